//! The packer: cold hot blobs, and the living rest of mostly dead segments, become new
//! segments. The inode's extents are swapped by compare-and-swap, so a file that is written
//! meanwhile keeps what was written; the old bytes then lose their references and go the
//! collector's way.

use crate::{MoverError, ShardCalls, all_shards, call};
use cfs_reactor::Instant;
use cfs_store::segment::SegmentStore;
use cfs_wire::blobs::BlobKind;
use cfs_wire::data::{Claim, DataError, Extent, FetchCall, Piece, Referent, Registration, Slot, StoreCall};
use cfs_wire::limits::{CHUNK_BYTES, SEGMENT_BYTES_MAX, SEGMENT_SLOTS_MAX};
use cfs_wire::meta::{ShardOp, ShardReply};
use cfs_wire::{BlobId, Ino, Policy, SegmentId, VolumeId};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::rc::Rc;
use std::time::Duration;

/// Extents of one file looked at per call.
const EXTENTS_BATCH: u32 = 512;
/// A segment is compacted when at most this share of its bytes lives (percent): rewriting half a
/// segment frees as much as it writes, less does better.
const LIVE_PERCENT_MAX: u64 = 50;
/// And where there is no room at all: any share but all.
const LIVE_PERCENT_MAX_FULL: u64 = 99;
/// Segments compacted in one round, those with the smallest living share: more wait for the next,
/// which finds them and those that died meanwhile.
const COMPACTED_MAX: usize = 256;

/// When what a round packed is off the targets at the latest, if nothing else refers to it: the
/// collector comes every two seconds.
const COLLECTED_AFTER: Duration = Duration::from_secs(10);
/// Hot blobs in one round of which all shards are asked who holds them. More wait for the next.
const ASKED_FOR_MAX: usize = 128;

/// What a round did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Packed {
    pub extents: u64,
    pub bytes: u64,
    pub segments_compacted: u64,
}

impl Packed {
    /// What a round came to that ended so. Where it got something done before there was no room any
    /// more, the room comes back with what it replaced.
    fn ended(self, outcome: Result<(), MoverError>) -> Result<Packed, MoverError> {
        match outcome {
            Err(MoverError::Data(DataError::NoSpace)) if self.extents > 0 => Ok(self),
            outcome => outcome.map(|()| self),
        }
    }
}

/// Segments by their living share, each with its dead slots.
type LeastLiving = BTreeMap<(u64, SegmentId), (Registration, Vec<u16>)>;

/// An extent on its way into a new segment.
struct Candidate {
    ino: Ino,
    policy: Policy,
    extent: Extent,
}

pub struct Packer {
    calls: Rc<dyn ShardCalls>,
    store: Rc<SegmentStore>,
    volume: VolumeId,
    /// Hot blobs of the round before: what is still there now is cold.
    seen: RefCell<BTreeSet<BlobId>>,
    /// Hot blobs that were packed for their owner, and when: only others refer to them, if anybody does.
    packed_for_owner: RefCell<BTreeMap<BlobId, Instant>>,
    /// The last of which all shards were asked.
    asked_for: Cell<BlobId>,
}

/// Hot blobs to be packed.
#[derive(Default)]
struct Cold {
    /// To be found by the inode that owns them.
    owned: BTreeMap<Ino, BTreeSet<BlobId>>,
    /// There after they were packed for their owner: other files share them, or nobody has them.
    shared: Vec<BlobId>,
}

impl Packer {
    pub fn new(calls: Rc<dyn ShardCalls>, store: Rc<SegmentStore>, volume: VolumeId) -> Packer {
        Packer {
            calls,
            store,
            volume,
            seen: RefCell::default(),
            packed_for_owner: RefCell::default(),
            asked_for: Cell::new(BlobId(0)),
        }
    }

    /// Packs what is cold, and compacts; with `pressed`, when hot blobs have met their limit or a
    /// writer found no room, packs what is not cold as well.
    pub async fn round(&self, pressed: bool) -> Result<Packed, MoverError> {
        let mut packed = Packed::default();
        let mut outcome = self.pack_hot(pressed, &mut packed).await;
        // Compaction may need less room than that, and makes more.
        if matches!(outcome, Ok(()) | Err(MoverError::Data(DataError::NoSpace))) {
            outcome = self.compact(&mut packed).await;
        }
        packed.ended(outcome)
    }

    /// Compacts only.
    pub async fn make_room(&self) -> Result<Packed, MoverError> {
        let mut packed = Packed::default();
        let outcome = self.compact(&mut packed).await;
        packed.ended(outcome)
    }

    async fn pack_hot(&self, all: bool, packed: &mut Packed) -> Result<(), MoverError> {
        let Cold { owned, shared } = self.cold(all);
        let mut batch = Batch::default();
        for (ino, blobs) in &owned {
            let ino = *ino;
            let mut offset = 0;
            loop {
                let (extents, policy) = self.extents(ino, offset).await?;
                let Some(last) = extents.last() else { break };
                offset = last.offset + u64::from(last.length);
                for extent in extents {
                    if matches!(extent.location.referent(), Referent::Hot(blob) if blobs.contains(&blob)) {
                        self.add(&mut batch, Candidate { ino, policy, extent }, packed).await?;
                    }
                }
            }
        }
        self.flush(&mut batch, packed).await?;
        let now = self.store.handle().now();
        self.packed_for_owner.borrow_mut().extend(owned.into_values().flatten().map(|blob| (blob, now)));
        for blob in shared {
            self.add_holders(&mut batch, Referent::Hot(blob), packed).await?;
            self.asked_for.set(blob);
        }
        self.flush(&mut batch, packed).await
    }

    /// Hot blobs that were there a round ago, or all.
    fn cold(&self, all: bool) -> Cold {
        let mut present = BTreeMap::new();
        for target in self.store.pool().readable() {
            present.extend(target.list(BlobKind::Hot).into_iter().map(|info| (info.id, info.owner)));
        }
        let before = self.seen.replace(present.keys().copied().collect());
        let mut packed_for_owner = self.packed_for_owner.borrow_mut();
        packed_for_owner.retain(|blob, _| present.contains_key(blob));
        let mut cold = Cold::default();
        for (blob, owner) in present {
            let ino = Ino::from_u64(owner.low);
            if packed_for_owner.contains_key(&blob) {
                continue;
            }
            if (all || before.contains(&blob)) && ino.shard().0 < self.calls.shards() {
                cold.owned.entry(ino).or_default().insert(blob);
            }
        }
        let now = self.store.handle().now();
        // From where the round before ended, and round again.
        let (done, next) = (..=self.asked_for.get(), (Bound::Excluded(self.asked_for.get()), Bound::Unbounded));
        let in_turn = packed_for_owner.range(next).chain(packed_for_owner.range(done));
        let left_over = in_turn.filter(|(_, packed)| now.saturating_since(**packed) >= COLLECTED_AFTER);
        cold.shared.extend(left_over.map(|(blob, _)| *blob).take(ASKED_FOR_MAX));
        cold
    }

    async fn extents(&self, ino: Ino, offset: u64) -> Result<(Vec<Extent>, Policy), MoverError> {
        let op = ShardOp::Extents { ino, offset, length: u64::MAX - offset, max: EXTENTS_BATCH };
        match call(&*self.calls, ino.shard(), op).await? {
            ShardReply::Extents { extents, policy } => Ok((extents, policy)),
            _ => Err(MoverError::Protocol { shard: ino.shard(), op: "Extents" }),
        }
    }

    /// Adds a candidate, packing the batch first when it is full or has another policy.
    async fn add(&self, batch: &mut Batch, candidate: Candidate, packed: &mut Packed) -> Result<(), MoverError> {
        let slots = (candidate.extent.length as usize).div_ceil(CHUNK_BYTES);
        let full = batch.bytes + candidate.extent.length as usize > SEGMENT_BYTES_MAX / 2
            || batch.slots + slots > SEGMENT_SLOTS_MAX;
        let differs = batch.candidates.first().is_some_and(|first| first.policy != candidate.policy);
        if full || differs {
            self.flush(batch, packed).await?;
        }
        batch.bytes += candidate.extent.length as usize;
        batch.slots += slots;
        batch.candidates.push(candidate);
        Ok(())
    }

    /// Stores the batch as one segment and swaps the extents.
    async fn flush(&self, batch: &mut Batch, packed: &mut Packed) -> Result<(), MoverError> {
        let Batch { candidates, .. } = std::mem::take(batch);
        let Some(first) = candidates.first() else { return Ok(()) };
        let policy = first.policy;
        let mut chunks = Vec::new();
        let mut sources: Vec<(Ino, Extent, usize)> = Vec::new();
        for candidate in &candidates {
            let extent = &candidate.extent;
            let piece = Piece { length: extent.length, location: extent.location.clone() };
            // Gone: the file changed since; its other extents still pack.
            let Ok(bytes) = self.store.fetch(&FetchCall { pieces: vec![piece] }).await else { continue };
            let first_chunk = chunks.len();
            for at in (0..bytes.len()).step_by(CHUNK_BYTES) {
                chunks.push(bytes.slice(at..(at + CHUNK_BYTES).min(bytes.len())));
            }
            sources.push((candidate.ino, extent.clone(), first_chunk));
        }
        if chunks.is_empty() {
            return Ok(());
        }
        let call_info = StoreCall { volume: self.volume, ino: Ino::ROOT, policy, claim: Claim::default() };
        let stored = self.store.store_chunks(&call_info, chunks).await?;
        let mut swaps: BTreeMap<Ino, Vec<(Extent, Vec<Extent>)>> = BTreeMap::new();
        for (ino, old, first_chunk) in sources {
            let count = (old.length as usize).div_ceil(CHUNK_BYTES);
            let mut offset = old.offset;
            let mut fresh = Vec::with_capacity(count);
            for piece in &stored.pieces[first_chunk..first_chunk + count] {
                fresh.push(Extent {
                    offset,
                    length: piece.length,
                    location: piece.location.clone(),
                    epoch: stored.epoch,
                });
                offset += u64::from(piece.length);
            }
            packed.bytes += u64::from(old.length);
            swaps.entry(ino).or_default().push((old, fresh));
        }
        for (ino, swaps) in swaps {
            let shard = ino.shard();
            let ShardReply::Swapped(swapped) = call(&*self.calls, shard, ShardOp::Swap { ino, swaps }).await? else {
                return Err(MoverError::Protocol { shard, op: "Swap" });
            };
            // Not those that were written anew meanwhile.
            packed.extents += u64::from(swapped);
        }
        Ok(())
    }

    /// Rewrites the living chunks of segments that are mostly dead; the shorter room is, the less has to
    /// be dead.
    async fn compact(&self, packed: &mut Packed) -> Result<(), MoverError> {
        let more = (LIVE_PERCENT_MAX_FULL - LIVE_PERCENT_MAX) * self.store.shortage_percent() / 100;
        let percent_max = LIVE_PERCENT_MAX + more;
        for (registration, dead) in self.least_living(percent_max).await?.into_values() {
            self.compact_segment(&registration, &dead, packed).await?;
        }
        Ok(())
    }

    /// Segments of which something lives, but no more than `percent_max`, and their dead slots; by
    /// their living share.
    async fn least_living(&self, percent_max: u64) -> Result<LeastLiving, MoverError> {
        let mut found = LeastLiving::new();
        for shard in all_shards(&*self.calls) {
            let mut after = None;
            loop {
                let reply = call(&*self.calls, shard, ShardOp::ListRegistrations { after, max: 256 }).await?;
                let ShardReply::Registrations { list, end } = reply else {
                    return Err(MoverError::Protocol { shard, op: "ListRegistrations" });
                };
                after = list.last().map(|(registration, _)| registration.segment);
                for (registration, dead) in list {
                    let percent = live_percent(&registration, &dead);
                    let segment = registration.segment;
                    if (1..=percent_max).contains(&percent) && !self.store.is_in_flight(segment) {
                        found.insert((percent, segment), (registration, dead));
                    }
                    if found.len() > COMPACTED_MAX {
                        found.pop_last();
                    }
                }
                if end || after.is_none() {
                    break;
                }
            }
        }
        Ok(found)
    }

    async fn compact_segment(
        &self,
        registration: &Registration,
        dead: &[u16],
        packed: &mut Packed,
    ) -> Result<(), MoverError> {
        let mut batch = Batch::default();
        for slot in 0..registration.slots.len() as u16 {
            if dead.contains(&slot) {
                continue;
            }
            self.add_holders(&mut batch, Referent::Slot(registration.segment, slot), packed).await?;
        }
        self.flush(&mut batch, packed).await?;
        packed.segments_compacted += 1;
        Ok(())
    }

    /// Adds all extents that refer to this, whichever files they are of.
    async fn add_holders(&self, batch: &mut Batch, referent: Referent, packed: &mut Packed) -> Result<(), MoverError> {
        for shard in all_shards(&*self.calls) {
            let reply = call(&*self.calls, shard, ShardOp::Holders { referent }).await?;
            let ShardReply::Holders(holders) = reply else {
                return Err(MoverError::Protocol { shard, op: "Holders" });
            };
            for (ino, offset) in holders {
                let op = ShardOp::Extents { ino, offset, length: 1, max: 1 };
                let ShardReply::Extents { extents, policy } = call(&*self.calls, ino.shard(), op).await? else {
                    return Err(MoverError::Protocol { shard, op: "Extents" });
                };
                for extent in extents {
                    if extent.location.referent() == referent {
                        self.add(batch, Candidate { ino, policy, extent }, packed).await?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Batch {
    candidates: Vec<Candidate>,
    bytes: usize,
    /// Slots they will take: small extents fill a segment's table before its bytes.
    slots: usize,
}

/// What share of a segment's bytes lives, in percent rounded up: 0 when nothing does.
fn live_percent(registration: &Registration, dead: &[u16]) -> u64 {
    let bytes = |slots: &mut dyn Iterator<Item = &Slot>| slots.map(|slot| u64::from(slot.stored)).sum::<u64>();
    let total = bytes(&mut registration.slots.iter());
    let living = registration.slots.iter().enumerate().filter(|(slot, _)| !dead.contains(&(*slot as u16)));
    (bytes(&mut living.map(|(_, slot)| slot)) * 100).div_ceil(total.max(1))
}
