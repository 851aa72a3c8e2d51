//! A node on the real seams: io_uring devices, TCP, the kernel's clock. Its executor runs on a
//! thread of its own.

use crate::created::Created;
use crate::devices::{Devices, is_driven};
use anyhow::{Context, Result, anyhow, bail};
use cfs::format::{FormatSpec, format_cluster, format_replacement};
use cfs::node::{DeviceSlot, Node, NodeConfig, NodeSetup};
use cfs_api::progress::Progress;
use cfs_device::uring::OpenOptions;
use cfs_device::{BlockDevice, DeviceError};
use cfs_fabric::Address;
use cfs_fabric::identity::Identity;
use cfs_fabric::network::{NetworkFabric, Transport};
use cfs_meta::service::ServiceConfig;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::executor::{POLL_MAX, PollRecord, SPIN_DEFAULT};
use cfs_reactor::mailbox::{self, mailbox};
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use cfs_store::segment::Backend;
use cfs_store::{DEVICE_BYTES_MIN, inspect};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::{ClusterId, TargetId};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::FileType;
use std::future::Future;
use std::ops::RangeInclusive;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// Operations in the kernel at once: devices and sockets together.
const RING_ENTRIES: u32 = 1024;

/// What `cfs server` was told.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub listen: String,
    pub targets: Vec<PathBuf>,
    pub spin_us: Option<u64>,
    pub session_lease_ms: Option<u32>,
    pub read_lease_ms: Option<u32>,
    pub repair_mib_s: Option<u32>,
    pub identity: Option<Arc<Identity>>,
    pub codec: Option<String>,
    pub fabric: Option<String>,
    /// The name of a client that is certainly dead: what it held is given away at once.
    pub dead_client: Option<String>,
}

/// Session leases that can be kept, in milliseconds. A client shows up four times per lease: over
/// shorter ones a busy machine would fence everybody, and after longer ones nobody waits any more
/// for what a dead client held.
const SESSION_LEASE_MS: RangeInclusive<u32> = 1000..=600_000;

impl Settings {
    /// Refuses values that a server can't run with; names key, value and range.
    fn check(&self) -> Result<()> {
        if let Some(lease) = self.session_lease_ms.filter(|lease| !SESSION_LEASE_MS.contains(lease)) {
            bail!(
                "session_lease_ms = {lease} is out of range; give {} to {}",
                SESSION_LEASE_MS.start(),
                SESSION_LEASE_MS.end()
            );
        }
        let session_ms = self.session_lease_ms.map_or(ServiceConfig::default().session_lease.as_millis(), u128::from);
        if let Some(lease) = self.read_lease_ms.filter(|lease| u128::from(*lease) > session_ms) {
            bail!("read_lease_ms = {lease} is out of range; give 0 to {session_ms}, the session's lease");
        }
        if self.repair_mib_s == Some(0) {
            bail!("repair_mib_s = 0 is out of range; give 1 or more");
        }
        self.transport()?;
        self.backend().map(|_| ())
    }

    /// What carries messages.
    fn transport(&self) -> Result<Transport> {
        Ok(self.fabric.as_deref().map(str::parse).transpose()?.unwrap_or_default())
    }

    /// What codes segments.
    fn backend(&self) -> Result<Backend> {
        let codec = self.codec.as_deref().unwrap_or("auto");
        let backend = match codec {
            "auto" => Backend::fastest(),
            "isal" => Backend::IsaL,
            "portable" => Backend::Scalar,
            _ => bail!("codec = {codec} is not known; give auto, isal or portable"),
        };
        if !backend.is_available() {
            bail!(
                "codec = {codec} is not in this build; install libisal-dev (2.30 or newer) and build with \
                 `cargo build --release --features cfs/isal`, or leave it out"
            );
        }
        Ok(backend)
    }
}

/// A server that runs on its own thread.
pub struct Server {
    address: String,
    stop: mailbox::Sender<()>,
    thread: JoinHandle<Result<()>>,
}

impl Server {
    /// Starts the thread and waits until the node serves.
    #[allow(clippy::disallowed_methods, reason = "this is where the reactor's thread is made")]
    pub fn start(settings: Settings) -> Result<Server> {
        if settings.targets.is_empty() {
            bail!("no targets: name them with --target or in the configuration file, after `cfs format`");
        }
        settings.check()?;
        check_given_once(&settings.targets)?;
        let (stop, stopped) = mailbox(1);
        let (ready, started) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("cfs-reactor".into())
            .spawn(move || run(settings, ready, stopped))
            .context("cannot start a thread")?;
        let progress = Progress::of("starting: reading the targets and replaying the log");
        let address = started.recv();
        drop(progress);
        match address {
            Ok(address) => Ok(Server { address, stop, thread }),
            Err(_) => match thread.join() {
                Ok(Err(error)) => Err(error),
                Ok(Ok(())) => Err(anyhow!("the server ended at once")),
                Err(_) => Err(anyhow!("the server's thread panicked; its message is above")),
            },
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Ends in order and waits for it.
    pub fn stop(self) -> Result<()> {
        let _progress = Progress::of("stopping: making what is applied durable");
        // A full mailbox means that it was told already.
        let _ = self.stop.try_send(());
        match self.thread.join() {
            Ok(outcome) => outcome,
            Err(_) => Err(anyhow!("the server's thread panicked; its message is above")),
        }
    }
}

fn run(settings: Settings, ready: mpsc::Sender<String>, mut stopped: mailbox::Receiver<()>) -> Result<()> {
    let spin = settings.spin_us.map_or(SPIN_DEFAULT, Duration::from_micros);
    on_reactor(spin, move |handle, devices| async move {
        let mut config = NodeConfig::default();
        if let Some(lease) = settings.session_lease_ms {
            config.meta.session_lease = Duration::from_millis(lease.into());
        }
        if let Some(lease) = settings.read_lease_ms {
            config.meta.read_lease = Duration::from_millis(lease.into());
        }
        if let Some(rate) = settings.repair_mib_s {
            config.rebuild.bytes_per_second = u64::from(rate) << 20;
        }
        config.segments.backend = settings.backend()?;
        let mut slots = Vec::new();
        for path in &settings.targets {
            slots.push(slot(path, &devices).await?);
        }
        let (identity, transport) = (settings.identity.clone(), settings.transport()?);
        let fabric = NetworkFabric::new(devices.ring.clone(), &handle, identity, transport);
        let listen = Address(settings.listen.clone());
        let setup = NodeSetup { handle: handle.clone(), fabric, listen, devices: slots, config, attach: None };
        let node = Node::start(setup).await?;
        if let Some(client) = &settings.dead_client
            && let Err(error) = node.meta().fence_client(client).await
        {
            tracing::warn!(client, %error, "what a dead client held is given away only when its lease is over");
        }
        // Nobody waits for the address only if the process is ending anyway.
        let _ = ready.send(node.address().0);
        stopped.recv().await;
        node.shutdown().await;
        Ok(())
    })
}

/// What can't be opened counts as lost, which redundancy may bridge.
///
/// # Errors
/// It is in use, or may not be written to: it is not lost, and a start without it would make it lag
/// behind.
async fn slot(path: &Path, devices: &Devices) -> Result<DeviceSlot, DeviceError> {
    let device = match devices.open(path, OpenOptions::default()).await {
        Ok(device) => Ok(device),
        Err(error @ (DeviceError::InUse(_) | DeviceError::NotPermitted(_))) => return Err(error),
        Err(error) => Err(error.to_string()),
    };
    Ok(DeviceSlot { label: path.display().to_string(), device })
}

/// Runs `main` on a fresh executor with its own ring, on this thread.
pub fn on_reactor<T, F>(spin: Duration, main: impl FnOnce(Handle, Rc<Devices>) -> F) -> Result<T>
where
    T: 'static,
    F: Future<Output = Result<T>> + 'static,
{
    let ring = Ring::new(RING_ENTRIES).context("io_uring is not usable here")?;
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let mut driver = ring.driver();
    // What looks after devices outlives what uses them.
    let beneath = executor.domain();
    let devices = Devices::new(&ring, &beneath);
    let main = main(handle.clone(), devices.clone());
    if tracing::enabled!(tracing::Level::DEBUG) {
        executor.record_polls();
    }
    let outcome = executor.run(&mut driver, spin, &handle, main).context("the reactor was stopped");
    handle.kill();
    let closed = executor.run(&mut driver, spin, &beneath, async move { devices.close().await });
    if let Err(error) = closed {
        tracing::warn!(%error, "devices were not closed in order");
    }
    if let Some(PollRecord { polls, longest, too_long }) = executor.poll_record() {
        tracing::debug!(
            polls,
            ?longest,
            too_long,
            "the reactor's polls of tasks; too long are those over {POLL_MAX:?}"
        );
    }
    outcome?
}

/// Formats files (created with `size` bytes if missing) or devices as a new cluster. The files
/// that it created are gone again if it fails.
pub fn format_files(paths: &[PathBuf], size: Option<u64>, spec: FormatSpec) -> Result<ClusterId> {
    check_given_once(paths)?;
    if let Some(size) = size.filter(|size| *size < DEVICE_BYTES_MIN) {
        bail!("{size} bytes for each target are too few; give a size of {DEVICE_BYTES_MIN} or more for each");
    }
    let paths = paths.to_vec();
    let _progress = Progress::of(format!("formatting {} targets", paths.len()));
    on_reactor(Duration::ZERO, move |handle, devices| async move {
        let mut created = Created::default();
        let outcome = match open_or_create(&paths, size, &devices, &mut created).await {
            Ok(opened) => format_cluster(&handle, &opened, &spec).await.map_err(anyhow::Error::from),
            Err(error) => Err(error),
        };
        created.kept_by(outcome)
    })
}

async fn open_or_create(
    paths: &[PathBuf],
    size: Option<u64>,
    devices: &Devices,
    created: &mut Created,
) -> Result<Vec<Rc<dyn BlockDevice>>> {
    let mut opened: Vec<Rc<dyn BlockDevice>> = Vec::new();
    for path in paths {
        if is_driven(path) {
            opened.push(devices.open(path, OpenOptions::default()).await?);
            continue;
        }
        check_not_dangling(path)?;
        // One that is empty was left by a format that was cut short.
        let is_empty = std::fs::metadata(path).map(|found| found.is_file() && found.len() == 0).ok();
        let create_size = if is_empty == Some(false) { None } else { size };
        match (is_empty, create_size) {
            (None, Some(_)) => created.create(path)?,
            (None, None) => bail!("{} does not exist; give --size to create it", path.display()),
            (Some(true), None) => bail!("{} is empty; give --size to make a target of it", path.display()),
            (Some(_), _) => {}
        }
        let options = OpenOptions { read_only: false, create_size };
        opened.push(devices.open(path, options).await?);
    }
    Ok(opened)
}

/// A link that leads nowhere is neither there nor can be made: creating it says only that it exists.
fn check_not_dangling(path: &Path) -> Result<()> {
    if path.is_symlink() && !path.exists() {
        bail!(
            "{} is a symbolic link to something that does not exist; give a path that is free, or make what it points to",
            path.display()
        );
    }
    Ok(())
}

/// What the cluster on these targets was made with, by the first that can be read; `None`: none can.
pub fn parameters_of(paths: &[PathBuf]) -> Result<Option<ClusterParameters>> {
    let paths = paths.to_vec();
    on_reactor(Duration::ZERO, move |_, devices| async move {
        for path in &paths {
            let options = OpenOptions { read_only: true, create_size: None };
            let Ok(device) = devices.open(path, options).await else { continue };
            if let Ok((superblock, _)) = inspect(&*device).await {
                return Ok(Some(superblock.parameters));
            }
        }
        Ok(None)
    })
}

/// Makes an empty target of `path`, a file to create or a device, in the place of target
/// `id`. `survivors` are where the others should be; nobody may be using them.
pub fn replace_target(path: PathBuf, survivors: Vec<PathBuf>, id: TargetId, force: bool) -> Result<()> {
    check_given_once(&survivors)?;
    let _progress = Progress::of(format!("formatting {} in the place of target {id}", path.display()));
    on_reactor(Duration::ZERO, move |handle, devices| async move {
        check_not_dangling(&path)?;
        let is_file = match is_driven(&path) {
            true => Some(false),
            false => std::fs::metadata(&path).map(|found| !is_device(found.file_type())).ok(),
        };
        if is_file == Some(true) {
            bail!("{} exists; move it away first: replacing erases what it holds", path.display());
        }
        let mut others: Vec<(String, Rc<dyn BlockDevice>)> = Vec::new();
        for survivor in survivors.iter().filter(|survivor| survivor.exists() || is_driven(survivor)) {
            let device = match devices.open(survivor, OpenOptions::default()).await {
                Ok(device) => device,
                // Another one that is lost.
                Err(DeviceError::Open(_) | DeviceError::Gone { .. }) if is_driven(survivor) => continue,
                Err(error) => return Err(error.into()),
            };
            others.push((survivor.display().to_string(), device));
        }
        let Some((_, other)) = others.first() else { bail!("no other target of the cluster is there") };
        let create_size = is_file.is_none().then_some(other.geometry().size);
        let mut created = Created::default();
        if create_size.is_some() {
            created.create(&path)?;
        }
        let options = OpenOptions { read_only: false, create_size };
        let outcome = match devices.open(&path, options).await {
            Ok(fresh) => format_replacement(&handle, &*fresh, &others, id, force).await.map_err(anyhow::Error::from),
            Err(error) => Err(error.into()),
        };
        created.kept_by(outcome)
    })
}

/// Whether what it names is known by its number, not by the directory entry.
fn is_device(kind: FileType) -> bool {
    kind.is_block_device() || kind.is_char_device()
}

/// The same device twice would be found in use by ourselves.
fn check_given_once(targets: &[PathBuf]) -> Result<()> {
    let mut seen: BTreeMap<(Option<bool>, u64, u64), &Path> = BTreeMap::new();
    let mut unseen: BTreeSet<&Path> = BTreeSet::new();
    for path in targets {
        // What can't be looked at is made, or refused with the reason, when it is opened.
        let Ok(found) = std::fs::metadata(path) else {
            if !unseen.insert(path) {
                bail!("{} is given twice: give it once", path.display());
            }
            continue;
        };
        let key = match is_device(found.file_type()) {
            true => (Some(found.file_type().is_block_device()), found.rdev(), 0),
            false => (None, found.dev(), found.ino()),
        };
        if let Some(other) = seen.insert(key, path) {
            bail!("{} and {} are the same target: give it once", other.display(), path.display());
        }
    }
    Ok(())
}
