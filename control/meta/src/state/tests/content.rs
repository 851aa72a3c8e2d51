//! Extents, the inline head, commit order and removal.

use super::check::check;
use super::*;
use crate::state::Reader;
use bytes::Bytes;
use cfs_wire::limits::{COMMIT_WRITES_MAX, FILE_BYTES_MAX, PUNCH_EXTENTS_MAX};
use futures_util::future::{LocalBoxFuture, ready};
use std::cell::Cell;

fn new_file(shard: &mut Shard) -> Ino {
    shard.create(ROOT, "f", file()).unwrap().ino
}

fn run_of(blob: u128, from: u32, to: u32) -> Vec<u8> {
    (from..to).map(|offset| byte_at(&hot(blob, offset))).collect()
}

#[test]
fn a_write_in_the_middle_splits_the_extent_and_moves_its_back_references() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    shard.write(ino, vec![data(0, 100, 1)]).unwrap();
    let attr = shard.write(ino, vec![data(40, 10, 2)]).unwrap();
    assert_eq!((attr.size, attr.allocated), (100, 100));
    let extents: Vec<_> = shard.extents(ino).extents.into_iter().map(|e| (e.offset, e.length, e.location)).collect();
    assert_eq!(extents, [(0, 40, hot(1, 0)), (40, 10, hot(2, 0)), (50, 50, hot(1, 50))]);
    let holders = |shard: &mut Shard, blob| shard.shard_op(ShardOp::Holders { referent: hot(blob, 0).referent() });
    assert_eq!(holders(&mut shard, 1), ShardReply::Holders(vec![(ino, 0), (ino, 50)]));
    assert_eq!(holders(&mut shard, 2), ShardReply::Holders(vec![(ino, 40)]));
    let after = |after, max| ShardOp::ListReferenced { after, max };
    let referenced = |list: &[u128], end| ShardReply::Referenced {
        list: list.iter().map(|blob| hot(*blob, 0).referent()).collect(),
        end,
    };
    assert_eq!(shard.shard_op(after(None, 9)), referenced(&[1, 2], true));
    // Two rows of one referent.
    assert_eq!(shard.shard_op(after(None, 2)), referenced(&[1], false));
    assert_eq!(shard.shard_op(after(Some(hot(1, 0).referent()), 2)), referenced(&[2], true));
    check(&[(shard.id, &shard.state)]).unwrap();
}

#[test]
fn data_over_an_inline_file_keeps_the_rest_and_a_punched_extent_shows_nothing_old() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    shard.write(ino, vec![FileWrite::Inline { offset: 0, bytes: vec![7; 100] }]).unwrap();
    shard.write(ino, vec![data(20, 30, 1)]).unwrap();
    let mut expected = vec![7; 100];
    expected[20..50].copy_from_slice(&run_of(1, 0, 30));
    assert_eq!(shard.content(ino), expected);
    shard.write(ino, vec![FileWrite::Punch { offset: 20, length: 30 }]).unwrap();
    expected[20..50].fill(0);
    assert_eq!(shard.content(ino), expected);
    // Data over the rest of the head leaves only what is before it.
    let attr = shard.write(ino, vec![data(10, 5000, 2)]).unwrap();
    assert_eq!((attr.size, attr.allocated), (5010, 5010));
    assert_eq!(shard.extents(ino).inline, Some(vec![7; 10]));
}

#[test]
fn a_small_file_is_given_whole_however_it_came_to_its_size() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    assert_eq!(shard.extents(ino).inline, Some(Vec::new()));
    shard.write(ino, vec![FileWrite::AppendInline { bytes: vec![1, 2] }, FileWrite::Extend { size: 5 }]).unwrap();
    assert_eq!(shard.extents(ino).inline, Some(vec![1, 2, 0, 0, 0]));
    shard.write(ino, vec![FileWrite::Extend { size: 5000 }]).unwrap();
    assert_eq!(shard.extents(ino).inline, Some(vec![1, 2]));
}

#[test]
fn inline_bytes_past_the_limit_are_refused_and_nothing_of_the_commit_applies() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    shard.write(ino, vec![FileWrite::Inline { offset: 4095, bytes: vec![1] }]).unwrap();
    let before = shard.attr(ino);
    let writes = vec![FileWrite::Truncate { size: 10 }, FileWrite::Inline { offset: 4090, bytes: vec![1; 7] }];
    assert_eq!(errno(shard.write(ino, writes)), Errno::EFBIG);
    assert_eq!(shard.attr(ino), before);
}

#[test]
fn offsets_end_where_lseek_does() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    let attr = shard.write(ino, vec![data(FILE_BYTES_MAX - 1, 1, 1)]).unwrap();
    assert_eq!((attr.size, attr.allocated), (FILE_BYTES_MAX, 1));
    for write in [data(FILE_BYTES_MAX, 1, 2), data(u64::MAX, 1, 2), FileWrite::Extend { size: FILE_BYTES_MAX + 1 }] {
        assert_eq!(errno(shard.write(ino, vec![write])), Errno::EFBIG);
    }
    let append = FileWrite::Append { length: 1, location: hot(3, 0), epoch: Epoch(0) };
    assert_eq!(errno(shard.write(ino, vec![append])), Errno::EFBIG);
    assert!(matches!(shard.write(ino, vec![data(0, 0, 1)]), Err(MetaError::Malformed(_))));
    let beyond = FileWrite::Data { offset: 0, length: 2, location: hot(1, u32::MAX), epoch: Epoch(0) };
    assert!(matches!(shard.write(ino, vec![beyond]), Err(MetaError::Malformed(_))));
}

#[test]
fn listing_extents_says_how_far_it_got() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    shard.write(ino, (0..5).map(|n| data(n * 100, 10, u128::from(n) + 1)).collect()).unwrap();
    let ask = |offset, length, extents_max| match shard.read(MetaOp::GetExtents { ino, offset, length, extents_max }) {
        Ok(MetaReply::Extents(reply)) => (reply.extents.iter().map(|e| e.offset).collect::<Vec<_>>(), reply.covered),
        other => panic!("{other:?}"),
    };
    assert_eq!(ask(0, 1000, 10), (vec![0, 100, 200, 300, 400], 1000));
    assert_eq!(ask(5, 200, 10), (vec![0, 100, 200], 205));
    assert_eq!(ask(10, 90, 10), (vec![], 100));
    assert_eq!(ask(0, 1000, 2), (vec![0, 100], 200));
}

#[test]
pub(super) fn commits_of_a_session_apply_in_order_and_once() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    let mut commit = |session, sequence| {
        let writes = vec![FileWrite::AppendInline { bytes: vec![sequence as u8] }];
        let commit = Commit { ino, sequence, writes, mtime: None, kill_privileges: false };
        shard.call_as(session, MetaOp::Commit(commit))
    };
    assert!(matches!(commit(ALICE, 2), Err(MetaError::Unavailable(_))));
    assert!(commit(ALICE, 1).is_ok());
    assert!(matches!(commit(ALICE, 3), Err(MetaError::Unavailable(_))));
    assert!(commit(BOB, 1).is_ok());
    assert!(commit(ALICE, 2).is_ok());
    assert!(matches!(commit(ALICE, 2), Err(MetaError::Malformed(_))));
    assert!(commit(ALICE, 3).is_ok());
    assert_eq!(shard.content(ino), [1, 1, 2, 3]);
}

#[test]
fn a_write_that_is_committed_late_takes_no_shown_ctime_back() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    let mut sequence = 0;
    let mut commit = |shard: &mut Shard, mtime| {
        sequence += 1;
        let writes = vec![data(0, 100, 1)];
        let commit = Commit { ino, sequence, writes, mtime: Some(mtime), kill_privileges: false };
        match shard.call(MetaOp::Commit(commit)) {
            Ok(MetaReply::Committed { attr, .. }) => (attr.mtime, attr.ctime),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(commit(&mut shard, at(5000)), (at(5000), at(5000)));
    let shown = shard.set(ino, AttrChanges { ctime: Some(at(7000)), ..Default::default() }).unwrap();
    assert_eq!(shown.ctime, at(7000));
    assert_eq!(commit(&mut shard, at(6000)), (at(6000), at(7000).next()));
    assert_eq!(commit(&mut shard, at(8000)), (at(8000), at(8000)));
}

#[test]
fn the_first_append_of_a_commit_says_where_it_went() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    shard.write(ino, vec![data(0, 9000, 1)]).unwrap();
    let append = |blob| FileWrite::Append { length: 10, location: hot(blob, 0), epoch: Epoch(0) };
    let commit =
        Commit { ino, sequence: 1, writes: vec![append(2), append(3)], mtime: Some(at(5000)), kill_privileges: false };
    match shard.call(MetaOp::Commit(commit)) {
        Ok(MetaReply::Committed { attr, append_offset }) => {
            assert_eq!((attr.size, append_offset, attr.mtime, attr.ctime), (9020, Some(9000), at(5000), at(5000)));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_write_takes_the_capabilities_of_a_program_and_no_other_attribute() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    let names = [name("security.capability"), name("user.kept")];
    for name in &names {
        let value = b"value".to_vec();
        assert!(shard.call(MetaOp::SetXattr { ino, name: name.clone(), value, flags: 0 }).is_ok());
    }
    let listed = |shard: &mut Shard| match shard.read(MetaOp::ListXattr { ino }) {
        Ok(MetaReply::Names(names)) => names,
        other => panic!("{other:?}"),
    };
    shard.write(ino, vec![data(0, 10, 1)]).unwrap();
    assert_eq!(listed(&mut shard), names);
    for _ in 0..2 {
        shard.write(ino, vec![data(0, 10, 2), FileWrite::DropCapability]).unwrap();
        assert_eq!(listed(&mut shard), names[1..]);
    }
}

#[test]
fn a_huge_file_goes_in_several_entries_and_its_bytes_are_released() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    for batch in 0..6u64 {
        shard
            .write(ino, (0..200).map(|n| data((batch * 200 + n) * 10, 10, u128::from(batch * 200 + n))).collect())
            .unwrap();
    }
    assert_eq!(shard.unlink(ROOT, "f"), Ok(MetaReply::Removed { ino, nlink: 0 }));
    assert_eq!(shard.follow_up, [FollowUp::Reap { ino }]);
    let follow_up = shard.follow_up.clone();
    // Half removed is gone for everyone.
    assert_eq!(errno(shard.call(MetaOp::Open { ino })), Errno::ESTALE);
    shard.follow_up = follow_up;
    let entries = shard.log.len();
    shard.reap();
    assert_eq!(shard.log.len() - entries, 2);
    assert_eq!(errno(shard.attr(ino)), Errno::ESTALE);
    match shard.shard_op(ShardOp::ListReleased { max: 4096 }) {
        ShardReply::Released(list) => assert_eq!(list.len(), 1200),
        other => panic!("{other:?}"),
    }
    check(&[(shard.id, &shard.state)]).unwrap();
}

#[test]
pub(super) fn a_write_lease_keeps_other_sessions_commits_and_truncations_out() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    let lease = |result| matches!(result, Ok(MetaReply::Lease { granted: true, .. }));
    assert!(lease(shard.call(MetaOp::AcquireLease { ino })));
    assert!(!lease(shard.call_as(BOB, MetaOp::AcquireLease { ino })));
    let commit = Commit { ino, sequence: 1, writes: vec![data(0, 1, 1)], mtime: None, kill_privileges: false };
    let truncate = MetaOp::SetAttr { ino, changes: AttrChanges { size: Some(9), ..Default::default() } };
    for op in [MetaOp::Commit(commit.clone()), truncate] {
        assert!(matches!(shard.call_as(BOB, op), Err(MetaError::Unavailable(_))));
    }
    assert!(shard.call(MetaOp::ReturnLease { ino }).is_ok());
    assert!(shard.call_as(BOB, MetaOp::Commit(commit)).is_ok());
    assert!(lease(shard.call_as(BOB, MetaOp::AcquireLease { ino })));
}

#[test]
fn a_truncation_of_many_extents_shows_at_once_and_is_finished_by_entries_of_its_own() {
    let mut shard = Shard::new();
    let ino = new_file(&mut shard);
    for batch in 0..4u64 {
        shard.write(ino, (0..200).map(|n| data((batch * 200 + n) * 10, 10, 50)).collect()).unwrap();
    }
    let attr = shard.set(ino, AttrChanges { size: Some(25), ..Default::default() }).unwrap();
    assert_eq!(attr.size, 25);
    assert_eq!(shard.follow_up, [FollowUp::Reap { ino }]);
    let expected: Vec<u8> = [run_of(50, 0, 10), run_of(50, 0, 10), run_of(50, 0, 5)].concat();
    assert_eq!(shard.content(ino), expected);
    check(&[(shard.id, &shard.state)]).unwrap();
    let follow_up = shard.follow_up.clone();
    assert!(matches!(shard.write(ino, vec![data(100, 5, 9)]), Err(MetaError::Busy(_))));
    // A new leader finds the work too.
    let listed = now_or_never(super::super::list_orphans(&shard.state, shard.id, None, 10));
    assert_eq!(listed, [(ino, false)]);
    shard.follow_up = follow_up;
    shard.reap();
    assert_eq!(shard.attr(ino).unwrap().allocated, 25);
    shard.write(ino, vec![data(100, 5, 9)]).unwrap();
    assert_eq!(shard.content(ino), [expected, vec![0; 75], run_of(9, 0, 5)].concat());
    assert_eq!(now_or_never(super::super::list_orphans(&shard.state, shard.id, None, 10)), []);
}

/// Extents of one byte with a gap of one byte between, so many of them.
fn riddled(shard: &mut Shard, extents: u64) -> Ino {
    let ino = new_file(shard);
    let all: Vec<FileWrite> = (0..extents).map(|index| data(index * 2, 1, u128::from(index))).collect();
    for some in all.chunks(COMMIT_WRITES_MAX) {
        shard.write(ino, some.to_vec()).unwrap();
    }
    ino
}

#[test]
fn a_hole_through_more_extents_than_one_entry_drops_is_refused_and_pieces_of_it_are_not() {
    let mut shard = Shard::new();
    let many = PUNCH_EXTENTS_MAX as u64 + 1;
    let ino = riddled(&mut shard, many);
    let whole = FileWrite::Punch { offset: 0, length: u64::MAX };
    let halves = [0, many].map(|offset| FileWrite::Punch { offset, length: many });
    // All holes of a commit count together.
    for holes in [vec![whole.clone()], halves.to_vec()] {
        assert_eq!(errno(shard.write(ino, holes)), Errno::E2BIG);
        assert_eq!(shard.attr(ino).unwrap().allocated, many);
    }
    for (half, left) in halves.into_iter().zip([many / 2, 0]) {
        assert_eq!(shard.write(ino, vec![half]).unwrap().allocated, left);
    }
    shard.write(ino, vec![whole]).unwrap();
    check(&[(shard.id, &shard.state)]).unwrap();
}

#[test]
fn what_a_truncation_leaves_for_later_is_bounded_for_the_writes_behind_it_in_one_commit() {
    let mut shard = Shard::new();
    // The truncation itself drops three extents here.
    let ino = riddled(&mut shard, PUNCH_EXTENTS_MAX as u64 + 4);
    let anew = vec![FileWrite::Truncate { size: 0 }, data(0, 1, 1)];
    assert_eq!(errno(shard.write(ino, anew.clone())), Errno::E2BIG);
    shard.write(ino, vec![FileWrite::Punch { offset: 0, length: 1 }]).unwrap();
    let attr = shard.write(ino, anew).unwrap();
    assert_eq!((attr.size, attr.allocated), (1, 1));
    check(&[(shard.id, &shard.state)]).unwrap();
}

/// Counts the rows that scans give.
struct Counting<'a> {
    state: &'a MemoryState,
    rows: Cell<usize>,
}

impl Reader for Counting<'_> {
    fn get<'a>(&'a self, key: &'a [u8]) -> LocalBoxFuture<'a, Result<Option<Bytes>, StateError>> {
        self.state.get(key)
    }

    fn scan(
        &self,
        start: Vec<u8>,
        end: Vec<u8>,
        max: usize,
    ) -> LocalBoxFuture<'_, Result<Vec<(Bytes, Bytes)>, StateError>> {
        let found = now_or_never(self.state.scan(start, end, max));
        self.rows.set(self.rows.get() + found.len());
        ready(Ok(found)).boxed_local()
    }
}

#[test]
fn a_hole_reads_each_extent_a_fixed_number_of_times() {
    let mut shard = Shard::new();
    let ino = riddled(&mut shard, PUNCH_EXTENTS_MAX as u64);
    let writes = vec![FileWrite::Punch { offset: 0, length: u64::MAX }];
    let commit = Commit { ino, sequence: 1, writes, mtime: None, kill_privileges: false };
    let entry = shard.next_call(ALICE, MetaOp::Commit(commit));
    let reader = Counting { state: &shard.state, rows: Cell::new(0) };
    let outcome = now_or_never(apply(&reader, shard.id, &entry));
    assert!(outcome.batch.len() > 2 * PUNCH_EXTENTS_MAX, "extents and back-references go: {}", outcome.batch.len());
    // Counted, taken out, and asked whether anything else refers to the same bytes.
    assert!(reader.rows.get() < 4 * PUNCH_EXTENTS_MAX, "{} rows read", reader.rows.get());
}
