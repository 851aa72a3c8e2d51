//! Mirrored blobs whose bytes are whatever they were made of.

use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobError, BlobInfo, BlobKind, MirroredBlobs, Owner, ShardGeometry};
use futures_util::future::LocalBoxFuture;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Blobs in memory; a change takes no time but lets others run.
pub struct Blobs {
    handle: Handle,
    stored: RefCell<BTreeMap<BlobId, (BlobInfo, Bytes)>>,
}

impl Blobs {
    pub fn new(handle: &Handle, stored: impl IntoIterator<Item = (BlobInfo, Bytes)>) -> Rc<Blobs> {
        let stored = stored.into_iter().map(|(info, bytes)| (info.id, (info, bytes))).collect();
        Rc::new(Blobs { handle: handle.clone(), stored: RefCell::new(stored) })
    }

    pub fn all(&self) -> Vec<(BlobInfo, Bytes)> {
        self.stored.borrow().values().cloned().collect()
    }
}

impl MirroredBlobs for Blobs {
    fn put(&self, kind: BlobKind, owner: Owner, payload: Bytes) -> LocalBoxFuture<'_, Result<BlobId, BlobError>> {
        Box::pin(async move {
            self.handle.yield_now().await;
            let id = BlobId(self.handle.random_u128());
            let info = BlobInfo { id, kind, owner, geometry: ShardGeometry::NONE, length: payload.len() as u32 };
            self.stored.borrow_mut().insert(id, (info, payload));
            Ok(id)
        })
    }

    fn get(&self, id: BlobId, offset: u32, length: u32) -> LocalBoxFuture<'_, Result<Bytes, BlobError>> {
        Box::pin(async move {
            self.handle.yield_now().await;
            let stored = self.stored.borrow();
            let (info, bytes) = stored.get(&id).ok_or(BlobError::NotFound(id))?;
            let size = info.length;
            match u64::from(offset) + u64::from(length) <= u64::from(size) {
                true => Ok(bytes.slice(offset as usize..(offset + length) as usize)),
                false => Err(BlobError::OutOfRange { id, offset, length, size }),
            }
        })
    }

    fn delete(&self, ids: Vec<BlobId>) -> LocalBoxFuture<'_, Result<(), BlobError>> {
        Box::pin(async move {
            self.handle.yield_now().await;
            self.stored.borrow_mut().retain(|id, _| !ids.contains(id));
            Ok(())
        })
    }

    fn list(&self, kind: BlobKind) -> LocalBoxFuture<'_, Result<Vec<BlobInfo>, BlobError>> {
        Box::pin(async move {
            let stored = self.stored.borrow();
            let mut infos: Vec<BlobInfo> =
                stored.values().map(|(info, _)| *info).filter(|info| info.kind == kind).collect();
            infos.sort_by_key(|info| (info.owner, info.id));
            Ok(infos)
        })
    }

    fn heal(&self, id: BlobId) -> LocalBoxFuture<'_, Result<(), BlobError>> {
        Box::pin(async move {
            let known = self.stored.borrow().contains_key(&id);
            if known { Ok(()) } else { Err(BlobError::NotFound(id)) }
        })
    }
}
