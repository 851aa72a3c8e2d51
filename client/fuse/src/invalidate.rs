//! Drops the kernel's copies. Names go at once. Pages go from a thread of their own: the kernel
//! waits for the requests that read or write them, so the executor may not ask for that.

use crate::abi::Features;
use crate::error::MountError;
use crate::notify;
use cfs_client::Invalidator;
use cfs_reactor::mailbox::{Sender, mailbox};
use cfs_wire::Ino;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;

struct Order {
    ino: Ino,
    done: Sender<()>,
}

/// The thread that drops attributes and pages. It ends with this.
pub(crate) struct PageThread {
    orders: mpsc::Sender<Order>,
}

impl PageThread {
    pub fn start(device: OwnedFd) -> Result<PageThread, MountError> {
        // Bounded by the events a server has under way for one client.
        let (orders, waiting) = mpsc::channel::<Order>();
        let run = move || {
            for order in waiting {
                report(order.ino, notify::inval_inode(&device, order.ino));
                let _ = order.done.try_send(());
            }
        };
        thread::Builder::new().name("cfs-invalidate".to_owned()).spawn(run).map_err(MountError::Thread)?;
        Ok(PageThread { orders })
    }
}

/// What the kernel keeps of one mount.
pub(crate) struct KernelCaches {
    device: Rc<OwnedFd>,
    features: Features,
    pages: PageThread,
}

impl KernelCaches {
    pub fn new(device: &Rc<OwnedFd>, features: Features, pages: PageThread) -> KernelCaches {
        KernelCaches { device: device.clone(), features, pages }
    }
}

impl Invalidator for KernelCaches {
    /// FUSE_NOTIFY_INVAL_ENTRY is of no use: it takes the directory's lock, which the kernel holds
    /// for every change of the directory that it has asked us for.
    fn keeps_names(&self) -> bool {
        self.features.epoch
    }

    fn drop_names(&self) {
        report(Ino::ROOT, notify::inc_epoch(&self.device));
    }

    fn drop_attributes(&self, ino: Ino) {
        report(ino, notify::inval_attributes(&self.device, ino));
    }

    fn invalidate(&self, ino: Ino) -> LocalBoxFuture<'static, ()> {
        let (done, mut finished) = mailbox(1);
        let sent = self.pages.orders.send(Order { ino, done }).is_ok();
        async move {
            if sent {
                // `None`: the thread is gone, and the mount with it.
                let _ = finished.recv().await;
            }
        }
        .boxed_local()
    }
}

fn report(ino: Ino, outcome: Result<(), Errno>) {
    if let Err(errno) = outcome {
        // Once the mount is gone there is nothing left to drop.
        tracing::debug!(%errno, %ino, "the kernel refused an invalidation");
    }
}
