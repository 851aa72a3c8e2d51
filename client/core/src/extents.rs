//! What is known of where one file's bytes are: ranges that were asked for, and the extents and
//! inline bytes in them.

use crate::read::Whence;
use bytes::Bytes;
use cfs_wire::data::{Extent, Piece};
use cfs_wire::limits::INLINE_BYTES_MAX;
use cfs_wire::meta::ExtentsReply;
use std::collections::BTreeMap;

/// Extents remembered of one file: 64 KiB chunks make this 4 GiB of file.
const EXTENTS_MAX: usize = 65_536;

/// Where a run of file bytes comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    Hole,
    Inline(Bytes),
    Stored(Piece),
}

/// A run of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Run {
    pub offset: u64,
    pub length: u32,
    pub source: Source,
}

#[derive(Default)]
pub(crate) struct ExtentCache {
    /// Start and end of what is known, not touching.
    known: BTreeMap<u64, u64>,
    extents: BTreeMap<u64, Extent>,
    inline: Bytes,
}

impl ExtentCache {
    pub fn clear(&mut self) {
        *self = ExtentCache::default();
    }

    /// Forgets everything when so many more would be too many.
    pub fn make_room(&mut self, more: usize) {
        if self.extents.len() + more > EXTENTS_MAX {
            self.clear();
        }
    }

    /// Takes in the answer to a question about a range that began at `offset`.
    pub fn learn(&mut self, offset: u64, reply: &ExtentsReply) {
        let end = reply.covered.max(offset);
        self.cut(offset, end);
        for extent in &reply.extents {
            let extent_end = extent.offset.saturating_add(extent.length.into());
            // An extent that reaches out of the range is as true outside as inside.
            self.cut(extent.offset, extent_end);
            self.extents.insert(extent.offset, extent.clone());
            self.know(extent.offset, extent_end);
        }
        if offset < INLINE_BYTES_MAX as u64 || reply.inline.is_some() {
            self.inline = reply.inline.clone().map(Bytes::from).unwrap_or_default();
        }
        self.know(offset, end);
    }

    /// New bytes of our own are committed there.
    pub fn replace(&mut self, extent: Extent) {
        self.make_room(1);
        let end = extent.offset + u64::from(extent.length);
        self.cut(extent.offset, end);
        self.know(extent.offset, end);
        self.extents.insert(extent.offset, extent);
    }

    /// The runs of a range in order, or `None` if some of it is not known.
    pub fn runs(&self, offset: u64, length: u64) -> Option<Vec<Run>> {
        let end = offset.checked_add(length)?;
        let (_, known_end) = self.known.range(..=offset).next_back()?;
        if *known_end < end {
            return None;
        }
        let mut runs = Vec::new();
        let mut at = offset;
        let first = self.extents.range(..=offset).next_back().map_or(offset, |(start, _)| *start);
        for (start, extent) in self.extents.range(first..end) {
            let extent_end = start + u64::from(extent.length);
            let (from, to) = ((*start).max(at), extent_end.min(end));
            if from >= to {
                continue;
            }
            self.fill_gap(&mut runs, at, from);
            let length = (to - from) as u32;
            let location = extent.location.skip((from - start) as u32);
            runs.push(Run { offset: from, length, source: Source::Stored(Piece { length, location }) });
            at = to;
        }
        self.fill_gap(&mut runs, at, end);
        Some(runs)
    }

    /// The extents that lie in a range, cut to it.
    pub fn extents(&self, offset: u64, end: u64) -> Vec<Extent> {
        let first = self.extents.range(..=offset).next_back().map_or(offset, |(start, _)| *start);
        let cut = |extent: &Extent| {
            let (from, to) = (extent.offset.max(offset), (extent.offset + u64::from(extent.length)).min(end));
            (from < to).then(|| Extent {
                offset: from,
                length: (to - from) as u32,
                location: extent.location.skip((from - extent.offset) as u32),
                epoch: extent.epoch,
            })
        };
        self.extents.range(first..end).filter_map(|(_, extent)| cut(extent)).collect()
    }

    /// Where no extent lies there are inline bytes, then zeros.
    fn fill_gap(&self, runs: &mut Vec<Run>, mut from: u64, to: u64) {
        let inline_end = (self.inline.len() as u64).min(to);
        if from < inline_end {
            let bytes = self.inline.slice(from as usize..inline_end as usize);
            runs.push(Run { offset: from, length: bytes.len() as u32, source: Source::Inline(bytes) });
            from = inline_end;
        }
        while from < to {
            let length = (to - from).min(u64::from(u32::MAX)) as u32;
            runs.push(Run { offset: from, length, source: Source::Hole });
            from += u64::from(length);
        }
    }

    fn know(&mut self, offset: u64, end: u64) {
        if offset >= end {
            return;
        }
        let (mut from, mut to) = (offset, end);
        while let Some((start, known_end)) = self.known.range(..=to).next_back().map(|(start, end)| (*start, *end)) {
            if known_end < from {
                break;
            }
            (from, to) = (from.min(start), to.max(known_end));
            self.known.remove(&start);
        }
        self.known.insert(from, to);
    }

    /// Forgets the extents in a range, keeping what sticks out of it.
    fn cut(&mut self, offset: u64, end: u64) {
        let first = self.extents.range(..=offset).next_back().map_or(offset, |(start, _)| *start);
        let touched: Vec<u64> = self.extents.range(first..end).map(|(start, _)| *start).collect();
        for start in touched {
            let Some(extent) = self.extents.remove(&start) else { continue };
            let extent_end = start + u64::from(extent.length);
            if extent_end <= offset {
                self.extents.insert(start, extent);
                continue;
            }
            if start < offset {
                self.extents.insert(start, Extent { length: (offset - start) as u32, ..extent.clone() });
            }
            if extent_end > end {
                let location = extent.location.skip((end - start) as u32);
                let length = (extent_end - end) as u32;
                self.extents.insert(end, Extent { offset: end, length, location, epoch: extent.epoch });
            }
        }
    }
}

/// The first data or hole from `at` in the part of a file that a reply covers.
pub(crate) fn place_in(reply: &ExtentsReply, at: u64, whence: Whence) -> Option<u64> {
    let covered = reply.covered.min(reply.attr.size);
    let inline = reply.inline.as_ref().map_or(0, |bytes| bytes.len() as u64);
    let stored = reply.extents.iter().map(|extent| (extent.offset, extent.offset.saturating_add(extent.length.into())));
    let mut from = at;
    for (start, end) in std::iter::once((0, inline)).chain(stored) {
        if end <= from {
            continue;
        }
        match whence {
            Whence::Data => return Some(start.max(from)).filter(|found| *found < covered),
            Whence::Hole if start > from => break,
            Whence::Hole => from = end,
        }
    }
    (whence == Whence::Hole && from < covered).then_some(from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_reactor::clock::SplitMix64;
    use cfs_wire::data::Location;
    use cfs_wire::meta::{Attr, FileKind, Grant};
    use cfs_wire::{BlobId, Epoch, Ino, Policy, Timestamp};

    fn extent(offset: u64, length: u32, blob: u128) -> Extent {
        let location = Location::Hot { blob: BlobId(blob), targets: Default::default(), offset: 0 };
        Extent { offset, length, location, epoch: Epoch(1) }
    }

    fn reply(extents: Vec<Extent>, covered: u64, inline: Option<Vec<u8>>) -> ExtentsReply {
        let time = Timestamp::default();
        let attr = Attr {
            ino: Ino::ROOT,
            kind: FileKind::File,
            mode: 0,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: covered,
            allocated: 0,
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
            version: 0,
            has_xattrs: false,
            policy: Policy::new(1, 0).unwrap(),
        };
        ExtentsReply { attr, grant: Grant::default(), inline, extents, covered }
    }

    #[test]
    fn only_what_was_asked_for_is_answered() {
        let mut cache = ExtentCache::default();
        cache.learn(100, &reply(vec![extent(120, 10, 1)], 200, None));
        assert_eq!(cache.runs(90, 20), None);
        assert_eq!(cache.runs(190, 20), None);
        let runs = cache.runs(100, 100).unwrap();
        let shape: Vec<(u64, u32, bool)> =
            runs.iter().map(|run| (run.offset, run.length, run.source == Source::Hole)).collect();
        assert_eq!(shape, [(100, 20, true), (120, 10, false), (130, 70, true)]);
    }

    #[test]
    fn an_extent_wins_over_the_inline_head() {
        let mut cache = ExtentCache::default();
        cache.learn(0, &reply(vec![extent(2, 2, 9)], 10, Some(b"abcdef".to_vec())));
        let runs = cache.runs(0, 8).unwrap();
        assert_eq!(runs[0].source, Source::Inline(Bytes::from_static(b"ab")));
        assert!(matches!(runs[1].source, Source::Stored(_)));
        assert_eq!(runs[2].source, Source::Inline(Bytes::from_static(b"ef")));
        assert_eq!((runs[3].offset, runs[3].length, &runs[3].source), (6, 2, &Source::Hole));
    }

    #[test]
    fn replaced_runs_read_as_an_array_says() {
        for seed in 0..30 {
            const SPACE: u64 = 500;
            let mut random = SplitMix64::new(seed);
            let mut cache = ExtentCache::default();
            cache.learn(0, &reply(Vec::new(), SPACE, None));
            // For each byte which blob it is in and where.
            let mut oracle: Vec<Option<(u128, u32)>> = vec![None; SPACE as usize];
            for blob in 1..120u128 {
                let (offset, length) = (random.below(SPACE - 60), 1 + random.below(60) as u32);
                cache.replace(extent(offset, length, blob));
                for at in 0..length {
                    oracle[(offset + u64::from(at)) as usize] = Some((blob, at));
                }
                let mut seen = Vec::new();
                for run in cache.runs(0, SPACE).unwrap() {
                    assert_eq!(run.offset, seen.len() as u64, "seed {seed}");
                    for at in 0..run.length {
                        seen.push(match &run.source {
                            Source::Stored(piece) => match piece.location.skip(at) {
                                Location::Hot { blob, offset, .. } => Some((blob.0, offset)),
                                Location::Chunk { .. } => None,
                            },
                            _ => None,
                        });
                    }
                }
                assert_eq!(seen, oracle, "seed {seed}, blob {blob}");
            }
        }
    }

    fn part(size: u64, inline: Option<usize>, extents: &[(u64, u32)], covered: u64) -> ExtentsReply {
        let extents = extents.iter().map(|(offset, length)| extent(*offset, *length, 1)).collect();
        let mut part = reply(extents, covered, inline.map(|length| vec![1; length]));
        part.attr.size = size;
        part
    }

    #[test]
    fn data_and_holes_are_found_in_what_a_reply_covers_and_nowhere_else() {
        let gaps = part(1000, None, &[(100, 50), (150, 50), (300, 100)], 400);
        let data = [0, 99, 100, 199, 200, 350].map(|at| place_in(&gaps, at, Whence::Data));
        assert_eq!(data, [Some(100), Some(100), Some(100), Some(199), Some(300), Some(350)]);
        let holes = [0, 100, 199, 200, 300].map(|at| place_in(&gaps, at, Whence::Hole));
        assert_eq!(holes, [Some(0), Some(200), Some(200), Some(200), None]);
        assert_eq!(place_in(&part(1 << 50, None, &[], 1 << 60), 5, Whence::Data), None);
        assert_eq!(place_in(&part(1 << 50, None, &[], 1 << 60), 5, Whence::Hole), Some(5));
        let inline = part(1000, Some(10), &[(500, 10)], 1000);
        assert_eq!(place_in(&inline, 3, Whence::Data), Some(3));
        assert_eq!(place_in(&inline, 3, Whence::Hole), Some(10));
        assert_eq!(place_in(&inline, 10, Whence::Data), Some(500));
        assert_eq!(place_in(&part(10, Some(10), &[], 10), 0, Whence::Hole), None);
    }
}
