//! `store`: from bytes to durable pieces.

use super::layout::{self, Layout};
use super::{BlobTarget, MOVERS_ROOM, SegmentStore};
use crate::{StoreError, WORK_PIECE_BYTES};
use bytes::Bytes;
use cfs_reactor::buffer::DmaBuf;
use cfs_wire::blobs::{BlobKind, Owner, ShardGeometry};
use cfs_wire::data::{Claim, DataError, Piece, Registration, ShardPlace, StoreCall, StoreReply};
use cfs_wire::limits::{PAGE, STORE_BYTES_MAX};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{BlobId, Epoch, SegmentId, TargetId};
use futures_util::future::{join, join_all, try_join_all};
use std::ops::Range;
use std::rc::Rc;

/// One shard on its way to a target.
struct Shard {
    index: u8,
    kind: BlobKind,
    payload: Bytes,
    target: Rc<dyn BlobTarget>,
    blob: BlobId,
}

impl Shard {
    fn place(&self) -> ShardPlace {
        ShardPlace { index: self.index, target: self.target.id(), blob: self.blob, length: self.payload.len() as u32 }
    }
}

/// Who stores, and so what room has to be left.
#[derive(Clone, Copy)]
pub(super) enum Taker<'a> {
    Client(&'a Claim),
    Mover,
}

/// A segment being stored; leaves the in-flight set whichever way `store` ends.
pub(super) struct InFlight<'a> {
    store: &'a SegmentStore,
    segment: SegmentId,
}

impl<'a> InFlight<'a> {
    pub(super) fn new(store: &'a SegmentStore, segment: SegmentId) -> InFlight<'a> {
        store.in_flight.borrow_mut().insert(segment);
        InFlight { store, segment }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.store.in_flight.borrow_mut().remove(&self.segment);
    }
}

/// The owner words of a segment's shards.
pub(super) fn segment_owner(segment: SegmentId) -> Owner {
    Owner { high: (segment.0 >> 64) as u64, low: segment.0 as u64 }
}

/// The segment a data or parity shard belongs to.
pub fn segment_of(owner: Owner) -> SegmentId {
    SegmentId((u128::from(owner.high) << 64) | u128::from(owner.low))
}

impl SegmentStore {
    /// Makes `bytes` durable under the call's policy. Answers when every piece is on distinct
    /// targets and every segment is registered; a failure leaves only garbage.
    pub async fn store(&self, call: &StoreCall, bytes: Bytes) -> Result<StoreReply, DataError> {
        if bytes.is_empty() || bytes.len() > STORE_BYTES_MAX {
            let message = format!("store of {} bytes; 1 to {STORE_BYTES_MAX} are taken", bytes.len());
            return Err(DataError::Malformed(message));
        }
        let reply = self.store_for_client(call, bytes).await?;
        self.reservations.borrow_mut().used(&call.claim);
        Ok(reply)
    }

    async fn store_for_client(&self, call: &StoreCall, bytes: Bytes) -> Result<StoreReply, DataError> {
        let epoch = self.registrar.epoch();
        let taker = Taker::Client(&call.claim);
        if bytes.len() <= self.config.hot_bytes_max && self.hot_has_room() {
            let piece = self.store_hot(call, bytes).await?;
            return Ok(StoreReply { epoch, pieces: vec![piece] });
        }
        let data = self.data_shards(call)?;
        let step = layout::segment_bytes_max(data);
        let runs = (0..bytes.len()).step_by(step).map(|at| bytes.slice(at..(at + step).min(bytes.len())));
        let stored = try_join_all(runs.map(|run| self.store_segment(call, epoch, layout::lay_out(&run, data), taker)));
        let stored = stored.await?;
        Ok(StoreReply { epoch, pieces: stored.into_iter().flatten().collect() })
    }

    /// Data shards possible now: m is kept, k shrinks with the targets that are up.
    fn data_shards(&self, call: &StoreCall) -> Result<usize, DataError> {
        let up = self.pool.writable().len();
        let parity = call.policy.parity();
        if up < parity + 1 {
            return Err(DataError::TooFewTargets { up: up as u32, needed: parity as u32 + 1 });
        }
        Ok(call.policy.data().min(up - parity))
    }

    /// Stores given chunks (each 1 byte to `CHUNK_BYTES`, together at most one segment) as one
    /// segment; the reply has one piece per chunk. For movers: it takes the room kept for them too.
    pub async fn store_chunks(&self, call: &StoreCall, chunks: Vec<Bytes>) -> Result<StoreReply, DataError> {
        let epoch = self.registrar.epoch();
        let data = self.data_shards(call)?;
        let layout = layout::pack(&chunks, data)
            .ok_or_else(|| DataError::Malformed(format!("{} chunks do not fit one segment", chunks.len())))?;
        let pieces = self.store_segment(call, epoch, layout, Taker::Mover).await?;
        Ok(StoreReply { epoch, pieces })
    }

    async fn store_segment(
        &self,
        call: &StoreCall,
        epoch: Epoch,
        layout: Layout,
        taker: Taker<'_>,
    ) -> Result<Vec<Piece>, DataError> {
        let segment = SegmentId(self.handle.random_u128());
        let _in_flight = InFlight::new(self, segment);
        let parity = call.policy.parity();
        let Layout { shards: data_shards, slots } = layout;
        let data = data_shards.len();
        let parity_shards = self.encode(data, parity, &data_shards).await?;
        let longest = data_shards.iter().map(Bytes::len).max().unwrap_or(0) as u64;
        let needed = data_shards.iter().filter(|shard| !shard.is_empty()).count() + parity;
        let crowded = self.check_room(longest, needed, taker)?;
        let shards = self.assign(data_shards, parity_shards, &crowded)?;
        let registration = Registration {
            segment,
            volume: call.volume,
            epoch,
            data: data as u8,
            parity: parity as u8,
            shards: shards.iter().map(Shard::place).collect(),
            slots,
        };
        let register = async {
            if planted::is(Bug::SegmentSkipRegistration) {
                return Ok(());
            }
            self.registrar.register(registration.clone()).await
        };
        let (placed, registered) = join(self.put_shards(&registration, shards, crowded), register).await;
        let outcome = match (placed, registered) {
            (Ok(places), Ok(())) => self.settle(&registration, places).await,
            (Ok(places), Err(error)) => {
                self.discard(&registration, &places).await;
                Err(error)
            }
            (Err((places, error)), _) => {
                self.discard(&registration, &places).await;
                Err(error)
            }
        };
        let registration = outcome?;
        let pieces = layout::pieces(segment, &registration.slots);
        self.remember(registration);
        Ok(pieces)
    }

    /// Refuses before anything is put or registered what would not find room on `needed` targets, with
    /// what is kept for others left over: on a full cluster each attempt would otherwise cost two
    /// entries of the log. Answers the targets that have no such room for `longest` bytes. Whoever puts
    /// on the others at once, without waiting, leaves what is reserved.
    pub(super) fn check_room(&self, longest: u64, needed: usize, taker: Taker<'_>) -> Result<Vec<TargetId>, DataError> {
        let (claim, movers) = match taker {
            Taker::Client(claim) if claim.answered => (*claim, 0),
            Taker::Client(claim) => (*claim, MOVERS_ROOM),
            Taker::Mover => (Claim::default(), 0),
        };
        let most = self.pool.reservable_most();
        let kept = self.reservations.borrow_mut().kept_from(self.handle.now(), &claim, most);
        let crowded = |kept: u64| self.pool.crowded((longest + PAGE as u64).saturating_add(kept));
        let up = self.pool.writable().len();
        let full = |crowded: &[TargetId]| up >= needed && up - crowded.len() < needed;
        // Those that a predecessor may have made promises on: soon it is known.
        let unsettled = crowded(kept.known + movers + kept.unknown);
        if !full(&unsettled) {
            return Ok(unsettled);
        }
        // Its own refusal tells the packer nothing new.
        if matches!(taker, Taker::Mover) {
            return Err(DataError::NoSpace);
        }
        self.call_packer();
        match full(&crowded(kept.known + movers)) {
            true => Err(DataError::NoSpace),
            false => Err(DataError::Starting),
        }
    }

    pub(super) async fn encode(&self, data: usize, parity: usize, shards: &[Bytes]) -> Result<Vec<Bytes>, DataError> {
        if parity == 0 {
            return Ok(Vec::new());
        }
        let codec = self.codec(data as u8, parity as u8)?;
        let length = shards.iter().map(Bytes::len).max().unwrap_or(0);
        let mut buffers: Vec<DmaBuf> = (0..parity).map(|_| DmaBuf::uninitialised(length)).collect();
        for piece in pieces(length, data + parity) {
            self.handle.work(piece.len() * (data + parity)).await;
            let inputs: Vec<&[u8]> = shards.iter().map(|shard| part(shard, &piece)).collect();
            let mut outputs: Vec<&mut [u8]> = buffers.iter_mut().map(|buffer| &mut buffer[piece.clone()]).collect();
            codec.encode(&inputs, &mut outputs).map_err(|error| DataError::Malformed(error.to_string()))?;
        }
        Ok(buffers.into_iter().map(DmaBuf::freeze).collect())
    }

    /// Gives each shard that has bytes its own target, none of the `crowded` ones.
    fn assign(&self, data: Vec<Bytes>, parity: Vec<Bytes>, crowded: &[TargetId]) -> Result<Vec<Shard>, DataError> {
        let count = data.len();
        let kinds = data.into_iter().map(|shard| (BlobKind::Data, shard));
        let kinds = kinds.chain(parity.into_iter().map(|shard| (BlobKind::Parity, shard)));
        let stored: Vec<(usize, (BlobKind, Bytes))> =
            kinds.enumerate().filter(|(_, (_, payload))| !payload.is_empty()).collect();
        debug_assert!(stored.iter().take(count).any(|(_, (kind, _))| *kind == BlobKind::Data));
        let mut targets = self.pool.pick(stored.len(), crowded);
        if targets.len() < stored.len() {
            return Err(DataError::TooFewTargets { up: targets.len() as u32, needed: stored.len() as u32 });
        }
        if planted::is(Bug::SegmentShareDomain) {
            targets = vec![targets[0].clone(); stored.len()];
        }
        let shard = |((index, (kind, payload)), target): ((usize, (BlobKind, Bytes)), Rc<dyn BlobTarget>)| Shard {
            index: index as u8,
            kind,
            payload,
            target,
            blob: BlobId(self.handle.random_u128()),
        };
        Ok(stored.into_iter().zip(targets).map(shard).collect())
    }

    /// Puts every shard, re-placing those that fail on targets that are not `crowded`; all are
    /// durable when this answers. On failure it tells which places may hold something.
    async fn put_shards(
        &self,
        registration: &Registration,
        mut shards: Vec<Shard>,
        crowded: Vec<TargetId>,
    ) -> Result<Vec<ShardPlace>, (Vec<ShardPlace>, DataError)> {
        if planted::is(Bug::SegmentAckEarly)
            && let Some(last) = shards.last()
        {
            // The last shard is written after the answer.
            let (target, owner) = (last.target.clone(), segment_owner(registration.segment));
            let (blob, kind, payload) = (last.blob, last.kind, last.payload.clone());
            let geometry = shard_geometry(registration, last.index);
            self.handle.spawn(async move { target.put(blob, kind, owner, geometry, payload).await });
            let rest = &shards[..shards.len() - 1];
            let _ = join_all(rest.iter().map(|shard| put(registration, shard))).await;
            return Ok(shards.iter().map(Shard::place).collect());
        }
        let mut pending: Vec<usize> = (0..shards.len()).collect();
        let mut tried = crowded;
        tried.extend(shards.iter().map(|shard| shard.target.id()));
        while !pending.is_empty() {
            let outcomes = join_all(pending.iter().map(|at| put(registration, &shards[*at]))).await;
            let mut failed = Vec::new();
            for (at, outcome) in pending.iter().zip(outcomes) {
                let Err(error) = outcome else { continue };
                tracing::warn!(segment = %registration.segment, target = %shards[*at].target.id(), %error, "a shard was not written");
                if planted::is(Bug::SegmentSkipReplace) {
                    continue;
                }
                failed.push((*at, error));
            }
            for (at, error) in &failed {
                let Some(target) = self.pool.pick(1, &tried).pop() else {
                    let places = shards.iter().map(Shard::place).collect();
                    return Err((places, self.no_place(registration, error)));
                };
                tried.push(target.id());
                shards[*at].target = target;
                // A retry takes a new id: the failed one may exist on the failed target.
                shards[*at].blob = BlobId(self.handle.random_u128());
            }
            pending = failed.into_iter().map(|(at, _)| at).collect();
        }
        Ok(shards.iter().map(Shard::place).collect())
    }

    /// What a failed shard with nowhere else to go means for the caller.
    fn no_place(&self, registration: &Registration, error: &StoreError) -> DataError {
        if matches!(error, StoreError::NoSpace { .. }) {
            return DataError::NoSpace;
        }
        // The whole store is tried again, then with fewer data shards.
        let needed = u32::from(registration.parity) + 1;
        DataError::TooFewTargets { up: self.pool.writable().len() as u32, needed }
    }

    /// Corrects the registration if shards ended up elsewhere than planned.
    async fn settle(&self, planned: &Registration, places: Vec<ShardPlace>) -> Result<Registration, DataError> {
        if places == planned.shards {
            return Ok(planned.clone());
        }
        let actual = Registration { shards: places, ..planned.clone() };
        self.registrar.replace(planned.clone(), actual.clone()).await?;
        Ok(actual)
    }

    /// Takes a failed attempt back as far as possible; what stays is an orphan.
    async fn discard(&self, registration: &Registration, places: &[ShardPlace]) {
        let deletions = places.iter().chain(&registration.shards).filter_map(|place| {
            let target = self.pool.get(place.target)?;
            let blob = place.blob;
            Some(async move { target.delete(vec![blob]).await })
        });
        join_all(deletions).await;
        if let Err(error) = self.registrar.deregister(registration.segment).await {
            tracing::warn!(segment = %registration.segment, %error, "a failed segment stays registered until collected");
        }
    }
}

/// Cuts shards of `length` bytes, `count` of them coded together, into ranges of which each is little
/// work: coding is bytewise, so the ranges have nothing to do with each other.
pub(super) fn pieces(length: usize, count: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (WORK_PIECE_BYTES / count).next_multiple_of(PAGE);
    (0..length).step_by(step).map(move |at| at..(at + step).min(length))
}

/// What a shard has of a range; one that ends before it nothing.
pub(super) fn part<'a>(shard: &'a [u8], range: &Range<usize>) -> &'a [u8] {
    &shard[range.start.min(shard.len())..range.end.min(shard.len())]
}

pub(super) fn shard_geometry(registration: &Registration, index: u8) -> ShardGeometry {
    ShardGeometry { data: registration.data, parity: registration.parity, index }
}

async fn put(registration: &Registration, shard: &Shard) -> Result<(), StoreError> {
    let owner = segment_owner(registration.segment);
    let geometry = shard_geometry(registration, shard.index);
    shard.target.put(shard.blob, shard.kind, owner, geometry, shard.payload.clone()).await
}
