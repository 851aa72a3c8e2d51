//! Redundancy over one node's targets: segments coded k+m, hot blobs in m+1 copies, and the
//! mirrored blobs that hold the Raft log and the ordered store.
//!
//! [`SegmentStore`] is the data-plane endpoint's work: `store` answers when every piece is
//! durable on distinct targets and the segment's registration is committed; `fetch` reads a
//! range from one shard and rebuilds it through parity when that shard is missing or damaged.
//! [`Mirror`] gives the control plane its [`cfs_wire::blobs::MirroredBlobs`].
//! [`repair`](SegmentStore::repair_segment) restores redundancy.
//!
//! Chunking by content, deduplication, compression and sealing belong between the arrival of
//! the bytes and [`layout`]: a chunk is the unit they work on, and `stored` in a location is
//! already separate from the plain length. None of them exists yet.

mod copies;
mod endpoint;
mod fetch;
mod hot;
mod layout;
mod mirror;
mod pool;
mod repair;
mod reservations;
mod write;

pub use cfs_codec::Backend;
pub use endpoint::DataService;
pub use mirror::Mirror;
pub use pool::{BlobTarget, Damaged, LocalTarget, MOVERS_ROOM, TargetPool, TargetState};
pub use repair::Repaired;
pub use reservations::{Reservable, Reservations};
pub use write::segment_of;

use crate::Space;
use cfs_codec::{Erasure, Geometry};
use cfs_reactor::Handle;
use cfs_reactor::collections::HashMap;
use cfs_reactor::sync::{Notify, Semaphore};
use cfs_wire::data::{DataError, Registration, ReserveCall, ReserveReply};
use cfs_wire::limits::BLOB_BYTES_MAX;
use cfs_wire::{Epoch, SegmentId};
use futures_util::future::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// Registrations kept in memory: 64 Ki of about 500 bytes is 32 MiB, and covers 128 GiB of
/// recently read data.
const REGISTRATIONS_CACHED_MAX: usize = 64 << 10;

/// The metadata side of segments: registrations and the reference epoch.
pub trait Registrar: 'static {
    /// The reference epoch to hand out with locations.
    fn epoch(&self) -> Epoch;
    fn register(&self, registration: Registration) -> LocalBoxFuture<'_, Result<(), DataError>>;
    /// Swaps one registration for another if the old one still stands.
    fn replace(&self, old: Registration, new: Registration) -> LocalBoxFuture<'_, Result<(), DataError>>;
    fn deregister(&self, segment: SegmentId) -> LocalBoxFuture<'_, Result<(), DataError>>;
    fn lookup(&self, segment: SegmentId) -> LocalBoxFuture<'_, Result<Option<Registration>, DataError>>;
}

/// Bounds on replicated small writes and on what is reserved, and what segments are coded with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentConfig {
    /// Writes up to this length become hot blobs; longer ones segments.
    pub hot_bytes_max: usize,
    /// Hundredths of a target that hot blobs may take, and memory its index may need for them.
    /// Beyond either writers go straight to short segments, and the packer is called.
    pub hot_percent_max: u64,
    pub hot_index_bytes_max: u64,
    /// What codes segments. All give the same bytes; it must be available.
    pub backend: Backend,
    /// Room that is reserved is free again when its client was silent for so long. It must not shrink
    /// from one start of the server to the next.
    pub reservation_lifetime: Duration,
}

impl Default for SegmentConfig {
    fn default() -> Self {
        // At one chunk, a 2+1 segment would store as much as two copies do and cost a
        // registration; from two chunks on it stores less.
        SegmentConfig {
            hot_bytes_max: cfs_wire::limits::CHUNK_BYTES,
            hot_percent_max: 2,
            hot_index_bytes_max: 256 << 20,
            backend: Backend::fastest(),
            // As long as a session without a sign of life.
            reservation_lifetime: Duration::from_secs(20),
        }
    }
}

/// Stores and fetches file bytes on this node's targets.
pub struct SegmentStore {
    handle: Handle,
    pool: Rc<TargetPool>,
    registrar: Rc<dyn Registrar>,
    config: SegmentConfig,
    codecs: RefCell<HashMap<(u8, u8), Rc<Erasure>>>,
    registrations: RefCell<HashMap<SegmentId, Rc<Registration>>>,
    /// Segments between their first put and their answer: not orphans although unregistered.
    in_flight: RefCell<BTreeSet<SegmentId>>,
    /// A writer met the limit of hot blobs or found no room, and the packer was not told yet.
    packer_is_called: Cell<bool>,
    packer_call: Rc<Notify>,
    degraded_reads: Cell<u64>,
    reservations: RefCell<Reservations>,
    /// One repair of a segment at a time: two of one would each rebuild it.
    repairs: Rc<Semaphore>,
}

impl SegmentStore {
    pub fn new(
        handle: &Handle,
        pool: Rc<TargetPool>,
        registrar: Rc<dyn Registrar>,
        config: SegmentConfig,
    ) -> Rc<SegmentStore> {
        Rc::new(SegmentStore {
            handle: handle.clone(),
            pool,
            registrar,
            config,
            codecs: RefCell::default(),
            registrations: RefCell::default(),
            in_flight: RefCell::default(),
            packer_is_called: Cell::new(false),
            packer_call: Notify::new(),
            degraded_reads: Cell::new(0),
            reservations: RefCell::new(Reservations::new(handle.now(), config.reservation_lifetime)),
            repairs: Semaphore::new(1),
        })
    }

    pub fn pool(&self) -> &Rc<TargetPool> {
        &self.pool
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The reference epoch handed out now.
    pub fn epoch(&self) -> Epoch {
        self.registrar.epoch()
    }

    /// Whether a segment is being stored right now.
    pub fn is_in_flight(&self, segment: SegmentId) -> bool {
        self.in_flight.borrow().contains(&segment)
    }

    /// Keeps room free for bytes that a client is going to store.
    pub fn reserve(&self, call: &ReserveCall) -> ReserveReply {
        self.reservations.borrow_mut().reserve(self.handle.now(), call, &self.pool.reservable())
    }

    /// Bytes on each target that are reserved.
    pub fn reserved_bytes(&self) -> u64 {
        self.reservations.borrow().total()
    }

    fn call_packer(&self) {
        self.packer_is_called.set(true);
        self.packer_call.notify_all();
    }

    /// Whether [`SegmentStore::packer_called`] would answer at once.
    pub fn packer_is_called(&self) -> bool {
        self.packer_is_called.get()
    }

    /// Waits until a writer has met the limit of hot blobs, or found no room, since the last
    /// answer: the packer is behind.
    pub async fn packer_called(&self) {
        while !self.packer_is_called.take() {
            self.packer_call.notified().await;
        }
    }

    /// Whether a target has so little room left that a segment's dead slots are worth what it costs to
    /// rewrite its living rest, although that is more than half of it.
    pub fn is_short_of_room(&self) -> bool {
        self.shortage_percent() > 0
    }

    /// How short of room the fullest target is: 0 with a 16th of what it can hold free, 100 with no
    /// more than is kept for movers and a shard. Of a target so small that the second is more: 0 or 100.
    pub fn shortage_percent(&self) -> u64 {
        let shortage = |space: Space| {
            let full = MOVERS_ROOM + BLOB_BYTES_MAX as u64;
            let enough = (space.capacity / 16).max(full + 1);
            (enough - space.free.clamp(full, enough)) * 100 / (enough - full)
        };
        self.pool.writable().iter().map(|target| shortage(target.space())).max().unwrap_or(0)
    }

    /// Reads so far that had to rebuild through parity or take another copy.
    pub fn degraded_reads(&self) -> u64 {
        self.degraded_reads.get()
    }

    /// A segment's registration for people who ask; `None` when it has none or it can't be had.
    pub async fn describe(&self, segment: SegmentId) -> Option<Rc<Registration>> {
        self.registration(segment).await.ok().flatten()
    }

    /// Drops a cached registration (it was replaced or removed).
    pub fn forget(&self, segment: SegmentId) {
        self.registrations.borrow_mut().remove(&segment);
    }

    fn codec(&self, data: u8, parity: u8) -> Result<Rc<Erasure>, DataError> {
        if let Some(codec) = self.codecs.borrow().get(&(data, parity)) {
            return Ok(codec.clone());
        }
        let geometry = Geometry::new(data, parity).map_err(|error| DataError::Malformed(error.to_string()))?;
        let codec = Erasure::with_backend(geometry, self.config.backend);
        let codec = Rc::new(codec.map_err(|error| DataError::Malformed(error.to_string()))?);
        self.codecs.borrow_mut().insert((data, parity), codec.clone());
        Ok(codec)
    }

    /// A segment's registration, from cache or its shard; `None`: collected.
    async fn registration(&self, segment: SegmentId) -> Result<Option<Rc<Registration>>, DataError> {
        if let Some(known) = self.registrations.borrow().get(&segment) {
            return Ok(Some(known.clone()));
        }
        let Some(found) = self.registrar.lookup(segment).await? else { return Ok(None) };
        Ok(Some(self.remember(found)))
    }

    fn remember(&self, registration: Registration) -> Rc<Registration> {
        let registration = Rc::new(registration);
        let mut cache = self.registrations.borrow_mut();
        if cache.len() >= REGISTRATIONS_CACHED_MAX {
            // Rare, and a lookup is one point read: start over instead of ordering by use.
            cache.clear();
        }
        cache.insert(registration.segment, registration.clone());
        registration
    }
}

#[cfg(test)]
#[path = "segment_tests.rs"]
mod tests;
