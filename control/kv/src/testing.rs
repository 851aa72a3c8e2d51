//! An in-memory [`MirroredBlobs`] with faults, for the tests of this crate and of those above it.
//!
//! A [`MemMedium`] survives its openings, as devices survive a node. It can halt at the n-th
//! change, after which nothing of that opening completes; at the next opening every put that was
//! never answered is there or not, and every id of an unanswered delete gone or not, by the seed.

use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_reactor::clock::SplitMix64;
use cfs_reactor::sync::Notify;
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobError, BlobInfo, BlobKind, MirroredBlobs, Owner, ShardGeometry};
use futures_util::future::LocalBoxFuture;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

#[derive(Clone)]
struct Stored {
    info: BlobInfo,
    payload: Bytes,
}

enum Change {
    Put(Stored),
    Delete(Vec<BlobId>),
}

#[derive(Default)]
struct Faults {
    halt_at: Option<u64>,
    put_fails_one_in: Option<u64>,
    latency: bool,
    refuses_heals: bool,
}

struct State {
    blobs: BTreeMap<BlobId, Stored>,
    /// Ids ever deleted with an answer: none may come back.
    deleted: BTreeSet<BlobId>,
    /// Begun, not answered.
    pending: BTreeMap<u64, Change>,
    next_ticket: u64,
    opening: u64,
    changes: u64,
    halted: bool,
    random: SplitMix64,
    faults: Faults,
    /// Blobs that were given all their copies.
    healed: BTreeSet<BlobId>,
}

/// What survives.
pub struct MemMedium {
    state: RefCell<State>,
    halted: Rc<Notify>,
}

/// One opening of a medium.
pub struct MemBlobs {
    medium: Rc<MemMedium>,
    handle: Handle,
    opening: u64,
}

impl MemMedium {
    pub fn new(seed: u64) -> Rc<MemMedium> {
        let state = State {
            blobs: BTreeMap::new(),
            deleted: BTreeSet::new(),
            pending: BTreeMap::new(),
            next_ticket: 0,
            opening: 0,
            changes: 0,
            halted: false,
            random: SplitMix64::new(seed),
            faults: Faults { latency: true, ..Faults::default() },
            healed: BTreeSet::new(),
        };
        Rc::new(MemMedium { state: RefCell::new(state), halted: Notify::new() })
    }

    /// Opens after a crash or for the first time: earlier openings complete nothing any more.
    pub fn open(self: &Rc<Self>, handle: &Handle) -> Rc<MemBlobs> {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        state.opening += 1;
        state.halted = false;
        state.faults.halt_at = None;
        for (_, change) in std::mem::take(&mut state.pending) {
            match change {
                Change::Put(stored) => {
                    if state.random.one_in(2) {
                        state.blobs.insert(stored.info.id, stored);
                    }
                }
                Change::Delete(ids) => {
                    for id in ids {
                        if state.random.one_in(2) {
                            state.blobs.remove(&id);
                        }
                    }
                }
            }
        }
        Rc::new(MemBlobs { medium: self.clone(), handle: handle.clone(), opening: state.opening })
    }

    /// Whether copies find no room.
    pub fn refuse_heals(&self, refuses: bool) {
        self.state.borrow_mut().faults.refuses_heals = refuses;
    }

    /// Whether a blob was given all its copies.
    pub fn is_healed(&self, id: BlobId) -> bool {
        self.state.borrow().healed.contains(&id)
    }

    /// Answers of puts and deletes so far.
    pub fn changes(&self) -> u64 {
        self.state.borrow().changes
    }

    /// The change after the next `changes` ones is never answered, nor is anything after it.
    pub fn halt_after(&self, changes: u64) {
        let mut state = self.state.borrow_mut();
        state.faults.halt_at = Some(state.changes + changes);
    }

    /// Completes when the medium halts.
    pub async fn halted(&self) {
        let halted = self.halted.notified();
        if !self.state.borrow().halted {
            halted.await;
        }
    }

    /// One put in `n` answers "no space", and its blob may be there or not.
    pub fn fail_puts(&self, one_in: Option<u64>) {
        self.state.borrow_mut().faults.put_fails_one_in = one_in;
    }

    /// Whether operations take (virtual) time; without, each gives the core up once.
    pub fn set_latency(&self, latency: bool) {
        self.state.borrow_mut().faults.latency = latency;
    }

    pub fn list(&self, kind: BlobKind) -> Vec<BlobInfo> {
        let state = self.state.borrow();
        let mut infos: Vec<BlobInfo> =
            state.blobs.values().map(|stored| stored.info).filter(|info| info.kind == kind).collect();
        infos.sort_by_key(|info| (info.owner, info.id));
        infos
    }

    pub fn bytes(&self) -> u64 {
        self.state.borrow().blobs.values().map(|stored| stored.payload.len() as u64).sum()
    }

    /// What a blob holds.
    pub fn payload(&self, id: BlobId) -> Option<Bytes> {
        self.state.borrow().blobs.get(&id).map(|stored| stored.payload.clone())
    }

    /// Takes a blob away, as when its targets are; [`MemMedium::bring_back`] undoes it.
    pub fn take_away(&self, id: BlobId) -> Option<LostBlob> {
        self.state.borrow_mut().blobs.remove(&id).map(LostBlob)
    }

    pub fn bring_back(&self, blob: LostBlob) {
        self.state.borrow_mut().blobs.insert(blob.0.info.id, blob.0);
    }

    /// Flips a bit of a blob below its checksums.
    pub fn flip_bit(&self, id: BlobId, at: usize) {
        if let Some(stored) = self.state.borrow_mut().blobs.get_mut(&id) {
            let mut payload = stored.payload.to_vec();
            payload[at / 8] ^= 1 << (at % 8);
            stored.payload = payload.into();
        }
    }
}

/// A blob that is away.
pub struct LostBlob(Stored);

impl MemBlobs {
    /// Takes the operation's time; never completes when this opening is over.
    async fn delay(&self) {
        let pause = {
            let mut state = self.medium.state.borrow_mut();
            state.faults.latency.then(|| Duration::from_micros(5 + state.random.below(60)))
        };
        match pause {
            Some(pause) => self.handle.sleep(pause).await,
            None => self.handle.yield_now().await,
        }
        let over = {
            let state = self.medium.state.borrow();
            state.halted || state.opening != self.opening
        };
        if over {
            std::future::pending::<()>().await;
        }
    }

    fn begin(&self, change: Change) -> u64 {
        let mut state = self.medium.state.borrow_mut();
        if state.opening != self.opening || state.halted {
            return u64::MAX;
        }
        state.next_ticket += 1;
        let ticket = state.next_ticket;
        state.pending.insert(ticket, change);
        ticket
    }

    /// Whether the change is done and answered; false when the medium halts at it.
    fn complete(&self, ticket: u64) -> bool {
        let mut state = self.medium.state.borrow_mut();
        if state.faults.halt_at.is_some_and(|at| state.changes >= at) {
            state.halted = true;
            drop(state);
            self.medium.halted.notify_all();
            return false;
        }
        state.changes += 1;
        match state.pending.remove(&ticket) {
            Some(Change::Put(stored)) => {
                state.blobs.insert(stored.info.id, stored);
            }
            Some(Change::Delete(ids)) => {
                for id in ids {
                    state.blobs.remove(&id);
                    state.deleted.insert(id);
                }
            }
            None => {}
        }
        true
    }
}

impl MirroredBlobs for MemBlobs {
    fn put(&self, kind: BlobKind, owner: Owner, payload: Bytes) -> LocalBoxFuture<'_, Result<BlobId, BlobError>> {
        assert!(!payload.is_empty() && payload.len() <= cfs_wire::limits::BLOB_BYTES_MAX, "{} bytes", payload.len());
        Box::pin(async move {
            let id = BlobId(self.handle.random_u128());
            let length = payload.len() as u32;
            let info = BlobInfo { id, kind, owner, geometry: ShardGeometry::NONE, length };
            let payload = Bytes::copy_from_slice(&payload);
            let ticket = self.begin(Change::Put(Stored { info, payload }));
            self.delay().await;
            let fails = {
                let mut state = self.medium.state.borrow_mut();
                let one_in = state.faults.put_fails_one_in;
                one_in.is_some_and(|n| state.random.one_in(n))
            };
            if fails {
                // Left pending: an opening after a crash may find it.
                return Err(BlobError::NoSpace { kind, needed: length.into() });
            }
            if !self.complete(ticket) {
                std::future::pending::<()>().await;
            }
            Ok(id)
        })
    }

    fn get(&self, id: BlobId, offset: u32, length: u32) -> LocalBoxFuture<'_, Result<Bytes, BlobError>> {
        Box::pin(async move {
            self.delay().await;
            let state = self.medium.state.borrow();
            let stored = state.blobs.get(&id).ok_or(BlobError::NotFound(id))?;
            let size = stored.info.length;
            let end = u64::from(offset) + u64::from(length);
            if end > u64::from(size) {
                return Err(BlobError::OutOfRange { id, offset, length, size });
            }
            // A buffer of its own, as a device would fill.
            Ok(Bytes::copy_from_slice(&stored.payload[offset as usize..end as usize]))
        })
    }

    fn delete(&self, ids: Vec<BlobId>) -> LocalBoxFuture<'_, Result<(), BlobError>> {
        Box::pin(async move {
            let ticket = self.begin(Change::Delete(ids));
            self.delay().await;
            if !self.complete(ticket) {
                std::future::pending::<()>().await;
            }
            Ok(())
        })
    }

    fn list(&self, kind: BlobKind) -> LocalBoxFuture<'_, Result<Vec<BlobInfo>, BlobError>> {
        Box::pin(async move {
            self.delay().await;
            Ok(self.medium.list(kind))
        })
    }

    fn heal(&self, id: BlobId) -> LocalBoxFuture<'_, Result<(), BlobError>> {
        Box::pin(async move {
            self.delay().await;
            let mut state = self.medium.state.borrow_mut();
            if !state.blobs.contains_key(&id) {
                return Err(BlobError::NotFound(id));
            }
            if state.faults.refuses_heals {
                return Err(BlobError::NoSpace { kind: BlobKind::Manifest, needed: 4096 });
            }
            state.healed.insert(id);
            Ok(())
        })
    }
}
