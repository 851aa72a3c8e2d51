//! Drops the kernel's copies. Names and attributes go at once, pages when no request reads or
//! writes them any more.

use crate::abi::Features;
use crate::notify::{self, report};
use crate::page_drops::PageDrops;
use cfs_client::Invalidator;
use cfs_wire::Ino;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// What the kernel keeps of one mount.
pub(crate) struct KernelCaches {
    device: Rc<OwnedFd>,
    features: Features,
    pages: PageDrops,
}

impl KernelCaches {
    pub fn new(device: &Rc<OwnedFd>, features: Features, pages: PageDrops) -> KernelCaches {
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
        self.pages.drop_pages(ino).boxed_local()
    }
}
