//! Extents against back-references and registrations, read as a stream: a shard holds an extent and
//! a back-reference for every 64 KiB of file data, far more than memory should hold.
//!
//! Both are hashed into buckets, an extent adding its hash and a back-reference taking it off. A
//! bucket that is not zero in the end holds some without their counterpart; only what falls into
//! such buckets is read again, kept, and compared one by one.

use super::audit;
use crate::{MoverError, ShardCalls};
use cfs_api::CheckReport;
use cfs_wire::data::{Extent, Location, Referent, Registration};
use cfs_wire::meta::AuditRecord;
use cfs_wire::{BlobId, Ino, SegmentId, ShardId};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

/// 512 KiB for the shard at hand; a mismatch makes a 65536th of it be kept.
const BUCKETS: usize = 1 << 16;

/// What the rest of the check needs to know of all extents.
#[derive(Default)]
pub(super) struct References {
    /// The hot blobs that extents name: few, because hot blobs are limited.
    pub hot: BTreeMap<(Ino, u64), BlobId>,
    /// Segments that some extent is in.
    pub segments: BTreeSet<SegmentId>,
}

/// A back-reference, or what an extent's would be.
type Reference = (Referent, Ino, u64);

struct Tally(Vec<u64>);

impl Tally {
    fn of(reference: &Reference) -> (usize, u64) {
        let mut hasher = DefaultHasher::new();
        reference.hash(&mut hasher);
        let hash = hasher.finish();
        (hash as usize % BUCKETS, hash)
    }

    fn add(&mut self, reference: &Reference) {
        let (bucket, hash) = Tally::of(reference);
        self.0[bucket] = self.0[bucket].wrapping_add(hash);
    }

    fn take_off(&mut self, reference: &Reference) {
        let (bucket, hash) = Tally::of(reference);
        self.0[bucket] = self.0[bucket].wrapping_sub(hash);
    }

    fn is_even(&self) -> bool {
        self.0.iter().all(|sum| *sum == 0)
    }

    fn is_suspect(&self, reference: &Reference) -> bool {
        self.0[Tally::of(reference).0] != 0
    }
}

/// The registrations and inodes that extents are held against.
pub(super) struct Known<'a> {
    pub registrations: &'a BTreeMap<SegmentId, (Registration, BTreeSet<u16>)>,
    pub is_inode: &'a dyn Fn(Ino) -> bool,
}

impl References {
    /// Reads a shard's extents and back-references, and reports what disagrees.
    pub async fn read(
        &mut self,
        calls: &dyn ShardCalls,
        shard: ShardId,
        known: &Known<'_>,
        report: &mut CheckReport,
    ) -> Result<(), MoverError> {
        let mut tally = Tally(vec![0; BUCKETS]);
        let mut last: Option<(Ino, u64)> = None;
        audit(calls, shard, |record| match record {
            AuditRecord::Extent { ino, extent } => {
                report.references += 1;
                tally.add(&(extent.location.referent(), ino, extent.offset));
                // They come in the order of their ends.
                if last.is_some_and(|(before, end)| before == ino && end > extent.offset) {
                    report.problems.push(format!("inode {ino}: extents overlap at {}", extent.offset));
                }
                last = Some((ino, extent.offset.saturating_add(extent.length.into())));
                self.note(ino, &extent, known, report);
            }
            AuditRecord::BackReference { referent, ino, offset } => tally.take_off(&(referent, ino, offset)),
            _ => {}
        })
        .await?;
        if !tally.is_even() {
            compare(calls, shard, &tally, report).await?;
        }
        Ok(())
    }

    fn note(&mut self, ino: Ino, extent: &Extent, known: &Known, report: &mut CheckReport) {
        let Extent { offset, .. } = extent;
        if !(known.is_inode)(ino) {
            report.problems.push(format!("extent at {offset} belongs to inode {ino}, which does not exist"));
        }
        let (segment, slot, shard, start, stored) = match &extent.location {
            Location::Hot { blob, .. } => {
                self.hot.insert((ino, *offset), *blob);
                return;
            }
            Location::Chunk { segment, slot, shard, start, stored, .. } => (segment, slot, shard, start, stored),
        };
        self.segments.insert(*segment);
        let Some((registration, dead)) = known.registrations.get(segment) else {
            let what = format!("inode {ino}: offset {offset} is in segment {segment}, which is not registered");
            report.problems.push(what);
            return;
        };
        let found = registration.slots.get(usize::from(*slot));
        if !found.is_some_and(|found| found.shard == *shard && found.start == *start && found.stored == *stored) {
            let what = format!("inode {ino}: offset {offset} disagrees with slot {slot} of segment {segment}");
            report.problems.push(what);
        }
        if dead.contains(slot) {
            let place = format!("slot {slot} of segment {segment}");
            report.problems.push(format!("inode {ino}: offset {offset} is in {place}, which is marked dead"));
        }
    }
}

/// Reads a shard again and names what has no counterpart.
async fn compare(
    calls: &dyn ShardCalls,
    shard: ShardId,
    tally: &Tally,
    report: &mut CheckReport,
) -> Result<(), MoverError> {
    let (mut extents, mut back_references) = (BTreeSet::new(), BTreeSet::new());
    audit(calls, shard, |record| {
        let (reference, of) = match record {
            AuditRecord::Extent { ino, extent } => ((extent.location.referent(), ino, extent.offset), &mut extents),
            AuditRecord::BackReference { referent, ino, offset } => ((referent, ino, offset), &mut back_references),
            _ => return,
        };
        if tally.is_suspect(&reference) {
            of.insert(reference);
        }
    })
    .await?;
    for (_, ino, offset) in extents.difference(&back_references) {
        report.problems.push(format!("inode {ino}: the extent at {offset} has no back-reference"));
    }
    for (referent, ino, offset) in back_references.difference(&extents) {
        report.problems.push(format!("back-reference of {referent:?} to inode {ino} at {offset} has no extent"));
    }
    Ok(())
}

#[cfg(test)]
#[path = "references_tests.rs"]
mod tests;
