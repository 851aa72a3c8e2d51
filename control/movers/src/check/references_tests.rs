use super::*;
use cfs_wire::data::Slot;
use cfs_wire::meta::{MetaError, ShardOp, ShardReply};
use cfs_wire::{Epoch, VolumeId};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::Cell;

const SEGMENT: SegmentId = SegmentId(7);
const INO: Ino = Ino::ROOT;
const CHUNK: u32 = 65_536;
const EXTENTS: u16 = 500;

/// A shard that is nothing but its records, and counts how often it is read.
struct Scripted {
    records: Vec<AuditRecord>,
    readings: Cell<u32>,
}

impl ShardCalls for Scripted {
    fn shards(&self) -> u16 {
        1
    }

    fn shard_call(&self, _: ShardId, op: ShardOp) -> LocalBoxFuture<'_, Result<ShardReply, MetaError>> {
        let ShardOp::Audit { after, .. } = op else { panic!("nothing else is asked") };
        let from = after.map_or(0, |after| usize::from(u16::from_le_bytes(after.try_into().unwrap())));
        self.readings.set(self.readings.get() + u32::from(from == 0));
        let to = (from + 70).min(self.records.len());
        let next = (to < self.records.len()).then(|| (to as u16).to_le_bytes().to_vec());
        let records = self.records[from..to].to_vec();
        async move { Ok(ShardReply::Audit { records, next }) }.boxed_local()
    }
}

fn extent(slot: u16) -> Extent {
    let start = u32::from(slot) * CHUNK;
    let location = Location::Chunk { segment: SEGMENT, slot, shard: 0, start, stored: CHUNK, offset: 0 };
    Extent { offset: u64::from(slot) * u64::from(CHUNK), length: CHUNK, location, epoch: Epoch(1) }
}

fn extent_record(extent: Extent) -> AuditRecord {
    AuditRecord::Extent { ino: INO, extent }
}

fn back_reference(slot: u16) -> AuditRecord {
    let offset = u64::from(slot) * u64::from(CHUNK);
    AuditRecord::BackReference { referent: Referent::Slot(SEGMENT, slot), ino: INO, offset }
}

/// A file of so many chunks: extents in their order, back-references in an order of their own.
fn sound() -> Vec<AuditRecord> {
    let extents = (0..EXTENTS).map(|slot| extent_record(extent(slot)));
    extents.chain((0..EXTENTS).rev().map(back_reference)).collect()
}

/// The problems found in a shard's records, and how often it was read.
fn problems(records: Vec<AuditRecord>) -> (Vec<String>, u32) {
    let slot = |slot: u16| Slot { shard: 0, start: u32::from(slot) * CHUNK, stored: CHUNK, length: CHUNK };
    let registration = Registration {
        segment: SEGMENT,
        volume: VolumeId(1),
        epoch: Epoch(1),
        data: 1,
        parity: 0,
        shards: Vec::new(),
        // The last is dead, and nobody's.
        slots: (0..=EXTENTS).map(slot).collect(),
    };
    let registrations = BTreeMap::from([(SEGMENT, (registration, BTreeSet::from([EXTENTS])))]);
    let known = Known { registrations: &registrations, is_inode: &|ino| ino == INO };
    let shard = Scripted { records, readings: Cell::new(0) };
    let (mut references, mut report) = (References::default(), CheckReport::default());
    let read = references.read(&shard, ShardId(0), &known, &mut report);
    read.now_or_never().expect("nothing waits").unwrap();
    (report.problems, shard.readings.get())
}

#[test]
fn extents_and_back_references_that_agree_are_read_once() {
    assert_eq!(problems(sound()), (vec![], 1));
}

#[test]
fn what_has_no_counterpart_is_named_and_nothing_else() {
    let mut without = sound();
    without.retain(|record| *record != back_reference(77));
    let offset = 77 * u64::from(CHUNK);
    let expected = format!("inode {INO}: the extent at {offset} has no back-reference");
    assert_eq!(problems(without), (vec![expected], 2));

    let mut without = sound();
    without.retain(|record| *record != extent_record(extent(78)));
    let offset = 78 * u64::from(CHUNK);
    let referent = Referent::Slot(SEGMENT, 78);
    let expected = format!("back-reference of {referent:?} to inode {INO} at {offset} has no extent");
    assert_eq!(problems(without), (vec![expected], 2));
}

/// What is found when one more extent, with its back-reference, is in its place of the order.
fn with_one_more(ino: Ino, location: Location) -> (Vec<String>, u32) {
    let referent = location.referent();
    let offset = u64::from(EXTENTS) * u64::from(CHUNK);
    let mut records = sound();
    let extent = Extent { location, ..extent(EXTENTS) };
    records.insert(usize::from(EXTENTS), AuditRecord::Extent { ino, extent });
    records.push(AuditRecord::BackReference { referent, ino, offset });
    problems(records)
}

#[test]
fn extents_are_held_against_inodes_registrations_and_each_other() {
    let offset = u64::from(EXTENTS) * u64::from(CHUNK);
    let chunk =
        |segment, slot: u16, start| Location::Chunk { segment, slot, shard: 0, start, stored: CHUNK, offset: 0 };

    let stranger = Ino::from_u64(99);
    let expected = format!("extent at {offset} belongs to inode {stranger}, which does not exist");
    assert_eq!(with_one_more(stranger, chunk(SEGMENT, 3, 3 * CHUNK)), (vec![expected], 1));

    let unknown = SegmentId(8);
    let expected = format!("inode {INO}: offset {offset} is in segment {unknown}, which is not registered");
    assert_eq!(with_one_more(INO, chunk(unknown, 0, 0)), (vec![expected], 1));

    let expected = format!("inode {INO}: offset {offset} disagrees with slot 3 of segment {SEGMENT}");
    assert_eq!(with_one_more(INO, chunk(SEGMENT, 3, 1)), (vec![expected], 1));

    let place = format!("slot {EXTENTS} of segment {SEGMENT}");
    let expected = format!("inode {INO}: offset {offset} is in {place}, which is marked dead");
    let dead = chunk(SEGMENT, EXTENTS, u32::from(EXTENTS) * CHUNK);
    assert_eq!(with_one_more(INO, dead), (vec![expected], 1));

    // The twin: in a slot that lives.
    assert_eq!(with_one_more(INO, chunk(SEGMENT, 3, 3 * CHUNK)), (vec![], 1));

    let mut records = sound();
    records[20] = extent_record(Extent { length: CHUNK + 1, ..extent(20) });
    let expected = format!("inode {INO}: extents overlap at {}", 21 * u64::from(CHUNK));
    assert_eq!(problems(records), (vec![expected], 1));
}
