//! Rebuilding what lost targets held: on the empty target in the place of a lost one, or, when a
//! target stays away, on those that are left. The least redundant first, at a bounded rate. And what
//! is missing or damaged on targets that are there: a read or a scrub finds what is damaged, a search
//! after every start and every scrub what is missing altogether.
//!
//! What is to be rebuilt is not remembered but found: by comparing what registrations and headers
//! promise with what the targets' indexes hold. Remembered, by [`Refills`], is only which targets
//! are not full yet; so a restart goes on where the last one stopped.

use crate::{MoverError, ShardCalls, all_shards, call, least_copies};
use cfs_api::Repair;
use cfs_reactor::Instant;
use cfs_store::Lacks;
use cfs_store::segment::{Damaged, SegmentStore, TargetState};
use cfs_wire::blobs::{BlobInfo, BlobKind};
use cfs_wire::data::{DataError, Registration};
use cfs_wire::meta::{ShardOp, ShardReply, registration_shard};
use cfs_wire::{BlobId, SegmentId, TargetId};
use futures_util::future::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::rc::Rc;
use std::time::Duration;

/// Segments remembered in one pass, 2 MiB of them: of more, the least redundant; the next pass
/// finds the rest.
const QUEUE_MAX: usize = 64 << 10;
/// Registrations fetched from a shard at once.
const LIST_BATCH: u32 = 256;
/// Copies being put or deleted come and go within this time.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// What is lost is searched for at least so often.
const LOST_PAUSE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Blobs looked at between two yields.
const STEPS_PER_YIELD: usize = 64;

/// Remembers across restarts what the targets that took the places of others do not hold yet.
pub trait Refills: 'static {
    fn lacking(&self) -> BTreeMap<TargetId, Lacks>;
    /// Everything of these sorts is back on `targets`.
    fn filled(&self, targets: BTreeSet<TargetId>, sorts: Lacks) -> LocalBoxFuture<'_, ()>;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RebuildConfig {
    pub bytes_per_second: u64,
    /// A target away for so long is taken for lost.
    pub lost_after: Duration,
}

impl Default for RebuildConfig {
    fn default() -> Self {
        // A tenth of what an NVMe device moves, so that clients hardly feel it; a reboot or a
        // pulled cable is usually over in ten minutes, and moves nothing then.
        RebuildConfig { bytes_per_second: 200 << 20, lost_after: Duration::from_secs(600) }
    }
}

/// What a search was made for: the same again finds nothing new, unless room was made for what had
/// none.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Situation {
    lacking: BTreeSet<TargetId>,
    lost: BTreeSet<TargetId>,
    writable: BTreeSet<TargetId>,
    /// Everything is to be searched whatever the targets look like.
    search: bool,
}

/// A search that left nothing to be tried at once.
struct Settled {
    situation: Situation,
    /// Something found no place, or is lost: it is searched again then.
    again: Option<Instant>,
    pause: Duration,
}

/// How a pass over one sort of things ended.
#[derive(Clone, Copy, Default)]
struct Pass {
    rebuilt: u64,
    /// Nowhere to put it now.
    waiting: u64,
    /// Beyond repair: damage, or the rest of a store that was cut off and never answered.
    lost: u64,
    /// To be tried again.
    failed: u64,
    /// The queue was full: there is more.
    more: bool,
}

impl Pass {
    /// Everything that can be rebuilt is.
    fn is_done(&self) -> bool {
        self.waiting == 0 && self.failed == 0 && !self.more
    }

    fn is_whole(&self) -> bool {
        self.is_done() && self.lost == 0
    }

    fn and(self, other: Pass) -> Pass {
        Pass {
            rebuilt: self.rebuilt + other.rebuilt,
            waiting: self.waiting + other.waiting,
            lost: self.lost + other.lost,
            failed: self.failed + other.failed,
            more: self.more || other.more,
        }
    }
}

pub struct Rebuild {
    calls: Rc<dyn ShardCalls>,
    store: Rc<SegmentStore>,
    refills: Rc<dyn Refills>,
    /// Of everything the log and the ordered stores consist of.
    metadata_copies: usize,
    config: RebuildConfig,
    /// Searches asked for, and the last of them that has found everything whole. The start asks for one:
    /// zones whose headers were lost look empty once they are used again, so an opening tells of them
    /// only once.
    asked: Cell<u64>,
    searched: Cell<u64>,
    away_since: RefCell<BTreeMap<TargetId, Instant>>,
    settled: RefCell<Option<Settled>>,
    progress: RefCell<Repair>,
}

impl Rebuild {
    /// `metadata_copies`: m+1, m being the largest any policy of the cluster promises.
    pub fn new(
        calls: Rc<dyn ShardCalls>,
        store: Rc<SegmentStore>,
        refills: Rc<dyn Refills>,
        metadata_copies: usize,
        config: RebuildConfig,
    ) -> Rebuild {
        let (away_since, settled, progress) = Default::default();
        let (asked, searched) = (Cell::new(1), Cell::new(0));
        Rebuild { calls, store, refills, metadata_copies, config, asked, searched, away_since, settled, progress }
    }

    /// What is being done, and how far it is.
    pub fn progress(&self) -> Repair {
        let refilling = self.refills.lacking().keys().map(|id| id.0).collect();
        Repair { refilling, ..self.progress.borrow().clone() }
    }

    /// A check found nothing wrong: what was counted as lost was garbage, or is deleted.
    pub fn found_whole(&self) {
        let mut progress = self.progress.borrow_mut();
        (progress.waiting, progress.lost) = (0, 0);
    }

    /// Has everything be searched once more: what a scrub can't see is what no index names any more.
    pub fn search_again(&self) {
        self.asked.set(self.asked.get() + 1);
        *self.settled.borrow_mut() = None;
    }

    /// Rebuilds everything that can be, if the targets have changed since it last was, or a search was
    /// asked for.
    pub async fn round(&self) -> Result<(), MoverError> {
        let asked = self.asked.get();
        let situation = self.situation();
        if situation.lacking.is_empty() && situation.lost.is_empty() && !situation.search {
            *self.settled.borrow_mut() = None;
            // What waited for a target has one.
            self.progress.borrow_mut().waiting = 0;
            return Ok(());
        }
        if self.is_settled(&situation) {
            return Ok(());
        }
        *self.progress.borrow_mut() = Repair { running: true, ..Repair::default() };
        let outcome = self.rebuild_all(&situation).await;
        let mut progress = self.progress.borrow_mut();
        (progress.running, progress.queued) = (false, 0);
        progress.phase = if outcome.is_ok() { "done".into() } else { "stopped".into() };
        let left = outcome?;
        tracing::info!(progress = ?*progress, "rebuilding ended");
        drop(progress);
        if left.is_whole() {
            self.searched.set(asked);
        }
        if left.failed == 0 && !left.more && self.asked.get() == asked {
            self.settle(situation, left);
        }
        Ok(())
    }

    /// Nothing more is to be done for now.
    fn settle(&self, situation: Situation, left: Pass) {
        let before = self.settled.take().filter(|before| before.situation == situation);
        // What is lost may have been the rest of a store, which goes with the next orphan search; real
        // losses are looked at ever more rarely.
        let pause = match before {
            Some(before) if left.waiting == 0 => (before.pause * 2).min(LOST_PAUSE_MAX),
            _ => self.config.lost_after,
        };
        let again = (left.waiting > 0 || left.lost > 0).then(|| self.store.handle().now() + pause);
        let situation = Situation { search: situation.search && !left.is_whole(), ..situation };
        *self.settled.borrow_mut() = Some(Settled { situation, again, pause });
    }

    /// Looks whether the devices are still all there.
    pub fn look_at_devices(&self) {
        for target in self.store.pool().writable() {
            target.look_at_device();
        }
    }

    /// Repairs what reads and scrubs found damaged. What can't be repaired now (a target is away and
    /// there is no other) is found again by the next read, scrub or check.
    pub async fn repair_damaged(&self) {
        for damaged in self.store.pool().take_damaged() {
            let outcome = match damaged {
                Damaged::Segment(segment) => {
                    let Some(registration) = self.store.describe(segment).await else { continue };
                    self.store.repair_segment(&registration, true).await.map_err(|error| error.to_string())
                }
                Damaged::Copies(id) => {
                    let targets = self.store.pool().readable();
                    let Some(info) = targets.iter().find_map(|target| target.stat(id)) else { continue };
                    let least = least_copies(info.kind, self.metadata_copies);
                    let repaired = self.store.repair_copies(&info, least, true).await;
                    repaired.ok_or_else(|| "no sound copy is left, or no target for another".to_owned())
                }
            };
            match outcome {
                // Somebody else was quicker, or there is no room where it is.
                Ok(repaired) if repaired.rebuilt == 0 => {}
                Ok(repaired) => {
                    tracing::info!(?damaged, ?repaired, "damage was repaired");
                    self.hold_back(repaired.bytes).await;
                }
                Err(error) => tracing::warn!(?damaged, error, "damage is not repaired yet"),
            }
        }
    }

    fn is_settled(&self, situation: &Situation) -> bool {
        let now = self.store.handle().now();
        let settled = self.settled.borrow();
        settled
            .as_ref()
            .is_some_and(|settled| settled.situation == *situation && settled.again.is_none_or(|again| now < again))
    }

    fn situation(&self) -> Situation {
        let now = self.store.handle().now();
        let mut away_since = self.away_since.borrow_mut();
        let (mut lost, mut awaited) = (BTreeSet::new(), false);
        for (id, state) in self.store.pool().states() {
            if state == TargetState::Up {
                away_since.remove(&id);
            } else if now.saturating_since(*away_since.entry(id).or_insert(now)) >= self.config.lost_after {
                lost.insert(id);
            } else {
                awaited = true;
            }
        }
        let lacking = self.refills.lacking().into_keys().collect();
        // What is on a target that may yet come back would be missed, and put elsewhere.
        let search = self.asked.get() != self.searched.get() && !awaited;
        Situation { lacking, lost, writable: self.writable(), search }
    }

    fn writable(&self) -> BTreeSet<TargetId> {
        self.store.pool().writable().iter().map(|target| target.id()).collect()
    }

    /// What is left after everything that can be rebuilt was.
    async fn rebuild_all(&self, situation: &Situation) -> Result<Pass, MoverError> {
        // The log first: of it, one more loss could take acknowledged metadata.
        let metadata = self.restore_copies(&[BlobKind::Log, BlobKind::Manifest, BlobKind::Run]).await;
        if metadata.is_done() {
            self.refills.filled(self.writable(), Lacks { metadata: true, data: false }).await;
        }
        let hot = self.restore_copies(&[BlobKind::Hot]).await;
        let mut segments;
        loop {
            segments = self.restore_segments(situation).await?;
            if !segments.more || segments.rebuilt == 0 {
                break;
            }
        }
        let all = metadata.and(hot).and(segments);
        if all.is_done() {
            self.refills.filled(self.writable(), Lacks::ALL).await;
        }
        Ok(all)
    }

    fn begin(&self, phase: &str, queued: usize) {
        let mut progress = self.progress.borrow_mut();
        progress.phase = phase.into();
        progress.queued = queued as u64;
    }

    /// Counts one thing done, and holds back as the rate demands.
    async fn done(&self, rebuilt: u64, bytes: u64) {
        {
            let mut progress = self.progress.borrow_mut();
            progress.queued = progress.queued.saturating_sub(1);
            progress.repaired += u64::from(rebuilt > 0);
            progress.bytes += bytes;
        }
        self.hold_back(bytes).await;
    }

    /// Waits as long as rebuilding so many bytes may take.
    async fn hold_back(&self, bytes: u64) {
        let seconds = bytes as f64 / self.config.bytes_per_second.max(1) as f64;
        self.store.handle().sleep(Duration::from_secs_f64(seconds)).await;
    }

    /// Brings replicated blobs of these kinds back to their number of copies.
    async fn restore_copies(&self, kinds: &[BlobKind]) -> Pass {
        let mut pass = Pass::default();
        self.begin("copies", 0);
        let mut short = self.short_copies(kinds).await;
        if short.is_empty() {
            return pass;
        }
        self.store.handle().sleep(LOOK_AGAIN_AFTER).await;
        short.sort_unstable_by_key(|(left, info)| (*left, info.id));
        self.begin("copies", short.len());
        for (_, info) in short {
            match self.store.repair_copies(&info, least_copies(info.kind, self.metadata_copies), false).await {
                Some(repaired) => {
                    pass.rebuilt += repaired.rebuilt;
                    self.done(repaired.rebuilt, repaired.bytes).await;
                }
                // Deleted meanwhile.
                None if self.copies(info.id) == 0 => self.done(0, 0).await,
                None => {
                    pass.waiting += 1;
                    self.progress.borrow_mut().waiting += 1;
                    self.done(0, 0).await;
                }
            }
        }
        pass
    }

    /// Blobs with copies missing, and how many each has left.
    async fn short_copies(&self, kinds: &[BlobKind]) -> Vec<(usize, BlobInfo)> {
        let mut short = Vec::new();
        for kind in kinds {
            let mut blobs: BTreeMap<BlobId, BlobInfo> = BTreeMap::new();
            for target in self.store.pool().readable() {
                blobs.extend(target.list(*kind).into_iter().map(|info| (info.id, info)));
            }
            for (count, info) in blobs.into_values().enumerate() {
                if self.store.missing_copies(&info, least_copies(info.kind, self.metadata_copies), false).await > 0 {
                    short.push((self.copies(info.id), info));
                }
                if count.is_multiple_of(STEPS_PER_YIELD) {
                    self.store.handle().yield_now().await;
                }
            }
        }
        short
    }

    fn copies(&self, id: BlobId) -> usize {
        self.store.pool().readable().iter().filter(|target| target.stat(id).is_some()).count()
    }

    /// One pass over the registrations of all shards.
    async fn restore_segments(&self, situation: &Situation) -> Result<Pass, MoverError> {
        self.begin("segments", 0);
        let mut pass = Pass::default();
        let queue = self.short_segments(situation, &mut pass).await?;
        self.begin("segments", queue.len());
        for segment in queue {
            let Some(registration) = self.lookup(segment).await? else {
                self.done(0, 0).await;
                continue;
            };
            let (rebuilt, bytes) = match self.store.repair_segment(&registration, false).await {
                Ok(repaired) => (repaired.rebuilt, repaired.bytes),
                Err(DataError::TooFewTargets { .. } | DataError::NoSpace) => {
                    pass.waiting += 1;
                    self.progress.borrow_mut().waiting += 1;
                    (0, 0)
                }
                // It went, or was rewritten, while it was read.
                Err(_) if self.lookup(segment).await?.as_ref() != Some(&registration) => (0, 0),
                // More of it is damaged than is missing: another search soon would find no more.
                Err(DataError::Unreadable(error)) => {
                    tracing::warn!(%segment, error, "a segment is beyond repair");
                    pass.lost += 1;
                    self.progress.borrow_mut().lost += 1;
                    (0, 0)
                }
                Err(error) => {
                    tracing::warn!(%segment, %error, "a segment is not rebuilt yet");
                    pass.failed += 1;
                    (0, 0)
                }
            };
            pass.rebuilt += rebuilt;
            self.done(rebuilt, bytes).await;
        }
        Ok(pass)
    }

    /// Segments with shards missing that can be rebuilt now, the least redundant first.
    async fn short_segments(&self, situation: &Situation, pass: &mut Pass) -> Result<Vec<SegmentId>, MoverError> {
        let mut queue: BinaryHeap<(usize, SegmentId)> = BinaryHeap::new();
        let (mut waiting, mut lost) = (0, 0);
        for home in all_shards(&*self.calls) {
            let mut after = None;
            loop {
                let op = ShardOp::ListRegistrations { after, max: LIST_BATCH };
                let ShardReply::Registrations { list, end } = call(&*self.calls, home, op).await? else {
                    return Err(MoverError::Protocol { shard: home, op: "ListRegistrations" });
                };
                after = list.last().map(|(registration, _)| registration.segment);
                for (registration, dead) in list {
                    let segment = registration.segment;
                    if dead.len() == registration.slots.len() || self.store.is_in_flight(segment) {
                        continue;
                    }
                    match self.shortage(&registration, situation).await {
                        Shortage::None => {}
                        // Unless it was deleted while the list was read.
                        Shortage::Lost => lost += u64::from(self.lookup(segment).await?.is_some()),
                        Shortage::NoTarget => waiting += 1,
                        Shortage::Left(left) => queue.push((left, segment)),
                    }
                    if queue.len() > QUEUE_MAX {
                        // The most redundant of them.
                        queue.pop();
                        pass.more = true;
                    }
                }
                if end || after.is_none() {
                    break;
                }
                self.store.handle().yield_now().await;
            }
        }
        pass.waiting += waiting;
        pass.lost += lost;
        let mut progress = self.progress.borrow_mut();
        (progress.waiting, progress.lost) = (progress.waiting + waiting, lost);
        Ok(queue.into_sorted_vec().into_iter().map(|(_, segment)| segment).collect())
    }

    async fn shortage(&self, registration: &Registration, situation: &Situation) -> Shortage {
        let missing = self.store.missing_shards(registration, false).await;
        // What is on a target that may yet come back is left alone.
        let counts = |target: &TargetId| situation.lost.contains(target) || situation.writable.contains(target);
        if !missing.iter().any(|place| counts(&place.target)) {
            return Shortage::None;
        }
        let Some(left) = usize::from(registration.parity).checked_sub(missing.len()) else {
            // Damage, or the rest of a store that was cut off and never answered: `check` tells.
            return Shortage::Lost;
        };
        let held: BTreeSet<TargetId> =
            registration.shards.iter().filter(|place| !missing.contains(place)).map(|place| place.target).collect();
        let longest = missing.iter().map(|place| u64::from(place.length)).max().unwrap_or(0);
        let has_room = |id: &TargetId| self.store.pool().get(*id).is_some_and(|target| target.free() > longest);
        if situation.writable.difference(&held).any(has_room) { Shortage::Left(left) } else { Shortage::NoTarget }
    }

    async fn lookup(&self, segment: SegmentId) -> Result<Option<Registration>, MoverError> {
        let shard = registration_shard(segment, self.calls.shards());
        match call(&*self.calls, shard, ShardOp::GetRegistration(segment)).await? {
            ShardReply::Registration(found) => Ok(found),
            _ => Err(MoverError::Protocol { shard, op: "GetRegistration" }),
        }
    }
}

/// What a segment lacks.
enum Shortage {
    None,
    /// So many more shards may be lost.
    Left(usize),
    /// No target that has none yet has room to take one.
    NoTarget,
    /// More than parity repairs.
    Lost,
}
