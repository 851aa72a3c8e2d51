//! Hot blobs: a small write in m+1 copies, not registered anywhere but in the extent.

use super::write::Taker;
use super::{BlobTarget, SegmentStore};
use crate::StoreError;
use bytes::Bytes;
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobKind, Owner, ShardGeometry};
use cfs_wire::data::{DataError, Location, Piece, StoreCall};
use futures_util::future::join_all;
use std::rc::Rc;

impl SegmentStore {
    /// Whether another hot blob may be written; calls the packer if not. Those under way at the
    /// time come on top of the limit.
    pub(super) fn hot_has_room(&self) -> bool {
        let room = self.pool.writable().iter().all(|target| {
            let space = target.space();
            space.taken_by(BlobKind::Hot) < space.device() / 100 * self.config.hot_percent_max
                && space.index_bytes_of(BlobKind::Hot) < self.config.hot_index_bytes_max
        });
        if !room {
            self.call_packer();
        }
        room
    }

    /// Durable on m+1 distinct targets when answered.
    pub(super) async fn store_hot(&self, call: &StoreCall, bytes: Bytes) -> Result<Piece, DataError> {
        let blob = BlobId(self.handle.random_u128());
        let owner = Owner { high: call.volume.0.into(), low: call.ino.as_u64() };
        let copies = call.policy.copies();
        let length = bytes.len() as u32;
        let crowded = self.check_room(length.into(), copies, Taker::Client(&call.claim))?;
        let placed = place_copies(&self.pool, blob, BlobKind::Hot, owner, copies, bytes, crowded).await;
        let targets = placed.map_err(|failure| failure.into_data_error())?;
        Ok(Piece { length, location: Location::Hot { blob, targets: targets.into(), offset: 0 } })
    }
}

/// Why copies could not be placed.
pub(super) enum PlaceFailure {
    TooFew { up: usize, needed: usize },
    NoSpace,
    Other(StoreError),
}

impl PlaceFailure {
    fn into_data_error(self) -> DataError {
        match self {
            PlaceFailure::TooFew { up, needed } => DataError::TooFewTargets { up: up as u32, needed: needed as u32 },
            PlaceFailure::NoSpace => DataError::NoSpace,
            PlaceFailure::Other(error) => DataError::Unreadable(error.to_string()),
        }
    }
}

/// Puts one blob on `copies` distinct targets that are not `crowded`, trying others for those that
/// fail. On failure the copies already made are deleted.
pub(super) async fn place_copies(
    pool: &super::TargetPool,
    blob: BlobId,
    kind: BlobKind,
    owner: Owner,
    copies: usize,
    bytes: Bytes,
    crowded: Vec<cfs_wire::TargetId>,
) -> Result<Vec<cfs_wire::TargetId>, PlaceFailure> {
    let geometry = ShardGeometry { data: 1, parity: (copies - 1) as u8, index: 0 };
    let mut held: Vec<Rc<dyn BlobTarget>> = Vec::with_capacity(copies);
    let mut full = !crowded.is_empty();
    let mut tried = crowded;
    let mut refused = None;
    while held.len() < copies {
        let picked = pool.pick(copies - held.len(), &tried);
        if picked.len() < copies - held.len() {
            // Best effort: a copy that stays is an orphan, and the collector knows those.
            join_all(held.iter().map(|target| target.delete(vec![blob]))).await;
            let up = pool.writable().len();
            return Err(match refused {
                _ if full && up >= copies => PlaceFailure::NoSpace,
                Some(error) => PlaceFailure::Other(error),
                // Devices failed: they take no more writes, so the next attempt is without them.
                None => PlaceFailure::TooFew { up, needed: copies },
            });
        }
        let puts = picked.iter().map(|target| target.put(blob, kind, owner, geometry, bytes.clone()));
        let outcomes = join_all(puts).await;
        for (target, outcome) in picked.into_iter().zip(outcomes) {
            tried.push(target.id());
            match outcome {
                Ok(()) => held.push(target),
                Err(StoreError::NoSpace { .. }) => full = true,
                Err(error) if error.is_device_failure() => {
                    tracing::warn!(%blob, target = %target.id(), %error, "a copy was not written");
                }
                Err(error) => refused = Some(error),
            }
        }
    }
    Ok(held.iter().map(|target| target.id()).collect())
}
