//! A server in this process, and mounts of it.

use crate::common::Server;
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Fabric};
use cfs_fuse::{MountConfig, MountError, MountHandle, spawn_mount};
use cfs_meta::service::ServiceConfig;
use cfs_reactor::Executor;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::mailbox::{Sender, mailbox};
use cfs_reactor::uring::Ring;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

/// Ends the server when dropped.
pub struct Running {
    pub address: Address,
    _stop: Sender<()>,
}

pub fn start_server() -> Running {
    start_server_with(ServiceConfig::default())
}

pub fn start_server_with(config: ServiceConfig) -> Running {
    let (stop, mut stopped) = mailbox(1);
    let (listening, address) = mpsc::channel();
    let run = move || {
        let ring = Ring::new(256).unwrap();
        let executor = Executor::new(Rc::new(KernelClock::new()));
        let handle = executor.domain();
        let fabric = TcpFabric::new(ring.clone(), &handle);
        let main = {
            let handle = handle.clone();
            async move {
                let server = Server::new(&handle, 1);
                *server.config.borrow_mut() = config;
                server.format().await;
                let service = server.endpoint(&handle);
                let listener = fabric.listen(&Address("127.0.0.1:0".to_owned()), service).unwrap();
                listening.send(listener.address()).unwrap();
                stopped.recv().await;
            }
        };
        executor.run(&mut ring.driver(), Duration::from_micros(20), &handle, main).unwrap();
    };
    std::thread::Builder::new().name("server".to_owned()).spawn(run).unwrap();
    Running { address: address.recv().unwrap(), _stop: stop }
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

pub fn mount() -> Option<Mounted> {
    mount_on(start_server())
}

pub fn mount_on(server: Running) -> Option<Mounted> {
    let directory = tempfile::tempdir().unwrap();
    match spawn_mount(MountConfig::new(directory.path(), server.address.clone())) {
        Ok(mount) => Some(Mounted { mount: Some(mount), directory, server }),
        Err(error @ (MountError::NoDevice | MountError::Device(_) | MountError::NotPermitted { .. })) => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
