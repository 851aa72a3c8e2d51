//! When the movers run.

use crate::registrar::ShardRegistrar;
use cfs_movers::collector::Collector;
use cfs_movers::orphans::OrphanSearch;
use cfs_movers::packer::{Packed, Packer};
use cfs_movers::rebuild::Rebuild;
use cfs_movers::scrub::Scrub;
use cfs_movers::{MoverError, ShardCalls};
use cfs_reactor::Handle;
use cfs_store::segment::{Registrar, SegmentStore};
use cfs_wire::meta::{ShardOp, ShardReply};
use cfs_wire::{Epoch, ShardId};
use futures_util::future::{Either, select};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

/// Pauses between rounds. Space freed by deletes is back within one collector round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MoverIntervals {
    pub collect: Duration,
    pub pack: Duration,
    pub orphans: Duration,
    pub epoch: Duration,
    /// What was found damaged is repaired, and what lost targets held is rebuilt.
    pub repair: Duration,
    /// Within this time everything is read once.
    pub scrub: Duration,
}

impl Default for MoverIntervals {
    fn default() -> Self {
        MoverIntervals {
            collect: Duration::from_secs(2),
            pack: Duration::from_secs(30),
            orphans: Duration::from_secs(300),
            // Longer than any client keeps stored bytes before it commits them.
            epoch: Duration::from_secs(120),
            repair: Duration::from_secs(10),
            // 1.7 MB per second and TB. Two copies of one thing rarely rot within a week.
            scrub: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

/// All movers of a node.
pub struct Movers {
    pub calls: Rc<dyn ShardCalls>,
    pub collector: Rc<Collector>,
    pub orphans: OrphanSearch,
    pub packer: Packer,
    pub rebuild: Rebuild,
    pub scrub: Scrub,
    pub registrar: Rc<ShardRegistrar>,
    pub store: Rc<SegmentStore>,
}

/// The epoch handed out with what is stored lies this far above the least one shards accept: a
/// location stays good for two to three epoch intervals, and one handed out with the extents of a
/// file for one to two.
const EPOCHS_ACCEPTED: u64 = 2;

impl Movers {
    /// Reads the shards' minimum epochs and hands out one above all. Before any store.
    pub async fn adopt_epoch(&self) -> Result<Epoch, MoverError> {
        let mut minimum = Epoch(0);
        for shard in (0..self.calls.shards()).map(ShardId) {
            match self.shard_call(shard, ShardOp::GetEpoch).await? {
                ShardReply::Epoch(found) => minimum = minimum.max(found),
                _ => return Err(MoverError::Protocol { shard, op: "GetEpoch" }),
            }
        }
        self.registrar.set_epoch(Epoch(minimum.0 + EPOCHS_ACCEPTED));
        Ok(minimum)
    }

    /// Lets every shard forget freezes that no location still accepted can meet, then hands out
    /// the next epoch. In this order a start never hands out, nor freezes under, an epoch lower
    /// than one handed out before it: a freeze outlives every location it is to meet.
    async fn advance_epoch(&self, minimum: Epoch) -> Result<Epoch, MoverError> {
        let next = Epoch(minimum.0 + 1);
        for shard in (0..self.calls.shards()).map(ShardId) {
            let mut after = None;
            loop {
                match self.shard_call(shard, ShardOp::AdvanceEpoch { minimum: next, after }).await? {
                    ShardReply::Forgotten { next: None } => break,
                    ShardReply::Forgotten { next } => after = next,
                    _ => return Err(MoverError::Protocol { shard, op: "AdvanceEpoch" }),
                }
            }
        }
        self.registrar.set_epoch(Epoch(next.0 + EPOCHS_ACCEPTED));
        Ok(next)
    }

    async fn shard_call(&self, shard: ShardId, op: ShardOp) -> Result<ShardReply, MoverError> {
        self.calls.shard_call(shard, op).await.map_err(|error| MoverError::Shard { shard, error })
    }

    /// The packer's pause; true when it was cut short because hot blobs have met their limit or a
    /// writer found no room.
    async fn pack_pause(&self, timer: &Handle, pause: Duration) -> bool {
        let (called, due) = (pin!(self.store.packer_called()), pin!(timer.sleep(pause)));
        matches!(select(called, due).await, Either::Left(_))
    }

    /// Compacts again and again while room is short and that helps, until it is time to pack: what was
    /// compacted goes with the collector's next rounds, and makes room to compact more.
    async fn make_room(&self, timer: &Handle, intervals: &MoverIntervals) {
        let end = timer.now() + intervals.pack;
        let mut useful = true;
        while useful && self.store.is_short_of_room() && !self.store.packer_is_called() && timer.now() < end {
            let began = timer.now();
            useful = packed_something(self.packer.make_room().await);
            // Half of the time at most: it reads all registrations.
            timer.sleep(intervals.collect.max(timer.now() - began)).await;
        }
    }

    /// Starts the loops. They end with the domain.
    pub fn start(self: Rc<Self>, handle: &Handle, intervals: MoverIntervals, minimum: Epoch) {
        let timer = || handle.clone();
        handle.spawn(self.clone().collecting(timer(), intervals.collect));
        handle.spawn(self.clone().packing(timer(), intervals));
        handle.spawn(self.clone().searching_orphans(timer(), intervals.orphans));
        handle.spawn(self.clone().looking(timer(), intervals.repair));
        handle.spawn(self.clone().repairing(timer(), intervals.repair));
        handle.spawn(self.clone().rebuilding(timer(), intervals.repair));
        handle.spawn(self.clone().scrubbing(intervals.scrub));
        handle.spawn(self.counting_epochs(timer(), intervals.epoch, minimum));
    }

    async fn collecting(self: Rc<Self>, timer: Handle, pause: Duration) {
        loop {
            timer.sleep(pause).await;
            report("collector", self.collector.round(self.registrar.epoch()).await);
        }
    }

    async fn packing(self: Rc<Self>, timer: Handle, intervals: MoverIntervals) {
        loop {
            let pressed = self.pack_pause(&timer, intervals.pack).await;
            let useful = packed_something(self.packer.round(pressed).await);
            // Where there was nothing to do, calling again would find no more.
            if pressed {
                timer.sleep(if useful { intervals.collect } else { intervals.pack }).await;
            }
            if useful {
                self.make_room(&timer, &intervals).await;
            }
        }
    }

    async fn searching_orphans(self: Rc<Self>, timer: Handle, pause: Duration) {
        loop {
            timer.sleep(pause).await;
            report("orphan search", self.orphans.round(self.registrar.epoch()).await);
        }
    }

    async fn looking(self: Rc<Self>, timer: Handle, pause: Duration) {
        loop {
            timer.sleep(pause).await;
            self.rebuild.look_at_devices();
        }
    }

    async fn repairing(self: Rc<Self>, timer: Handle, pause: Duration) {
        loop {
            timer.sleep(pause).await;
            self.rebuild.repair_damaged().await;
        }
    }

    async fn rebuilding(self: Rc<Self>, timer: Handle, pause: Duration) {
        loop {
            report("rebuild", self.rebuild.round().await);
            timer.sleep(pause).await;
        }
    }

    async fn scrubbing(self: Rc<Self>, within: Duration) {
        loop {
            self.scrub.pass(within).await;
            self.rebuild.search_again();
        }
    }

    async fn counting_epochs(self: Rc<Self>, timer: Handle, pause: Duration, mut minimum: Epoch) {
        loop {
            timer.sleep(pause).await;
            match self.advance_epoch(minimum).await {
                Ok(next) => minimum = next,
                Err(error) => tracing::warn!(%error, "the reference epoch did not advance"),
            }
        }
    }
}

/// Whether the packer did anything.
fn packed_something(outcome: Result<Packed, MoverError>) -> bool {
    let useful = outcome.as_ref().is_ok_and(|packed| packed.extents > 0);
    report("packer", outcome);
    useful
}

fn report<T: std::fmt::Debug>(mover: &'static str, outcome: Result<T, MoverError>) {
    match outcome {
        Ok(done) => tracing::debug!(mover, ?done, "round done"),
        Err(error) => tracing::warn!(mover, %error, "round stopped early"),
    }
}
