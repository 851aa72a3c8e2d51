//! The node's own state in m+1 copies: the Raft log and the ordered store.

use super::copies::{self, NotRestored};
use super::hot::{PlaceFailure, place_copies};
use super::{BlobTarget, Damaged, TargetPool};
use crate::StoreError;
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobError, BlobInfo, BlobKind, MirroredBlobs, Owner};
use cfs_wire::planted::{self, Bug};
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, join_all};
use std::collections::BTreeMap;
use std::rc::Rc;

/// [`MirroredBlobs`] over the node's targets.
pub struct Mirror {
    handle: Handle,
    pool: Rc<TargetPool>,
    copies: usize,
}

impl Mirror {
    /// `copies` is m+1, m being the largest any policy of the cluster promises.
    pub fn new(handle: &Handle, pool: Rc<TargetPool>, copies: usize) -> Rc<Mirror> {
        Rc::new(Mirror { handle: handle.clone(), pool, copies })
    }

    fn holders(&self, id: BlobId) -> Vec<Rc<dyn BlobTarget>> {
        self.pool.readable().into_iter().filter(|target| target.stat(id).is_some()).collect()
    }

    async fn read(&self, id: BlobId, offset: u32, length: u32) -> Result<Bytes, BlobError> {
        let holders = self.holders(id);
        if holders.is_empty() {
            return Err(BlobError::NotFound(id));
        }
        let mut detail = String::new();
        for target in holders {
            match target.get(id, offset, length).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    tracing::warn!(blob = %id, target = %target.id(), %error, "a mirrored copy is unreadable");
                    if target.failure().is_none() {
                        self.pool.note_damage(Damaged::Copies(id));
                    }
                    detail = format!("{}: {error}", target.id());
                }
            }
        }
        Err(BlobError::Unreadable { id, detail })
    }

    async fn restore_copies(&self, id: BlobId) -> Result<(), BlobError> {
        let Some(info) = self.holders(id).first().and_then(|target| target.stat(id)) else {
            return Err(BlobError::NotFound(id));
        };
        match copies::restore(&self.pool, &info, self.copies, true).await {
            Ok(_) => Ok(()),
            Err(NotRestored::Unreadable(detail)) => Err(BlobError::Unreadable { id, detail }),
            Err(NotRestored::NoTarget) => {
                Err(BlobError::TooFewTargets { up: self.pool.writable().len(), needed: self.copies })
            }
        }
    }
}

impl MirroredBlobs for Mirror {
    fn put(&self, kind: BlobKind, owner: Owner, payload: Bytes) -> LocalBoxFuture<'_, Result<BlobId, BlobError>> {
        async move {
            let id = BlobId(self.handle.random_u128());
            let needed = payload.len() as u64;
            let copies = if planted::is(Bug::LogSingleCopy) { 1 } else { self.copies };
            match place_copies(&self.pool, id, kind, owner, copies, payload, Vec::new()).await {
                Ok(_) => Ok(id),
                Err(PlaceFailure::TooFew { up, needed }) => Err(BlobError::TooFewTargets { up, needed }),
                Err(PlaceFailure::NoSpace) => Err(BlobError::NoSpace { kind, needed }),
                Err(PlaceFailure::Other(error)) => Err(BlobError::Unreadable { id, detail: error.to_string() }),
            }
        }
        .boxed_local()
    }

    fn get(&self, id: BlobId, offset: u32, length: u32) -> LocalBoxFuture<'_, Result<Bytes, BlobError>> {
        self.read(id, offset, length).boxed_local()
    }

    fn delete(&self, ids: Vec<BlobId>) -> LocalBoxFuture<'_, Result<(), BlobError>> {
        async move {
            let mut deletions = Vec::new();
            // A failed one takes no tombstone, but forgets what is deleted: nobody brings it back.
            for target in self.pool.readable() {
                let held: Vec<BlobId> = ids.iter().copied().filter(|id| target.stat(*id).is_some()).collect();
                let failed = target.failure().is_some();
                if !held.is_empty() {
                    deletions.push(async move { (target.id(), failed, target.delete(held).await) });
                }
            }
            let mut refused = None;
            for (target, failed, outcome) in join_all(deletions).await {
                match outcome {
                    Ok(()) => {}
                    Err(_) if failed => {}
                    Err(StoreError::NoSpace { kind, needed }) => refused = Some(BlobError::NoSpace { kind, needed }),
                    // It is fenced now; what it still holds is old state that no newer manifest or
                    // log batch names.
                    Err(error) => tracing::warn!(%target, %error, "a mirrored blob could not be deleted everywhere"),
                }
            }
            refused.map_or(Ok(()), Err)
        }
        .boxed_local()
    }

    fn list(&self, kind: BlobKind) -> LocalBoxFuture<'_, Result<Vec<BlobInfo>, BlobError>> {
        async move {
            let mut found: BTreeMap<(Owner, BlobId), BlobInfo> = BTreeMap::new();
            for target in self.pool.readable() {
                found.extend(target.list(kind).into_iter().map(|info| ((info.owner, info.id), info)));
            }
            Ok(found.into_values().collect())
        }
        .boxed_local()
    }

    fn heal(&self, id: BlobId) -> LocalBoxFuture<'_, Result<(), BlobError>> {
        self.restore_copies(id).boxed_local()
    }
}
