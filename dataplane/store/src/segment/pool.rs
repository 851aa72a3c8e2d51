//! The node's targets as failure domains: which are up, and which to write to.

use super::Reservable;
use super::write::segment_of;
use crate::{Flaw, ShardCursor, Space, StoreError, TargetStore};
use bytes::Bytes;
use cfs_device::DeviceHealth;
use cfs_reactor::Handle;
use cfs_reactor::sync::Semaphore;
use cfs_wire::blobs::{BlobInfo, BlobKind, Owner, ShardGeometry};
use cfs_wire::limits::BLOB_BYTES_MAX;
use cfs_wire::{BlobId, Policy, SegmentId, TargetId};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Range, RangeInclusive};
use std::rc::Rc;

/// Room on every target that clients may not take, a shard of the largest segment: the packer stores
/// the living rest of a segment anew before the old one goes. Repair takes it too, since redundancy
/// goes before room.
pub const MOVERS_ROOM: u64 = BLOB_BYTES_MAX as u64;

/// Damaged things remembered: the next read, scrub or check finds the rest.
const DAMAGED_MAX: usize = 64 << 10;

/// Something of which a shard or copy is known to be damaged or missing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Damaged {
    Segment(SegmentId),
    /// A blob in whole copies: hot, or of the log or the ordered store.
    Copies(BlobId),
}

impl Damaged {
    /// What a damaged blob is a part of.
    pub fn of(info: &BlobInfo) -> Damaged {
        match info.kind {
            BlobKind::Data | BlobKind::Parity => Damaged::Segment(segment_of(info.owner)),
            BlobKind::Log | BlobKind::Run | BlobKind::Manifest | BlobKind::Hot => Damaged::Copies(info.id),
        }
    }
}

/// The verbs of one target, whether on this executor or behind a mailbox.
pub trait BlobTarget: 'static {
    fn id(&self) -> TargetId;
    fn put(
        &self,
        id: BlobId,
        kind: BlobKind,
        owner: Owner,
        geometry: ShardGeometry,
        payload: Bytes,
    ) -> LocalBoxFuture<'_, Result<(), StoreError>>;
    fn get(&self, id: BlobId, offset: u32, length: u32) -> LocalBoxFuture<'_, Result<Bytes, StoreError>>;
    fn delete(&self, ids: Vec<BlobId>) -> LocalBoxFuture<'_, Result<(), StoreError>>;
    fn stat(&self, id: BlobId) -> Option<BlobInfo>;
    /// Whether a deletion of the blob is under way: it is there yet, and won't be soon.
    fn is_being_deleted(&self, id: BlobId) -> bool;
    fn list(&self, kind: BlobKind) -> Vec<BlobInfo>;
    /// As [`TargetStore::shards`].
    fn shards(&self, from: ShardCursor) -> (Vec<BlobInfo>, Option<ShardCursor>);
    /// Bytes ordinary writers may still use.
    fn free(&self) -> u64;
    fn space(&self) -> Space;
    /// Why the target takes no more writes, if so.
    fn failure(&self) -> Option<String>;
    /// As [`TargetStore::look_at_device`].
    fn look_at_device(&self);
    /// As [`TargetStore::device_health`].
    fn device_health(&self) -> LocalBoxFuture<'_, Option<DeviceHealth>> {
        std::future::ready(None).boxed_local()
    }
    /// As [`TargetStore::take_damaged`].
    fn take_damaged(&self) -> Vec<BlobInfo>;
    /// Reads everything that lives in these zones of the target, at no more than as many bytes per second as `pace`
    /// says each time, and hands over what does not verify as it is found.
    fn scrub<'a>(
        &'a self,
        zones: Range<u32>,
        pace: &'a dyn Fn() -> u64,
        found: &'a dyn Fn(&BlobInfo),
    ) -> LocalBoxFuture<'a, ()>;
    /// Checks what locates the blobs of these zones, at the same pace, and mends it if `mend`; hands over
    /// what was damaged.
    fn check_structures<'a>(
        &'a self,
        zones: Range<u32>,
        mend: bool,
        pace: &'a dyn Fn() -> u64,
        found: &'a dyn Fn(&Flaw),
    ) -> LocalBoxFuture<'a, ()>;
}

/// Room on a target that is not reserved, in bytes, or a 16th where that lies between: the log and the
/// ordered stores take it for a while. On large targets it is the log twice.
const SPARE_BYTES: RangeInclusive<u64> = 2 << 20..=256 << 20;
const SPARE_PART: u64 = 16;
/// The part of the smallest target that may be reserved, and the most: 64 clients' 64 MiB.
const RESERVABLE_PART: u64 = 8;
const RESERVABLE_BYTES_MAX: u64 = 4 << 30;

/// Room that may be reserved. What is not in segments may double: while runs are merged, and where the
/// copies of a target that failed are made anew.
fn reservable_room(target: &dyn BlobTarget) -> u64 {
    let space = target.space();
    let kinds = [BlobKind::Log, BlobKind::Run, BlobKind::Manifest, BlobKind::Hot];
    let copies: u64 = kinds.into_iter().map(|kind| space.taken_by(kind)).sum();
    let spare = (space.capacity / SPARE_PART).clamp(*SPARE_BYTES.start(), *SPARE_BYTES.end());
    room_for_clients(target).saturating_sub(spare + copies)
}

/// Free bytes that are not kept for the movers.
fn room_for_clients(target: &dyn BlobTarget) -> u64 {
    target.free().saturating_sub(MOVERS_ROOM)
}

/// Bytes of file data for which targets have room. Each shard of a segment takes a target of its own:
/// where there is more room on some than the others can match, it can't be used. Of s bytes in each
/// shard of all segments a target takes s at most, so for every b the n - b smallest take the other
/// k + m - b shards.
fn usable_bytes(mut rooms: Vec<u64>, policy: Policy) -> u64 {
    // As `data_shards` has it.
    let Some(data) = rooms.len().checked_sub(policy.parity()).map(|most| policy.data().min(most)) else { return 0 };
    let width = data + policy.parity();
    rooms.sort_unstable();
    let smallest = |count: usize| rooms[..count].iter().map(|room| u128::from(*room)).sum::<u128>();
    let bounds = (0..width).map(|large| smallest(rooms.len() - large) * data as u128 / (width - large) as u128);
    bounds.min().map_or(0, |bytes| u64::try_from(bytes).unwrap_or(u64::MAX))
}

/// A target of this executor.
pub struct LocalTarget(pub Rc<TargetStore>);

impl BlobTarget for LocalTarget {
    fn id(&self) -> TargetId {
        self.0.superblock().identity.target
    }

    fn put(
        &self,
        id: BlobId,
        kind: BlobKind,
        owner: Owner,
        geometry: ShardGeometry,
        payload: Bytes,
    ) -> LocalBoxFuture<'_, Result<(), StoreError>> {
        self.0.put(id, kind, owner, geometry, payload).boxed_local()
    }

    fn get(&self, id: BlobId, offset: u32, length: u32) -> LocalBoxFuture<'_, Result<Bytes, StoreError>> {
        self.0.get(id, offset, length).boxed_local()
    }

    fn delete(&self, ids: Vec<BlobId>) -> LocalBoxFuture<'_, Result<(), StoreError>> {
        self.0.delete(ids).boxed_local()
    }

    fn stat(&self, id: BlobId) -> Option<BlobInfo> {
        self.0.stat(id)
    }

    fn is_being_deleted(&self, id: BlobId) -> bool {
        self.0.is_being_deleted(id)
    }

    fn list(&self, kind: BlobKind) -> Vec<BlobInfo> {
        self.0.list(kind)
    }

    fn shards(&self, from: ShardCursor) -> (Vec<BlobInfo>, Option<ShardCursor>) {
        self.0.shards(from)
    }

    fn free(&self) -> u64 {
        self.0.space().free
    }

    fn space(&self) -> Space {
        self.0.space()
    }

    fn failure(&self) -> Option<String> {
        self.0.is_failed()
    }

    fn look_at_device(&self) {
        self.0.look_at_device();
    }

    fn device_health(&self) -> LocalBoxFuture<'_, Option<DeviceHealth>> {
        self.0.device_health().boxed_local()
    }

    fn take_damaged(&self) -> Vec<BlobInfo> {
        self.0.take_damaged()
    }

    fn scrub<'a>(
        &'a self,
        zones: Range<u32>,
        pace: &'a dyn Fn() -> u64,
        found: &'a dyn Fn(&BlobInfo),
    ) -> LocalBoxFuture<'a, ()> {
        async move { _ = self.0.scrub(zones, pace, found).await }.boxed_local()
    }

    fn check_structures<'a>(
        &'a self,
        zones: Range<u32>,
        mend: bool,
        pace: &'a dyn Fn() -> u64,
        found: &'a dyn Fn(&Flaw),
    ) -> LocalBoxFuture<'a, ()> {
        self.0.check_structures(zones, mend, pace, found).boxed_local()
    }
}

/// What is known of one target of the node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetState {
    Up,
    /// Present but refusing writes.
    Failed(String),
    /// Not opened: the device is missing, foreign or unreadable.
    Absent(String),
}

enum Member {
    Open(Rc<dyn BlobTarget>),
    Absent(String),
}

/// All targets of a node, by id.
pub struct TargetPool {
    handle: Handle,
    members: RefCell<BTreeMap<TargetId, Member>>,
    damaged: RefCell<BTreeSet<Damaged>>,
    restoring: Rc<Semaphore>,
}

impl TargetPool {
    pub fn new(handle: &Handle) -> Rc<TargetPool> {
        let (members, damaged) = Default::default();
        Rc::new(TargetPool { handle: handle.clone(), members, damaged, restoring: Semaphore::new(1) })
    }

    /// Adds a target, in the place of the one that has its id.
    pub fn add(&self, target: Rc<dyn BlobTarget>) {
        self.members.borrow_mut().insert(target.id(), Member::Open(target));
    }

    /// Records a target that should be there and could not be opened.
    pub fn add_absent(&self, id: TargetId, reason: String) {
        self.members.borrow_mut().insert(id, Member::Absent(reason));
    }

    pub fn states(&self) -> Vec<(TargetId, TargetState)> {
        let state = |member: &Member| match member {
            Member::Absent(reason) => TargetState::Absent(reason.clone()),
            Member::Open(target) => target.failure().map_or(TargetState::Up, TargetState::Failed),
        };
        self.members.borrow().iter().map(|(id, member)| (*id, state(member))).collect()
    }

    /// Targets that can be read, in id order; a failed one may still answer reads.
    pub fn readable(&self) -> Vec<Rc<dyn BlobTarget>> {
        let members = self.members.borrow();
        members
            .values()
            .filter_map(|member| if let Member::Open(target) = member { Some(target.clone()) } else { None })
            .collect()
    }

    /// Targets that take writes, in id order.
    pub fn writable(&self) -> Vec<Rc<dyn BlobTarget>> {
        self.readable().into_iter().filter(|target| target.failure().is_none()).collect()
    }

    /// A read or a scrub found damage: to be repaired.
    pub fn note_damage(&self, what: Damaged) {
        let mut damaged = self.damaged.borrow_mut();
        if damaged.len() < DAMAGED_MAX {
            damaged.insert(what);
        }
    }

    /// In what damage was found since the last call, by the targets' collectors too.
    pub fn take_damaged(&self) -> BTreeSet<Damaged> {
        for target in self.readable() {
            // One that failed as a whole is rebuilt when it stays away.
            for info in target.take_damaged().into_iter().filter(|_| target.failure().is_none()) {
                self.note_damage(Damaged::of(&info));
            }
        }
        self.damaged.take()
    }

    /// Whose turn it is to put copies of blobs back.
    pub(super) fn restoring(&self) -> &Rc<Semaphore> {
        &self.restoring
    }

    pub fn get(&self, id: TargetId) -> Option<Rc<dyn BlobTarget>> {
        match self.members.borrow().get(&id) {
            Some(Member::Open(target)) => Some(target.clone()),
            _ => None,
        }
    }

    /// Up to `count` distinct writable targets outside `exclude`, in random order weighted by the
    /// space that clients may still take (weighted rendezvous: each target draws -ln(u)/weight,
    /// smallest first): where one fills up before the others, room is left that no segment can use.
    pub fn pick(&self, count: usize, exclude: &[TargetId]) -> Vec<Rc<dyn BlobTarget>> {
        let mut drawn: Vec<(f64, Rc<dyn BlobTarget>)> = self
            .writable()
            .into_iter()
            .filter(|target| !exclude.contains(&target.id()))
            .map(|target| {
                let unit = ((self.handle.random_u64() >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
                (-unit.ln() / (room_for_clients(&*target) as f64 + 1.0), target)
            })
            .collect();
        drawn.sort_by(|(left, a), (right, b)| left.total_cmp(right).then(a.id().cmp(&b.id())));
        drawn.into_iter().take(count).map(|(_, target)| target).collect()
    }

    /// Writable targets that have no more than `room` bytes left.
    pub fn crowded(&self, room: u64) -> Vec<TargetId> {
        let writable = self.writable();
        writable.iter().filter(|target| target.free() <= room).map(|target| target.id()).collect()
    }

    /// What of the targets that take writes may be reserved.
    pub fn reservable(&self) -> Reservable {
        let writable = self.writable();
        let rooms = writable.iter().map(|target| reservable_room(&**target)).collect();
        Reservable { rooms, most: self.reservable_most() }
    }

    /// How much may be reserved in all: whatever is stored, so that it is known after a restart too.
    pub fn reservable_most(&self) -> u64 {
        let smallest = self.writable().iter().map(|target| target.space().capacity).min().unwrap_or(0);
        (smallest / RESERVABLE_PART).min(RESERVABLE_BYTES_MAX)
    }

    /// Bytes of file data that fit under a policy: all in all on the targets that can be read, and
    /// now on those that take writes.
    pub fn usable(&self, policy: Policy) -> (u64, u64) {
        let capacities = self.readable().iter().map(|target| target.space().capacity).collect();
        let rooms = self.writable().iter().map(|target| room_for_clients(&**target)).collect();
        (usable_bytes(capacities, policy), usable_bytes(rooms, policy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_reactor::clock::SplitMix64;

    /// Segments of a byte in each shard that fit when each takes the emptiest targets.
    fn segments(mut rooms: Vec<u64>, width: usize) -> u64 {
        let mut stored = 0;
        loop {
            rooms.sort_unstable_by(|a, b| b.cmp(a));
            if rooms.len() < width || rooms[width - 1] == 0 {
                return stored;
            }
            rooms[..width].iter_mut().for_each(|room| *room -= 1);
            stored += 1;
        }
    }

    #[test]
    fn what_fits_is_what_segments_find_room_for() {
        let mut random = SplitMix64::new(1);
        for _ in 0..500 {
            let policy = [(1, 0), (1, 1), (2, 1), (4, 2)][random.below(4) as usize];
            let policy = Policy::new(policy.0, policy.1).unwrap();
            let rooms: Vec<u64> = (0..random.below(8)).map(|_| random.below(30)).collect();
            let data = policy.data().min(rooms.len().saturating_sub(policy.parity()));
            let found = usable_bytes(rooms.clone(), policy);
            let expected = if data == 0 { 0 } else { segments(rooms.clone(), data + policy.parity()) };
            assert_eq!(found.checked_div(data as u64).unwrap_or(0), expected, "{policy:?} on {rooms:?}");
        }
        let policy = Policy::new(2, 1).unwrap();
        assert_eq!(usable_bytes(vec![30, 30, 30], policy), 60, "redundancy is taken off");
        assert_eq!(usable_bytes(vec![10, 30, 30], policy), 20, "each needs the smallest");
        assert_eq!(usable_bytes(vec![30, 30], policy), 30, "fewer data shards while a target is missing");
        assert_eq!(usable_bytes(vec![u64::MAX; 5], policy), u64::MAX);
    }
}
