//! Blobs no longer named by the durable manifest, deleted in the background.

use cfs_reactor::Handle;
use cfs_reactor::sync::Notify;
use cfs_wire::BlobId;
use cfs_wire::blobs::MirroredBlobs;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

pub struct Trash {
    blobs: Rc<dyn MirroredBlobs>,
    handle: Handle,
    ids: RefCell<Vec<BlobId>>,
    running: Cell<bool>,
    closed: Cell<bool>,
    idle: Rc<Notify>,
}

impl Trash {
    pub fn new(blobs: Rc<dyn MirroredBlobs>, handle: Handle) -> Rc<Trash> {
        let (ids, running, closed) = (RefCell::default(), Cell::new(false), Cell::new(false));
        Rc::new(Trash { blobs, handle, ids, running, closed, idle: Notify::new() })
    }

    /// Deletes soon. After `close` nothing is deleted: what is left over is found at the next open.
    pub fn add(self: &Rc<Self>, ids: impl IntoIterator<Item = BlobId>) {
        if self.closed.get() {
            return;
        }
        self.ids.borrow_mut().extend(ids);
        if self.ids.borrow().is_empty() || self.running.replace(true) {
            return;
        }
        let trash = self.clone();
        self.handle.spawn(async move {
            trash.empty().await;
            trash.running.set(false);
            trash.idle.notify_all();
        });
    }

    async fn empty(&self) {
        while !self.closed.get() {
            let ids = std::mem::take(&mut *self.ids.borrow_mut());
            if ids.is_empty() {
                return;
            }
            if let Err(error) = self.blobs.delete(ids.clone()).await {
                // Kept for the next time something is thrown away; at the latest, for the next open.
                tracing::warn!(%error, count = ids.len(), "deleting superseded blobs of the ordered store");
                self.ids.borrow_mut().extend(ids);
                return;
            }
        }
    }

    /// Waits until no deletion is under way.
    pub async fn settle(&self) {
        loop {
            let idle = self.idle.notified();
            if !self.running.get() {
                return;
            }
            idle.await;
        }
    }

    pub fn close(&self) {
        self.closed.set(true);
    }
}
