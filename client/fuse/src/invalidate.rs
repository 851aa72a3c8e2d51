//! Drops the kernel's copies, from a thread of its own: the kernel may wait for a request to be
//! answered before it takes an invalidation, so the executor may not ask for one.

use crate::error::MountError;
use crate::notify::Notifier;
use cfs_client::Invalidator;
use cfs_reactor::mailbox::{Sender, mailbox};
use cfs_wire::Ino;
use cfs_wire::meta::Name;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::sync::mpsc;
use std::thread;

struct Order {
    ino: Ino,
    names: Vec<Name>,
    done: Sender<()>,
}

/// The executor's end.
pub(crate) struct KernelCaches {
    orders: mpsc::Sender<Order>,
}

/// The thread's end, waiting for the mount's notifier.
pub(crate) struct Waiting(mpsc::Receiver<Order>);

impl KernelCaches {
    pub fn new() -> (KernelCaches, Waiting) {
        // Bounded by the events a server has under way for one client.
        let (orders, waiting) = mpsc::channel();
        (KernelCaches { orders }, Waiting(waiting))
    }
}

impl Waiting {
    /// Starts the thread; it ends with the executor's end.
    pub fn start(self, notifier: Notifier) -> Result<(), MountError> {
        let run = move || {
            for order in self.0 {
                carry_out(&notifier, &order);
                let _ = order.done.try_send(());
            }
        };
        thread::Builder::new().name("cfs-invalidate".to_owned()).spawn(run).map_err(MountError::Thread)?;
        Ok(())
    }
}

fn carry_out(notifier: &Notifier, order: &Order) {
    let inode = notifier.inval_inode(order.ino);
    let entries = order.names.iter().map(|name| notifier.inval_entry(order.ino, name));
    for error in std::iter::once(inode).chain(entries).filter_map(Result::err) {
        // Once the mount is gone there is nothing left to drop.
        tracing::debug!(%error, ino = %order.ino, "the kernel refused an invalidation");
    }
}

impl Invalidator for KernelCaches {
    fn invalidate(&self, ino: Ino, names: Vec<Name>) -> LocalBoxFuture<'static, ()> {
        let (done, mut finished) = mailbox(1);
        let sent = self.orders.send(Order { ino, names, done }).is_ok();
        async move {
            if sent {
                // `None`: the thread is gone, and the mount with it.
                let _ = finished.recv().await;
            }
        }
        .boxed_local()
    }
}
