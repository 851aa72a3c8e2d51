//! A mount from its beginning to its end: the client's thread, fuser's session, the kernel's
//! settings, and the way out.

use crate::error::MountError;
use crate::invalidate::KernelCaches;
use crate::options::{MountConfig, MountOptions};
use crate::perform::Performer;
use crate::transport::{Job, Transport};
use cfs_client::Client;
use cfs_fabric::tcp::TcpFabric;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::mailbox::{Receiver, Sender, mailbox};
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use fuser::{MountOption, SessionACL};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Requests between fuser's threads and the executor.
const JOBS_MAX: usize = 1024;
/// Submission entries of the client's ring: it has three connections.
const RING_ENTRIES: u32 = 256;
/// How long the client's executor looks for work before it sleeps. A FUSE round trip takes
/// some 20 µs, so the next request of a busy program comes within this.
const SPIN: Duration = Duration::from_micros(20);

/// How long the kernel may take to end the session of a file system that is unmounted. It does
/// not while another mount namespace, copied from ours, still shows the mount.
const END_WAIT: Duration = Duration::from_secs(5);

/// What happens to a mount.
enum Ending {
    /// The mount point is free again.
    Unmounted,
    /// The kernel has ended the session.
    Ended(io::Result<()>),
}

/// A mounted file system. Dropping it unmounts.
pub struct MountHandle {
    endings: mpsc::Receiver<Ending>,
    client: Option<thread::JoinHandle<Result<(), MountError>>>,
    jobs: Sender<Job>,
    unmounter: Unmounter,
}

/// Unmounts from anywhere, for example when a signal arrives.
#[derive(Clone, Debug)]
pub struct Unmounter {
    mountpoint: PathBuf,
    /// The connection's number in /sys/fs/fuse/connections.
    connection: Option<u32>,
    endings: mpsc::Sender<Ending>,
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
    let (jobs, inbox) = mailbox(JOBS_MAX);
    let alive = Arc::new(AtomicBool::new(true));
    let (caches, waiting) = KernelCaches::new();
    let (ready, started) = mpsc::channel();
    let client = {
        let (config, life) = (config.clone(), Life(alive.clone()));
        let run = move || {
            let _life = life;
            run_client(config, inbox, caches, &ready)
        };
        thread::Builder::new().name("cfs-client".to_owned()).spawn(run).map_err(MountError::Thread)?
    };
    if started.recv().is_err() {
        return Err(client.join().unwrap_or(Err(MountError::ClientDied)).err().unwrap_or(MountError::ClientDied));
    }
    let session = fuser::Session::new(Transport::new(jobs.clone(), alive), &mountpoint, &session_config(&config))
        .map_err(|error| mount_error(&mountpoint, error))?;
    waiting.start(session.notifier())?;
    let connection = device_minor(&mountpoint);
    let (ending, endings) = mpsc::channel();
    watch_session(session.spawn().map_err(MountError::Thread)?, ending.clone())?;
    if let Some(minor) = connection {
        raise_read_ahead(minor, config.options.read_ahead_kib);
    }
    let unmounter = Unmounter { mountpoint, connection, endings: ending };
    Ok(MountHandle { endings, client: Some(client), jobs, unmounter })
}

/// Reports the session's end from a thread that waits for it.
fn watch_session(session: fuser::BackgroundSession, ending: mpsc::Sender<Ending>) -> Result<(), MountError> {
    let run = move || {
        let _ = ending.send(Ending::Ended(session.join()));
    };
    thread::Builder::new().name("cfs-session".to_owned()).spawn(run).map_err(MountError::Thread)?;
    Ok(())
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
            tracing::warn!("the kernel keeps the session of an unmounted file system: it is aborted");
            self.unmounter.abort();
        }
        let mut stop = Job::Stop;
        while let Err(back) = self.jobs.try_send(stop) {
            stop = back;
            if client.is_finished() {
                break;
            }
            thread::yield_now();
        }
        client.join().unwrap_or(Err(MountError::ClientDied))?;
        match ending {
            Some(Ending::Ended(Err(error))) => {
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
                return;
            }
            let _ = self.join();
        }
    }
}

impl Unmounter {
    /// Unmounts. Where files are still open the mount point is freed at once, and those files
    /// get errors.
    pub fn unmount(&self) -> Result<(), MountError> {
        self.free_mountpoint()?;
        let _ = self.endings.send(Ending::Unmounted);
        Ok(())
    }

    fn free_mountpoint(&self) -> Result<(), MountError> {
        match rustix::mount::unmount(&self.mountpoint, UnmountFlags::empty()) {
            Ok(()) => Ok(()),
            // Unmounted by someone else.
            Err(Errno::INVAL | Errno::NOENT) => Ok(()),
            Err(Errno::BUSY) => self.detach(),
            Err(Errno::PERM) => self.fusermount(),
            Err(error) => Err(self.failed(error.to_string())),
        }
    }

    fn detach(&self) -> Result<(), MountError> {
        tracing::warn!(mountpoint = %self.mountpoint.display(), "files are still open");
        if let Ok(root) = File::open(&self.mountpoint) {
            // Pages written through mmap come to us before the connection ends.
            let _ = rustix::fs::syncfs(&root);
        }
        rustix::mount::unmount(&self.mountpoint, UnmountFlags::DETACH)
            .map_err(|error| self.failed(error.to_string()))?;
        self.abort();
        Ok(())
    }

    /// Ends the connection: every request that is still open gets an error.
    fn abort(&self) {
        let Some(connection) = self.connection else { return };
        if let Err(error) = fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1") {
            tracing::debug!(%error, "the FUSE connection could not be aborted");
        }
    }

    fn fusermount(&self) -> Result<(), MountError> {
        let outcome = std::process::Command::new("fusermount3").arg("-u").arg("-z").arg(&self.mountpoint).output();
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

/// Tells fuser's threads when the client's thread ends, however it ends.
struct Life(Arc<AtomicBool>);

impl Drop for Life {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// The client's thread: one executor, one ring, one client, every request a task.
fn run_client(
    config: MountConfig,
    inbox: Receiver<Job>,
    caches: KernelCaches,
    ready: &mpsc::Sender<()>,
) -> Result<(), MountError> {
    let ring = Ring::new(RING_ENTRIES)?;
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let fabric = TcpFabric::new(ring.clone(), &handle);
    let main = {
        let (handle, ready) = (handle.clone(), ready.clone());
        async move {
            let client = Client::connect(&handle, fabric, &config.address, config.client).await?;
            client.set_invalidator(Rc::new(caches));
            let _ = ready.send(());
            drop(ready);
            serve(&handle, &client, inbox).await;
            client.shutdown().await.map_err(MountError::DataLost)
        }
    };
    let outcome = executor.run(&mut ring.driver(), SPIN, &handle, main);
    outcome.unwrap_or(Err(MountError::ClientDied))
}

async fn serve(handle: &Handle, client: &Rc<Client>, mut inbox: Receiver<Job>) {
    let performer = Rc::new(Performer::new(client.clone()));
    while let Some(Job::Request(request)) = inbox.recv().await {
        let (asked, respond) = *request;
        let performer = performer.clone();
        handle.spawn(async move { respond.send(performer.perform(asked).await) });
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

fn mount_error(path: &Path, error: io::Error) -> MountError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => MountError::NotPermitted { path: path.to_owned() },
        _ => MountError::Mount { path: path.to_owned(), error },
    }
}

fn session_config(config: &MountConfig) -> fuser::Config {
    let options: &MountOptions = &config.options;
    let root = rustix::process::geteuid().is_root();
    let source = options.source.clone().unwrap_or_else(|| format!("cfs#{}", config.address));
    let mut mount_options = vec![
        MountOption::FSName(source),
        MountOption::Subtype("cfs".to_owned()),
        MountOption::DefaultPermissions,
        if options.read_only { MountOption::RO } else { MountOption::RW },
    ];
    // Only root may ask for these two.
    if root {
        mount_options.push(if options.suid { MountOption::Suid } else { MountOption::NoSuid });
        mount_options.push(if options.dev { MountOption::Dev } else { MountOption::NoDev });
    }
    if !options.exec {
        mount_options.push(MountOption::NoExec);
    }
    if options.noatime {
        mount_options.push(MountOption::NoAtime);
    }
    let mut session = fuser::Config::default();
    session.mount_options = mount_options;
    session.acl = if options.allow_other.unwrap_or(root) { SessionACL::All } else { SessionACL::Owner };
    session.n_threads = Some(options.threads.max(1));
    session.clone_fd = true;
    session
}

/// The mount's anonymous device number, without a request to the mount itself: its session does
/// not answer yet.
fn device_minor(mountpoint: &Path) -> Option<u32> {
    let wanted = mountpoint.as_os_str().to_string_lossy().replace(' ', "\\040");
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    // Fields 3 and 5: device and mount point. The last mount on a point is the one seen.
    table.lines().rev().find_map(|line| {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?;
        let point = fields.nth(1)?;
        if point == wanted { device.split_once(':')?.1.parse().ok() } else { None }
    })
}

fn raise_read_ahead(minor: u32, kib: u32) {
    let path = format!("/sys/class/bdi/0:{minor}/read_ahead_kb");
    if let Err(error) = fs::write(&path, kib.to_string()) {
        tracing::info!(%error, path, "the kernel's read-ahead stays at its default");
    }
}
