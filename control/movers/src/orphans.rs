//! Orphans: stored, durable, and never referenced, because whoever stored them died between
//! `store` and `commit`.
//!
//! A shard blob whose segment is neither in flight nor registered is garbage at once: its
//! `store` was never answered. A hot blob, or a registered slot, that nobody references may
//! still be committed by a client that holds its location: it must be seen unreferenced in two
//! rounds, and then dies only through the collector's freeze, which makes a late commit store
//! its bytes again.
//!
//! A segment whose slots are all marked dead was left by a node that died before it removed it: it
//! goes at once.

use crate::collector::{Collected, Collector};
use crate::merged::{LivingSlots, Merged};
use crate::{MoverError, ShardCalls, call};
use cfs_store::ShardCursor;
use cfs_store::segment::{SegmentStore, segment_of};
use cfs_wire::blobs::BlobKind;
use cfs_wire::data::Referent;
use cfs_wire::meta::{ShardOp, ShardReply, registration_shard};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{BlobId, Epoch, SegmentId};
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
        let (unreferenced, emptied) = self.unreferenced().await?;
        for segment in emptied {
            self.collector.remove_segment(segment).await?;
            total.segments += 1;
        }
        let before = self.suspects.replace(unreferenced.clone());
        let twice: Vec<Referent> = unreferenced.intersection(&before).copied().collect();
        for batch in twice.chunks(BATCH) {
            let dead = match planted::is(Bug::OrphansWithoutFreeze) {
                true => batch.to_vec(),
                false => self.collector.freeze(batch, epoch).await?,
            };
            total.referents += batch.len() as u64;
            self.collector.bury(&dead, &mut total).await?;
        }
        Ok(total)
    }

    /// Deletes shard blobs of segments that were never answered.
    async fn unregistered_shards(&self, total: &mut Collected) -> Result<(), MoverError> {
        let mut segments: BTreeMap<SegmentId, BTreeSet<BlobId>> = BTreeMap::new();
        for target in self.store.pool().writable() {
            // In pages: one that moves past us is seen in the next round, one that is seen twice counts once.
            let mut next = Some(ShardCursor::default());
            while let Some(cursor) = next {
                let (page, more) = target.shards(cursor);
                for info in page {
                    segments.entry(segment_of(info.owner)).or_default().insert(info.id);
                }
                next = more;
                self.store.handle().yield_now().await;
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
            let garbage: Vec<BlobId> = blobs.difference(&named).copied().collect();
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

    /// Hot blobs and registered slots that no shard references, as far as a look at one shard after the
    /// other can tell; and the segments of which every slot is marked dead.
    async fn unreferenced(&self) -> Result<(BTreeSet<Referent>, Vec<SegmentId>), MoverError> {
        let (mut unreferenced, mut emptied) = (BTreeSet::new(), Vec::new());
        // Before the references: what is stored and committed meanwhile is not taken for an orphan.
        let hot = self.hot_blobs();
        let (calls, handle) = (&*self.calls, self.store.handle());
        let mut referenced = Merged::<Referent>::start(calls, handle).await?;
        for referent in hot.into_iter().map(Referent::Hot) {
            if !referenced.contains(&referent).await? {
                unreferenced.insert(referent);
            }
        }
        let mut segments = Merged::<LivingSlots>::start(calls, handle).await?;
        while let Some(LivingSlots { segment, slots }) = segments.next().await? {
            if self.store.is_in_flight(segment) {
                continue;
            }
            if slots.is_empty() {
                emptied.push(segment);
            }
            for referent in slots.into_iter().map(|slot| Referent::Slot(segment, slot)) {
                if !referenced.contains(&referent).await? {
                    unreferenced.insert(referent);
                }
            }
        }
        Ok((unreferenced, emptied))
    }

    fn hot_blobs(&self) -> BTreeSet<BlobId> {
        let targets = self.store.pool().readable();
        targets.iter().flat_map(|target| target.list(BlobKind::Hot)).map(|info| info.id).collect()
    }
}
