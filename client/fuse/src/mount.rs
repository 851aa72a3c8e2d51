//! A mount from its beginning to its end: the client's thread, the kernel's settings, and the way
//! out.

use crate::connection::{self, Session, mounted_on, mounts};
use crate::error::MountError;
use crate::invalidate::KernelCaches;
use crate::options::MountConfig;
use crate::page_drops::{PageDrops, PageThreads};
use crate::perform::Performer;
use crate::reader::Reader;
use cfs_client::Client;
use cfs_fabric::network::NetworkFabric;
use cfs_reactor::buffer::give_back;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::mailbox::{Receiver, Sender, mailbox};
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use futures_util::future::{Either, select};
use rustix::fs::AtFlags;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

/// Submission entries of the client's ring: it has three connections and the device.
const RING_ENTRIES: u32 = 256;
/// How long the client's executor looks for work before it sleeps. A FUSE round trip takes
/// some 20 µs, so the next request of a busy program comes within this.
const SPIN: Duration = Duration::from_micros(20);

/// How long the kernel may take to end the session of a file system that is unmounted. It does
/// not while another mount namespace, copied from ours, still shows the mount.
const END_WAIT: Duration = Duration::from_secs(5);

/// One unmounting and, each saying so, the session's end and that of the client's two parts.
const ENDINGS_MAX: usize = 4;

/// What the client's thread is told.
enum Order {
    Serve(Session, PageThreads),
    /// The session does not end by itself.
    Stop,
}

/// What happens to a mount.
enum Ending {
    /// The mount point is free again.
    Unmounted,
    /// The kernel has ended the session, or the client's thread is gone.
    Ended(io::Result<()>),
}

/// A mounted file system. Dropping it unmounts.
pub struct MountHandle {
    endings: mpsc::Receiver<Ending>,
    client: Option<thread::JoinHandle<Result<(), MountError>>>,
    unmounter: Unmounter,
}

/// Unmounts from anywhere, for example when a signal arrives.
#[derive(Clone)]
pub struct Unmounter {
    mountpoint: PathBuf,
    /// The mount's device number, nobody else's as long as the kernel has the session.
    minor: Option<u32>,
    orders: Sender<Order>,
    endings: mpsc::SyncSender<Ending>,
    /// The unmounting was told.
    told: Arc<AtomicBool>,
    /// The kernel was told to end the session at once, which whoever reads requests may see as an error.
    aborted: Arc<AtomicBool>,
    gone: Arc<AtomicBool>,
}

/// Mounts and stays until unmounted. `shutdown` gets the way to end it.
pub fn run_mount(config: MountConfig, shutdown: impl FnOnce(Unmounter)) -> Result<(), MountError> {
    let mount = spawn_mount(config)?;
    shutdown(mount.unmounter());
    mount.wait()
}

/// Mounts; returns once the file system can be used.
pub fn spawn_mount(config: MountConfig) -> Result<MountHandle, MountError> {
    check_device()?;
    let mountpoint = check_mountpoint(&config.mountpoint)?;
    let (orders, inbox) = mailbox(2);
    let (ending, endings) = mpsc::sync_channel(ENDINGS_MAX);
    let (ready, started) = mpsc::sync_channel(1);
    let gone = Arc::<AtomicBool>::default();
    let farewell = Farewell { endings: ending.clone(), gone: gone.clone() };
    let client = start_client(config.clone(), inbox, ready, farewell)?;
    if started.recv().is_err() {
        return Err(client.join().unwrap_or(Err(MountError::ClientDied)).err().unwrap_or(MountError::ClientDied));
    }
    match begin_session(&config, &mountpoint) {
        Ok((session, pages)) => {
            // A client that has just died leaves the session unserved: it is then closed at once.
            let _ = orders.try_send(Order::Serve(session, pages));
            let minor = mounted_on(&mountpoint).ok().flatten().map(|entry| entry.minor);
            if let Some(minor) = minor {
                raise_read_ahead(minor, config.options.read_ahead_kib);
            }
            let (told, aborted) = (Arc::default(), Arc::default());
            let unmounter = Unmounter { mountpoint, minor, orders, endings: ending, told, aborted, gone };
            Ok(MountHandle { endings, client: Some(client), unmounter })
        }
        Err(error) => {
            // Without orders the client ends.
            drop(orders);
            let _ = client.join();
            Err(error)
        }
    }
}

fn begin_session(config: &MountConfig, mountpoint: &Path) -> Result<(Session, PageThreads), MountError> {
    let source = config.options.source.clone().unwrap_or_else(|| config.address.0.clone());
    let session = connection::connect(mountpoint, &source, &config.options)?;
    let device = session.device.try_clone().map_err(MountError::Device)?;
    Ok((session, PageThreads::start(device)?))
}

impl MountHandle {
    pub fn unmounter(&self) -> Unmounter {
        self.unmounter.clone()
    }

    /// Waits until the file system is unmounted and everything written is committed.
    pub fn wait(mut self) -> Result<(), MountError> {
        self.join()
    }

    fn join(&mut self) -> Result<(), MountError> {
        let Some(client) = self.client.take() else { return Ok(()) };
        let mut ending = self.endings.recv().ok();
        if matches!(ending, Some(Ending::Unmounted)) {
            ending = self.endings.recv_timeout(END_WAIT).ok();
        }
        if !matches!(ending, Some(Ending::Ended(_))) {
            tracing::warn!("the kernel keeps the session of an unmounted file system: it is left");
            self.unmounter.leave();
        }
        let outcome = client.join().unwrap_or(Err(MountError::ClientDied));
        if matches!(outcome, Err(MountError::ClientDied)) {
            // What is mounted there answers nobody any more.
            let _ = self.unmounter.free_mountpoint();
        }
        outcome?;
        match ending {
            Some(Ending::Ended(Err(error))) if !self.unmounter.aborted.load(Ordering::Acquire) => {
                Err(MountError::Mount { path: self.unmounter.mountpoint.clone(), error })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for MountHandle {
    fn drop(&mut self) {
        if self.client.is_some() {
            if let Err(error) = self.unmounter.unmount() {
                tracing::error!(%error, "the mount stays behind");
            }
            let _ = self.join();
        }
    }
}

impl Unmounter {
    /// Unmounts. Where files are still open the mount point is freed at once, and those files
    /// get errors. So does everything in a mount that can't be taken away: what was written to it is
    /// committed all the same.
    pub fn unmount(&self) -> Result<(), MountError> {
        let freed = self.free_mountpoint();
        if freed.is_err() {
            self.leave();
        }
        if !self.told.swap(true, Ordering::Relaxed) {
            let _ = self.endings.try_send(Ending::Unmounted);
        }
        freed
    }

    fn free_mountpoint(&self) -> Result<(), MountError> {
        // What is mounted there otherwise is somebody else's.
        let Some(at) = self.whereabouts()? else { return Ok(()) };
        let freed = match rustix::mount::unmount(&at, UnmountFlags::empty()) {
            Ok(()) => Ok(()),
            // Unmounted by someone else.
            Err(Errno::INVAL | Errno::NOENT) => Ok(()),
            Err(Errno::BUSY) => self.detach(&at),
            Err(Errno::PERM) => self.fusermount(&at),
            Err(error) => Err(self.failed(error.to_string())),
        };
        if freed.is_err() {
            write_mapped_pages(&at);
        }
        freed
    }

    /// Where this mount is to be unmounted; it may have been moved. `None`: it is gone.
    fn whereabouts(&self) -> Result<Option<PathBuf>, MountError> {
        let (Some(minor), Ok(mounts)) = (self.minor, mounts()) else { return Ok(Some(self.mountpoint.clone())) };
        let ours = |at: &Path| mounts.iter().any(|entry| entry.minor == minor && entry.point == at);
        let seen = |at: &Path| mounts.iter().rev().find(|entry| entry.point == at).map(|entry| entry.minor);
        let at = match mounts.iter().rev().find(|entry| entry.minor == minor) {
            None => return Ok(None),
            Some(_) if ours(&self.mountpoint) => self.mountpoint.clone(),
            Some(elsewhere) => elsewhere.point.clone(),
        };
        if seen(&at) != Some(minor) {
            let detail = "another file system is mounted over it: unmount that first".to_owned();
            return Err(MountError::Unmount { path: at, detail });
        }
        // Ended by the kernel, it was unmounted, and its number may be another's now; or its
        // connection was aborted, and it is still there, dead.
        let gone = self.gone.load(Ordering::Acquire) && answers(&at);
        Ok((!gone).then_some(at))
    }

    fn detach(&self, at: &Path) -> Result<(), MountError> {
        tracing::warn!(mountpoint = %at.display(), "files are still open, or something is mounted inside");
        write_mapped_pages(at);
        // Forced, so that the kernel answers every request itself: one that we don't take any more
        // would keep its pages locked, a thread that drops them waiting, and so the device open.
        self.aborted.store(true, Ordering::Release);
        rustix::mount::unmount(at, UnmountFlags::FORCE | UnmountFlags::DETACH)
            .map_err(|error| self.failed(error.to_string()))?;
        self.leave();
        Ok(())
    }

    /// Has the device closed: every request that is still open, and every later one, gets an
    /// error.
    fn leave(&self) {
        // Full, it has been told before.
        let _ = self.orders.try_send(Order::Stop);
    }

    fn fusermount(&self, at: &Path) -> Result<(), MountError> {
        let outcome = std::process::Command::new("fusermount3").arg("-u").arg("-z").arg(at).output();
        match outcome {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(self.failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
            Err(error) => Err(self.failed(format!("fusermount3: {error}"))),
        }
    }

    fn failed(&self, detail: String) -> MountError {
        MountError::Unmount { path: self.mountpoint.clone(), detail }
    }
}

fn answers(mountpoint: &Path) -> bool {
    let mask = rustix::fs::StatxFlags::BASIC_STATS;
    let asked = rustix::fs::statx(rustix::fs::CWD, mountpoint, AtFlags::STATX_FORCE_SYNC, mask);
    !matches!(asked, Err(Errno::NOTCONN | Errno::CONNABORTED))
}

/// Pages written through mmap come to us before the connection ends.
fn write_mapped_pages(mountpoint: &Path) {
    if let Ok(root) = File::open(mountpoint) {
        let _ = rustix::fs::syncfs(&root);
    }
}

/// Tells of the session's end, at the latest with that of the client's thread.
#[derive(Clone)]
struct Farewell {
    endings: mpsc::SyncSender<Ending>,
    /// The kernel has ended the session: it was unmounted everywhere, or aborted.
    gone: Arc<AtomicBool>,
}

impl Farewell {
    fn ended(&self, outcome: io::Result<()>) {
        let _ = self.endings.try_send(Ending::Ended(outcome));
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        self.ended(Ok(()));
    }
}

#[allow(clippy::disallowed_methods, reason = "this is where the client's thread is made")]
fn start_client(
    config: MountConfig,
    inbox: Receiver<Order>,
    ready: mpsc::SyncSender<()>,
    farewell: Farewell,
) -> Result<thread::JoinHandle<Result<(), MountError>>, MountError> {
    let run = move || run_client(config, inbox, &ready, &farewell);
    thread::Builder::new().name("cfs-client".to_owned()).spawn(run).map_err(MountError::Thread)
}

/// The client's thread: one executor, one ring, one client, every request a task.
fn run_client(
    config: MountConfig,
    mut inbox: Receiver<Order>,
    ready: &mpsc::SyncSender<()>,
    farewell: &Farewell,
) -> Result<(), MountError> {
    let ring = Ring::new(RING_ENTRIES)?;
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let fabric = NetworkFabric::new(ring.clone(), &handle, config.identity.clone(), config.transport.clone());
    let main = {
        let (handle, ring, ready) = (handle.clone(), ring.clone(), ready.clone());
        let farewell = farewell.clone();
        async move {
            let client = Client::connect(&handle, fabric, &config.address, config.client).await?;
            let _ = ready.send(());
            drop(ready);
            let quiet = client.clone();
            handle.spawn(async move {
                loop {
                    quiet.has_become_quiet().await;
                    give_back();
                }
            });
            if let Some(Order::Serve(session, pages)) = inbox.recv().await {
                farewell.ended(serve(&handle, &ring, &client, session, pages, inbox, &farewell.gone).await);
                // With it go its descriptors of the device.
                client.forget_invalidator();
            }
            client.shutdown().await.map_err(MountError::DataLost)
        }
    };
    let outcome = executor.run(&mut ring.driver(), SPIN, &handle, main);
    outcome.unwrap_or(Err(MountError::ClientDied))
}

/// Serves the session until it ends or is to be left.
async fn serve(
    handle: &Handle,
    ring: &Rc<Ring>,
    client: &Rc<Client>,
    session: Session,
    pages: PageThreads,
    mut inbox: Receiver<Order>,
    gone: &AtomicBool,
) -> io::Result<()> {
    let Session { device, features } = session;
    let device = Rc::new(device);
    client.set_invalidator(Rc::new(KernelCaches::new(&device, features, PageDrops::new(handle, pages))));
    let reader = Reader::new(handle, ring, device, features, Performer::new(client.clone()));
    let (reading, stopped) = (reader.run(), inbox.recv());
    futures_util::pin_mut!(reading, stopped);
    match select(reading, stopped).await {
        Either::Left((outcome, _)) => {
            gone.store(outcome.is_ok(), Ordering::Release);
            outcome
        }
        Either::Right(_) => Ok(()),
    }
}

fn check_device() -> Result<(), MountError> {
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(MountError::NoDevice),
        Err(error) => Err(MountError::Device(error)),
    }
}

fn check_mountpoint(path: &Path) -> Result<PathBuf, MountError> {
    let refused = |detail: String| MountError::Mountpoint { path: path.to_owned(), detail };
    let found = fs::metadata(path).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT) => refused("there is no such directory: create it first".to_owned()),
        Some(libc::ENOTCONN) => refused(format!("a dead mount is in the way: run umount {}", path.display())),
        _ => refused(error.to_string()),
    })?;
    if !found.is_dir() {
        return Err(refused("it is not a directory".to_owned()));
    }
    path.canonicalize().map_err(|error| refused(error.to_string()))
}

fn raise_read_ahead(minor: u32, kib: u32) {
    let path = format!("/sys/class/bdi/0:{minor}/read_ahead_kb");
    if let Err(error) = fs::write(&path, kib.to_string()) {
        tracing::info!(%error, path, "the kernel's read-ahead stays at its default");
    }
}
