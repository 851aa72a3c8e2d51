//! One connection to a server, driven on this thread.

use anyhow::{Context, Result, anyhow};
use cfs_api::{AdminCall, AdminReply, client};
use cfs_fabric::identity::Identity;
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Fabric, FabricError};
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, clock::KernelClock};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Requests at once: one, and its connection's own.
const RING_ENTRIES: u32 = 32;

pub struct Server {
    address: Address,
    identity: Option<Arc<Identity>>,
}

impl Server {
    /// With the directory of an identity, which is to prove to the server who asks.
    pub fn new(address: &str, identity: Option<&Path>) -> Result<Server> {
        let identity = identity.map(Identity::load).transpose()?.map(Arc::new);
        Ok(Server { address: Address(address.to_owned()), identity })
    }

    pub fn call(&self, call: AdminCall) -> Result<AdminReply> {
        let (address, identity) = (self.address.clone(), self.identity.clone());
        drive(move |handle, ring| async move {
            let fabric = TcpFabric::new(ring, &handle, identity);
            let connection = fabric.connect(&address).await.map_err(|error| match error {
                FabricError::Connect { .. } => anyhow!("{error} Start one with `cfs dev` or `cfs server`"),
                other => other.into(),
            })?;
            Ok(client::call(&*connection, &call).await?)
        })
    }
}

/// Sleeps between polls of a check.
#[allow(clippy::disallowed_methods, reason = "a command line waits; nothing here is simulated")]
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

fn drive<T, F>(main: impl FnOnce(cfs_reactor::Handle, Rc<Ring>) -> F) -> Result<T>
where
    T: 'static,
    F: Future<Output = Result<T>> + 'static,
{
    let ring = Ring::new(RING_ENTRIES).context("io_uring is not usable here")?;
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let mut driver = ring.driver();
    let main = main(handle.clone(), ring);
    executor.run(&mut driver, Duration::ZERO, &handle, main).context("the call was cancelled")?
}
