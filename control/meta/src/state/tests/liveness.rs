//! References against freezes and epochs, swaps, the released list and registrations.

use super::super::keys;
use super::*;
use cfs_wire::SegmentId;
use cfs_wire::data::{Referent, Registration, ShardPlace, Slot};

fn referent(blob: u128) -> Referent {
    hot(blob, 0).referent()
}

fn released(shard: &mut Shard) -> Vec<Referent> {
    match shard.shard_op(ShardOp::ListReleased { max: 100 }) {
        ShardReply::Released(list) => list.into_iter().map(|(referent, _)| referent).collect(),
        other => panic!("{other:?}"),
    }
}

fn freeze(shard: &mut Shard, blobs: &[u128], epoch: u64) -> Vec<bool> {
    let referents = blobs.iter().map(|blob| referent(*blob)).collect();
    match shard.shard_op(ShardOp::Freeze { referents, epoch: Epoch(epoch) }) {
        ShardReply::Held(held) => held,
        other => panic!("{other:?}"),
    }
}

#[test]
pub(super) fn a_frozen_referent_takes_no_new_reference_until_thawed() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    shard.write(ino, vec![data(0, 10, 1)]).unwrap();
    assert_eq!(freeze(&mut shard, &[1, 2], 1), [true, false]);
    assert_eq!(shard.write(ino, vec![data(50, 5, 3), data(20, 10, 2)]), Err(MetaError::StaleReference));
    assert_eq!(shard.attr(ino).unwrap().size, 10);
    // Splitting what is there makes no new reference.
    shard.write(ino, vec![FileWrite::Punch { offset: 4, length: 2 }]).unwrap();
    shard.shard_op(ShardOp::Thaw { referents: vec![referent(2)] });
    shard.write(ino, vec![data(20, 10, 2)]).unwrap();
}

fn frozen_rows(shard: &Shard) -> usize {
    let table = keys::table(shard.id, keys::FROZEN);
    shard.state.map.keys().filter(|key| key.starts_with(&table)).count()
}

/// Slots of one segment share a row; each is frozen and thawed by itself.
#[test]
fn slots_of_a_segment_are_frozen_and_thawed_one_by_one() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    let slot = |slot| Referent::Slot(SegmentId(7), slot);
    let location = |slot| Location::Chunk { segment: SegmentId(7), slot, shard: 0, start: 0, stored: 10, offset: 0 };
    let write = |slot| FileWrite::Data { offset: 0, length: 1, location: location(slot), epoch: Epoch(5) };
    let referents = vec![slot(0), slot(9), slot(300)];
    shard.shard_op(ShardOp::Freeze { referents, epoch: Epoch(5) });
    for frozen in [0, 9, 300] {
        assert_eq!(shard.write(ino, vec![write(frozen)]), Err(MetaError::StaleReference), "slot {frozen}");
    }
    for free in [1, 8, 10, 299, 301, 4000] {
        assert!(shard.write(ino, vec![write(free)]).is_ok(), "slot {free}");
    }
    shard.shard_op(ShardOp::Thaw { referents: vec![slot(9), slot(4000)] });
    assert!(shard.write(ino, vec![write(9)]).is_ok());
    assert_eq!(shard.write(ino, vec![write(300)]), Err(MetaError::StaleReference));
    shard.shard_op(ShardOp::Thaw { referents: vec![slot(0), slot(300)] });
    assert!(shard.write(ino, vec![write(300)]).is_ok());
    assert_eq!(frozen_rows(&shard), 0);
}

#[test]
fn forgotten_freezes_are_deleted_some_at_a_time_and_the_others_stay() {
    let mut shard = Shard::new();
    let blobs: Vec<u128> = (0..1500).collect();
    freeze(&mut shard, &blobs, 3);
    freeze(&mut shard, &[2000, 2001], 4);
    let advance = |after| ShardOp::AdvanceEpoch { minimum: Epoch(4), after };
    let ShardReply::Forgotten { next: Some(next) } = shard.shard_op(advance(None)) else { panic!("all at once") };
    assert_eq!(frozen_rows(&shard), 1502 - 1024);
    // None of them counts any more, deleted or not.
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    let write = |blob| FileWrite::Data { offset: 0, length: 1, location: hot(blob, 0), epoch: Epoch(4) };
    assert!(shard.write(ino, vec![write(1400)]).is_ok());
    assert_eq!(shard.write(ino, vec![write(2000)]), Err(MetaError::StaleReference));
    assert_eq!(shard.shard_op(advance(Some(next))), ShardReply::Forgotten { next: None });
    assert_eq!(frozen_rows(&shard), 2);
}

#[test]
fn an_epoch_gone_by_is_refused_and_freezes_below_it_are_forgotten() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    freeze(&mut shard, &[1], 3);
    shard.shard_op(ShardOp::AdvanceEpoch { minimum: Epoch(3), after: None });
    assert_eq!(shard.shard_op(ShardOp::GetEpoch), ShardReply::Epoch(Epoch(3)));
    let write = |epoch| FileWrite::Data { offset: 0, length: 1, location: hot(1, 0), epoch: Epoch(epoch) };
    assert_eq!(shard.write(ino, vec![write(2)]), Err(MetaError::StaleReference));
    assert_eq!(shard.write(ino, vec![write(3)]), Err(MetaError::StaleReference));
    shard.shard_op(ShardOp::AdvanceEpoch { minimum: Epoch(4), after: None });
    assert!(shard.write(ino, vec![write(4)]).is_ok());
}

#[test]
fn an_epoch_that_was_never_counted_is_refused_and_changes_nothing() {
    let mut shard = Shard::new();
    for (minimum, reply) in [
        ((u64::MAX >> 1) + 1, ShardReply::Refused),
        (u64::MAX, ShardReply::Refused),
        (5, ShardReply::Forgotten { next: None }),
    ] {
        assert_eq!(shard.shard_op(ShardOp::AdvanceEpoch { minimum: Epoch(minimum), after: None }), reply);
    }
    assert_eq!(shard.shard_op(ShardOp::GetEpoch), ShardReply::Epoch(Epoch(5)));
}

/// What a file refers to may be referred to elsewhere, however old it is; a freeze that would be
/// forgotten before such a reference is refused answers nothing.
#[test]
fn extents_come_with_an_epoch_that_no_freeze_behind_them_is_below() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    shard.write(ino, vec![data(0, 10, 1)]).unwrap();
    shard.shard_op(ShardOp::AdvanceEpoch { minimum: Epoch(7), after: None });
    assert_eq!(shard.write(ino, vec![data(20, 10, 1)]), Err(MetaError::StaleReference));
    let Extent { length, location, epoch, .. } = shard.extents(ino).extents.remove(0);
    assert_eq!(epoch, Epoch(8));
    let share = |offset| FileWrite::Data { offset, length, location: location.clone(), epoch };
    shard.write(ino, vec![share(20)]).unwrap();
    shard.write(ino, vec![FileWrite::Truncate { size: 0 }]).unwrap();
    shard.reap();
    // A freeze of the epoch 7 would let the location in again once the minimum is 8.
    let under = |epoch| ShardOp::Freeze { referents: vec![referent(1)], epoch: Epoch(epoch) };
    assert_eq!(shard.shard_op(under(7)), ShardReply::Refused);
    assert_eq!(frozen_rows(&shard), 0);
    assert_eq!(shard.shard_op(under(8)), ShardReply::Held(vec![false]));
    for minimum in [8, 9] {
        shard.shard_op(ShardOp::AdvanceEpoch { minimum: Epoch(minimum), after: None });
        assert_eq!(shard.write(ino, vec![share(0)]), Err(MetaError::StaleReference), "minimum {minimum}");
    }
}

#[test]
fn what_loses_its_last_reference_is_listed_until_a_freeze_has_looked_at_it() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    shard.write(ino, vec![data(0, 10, 1), data(10, 10, 1)]).unwrap();
    shard.write(ino, vec![data(0, 10, 2)]).unwrap();
    assert_eq!(released(&mut shard), []);
    shard.write(ino, vec![data(10, 10, 2)]).unwrap();
    assert_eq!(released(&mut shard), [referent(1)]);
    let resolve = |shard: &mut Shard| shard.shard_op(ShardOp::Resolve { referents: vec![referent(1)] });
    resolve(&mut shard);
    assert_eq!(released(&mut shard), [referent(1)]);
    // Found held elsewhere and thawed; referenced and lost again here before it is resolved.
    freeze(&mut shard, &[1], 1);
    shard.shard_op(ShardOp::Thaw { referents: vec![referent(1)] });
    shard.write(ino, vec![data(0, 10, 1), data(0, 10, 2)]).unwrap();
    resolve(&mut shard);
    assert_eq!(released(&mut shard), [referent(1)]);
    freeze(&mut shard, &[1], 1);
    resolve(&mut shard);
    assert_eq!(released(&mut shard), []);
}

#[test]
pub(super) fn a_swap_replaces_only_what_still_stands() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    shard.write(ino, vec![data(0, 100, 1)]).unwrap();
    shard.write(ino, vec![data(30, 10, 2)]).unwrap();
    let before = shard.attr(ino);
    let extent = |offset, length, location| Extent { offset, length, location, epoch: Epoch(0) };
    let old = extent(0, 100, hot(1, 0));
    let new = vec![extent(0, 60, hot(8, 5)), extent(60, 40, hot(9, 0))];
    let swap = |new| ShardOp::Swap { ino, swaps: vec![(old.clone(), new)] };
    assert_eq!(shard.shard_op(swap(vec![extent(0, 60, hot(8, 5))])), ShardReply::Refused);
    assert_eq!(shard.shard_op(swap(new.clone())), ShardReply::Swapped(1));
    let extents: Vec<_> = shard.extents(ino).extents.into_iter().map(|e| (e.offset, e.length, e.location)).collect();
    let expected = [(0, 30, hot(8, 5)), (30, 10, hot(2, 0)), (40, 20, hot(8, 45)), (60, 40, hot(9, 0))];
    assert_eq!(extents, expected);
    assert_eq!((shard.attr(ino), released(&mut shard)), (before, vec![referent(1)]));
    assert_eq!(shard.shard_op(swap(new)), ShardReply::Swapped(0));
    super::check::check(&[(shard.id, &shard.state)]).unwrap();
}

fn registration(segment: u128, target: u32) -> Registration {
    let slot = Slot { shard: 0, start: 0, stored: 10, length: 10 };
    Registration {
        segment: SegmentId(segment),
        volume: VolumeId(1),
        epoch: Epoch(0),
        data: 1,
        parity: 0,
        shards: vec![ShardPlace { index: 0, target: TargetId(target), blob: BlobId(1), length: 10 }],
        slots: vec![slot; 3],
    }
}

#[test]
fn registrations_are_written_once_swapped_by_comparison_and_die_slot_by_slot() {
    let mut shard = Shard::new();
    let (first, moved) = (registration(5, 1), registration(5, 2));
    assert_eq!(shard.shard_op(ShardOp::Register(first.clone())), ShardReply::Done);
    assert_eq!(shard.shard_op(ShardOp::Register(first.clone())), ShardReply::Done);
    assert_eq!(shard.shard_op(ShardOp::Register(moved.clone())), ShardReply::Refused);
    let replace = ShardOp::Replace { old: first.clone(), new: moved.clone() };
    assert_eq!(shard.shard_op(replace.clone()), ShardReply::Done);
    assert_eq!(shard.shard_op(replace), ShardReply::Done);
    let lost = ShardOp::Replace { old: first, new: registration(5, 3) };
    assert_eq!(shard.shard_op(lost), ShardReply::Refused);
    shard.shard_op(ShardOp::Register(registration(6, 1)));
    let dead = |slots: &[u16]| ShardOp::MarkDead { slots: slots.iter().map(|slot| (SegmentId(5), *slot)).collect() };
    assert_eq!(shard.shard_op(dead(&[0, 2, 900])), ShardReply::Dead(vec![]));
    let list = ShardOp::ListRegistrations { after: None, max: 1 };
    let expected = ShardReply::Registrations { list: vec![(moved.clone(), vec![0, 2])], end: false };
    assert_eq!(shard.shard_op(list), expected);
    assert_eq!(shard.shard_op(dead(&[1])), ShardReply::Dead(vec![SegmentId(5)]));
    shard.shard_op(ShardOp::Deregister(SegmentId(5)));
    assert_eq!(shard.shard_op(ShardOp::GetRegistration(SegmentId(5))), ShardReply::Registration(None));
    let list = ShardOp::ListRegistrations { after: Some(SegmentId(5)), max: 9 };
    assert_eq!(shard.shard_op(list), ShardReply::Registrations { list: vec![(registration(6, 1), vec![])], end: true });
}
