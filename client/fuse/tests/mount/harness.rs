//! A server in this process, and mounts of it.

use crate::common::Server;
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Fabric, Message, Peer, Service};
use cfs_fuse::{MountConfig, MountError, MountHandle, spawn_mount};
use cfs_meta::service::ServiceConfig;
use cfs_reactor::Executor;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::mailbox::{Sender, mailbox};
use cfs_reactor::uring::Ring;
use cfs_wire::data::OP_FETCH;
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, pending};
use std::io::Write;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Ends the server when dropped.
pub struct Running {
    pub address: Address,
    pub fetches: Arc<Fetches>,
    _stop: Sender<()>,
}

/// Whether the server answers those who read.
#[derive(Default)]
pub struct Fetches {
    held: AtomicBool,
    waiting: AtomicUsize,
}

impl Fetches {
    /// From now on none is answered.
    pub fn hold(&self) {
        self.held.store(true, Ordering::Relaxed);
    }

    /// How many were made since.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// A server that may hold fetches.
struct Holding {
    server: Rc<dyn Service>,
    fetches: Arc<Fetches>,
}

impl Service for Holding {
    fn handle(&self, peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        if request.opcode == OP_FETCH && self.fetches.held.load(Ordering::Relaxed) {
            self.fetches.waiting.fetch_add(1, Ordering::Relaxed);
            return pending().boxed_local();
        }
        self.server.handle(peer, request)
    }
}

pub fn start_server() -> Running {
    start_server_with(ServiceConfig::default())
}

pub fn start_server_with(config: ServiceConfig) -> Running {
    let (stop, mut stopped) = mailbox(1);
    let (listening, address) = mpsc::channel();
    let fetches = Arc::<Fetches>::default();
    let held = fetches.clone();
    let run = move || {
        let ring = Ring::new(256).unwrap();
        let executor = Executor::new(Rc::new(KernelClock::new()));
        let handle = executor.domain();
        let fabric = TcpFabric::new(ring.clone(), &handle, None);
        let main = {
            let handle = handle.clone();
            async move {
                let server = Server::new(&handle, 1);
                *server.config.borrow_mut() = config;
                server.format().await;
                let service = Rc::new(Holding { server: server.endpoint(&handle), fetches: held });
                let listener = fabric.listen(&Address("127.0.0.1:0".to_owned()), service).unwrap();
                listening.send(listener.address()).unwrap();
                stopped.recv().await;
            }
        };
        executor.run(&mut ring.driver(), Duration::from_micros(20), &handle, main).unwrap();
    };
    std::thread::Builder::new().name("server".to_owned()).spawn(run).unwrap();
    Running { address: address.recv().unwrap(), fetches, _stop: stop }
}

pub struct Mounted {
    pub mount: Option<MountHandle>,
    pub directory: tempfile::TempDir,
    pub server: Running,
}

impl Mounted {
    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    pub fn unmount(mut self) {
        let mount = self.mount.take().unwrap();
        mount.unmounter().unmount().unwrap();
        mount.wait().unwrap();
    }
}

/// Says that what the caller tests can't be tested here; scripts/test repeats it at its end.
#[track_caller]
pub fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
    let Some(log) = std::env::var_os("CFS_SKIPPED_LOG") else { return };
    let mut log = std::fs::OpenOptions::new().create(true).append(true).open(log).expect("the log of scripts/test");
    // In one write, since tests run side by side.
    log.write_all(format!("{}: {why}\n", std::panic::Location::caller().file()).as_bytes()).unwrap();
}

#[track_caller]
pub fn mount() -> Option<Mounted> {
    mount_on(start_server())
}

#[track_caller]
pub fn mount_on(server: Running) -> Option<Mounted> {
    let directory = tempfile::tempdir().unwrap();
    match spawn_mount(MountConfig::new(directory.path(), server.address.clone())) {
        Ok(mount) => Some(Mounted { mount: Some(mount), directory, server }),
        Err(error @ (MountError::NoDevice | MountError::Device(_) | MountError::NotPermitted { .. })) => {
            skipped(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}
