//! `fetch`: pieces back to bytes, through redundancy when a copy or shard is missing, damaged
//! or on an absent target.

use super::write::{part, pieces};
use super::{Damaged, SegmentStore};
use crate::{StoreError, WORK_PIECE_BYTES};
use bytes::Bytes;
use cfs_reactor::buffer::DmaBuf;
use cfs_wire::data::{DataError, FetchCall, Location, Piece, Registration, ShardPlace};
use cfs_wire::limits::{FETCH_PIECES_MAX, RPC_BULK_BYTES_MAX};
use cfs_wire::{BlobId, SegmentId, TargetId};
use futures_util::future::{join_all, try_join_all};

/// A run of stored bytes to read: neighbouring pieces of one shard are read as one.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Run {
    Hot { blob: BlobId, targets: Vec<TargetId>, offset: u32, length: u32 },
    Shard { segment: SegmentId, shard: u8, start: u32, length: u32 },
}

impl Run {
    fn of(piece: &Piece) -> Result<Run, DataError> {
        let malformed = || DataError::Malformed(format!("piece {piece:?} lies outside its chunk"));
        match &piece.location {
            Location::Hot { blob, targets, offset } => {
                Ok(Run::Hot { blob: *blob, targets: targets.to_vec(), offset: *offset, length: piece.length })
            }
            Location::Chunk { segment, shard, start, stored, offset, .. } => {
                // Chunks are stored as they are, so a part can be read and verified by page.
                let end = offset.checked_add(piece.length).ok_or_else(malformed)?;
                if end > *stored {
                    return Err(malformed());
                }
                let start = start.checked_add(*offset).ok_or_else(malformed)?;
                Ok(Run::Shard { segment: *segment, shard: *shard, start, length: piece.length })
            }
        }
    }

    /// Takes `next` in when it continues this run in the same shard.
    fn extend(&mut self, next: &Run) -> bool {
        match (self, next) {
            (
                Run::Shard { segment, shard, start, length },
                Run::Shard { segment: other, shard: other_shard, start: other_start, length: more },
            ) if segment == other && shard == other_shard && start.checked_add(*length) == Some(*other_start) => {
                *length += more;
                true
            }
            _ => false,
        }
    }
}

impl SegmentStore {
    /// The bytes of all pieces, in order.
    pub async fn fetch(&self, call: &FetchCall) -> Result<Bytes, DataError> {
        // Each costs a look into the index of every target, however few bytes it asks for.
        if call.pieces.len() > FETCH_PIECES_MAX || call.pieces.iter().any(|piece| piece.length == 0) {
            let refusal = format!("fetch of more than {FETCH_PIECES_MAX} pieces, or of an empty one");
            return Err(DataError::Malformed(refusal));
        }
        let total = call.pieces.iter().try_fold(0u64, |sum, piece| sum.checked_add(piece.length.into()));
        if total.is_none_or(|total| total > RPC_BULK_BYTES_MAX as u64) {
            return Err(DataError::Malformed(format!("fetch of more than {RPC_BULK_BYTES_MAX} bytes")));
        }
        let mut runs: Vec<Run> = Vec::with_capacity(call.pieces.len());
        for piece in &call.pieces {
            let run = Run::of(piece)?;
            if !runs.last_mut().is_some_and(|last| last.extend(&run)) {
                runs.push(run);
            }
        }
        let mut parts = try_join_all(runs.iter().map(|run| self.read_run(run))).await?;
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        let mut joined = DmaBuf::uninitialised(parts.iter().map(Bytes::len).sum());
        let mut at = 0;
        for piece in parts.iter().flat_map(|part| part.chunks(WORK_PIECE_BYTES)) {
            self.handle.work(piece.len()).await;
            joined[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        }
        Ok(joined.freeze())
    }

    async fn read_run(&self, run: &Run) -> Result<Bytes, DataError> {
        match run {
            Run::Hot { blob, targets, offset, length } => self.read_hot(*blob, targets, *offset, *length).await,
            Run::Shard { segment, shard, start, length } => {
                let Some(registration) = self.registration(*segment).await? else { return Err(DataError::Gone) };
                match self.read_shard(&registration, *shard, *start, *length).await {
                    Err(error @ (DataError::Gone | DataError::Unreadable(_))) => {
                        // The cached registration may be older than a repair or a collection.
                        self.forget(*segment);
                        match self.registration(*segment).await? {
                            None => Err(DataError::Gone),
                            Some(fresh) if fresh != registration => {
                                self.read_shard(&fresh, *shard, *start, *length).await
                            }
                            Some(_) => Err(error),
                        }
                    }
                    outcome => outcome,
                }
            }
        }
    }

    /// Any sound copy: the targets the extent names first, then any other that holds the blob
    /// (repair puts copies elsewhere without touching the extent).
    async fn read_hot(&self, blob: BlobId, named: &[TargetId], offset: u32, length: u32) -> Result<Bytes, DataError> {
        let readable = self.pool.readable();
        let (first, others): (Vec<_>, Vec<_>) = readable.into_iter().partition(|target| named.contains(&target.id()));
        let mut damage = None;
        for (tries, target) in first.into_iter().chain(others).enumerate() {
            if target.stat(blob).is_none() {
                continue;
            }
            match target.get(blob, offset, length).await {
                Ok(bytes) => {
                    if damage.is_some() {
                        self.degraded_reads.set(self.degraded_reads.get() + 1);
                    }
                    return Ok(bytes);
                }
                // Deleted while it was read.
                Err(StoreError::NotFound(_)) => {}
                // Nothing is wrong with the copy.
                Err(error @ StoreError::OutOfRange { .. }) => return Err(DataError::Malformed(error.to_string())),
                Err(error) => {
                    tracing::warn!(%blob, target = %target.id(), tries, %error, "a copy is unreadable");
                    damage = Some(error.to_string());
                    // One that failed as a whole is rebuilt when it stays away.
                    if target.failure().is_none() {
                        self.pool.note_damage(Damaged::Copies(blob));
                    }
                }
            }
        }
        // While one of its targets is present and has no copy, the blob was collected.
        let absent = !named.is_empty() && named.iter().all(|id| self.pool.get(*id).is_none());
        match damage {
            Some(detail) => Err(DataError::Unreadable(format!("hot blob {blob}: {detail}"))),
            None if absent => Err(DataError::Unreadable(format!("hot blob {blob}: no copy on a present target"))),
            None => Err(DataError::Gone),
        }
    }

    async fn read_shard(
        &self,
        registration: &Registration,
        shard: u8,
        start: u32,
        length: u32,
    ) -> Result<Bytes, DataError> {
        let place = registration.shards.iter().find(|place| place.index == shard);
        let Some(place) = place.filter(|place| start.checked_add(length).is_some_and(|end| end <= place.length)) else {
            return Err(DataError::Gone);
        };
        match self.read_place(place, start, length).await {
            Ok(bytes) => Ok(bytes),
            Err(detail) => {
                tracing::warn!(segment = %registration.segment, shard, %detail, "reading through parity");
                self.degraded_reads.set(self.degraded_reads.get() + 1);
                // A target that is away or failed as a whole is rebuilt when it stays so.
                if self.pool.get(place.target).is_some_and(|target| target.failure().is_none()) {
                    self.pool.note_damage(Damaged::Segment(registration.segment));
                }
                self.rebuild_range(registration, shard, start, length, &detail).await
            }
        }
    }

    pub(super) async fn read_place(&self, place: &ShardPlace, start: u32, length: u32) -> Result<Bytes, String> {
        let Some(target) = self.pool.get(place.target) else { return Err(format!("{} is absent", place.target)) };
        target.get(place.blob, start, length).await.map_err(|error| format!("{}: {error}", place.target))
    }

    /// A range of one shard from the same range of k others: coding is bytewise, so no more
    /// than the range is read.
    pub(super) async fn rebuild_range(
        &self,
        registration: &Registration,
        shard: u8,
        start: u32,
        length: u32,
        detail: &str,
    ) -> Result<Bytes, DataError> {
        let total = usize::from(registration.data) + usize::from(registration.parity);
        let mut ranges: Vec<Option<Bytes>> = vec![None; total];
        for (index, range) in ranges.iter_mut().enumerate().take(usize::from(registration.data)) {
            // A data shard that was never stored is all zero.
            if !registration.shards.iter().any(|place| usize::from(place.index) == index) {
                *range = Some(Bytes::new());
            }
        }
        let others: Vec<&ShardPlace> = registration.shards.iter().filter(|place| place.index != shard).collect();
        let reads = others.iter().map(|place| {
            let end = (start + length).min(place.length);
            let part = end.saturating_sub(start);
            async move { if part == 0 { Ok(Bytes::new()) } else { self.read_place(place, start, part).await } }
        });
        let mut failures = vec![detail.to_owned()];
        for (place, outcome) in others.iter().zip(join_all(reads).await) {
            match outcome {
                Ok(bytes) if usize::from(place.index) < total => ranges[usize::from(place.index)] = Some(bytes),
                Ok(_) => {}
                Err(failure) => failures.push(failure),
            }
        }
        let codec = self.codec(registration.data, registration.parity)?;
        let mut rebuilt = DmaBuf::uninitialised(length as usize);
        for piece in pieces(length as usize, total) {
            self.handle.work(piece.len() * total).await;
            let shards: Vec<Option<&[u8]>> =
                ranges.iter().map(|range| range.as_ref().map(|range| part(range, &piece))).collect();
            let lengths: Vec<usize> = shards.iter().map(|shard| shard.map_or(piece.len(), <[u8]>::len)).collect();
            let coded = codec.reconstruct(&shards, &lengths, &[usize::from(shard)]).map_err(|error| {
                DataError::Unreadable(format!("segment {}: {error}; {}", registration.segment, failures.join("; ")))
            })?;
            rebuilt[piece].copy_from_slice(&coded[0]);
        }
        Ok(rebuilt.freeze())
    }
}
