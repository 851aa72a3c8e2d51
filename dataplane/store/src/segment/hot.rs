//! Hot blobs: a small write in m+1 copies, not registered anywhere but in the extent.

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
            self.hot_limit_met.set(true);
            self.hot_limit.notify_all();
        }
        room
    }

    /// Waits until a writer has met the limit of hot blobs since the last answer: the packer is
    /// behind.
    pub async fn hot_limit_met(&self) {
        while !self.hot_limit_met.take() {
            self.hot_limit.notified().await;
        }
    }

    /// Durable on m+1 distinct targets when answered.
    pub(super) async fn store_hot(&self, call: &StoreCall, bytes: Bytes) -> Result<Piece, DataError> {
        let blob = BlobId(self.handle.random_u128());
        let owner = Owner { high: call.volume.0.into(), low: call.ino.as_u64() };
        let copies = call.policy.copies();
        let length = bytes.len() as u32;
        let targets = self.put_copies(blob, BlobKind::Hot, owner, copies, bytes).await?;
        Ok(Piece { length, location: Location::Hot { blob, targets: targets.into(), offset: 0 } })
    }

    async fn put_copies(
        &self,
        blob: BlobId,
        kind: BlobKind,
        owner: Owner,
        copies: usize,
        bytes: Bytes,
    ) -> Result<Vec<cfs_wire::TargetId>, DataError> {
        place_copies(&self.pool, blob, kind, owner, copies, bytes).await.map_err(|failure| failure.into_data_error())
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

/// Puts one blob on `copies` distinct targets, trying others for those that fail. On failure
/// the copies already made are deleted.
pub(super) async fn place_copies(
    pool: &super::TargetPool,
    blob: BlobId,
    kind: BlobKind,
    owner: Owner,
    copies: usize,
    bytes: Bytes,
) -> Result<Vec<cfs_wire::TargetId>, PlaceFailure> {
    let geometry = ShardGeometry { data: 1, parity: (copies - 1) as u8, index: 0 };
    let mut held: Vec<Rc<dyn BlobTarget>> = Vec::with_capacity(copies);
    let mut tried = Vec::new();
    let mut failure = None;
    while held.len() < copies {
        let picked = pool.pick(copies - held.len(), &tried);
        if picked.len() < copies - held.len() {
            // Best effort: a copy that stays is an orphan, and the collector knows those.
            join_all(held.iter().map(|target| target.delete(vec![blob]))).await;
            let up = pool.writable().len();
            return Err(match failure {
                Some(error) if up >= copies => classify(error),
                _ => PlaceFailure::TooFew { up, needed: copies },
            });
        }
        let puts = picked.iter().map(|target| target.put(blob, kind, owner, geometry, bytes.clone()));
        let outcomes = join_all(puts).await;
        for (target, outcome) in picked.into_iter().zip(outcomes) {
            tried.push(target.id());
            match outcome {
                Ok(()) => held.push(target),
                Err(error) => failure = Some(error),
            }
        }
    }
    Ok(held.iter().map(|target| target.id()).collect())
}

fn classify(error: StoreError) -> PlaceFailure {
    if matches!(error, StoreError::NoSpace { .. }) { PlaceFailure::NoSpace } else { PlaceFailure::Other(error) }
}
