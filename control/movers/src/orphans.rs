//! Orphans: stored, durable, and never referenced, because whoever stored them died between
//! `store` and `commit`.
//!
//! A shard blob whose segment is neither in flight nor registered is garbage at once: its
//! `store` was never answered. A hot blob, or a registered slot, that nobody references may
//! still be committed by a client that holds its location: it must be seen unreferenced in two
//! rounds, and then dies only through the collector's freeze, which makes a late commit store
//! its bytes again.

use crate::collector::{Collected, Collector};
use crate::{MoverError, ShardCalls, all_shards, call};
use cfs_store::segment::{SegmentStore, segment_of};
use cfs_wire::blobs::{BlobInfo, BlobKind};
use cfs_wire::data::Referent;
use cfs_wire::meta::{ShardOp, ShardReply, registration_shard};
use cfs_wire::{BlobId, Epoch, Ino, SegmentId};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Candidates frozen at once.
const BATCH: usize = 512;

pub struct OrphanSearch {
    calls: Rc<dyn ShardCalls>,
    store: Rc<SegmentStore>,
    collector: Rc<Collector>,
    /// Unreferenced in the round before.
    suspects: RefCell<BTreeSet<Referent>>,
}

impl OrphanSearch {
    pub fn new(calls: Rc<dyn ShardCalls>, store: Rc<SegmentStore>, collector: Rc<Collector>) -> OrphanSearch {
        OrphanSearch { calls, store, collector, suspects: RefCell::default() }
    }

    /// One pass over all blobs and registrations; answers what was removed.
    pub async fn round(&self, epoch: Epoch) -> Result<Collected, MoverError> {
        let mut total = Collected::default();
        self.unregistered_shards(&mut total).await?;
        let mut unreferenced = self.unreferenced_hot().await?;
        unreferenced.extend(self.unreferenced_slots().await?);
        let before = self.suspects.replace(unreferenced.clone());
        let twice: Vec<Referent> = unreferenced.intersection(&before).copied().collect();
        for batch in twice.chunks(BATCH) {
            let dead = self.collector.freeze(batch, epoch).await?;
            total.referents += batch.len() as u64;
            self.collector.bury(&dead, &mut total).await?;
        }
        Ok(total)
    }

    /// Deletes shard blobs of segments that were never answered.
    async fn unregistered_shards(&self, total: &mut Collected) -> Result<(), MoverError> {
        let mut segments: BTreeMap<SegmentId, Vec<BlobInfo>> = BTreeMap::new();
        for target in self.store.pool().writable() {
            for kind in [BlobKind::Data, BlobKind::Parity] {
                for info in target.list(kind) {
                    segments.entry(segment_of(info.owner)).or_default().push(info);
                }
            }
        }
        for (segment, blobs) in segments {
            if self.store.is_in_flight(segment) {
                continue;
            }
            let shard = registration_shard(segment, self.calls.shards());
            let reply = call(&*self.calls, shard, ShardOp::GetRegistration(segment)).await?;
            let ShardReply::Registration(registration) = reply else {
                return Err(MoverError::Protocol { shard, op: "GetRegistration" });
            };
            let named: BTreeSet<BlobId> =
                registration.iter().flat_map(|found| found.shards.iter().map(|place| place.blob)).collect();
            let garbage: Vec<BlobId> = blobs.iter().map(|info| info.id).filter(|id| !named.contains(id)).collect();
            // A repair puts a shard before its registration names it, under the same segment.
            if garbage.is_empty() || self.store.is_in_flight(segment) {
                continue;
            }
            for target in self.store.pool().writable() {
                let held: Vec<BlobId> = garbage.iter().copied().filter(|id| target.stat(*id).is_some()).collect();
                if !held.is_empty()
                    && let Err(error) = target.delete(held).await
                {
                    tracing::warn!(target = %target.id(), %error, "orphaned shards could not be deleted");
                }
            }
            total.segments += u64::from(registration.is_none());
        }
        Ok(())
    }

    async fn unreferenced_hot(&self) -> Result<BTreeSet<Referent>, MoverError> {
        let mut blobs: BTreeMap<BlobId, BlobInfo> = BTreeMap::new();
        for target in self.store.pool().readable() {
            blobs.extend(target.list(BlobKind::Hot).into_iter().map(|info| (info.id, info)));
        }
        let mut unreferenced = BTreeSet::new();
        for info in blobs.into_values() {
            let referent = Referent::Hot(info.id);
            let home = Ino::from_u64(info.owner.low).shard();
            if home.0 >= self.calls.shards() || !self.is_held(home, referent).await? {
                unreferenced.insert(referent);
            }
        }
        Ok(unreferenced)
    }

    async fn unreferenced_slots(&self) -> Result<BTreeSet<Referent>, MoverError> {
        let mut unreferenced = BTreeSet::new();
        for home in all_shards(&*self.calls) {
            let mut after = None;
            loop {
                let reply = call(&*self.calls, home, ShardOp::ListRegistrations { after, max: 256 }).await?;
                let ShardReply::Registrations { list, end } = reply else {
                    return Err(MoverError::Protocol { shard: home, op: "ListRegistrations" });
                };
                after = list.last().map(|(registration, _)| registration.segment);
                for (registration, dead) in list {
                    if self.store.is_in_flight(registration.segment) {
                        continue;
                    }
                    for slot in 0..registration.slots.len() as u16 {
                        let referent = Referent::Slot(registration.segment, slot);
                        if !dead.contains(&slot) && !self.is_held_anywhere(referent).await? {
                            unreferenced.insert(referent);
                        }
                    }
                }
                if end || after.is_none() {
                    break;
                }
            }
        }
        Ok(unreferenced)
    }

    async fn is_held_anywhere(&self, referent: Referent) -> Result<bool, MoverError> {
        for shard in all_shards(&*self.calls) {
            if self.is_held(shard, referent).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn is_held(&self, shard: cfs_wire::ShardId, referent: Referent) -> Result<bool, MoverError> {
        match call(&*self.calls, shard, ShardOp::Holders { referent }).await? {
            ShardReply::Holders(holders) => Ok(!holders.is_empty()),
            _ => Err(MoverError::Protocol { shard, op: "Holders" }),
        }
    }
}
