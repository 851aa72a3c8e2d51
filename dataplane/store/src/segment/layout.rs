//! How a run of bytes becomes a segment: chunks, data shards, slots. Pure arithmetic.

use bytes::Bytes;
use cfs_reactor::buffer::DmaBuf;
use cfs_wire::SegmentId;
use cfs_wire::data::{Location, Piece, Slot};
use cfs_wire::limits::{BLOB_BYTES_MAX, CHUNK_BYTES, SEGMENT_BYTES_MAX, SEGMENT_SLOTS_MAX};

/// Data bytes of one segment under k data shards: each shard is one blob.
pub(super) fn segment_bytes_max(data: usize) -> usize {
    (data * BLOB_BYTES_MAX).min(SEGMENT_BYTES_MAX)
}

/// A segment's data laid out: shard `i` is a contiguous run of whole chunks.
pub(super) struct Layout {
    /// One per data shard, possibly empty at the end.
    pub shards: Vec<Bytes>,
    pub slots: Vec<Slot>,
}

/// Cuts `bytes` into chunks and deals them to `data` shards in file order, so that a shard is
/// a slice of the input (no copy) and a sequential read stays sequential in the shard.
pub(super) fn lay_out(bytes: &Bytes, data: usize) -> Layout {
    let chunks = bytes.len().div_ceil(CHUNK_BYTES);
    let mut shards = Vec::with_capacity(data);
    let mut slots = Vec::with_capacity(chunks);
    let mut first = 0;
    for index in 0..data {
        // The earlier shards take the remainder: later ones may be empty, and are not stored.
        let count = chunks / data + usize::from(index < chunks % data);
        let start = first * CHUNK_BYTES;
        let end = ((first + count) * CHUNK_BYTES).min(bytes.len()).max(start.min(bytes.len()));
        let shard = bytes.slice(start.min(bytes.len())..end);
        for offset in (0..shard.len()).step_by(CHUNK_BYTES) {
            let length = (shard.len() - offset).min(CHUNK_BYTES) as u32;
            slots.push(Slot { shard: index as u8, start: offset as u32, stored: length, length });
        }
        shards.push(shard);
        first += count;
    }
    Layout { shards, slots }
}

/// Packs chunks of any length into `data` shards, each chunk whole in one shard, in order.
/// `None` when a chunk or their number is out of bounds or they don't fit.
pub(super) fn pack(chunks: &[Bytes], data: usize) -> Option<Layout> {
    let fits = chunks.iter().all(|chunk| (1..=CHUNK_BYTES).contains(&chunk.len()));
    if chunks.is_empty() || chunks.len() > SEGMENT_SLOTS_MAX || !fits {
        return None;
    }
    let total: usize = chunks.iter().map(Bytes::len).sum();
    // A shard may exceed its fair share by one chunk, since chunks are not cut.
    let share = total.div_ceil(data);
    let mut shards: Vec<Vec<u8>> = vec![Vec::new(); data];
    let mut slots = Vec::with_capacity(chunks.len());
    let mut index = 0;
    for chunk in chunks {
        if shards[index].len() >= share && index + 1 < data {
            index += 1;
        }
        let length = chunk.len() as u32;
        slots.push(Slot { shard: index as u8, start: shards[index].len() as u32, stored: length, length });
        shards[index].extend_from_slice(chunk);
    }
    let bounded = shards.iter().all(|shard| shard.len() <= BLOB_BYTES_MAX);
    bounded
        .then(|| Layout { shards: shards.into_iter().map(|shard| DmaBuf::copy_of(&shard).freeze()).collect(), slots })
}

/// The locations of a segment's chunks, in file order.
pub(super) fn pieces(segment: SegmentId, slots: &[Slot]) -> Vec<Piece> {
    let piece = |(index, slot): (usize, &Slot)| Piece {
        length: slot.length,
        location: Location::Chunk {
            segment,
            slot: index as u16,
            shard: slot.shard,
            start: slot.start,
            stored: slot.stored,
            offset: 0,
        },
    };
    slots.iter().enumerate().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_input_in_order_and_no_shard_exceeds_a_blob() {
        for data in [1usize, 2, 4, 7, 32] {
            for length in [1, 100, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES - 7, segment_bytes_max(data)] {
                let input: Vec<u8> = (0..length).map(|at| (at * 31 % 251) as u8).collect();
                let bytes = Bytes::from(input);
                let layout = lay_out(&bytes, data);
                assert_eq!(layout.shards.len(), data);
                assert!(layout.shards.iter().all(|shard| shard.len() <= BLOB_BYTES_MAX));
                let mut rebuilt = Vec::new();
                for slot in &layout.slots {
                    let shard = &layout.shards[usize::from(slot.shard)];
                    rebuilt.extend_from_slice(&shard[slot.start as usize..][..slot.stored as usize]);
                }
                assert_eq!(rebuilt, bytes, "data {data}, length {length}");
                assert!(layout.shards.windows(2).all(|pair| pair[0].len() >= pair[1].len()));
            }
        }
    }
}
