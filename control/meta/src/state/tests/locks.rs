//! Byte-range and whole-file locks.

use super::*;
use cfs_wire::meta::{LockFamily, LockKind, LockRange};

fn range(kind: LockKind, start: u64, end: u64, owner: u64) -> LockRange {
    LockRange { family: LockFamily::Posix, kind, start, end, owner, pid: owner as u32 }
}

fn lock(shard: &mut Shard, session: SessionId, ino: Ino, lock: LockRange) -> Option<LockRange> {
    match shard.call_as(session, MetaOp::Lock { ino, lock, wait: false }) {
        Ok(MetaReply::Done) => None,
        Ok(MetaReply::Conflict(conflict)) => conflict,
        other => panic!("{other:?}"),
    }
}

/// What keeps each byte of 0..40 from being written by a stranger.
fn map(shard: &Shard, ino: Ino) -> String {
    let test = |at| MetaOp::TestLock { ino, lock: range(LockKind::Write, at, at, 999) };
    let letter = |at| match shard.read(test(at)) {
        Ok(MetaReply::Conflict(Some(held))) if held.kind == LockKind::Read => 'r',
        Ok(MetaReply::Conflict(Some(_))) => 'w',
        Ok(MetaReply::Conflict(None)) => '.',
        other => panic!("{other:?}"),
    };
    (0..40).map(letter).collect()
}

#[test]
fn ranges_split_convert_and_merge_per_owner() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    assert_eq!(lock(&mut shard, ALICE, ino, range(LockKind::Write, 0, 29, 1)), None);
    assert_eq!(lock(&mut shard, ALICE, ino, range(LockKind::Read, 10, 19, 1)), None);
    assert_eq!(map(&shard, ino), format!("{}{}{}{}", "w".repeat(10), "r".repeat(10), "w".repeat(10), ".".repeat(10)));
    let unlock = MetaOp::Unlock { ino, lock: range(LockKind::Read, 5, 14, 1) };
    assert_eq!(shard.call(unlock), Ok(MetaReply::Done));
    assert_eq!(shard.follow_up, [FollowUp::LocksFreed { ino }]);
    assert_eq!(
        map(&shard, ino),
        format!("{}{}{}{}{}", "w".repeat(5), ".".repeat(10), "r".repeat(5), "w".repeat(10), ".".repeat(10))
    );
    assert_eq!(lock(&mut shard, ALICE, ino, range(LockKind::Write, 0, u64::MAX, 1)), None);
    let whole = range(LockKind::Write, 0, u64::MAX, 1);
    assert_eq!(lock(&mut shard, BOB, ino, range(LockKind::Read, 70, 80, 1)), Some(whole));
}

#[test]
pub(super) fn readers_share_writers_do_not_and_flock_is_another_space() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    let mine = range(LockKind::Read, 5, 9, 1);
    assert_eq!(lock(&mut shard, ALICE, ino, mine), None);
    assert_eq!(lock(&mut shard, BOB, ino, range(LockKind::Read, 0, 9, 1)), None);
    assert_eq!(lock(&mut shard, BOB, ino, range(LockKind::Write, 9, 12, 1)), Some(mine));
    let flock = |kind, owner| LockRange { family: LockFamily::Flock, ..range(kind, 3, 4, owner) };
    assert_eq!(lock(&mut shard, BOB, ino, flock(LockKind::Write, 7)), None);
    let whole = LockRange { start: 0, end: u64::MAX, ..flock(LockKind::Write, 7) };
    assert_eq!(lock(&mut shard, BOB, ino, flock(LockKind::Read, 8)), Some(whole));
    assert_eq!(lock(&mut shard, BOB, ino, flock(LockKind::Read, 7)), None);
    assert_eq!(lock(&mut shard, BOB, ino, flock(LockKind::Read, 8)), None);
    assert_eq!(
        errno(shard.call(MetaOp::Lock { ino, lock: range(LockKind::Read, 9, 5, 1), wait: false })),
        Errno::EINVAL
    );
}

#[test]
fn a_waiting_request_is_granted_when_it_is_asked_again_under_the_same_id() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    let held = range(LockKind::Write, 0, 9, 1);
    assert_eq!(lock(&mut shard, ALICE, ino, held), None);
    let waiting = shard.next_call(BOB, MetaOp::Lock { ino, lock: range(LockKind::Write, 0, 0, 1), wait: true });
    assert_eq!(shard.entry(waiting.clone()), Reply::Meta(Ok(MetaReply::Conflict(Some(held)))));
    shard.call(MetaOp::UnlockOwner { ino, family: LockFamily::Posix, owner: 1 }).unwrap();
    assert_eq!(shard.entry(waiting.clone()), Reply::Meta(Ok(MetaReply::Done)));
    let before = shard.state.clone();
    assert_eq!(shard.entry(waiting), Reply::Meta(Ok(MetaReply::Done)));
    assert_eq!(shard.state, before);
}
