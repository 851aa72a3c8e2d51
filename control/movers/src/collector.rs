//! The collector: decides that a blob or slot is dead, and takes it away.
//!
//! A shard lists what lost a reference in it (released). The collector freezes a batch of
//! those in every shard: each answers whether it still holds a reference and from then on
//! refuses new ones. Held by none while frozen in all: dead. Held by any: thawed everywhere.
//! A crash anywhere repeats the batch, which changes nothing twice.

use crate::{MoverError, ShardCalls, all_shards, call};
use cfs_reactor::sync::Mutex;
use cfs_store::segment::SegmentStore;
use cfs_wire::data::Referent;
use cfs_wire::meta::{ShardOp, ShardReply, registration_shard};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{BlobId, Epoch, SegmentId, ShardId};
use futures_util::future::{join_all, try_join_all};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Referents resolved by one freeze: the freeze costs a log entry per shard, whatever its size.
const BATCH: u32 = 1024;

/// What a round did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Collected {
    pub referents: u64,
    pub kept: u64,
    pub hot_blobs: u64,
    pub segments: u64,
}

pub struct Collector {
    calls: Rc<dyn ShardCalls>,
    store: Rc<SegmentStore>,
    /// One freeze at a time: two of one referent could each see it held in one shard only, at
    /// different times, and one would thaw what the other takes for frozen.
    freezing: Mutex<()>,
}

impl Collector {
    pub fn new(calls: Rc<dyn ShardCalls>, store: Rc<SegmentStore>) -> Collector {
        Collector { calls, store, freezing: Mutex::new(()) }
    }

    /// Resolves everything released so far in every shard.
    pub async fn round(&self, epoch: Epoch) -> Result<Collected, MoverError> {
        let mut total = Collected::default();
        for shard in all_shards(&*self.calls) {
            let mut before: Vec<Referent> = Vec::new();
            loop {
                let reply = call(&*self.calls, shard, ShardOp::ListReleased { max: BATCH }).await?;
                let ShardReply::Released(released) = reply else {
                    return Err(MoverError::Protocol { shard, op: "ListReleased" });
                };
                if released.is_empty() {
                    break;
                }
                let referents: Vec<Referent> = released.iter().map(|(referent, _)| *referent).collect();
                // What stays on the list although it was resolved would be resolved for ever.
                if referents == before {
                    return Err(MoverError::Protocol { shard, op: "Resolve" });
                }
                before.clone_from(&referents);
                let dead = self.freeze(&referents, epoch).await?;
                total.referents += referents.len() as u64;
                total.kept += (referents.len() - dead.len()) as u64;
                self.bury(&dead, &mut total).await?;
                call(&*self.calls, shard, ShardOp::Resolve { referents }).await?;
            }
        }
        Ok(total)
    }

    /// Freezes referents in every shard and answers those that none holds; the others are
    /// thawed. After a failure those not known to be held stay frozen until they are asked for
    /// again or the epoch has passed: an earlier round may have deleted them already.
    pub async fn freeze(&self, referents: &[Referent], epoch: Epoch) -> Result<Vec<Referent>, MoverError> {
        let _alone = self.freezing.lock().await;
        // A long round must not freeze under an epoch older than what it meets.
        let epoch = epoch.max(self.store.epoch());
        let mut held = vec![false; referents.len()];
        let freezes = all_shards(&*self.calls).map(|shard| async move {
            let op = ShardOp::Freeze { referents: referents.to_vec(), epoch };
            match call(&*self.calls, shard, op).await? {
                ShardReply::Held(answers) if answers.len() == referents.len() => Ok(answers),
                ShardReply::Refused => Err(MoverError::EpochPassed { shard }),
                _ => Err(MoverError::Protocol { shard, op: "Freeze" }),
            }
        });
        let mut failure = None;
        let asked = if planted::is(Bug::CollectorAskOneShard) { 1 } else { usize::MAX };
        for answers in join_all(freezes.take(asked)).await {
            match answers {
                Ok(answers) => held.iter_mut().zip(answers).for_each(|(held, answer)| *held |= answer),
                Err(error) => failure = Some(error),
            }
        }
        let (dead, kept): (Vec<_>, Vec<_>) = referents.iter().zip(&held).partition(|(_, held)| !**held);
        let dead: Vec<Referent> = dead.into_iter().map(|(referent, _)| *referent).collect();
        let thaw: Vec<Referent> = kept.into_iter().map(|(referent, _)| *referent).collect();
        if !thaw.is_empty() {
            let thaws = all_shards(&*self.calls)
                .map(|shard| call(&*self.calls, shard, ShardOp::Thaw { referents: thaw.clone() }));
            try_join_all(thaws).await?;
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(dead),
        }
    }

    /// Deletes what is dead: hot blobs at once, segments when their last slot died.
    pub async fn bury(&self, dead: &[Referent], total: &mut Collected) -> Result<(), MoverError> {
        let mut blobs: Vec<BlobId> = Vec::new();
        let mut slots: BTreeMap<ShardId, Vec<(SegmentId, u16)>> = BTreeMap::new();
        for referent in dead {
            match referent {
                Referent::Hot(blob) => blobs.push(*blob),
                Referent::Slot(segment, slot) => {
                    let home = registration_shard(*segment, self.calls.shards());
                    slots.entry(home).or_default().push((*segment, *slot));
                }
            }
        }
        total.hot_blobs += blobs.len() as u64;
        self.delete_everywhere(&blobs).await;
        for (shard, slots) in slots {
            let ShardReply::Dead(segments) = call(&*self.calls, shard, ShardOp::MarkDead { slots }).await? else {
                return Err(MoverError::Protocol { shard, op: "MarkDead" });
            };
            for segment in segments {
                self.remove_segment(segment).await?;
                total.segments += 1;
            }
        }
        Ok(())
    }

    /// Removes a segment's registration, then its shards: in this order a reader that finds a
    /// shard gone learns from the missing registration that it has to read the extents again.
    /// A crash in between leaves shards that nothing names, which the orphan search deletes.
    pub async fn remove_segment(&self, segment: SegmentId) -> Result<(), MoverError> {
        let shard = registration_shard(segment, self.calls.shards());
        let reply = call(&*self.calls, shard, ShardOp::GetRegistration(segment)).await?;
        let ShardReply::Registration(registration) = reply else {
            return Err(MoverError::Protocol { shard, op: "GetRegistration" });
        };
        let Some(registration) = registration else { return Ok(()) };
        let blobs: Vec<BlobId> = registration.shards.iter().map(|place| place.blob).collect();
        call(&*self.calls, shard, ShardOp::Deregister(segment)).await?;
        self.store.forget(segment);
        self.delete_everywhere(&blobs).await;
        Ok(())
    }

    /// Deletes blobs on every target that has them. A target that failed forgets them, and keeps
    /// garbage, which the orphan search finds when it is back.
    async fn delete_everywhere(&self, blobs: &[BlobId]) {
        let mut deletions = Vec::new();
        for target in self.store.pool().readable() {
            let failed = target.failure().is_some();
            let held: Vec<BlobId> = blobs.iter().copied().filter(|blob| target.stat(*blob).is_some()).collect();
            if !held.is_empty() {
                deletions.push(async move {
                    if let Err(error) = target.delete(held).await
                        && !failed
                    {
                        tracing::warn!(target = %target.id(), %error, "dead blobs could not be deleted");
                    }
                });
            }
        }
        join_all(deletions).await;
    }
}
