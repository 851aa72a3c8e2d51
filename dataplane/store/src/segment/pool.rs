//! The node's targets as failure domains: which are up, and which to write to.

use super::write::segment_of;
use crate::{Space, StoreError, TargetStore};
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_reactor::sync::Semaphore;
use cfs_wire::blobs::{BlobInfo, BlobKind, Owner, ShardGeometry};
use cfs_wire::limits::BLOB_BYTES_MAX;
use cfs_wire::{BlobId, SegmentId, TargetId};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
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
    /// Bytes ordinary writers may still use.
    fn free(&self) -> u64;
    fn space(&self) -> Space;
    /// Why the target takes no more writes, if so.
    fn failure(&self) -> Option<String>;
    /// Reads everything that lives in these zones of the target, at no more than as many bytes per second as `pace`
    /// says each time, and hands over what does not verify as it is found.
    fn scrub<'a>(
        &'a self,
        zones: Range<u32>,
        pace: &'a dyn Fn() -> u64,
        found: &'a dyn Fn(&BlobInfo),
    ) -> LocalBoxFuture<'a, ()>;
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

    fn free(&self) -> u64 {
        self.0.space().free
    }

    fn space(&self) -> Space {
        self.0.space()
    }

    fn failure(&self) -> Option<String> {
        self.0.is_failed()
    }

    fn scrub<'a>(
        &'a self,
        zones: Range<u32>,
        pace: &'a dyn Fn() -> u64,
        found: &'a dyn Fn(&BlobInfo),
    ) -> LocalBoxFuture<'a, ()> {
        async move { _ = self.0.scrub(zones, pace, found).await }.boxed_local()
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

    /// In what damage was found since the last call.
    pub fn take_damaged(&self) -> BTreeSet<Damaged> {
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

    /// Up to `count` distinct writable targets outside `exclude`, in random order weighted by
    /// free space (weighted rendezvous: each target draws -ln(u)/weight, smallest first).
    pub fn pick(&self, count: usize, exclude: &[TargetId]) -> Vec<Rc<dyn BlobTarget>> {
        let mut drawn: Vec<(f64, Rc<dyn BlobTarget>)> = self
            .writable()
            .into_iter()
            .filter(|target| !exclude.contains(&target.id()))
            .map(|target| {
                let unit = ((self.handle.random_u64() >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
                (-unit.ln() / (target.free() as f64 + 1.0), target)
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

    /// Bytes free for file data: what clients may take of the targets, before redundancy is taken
    /// off.
    pub fn free(&self) -> u64 {
        self.writable().iter().map(|target| target.free().saturating_sub(MOVERS_ROOM)).sum()
    }
}
