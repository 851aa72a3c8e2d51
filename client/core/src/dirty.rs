//! Written bytes that are not committed yet: runs that never overlap, merged where small writes
//! follow each other.

use crate::reservation::footprint;
use bytes::{Bytes, BytesMut};
use std::collections::BTreeMap;

/// A run grows by copying up to here.
const MERGE_BYTES_MAX: usize = 1 << 20;
/// From here on a write is kept as it came, in the buffer it came in: copying costs more than a
/// further run.
const KEPT_BYTES_MIN: usize = MERGE_BYTES_MAX / 2;

/// Bytes that follow each other in the file.
enum Run {
    Kept(Bytes),
    Growing(BytesMut),
}

impl Run {
    fn new(data: Bytes) -> Run {
        if data.len() >= KEPT_BYTES_MIN { Run::Kept(data) } else { Run::Growing(BytesMut::from(data)) }
    }

    fn len(&self) -> usize {
        match self {
            Run::Kept(bytes) => bytes.len(),
            Run::Growing(bytes) => bytes.len(),
        }
    }

    /// The bytes, to be changed; copied if others may be reading them.
    fn writable(&mut self) -> &mut BytesMut {
        if let Run::Kept(bytes) = self {
            *self = Run::Growing(BytesMut::from(std::mem::take(bytes)));
        }
        match self {
            Run::Growing(bytes) => bytes,
            Run::Kept(_) => unreachable!("it was made a growing run above"),
        }
    }

    /// Keeps the first `at` bytes and gives the others.
    fn split_off(&mut self, at: usize) -> Run {
        match self {
            Run::Kept(bytes) => Run::Kept(bytes.split_off(at)),
            Run::Growing(bytes) => Run::Growing(bytes.split_off(at)),
        }
    }

    /// A small rest does not hold the large buffer it came in.
    fn let_go(mut self) -> Run {
        if self.len() < KEPT_BYTES_MIN {
            self.writable();
        }
        self
    }

    fn freeze(self) -> Bytes {
        match self {
            Run::Kept(bytes) => bytes,
            Run::Growing(bytes) => bytes.freeze(),
        }
    }

    /// What lies in a range; a copy where the run may change.
    fn part(&self, range: std::ops::Range<usize>) -> Bytes {
        match self {
            Run::Kept(bytes) => bytes.slice(range),
            Run::Growing(bytes) => Bytes::copy_from_slice(&bytes[range]),
        }
    }
}

/// Runs by their offset in the file.
#[derive(Default)]
pub(crate) struct DirtyMap {
    runs: BTreeMap<u64, Run>,
    bytes: usize,
}

/// Runs that are on their way to the server and change no more.
pub(crate) type Frozen = BTreeMap<u64, Bytes>;

impl DirtyMap {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What it can take of a target.
    pub fn footprint(&self) -> u64 {
        footprint(self.bytes, self.runs.len())
    }

    /// Where the last run ends; 0 without any.
    pub fn end(&self) -> u64 {
        self.runs.last_key_value().map_or(0, |(offset, run)| offset + run.len() as u64)
    }

    /// Puts `data` over whatever was there.
    pub fn insert(&mut self, offset: u64, data: Bytes) {
        if data.is_empty() {
            return;
        }
        let end = offset + data.len() as u64;
        if let Some((start, run)) = self.runs.range_mut(..=offset).next_back()
            && end <= start + run.len() as u64
            && data.len() < KEPT_BYTES_MIN
        {
            let at = (offset - start) as usize;
            run.writable()[at..at + data.len()].copy_from_slice(&data);
            return;
        }
        self.remove(offset, end);
        self.bytes += data.len();
        if let Some((start, Run::Growing(run))) = self.runs.range_mut(..offset).next_back()
            && start + run.len() as u64 == offset
            && run.len() + data.len() <= MERGE_BYTES_MAX
        {
            run.extend_from_slice(&data);
            return;
        }
        self.runs.insert(offset, Run::new(data));
    }

    /// Cuts a range out.
    fn remove(&mut self, offset: u64, end: u64) {
        if let Some((&start, run)) = self.runs.range_mut(..offset).next_back() {
            let run_end = start + run.len() as u64;
            if run_end > offset {
                let mut cut = run.split_off((offset - start) as usize);
                self.bytes -= cut.len();
                if run_end > end {
                    let tail = cut.split_off((end - offset) as usize);
                    self.bytes += tail.len();
                    self.runs.insert(end, tail.let_go());
                }
                if let Some(head) = self.runs.remove(&start) {
                    self.runs.insert(start, head.let_go());
                }
            }
        }
        while let Some((start, length)) = self.runs.range(offset..end).next().map(|(start, run)| (*start, run.len())) {
            let Some(mut run) = self.runs.remove(&start) else { return };
            self.bytes -= length;
            if start + length as u64 > end {
                let tail = run.split_off((end - start) as usize);
                self.bytes += tail.len();
                self.runs.insert(end, tail.let_go());
            }
        }
    }

    /// Takes everything, leaving the map empty.
    pub fn freeze(&mut self) -> Frozen {
        self.bytes = 0;
        std::mem::take(&mut self.runs).into_iter().map(|(offset, run)| (offset, run.freeze())).collect()
    }

    /// What lies in a range, as it is now.
    pub fn overlay(&self, offset: u64, length: usize, into: &mut Vec<(u64, Bytes)>) {
        let end = offset + length as u64;
        let first = self.runs.range(..offset).next_back().map_or(offset, |(start, _)| *start);
        for (start, run) in self.runs.range(first..end) {
            let (from, to) = (offset.max(*start), end.min(start + run.len() as u64));
            if from < to {
                into.push((from, run.part((from - start) as usize..(to - start) as usize)));
            }
        }
    }
}

/// What of `frozen` lies in a range.
pub(crate) fn overlay_frozen(frozen: &Frozen, offset: u64, length: usize, into: &mut Vec<(u64, Bytes)>) {
    let end = offset + length as u64;
    let first = frozen.range(..offset).next_back().map_or(offset, |(start, _)| *start);
    for (start, run) in frozen.range(first..end) {
        let (from, to) = (offset.max(*start), end.min(start + run.len() as u64));
        if from < to {
            into.push((from, run.slice((from - start) as usize..(to - start) as usize)));
        }
    }
}

pub(crate) fn frozen_bytes(frozen: &Frozen) -> usize {
    frozen.values().map(Bytes::len).sum()
}

pub(crate) fn frozen_end(frozen: &Frozen) -> u64 {
    frozen.last_key_value().map_or(0, |(offset, run)| offset + run.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_reactor::clock::SplitMix64;

    /// What was written, byte by byte; writes are of up to an eighth of `space`.
    fn against_an_array(seed: u64, space: usize, steps: u64) {
        let longest = space / 8;
        let mut random = SplitMix64::new(seed);
        let mut oracle: Vec<Option<u8>> = vec![None; space];
        let mut map = DirtyMap::default();
        for step in 0..steps {
            let offset = random.below((space - longest) as u64);
            let length = 1 + random.below(longest as u64) as usize;
            let data: Vec<u8> = (0..length).map(|at| (step as u8).wrapping_add(at as u8)).collect();
            for (at, byte) in data.iter().enumerate() {
                oracle[offset as usize + at] = Some(*byte);
            }
            map.insert(offset, Bytes::from(data));
            let (from, length) = (random.below(space as u64 / 2), random.below(space as u64 / 2) as usize);
            let mut found = Vec::new();
            map.overlay(from, length, &mut found);
            let mut seen = vec![None; length];
            for (start, bytes) in found {
                for (at, byte) in bytes.iter().enumerate() {
                    seen[(start - from) as usize + at] = Some(*byte);
                }
            }
            assert_eq!(seen, oracle[from as usize..from as usize + length], "seed {seed}, step {step}");
            assert_eq!(map.bytes(), oracle.iter().flatten().count(), "seed {seed}, step {step}");
            if random.one_in(40) {
                let frozen = map.freeze();
                let mut seen = Vec::new();
                overlay_frozen(&frozen, 0, space, &mut seen);
                let total: usize = seen.iter().map(|(_, bytes)| bytes.len()).sum();
                assert_eq!(total, frozen_bytes(&frozen), "seed {seed}");
                for (start, bytes) in seen {
                    for (at, byte) in bytes.iter().enumerate() {
                        assert_eq!(oracle[start as usize + at], Some(*byte), "seed {seed}");
                    }
                }
                oracle.fill(None);
                assert!(map.is_empty() && map.end() == 0);
            }
        }
    }

    #[test]
    fn runs_hold_the_last_byte_written_everywhere() {
        for seed in 0..40 {
            against_an_array(seed, 640, 300);
        }
        // Every other write is kept as it came.
        against_an_array(40, 16 * KEPT_BYTES_MIN, 12);
    }

    #[test]
    fn a_large_write_stays_where_it_is_until_a_small_one_goes_over_it() {
        let mut map = DirtyMap::default();
        let large = Bytes::from(vec![1u8; KEPT_BYTES_MIN]);
        map.insert(5, large.clone());
        assert_eq!(map.freeze()[&5].as_ptr(), large.as_ptr(), "not copied");

        map.insert(5, large.clone());
        let mut before = Vec::new();
        map.overlay(5, 100, &mut before);
        map.insert(10, Bytes::from_static(b"over"));
        let frozen = map.freeze();
        assert_eq!(frozen.keys().collect::<Vec<_>>(), [&5]);
        let expected = [&[1; 5][..], b"over", &[1; KEPT_BYTES_MIN - 9]].concat();
        assert!(frozen[&5] == expected);
        assert_eq!(before, [(5, large.slice(..100))], "what was read does not change");
    }

    #[test]
    fn what_a_later_write_leaves_of_a_large_one_does_not_hold_its_buffer() {
        let mut map = DirtyMap::default();
        struct Buffer(Vec<u8>, #[allow(dead_code, reason = "counts the buffers that are held")] std::sync::Arc<()>);
        impl AsRef<[u8]> for Buffer {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        let buffers = std::sync::Arc::new(());
        // Each leaves a byte of the one before, at its beginning or its end.
        for offset in (0..20).chain((0..20).rev()) {
            let buffer = Buffer(vec![offset as u8; KEPT_BYTES_MIN], buffers.clone());
            map.insert(offset, Bytes::from_owner(buffer));
            assert!(std::sync::Arc::strong_count(&buffers) <= 2, "no more than the last one");
        }
        assert_eq!(map.bytes(), KEPT_BYTES_MIN + 19);
    }

    #[test]
    fn small_writes_that_follow_each_other_become_one_run() {
        let mut map = DirtyMap::default();
        for at in 0..100u64 {
            map.insert(at * 10, Bytes::from_static(b"0123456789"));
        }
        let frozen = map.freeze();
        assert_eq!(frozen.len(), 1);
        assert_eq!(frozen_end(&frozen), 1000);
    }
}
