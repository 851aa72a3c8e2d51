//! Sessions, stored replies, holds and fencing.

use super::super::{keys, lease_holder, list_half_fenced, list_leases};
use super::check::check;
use super::*;
use cfs_wire::limits::SESSION_REPLIES_MAX;
use cfs_wire::meta::{LockFamily, LockKind, LockRange};

#[test]
fn a_session_must_be_opened_and_a_fenced_one_stays_out() {
    let mut shard = Shard::new();
    let stranger = SessionId(77);
    let create = || MetaOp::Create { dir: ROOT, name: name("f"), node: file(), hold: false };
    assert_eq!(shard.call_as(stranger, create()), Err(MetaError::SessionUnknown));
    shard.fence(stranger);
    for op in [create(), MetaOp::OpenSession { client: "again".into() }, MetaOp::CloseSession] {
        assert_eq!(shard.call_as(stranger, op), Err(MetaError::Fenced));
    }
    assert_eq!(errno(shard.lookup(ROOT, "f")), Errno::ENOENT);
}

#[test]
pub(super) fn fencing_takes_leases_locks_and_holds_and_reaps_what_only_they_kept() {
    let mut shard = Shard::new();
    let create = MetaOp::Create { dir: ROOT, name: name("f"), node: file(), hold: true };
    let ino = match shard.call_as(BOB, create) {
        Ok(MetaReply::Entry(entry)) => entry.attr.ino,
        other => panic!("{other:?}"),
    };
    let lock = LockRange { family: LockFamily::Posix, kind: LockKind::Write, start: 0, end: 9, owner: 1, pid: 1 };
    shard.call_as(BOB, MetaOp::Lock { ino, lock, wait: false }).unwrap();
    shard.call_as(BOB, MetaOp::AcquireLease { ino }).unwrap();
    assert_eq!(shard.unlink(ROOT, "f"), Ok(MetaReply::Removed { ino, nlink: 0 }));
    assert_eq!(shard.attr(ino).unwrap().nlink, 0);
    check(&[(shard.id, &shard.state)]).unwrap();
    shard.fence(BOB);
    shard.reap();
    assert_eq!(errno(shard.attr(ino)), Errno::ESTALE);
    check(&[(shard.id, &shard.state)]).unwrap();
    let commit = Commit { ino, sequence: 1, writes: vec![data(0, 1, 1)], mtime: None, kill_privileges: false };
    assert_eq!(shard.call_as(BOB, MetaOp::Commit(commit)), Err(MetaError::Fenced));
}

#[test]
fn fencing_leaves_the_bytes_of_what_a_session_kept_to_entries_of_their_own() {
    let mut shard = Shard::new();
    let mut inos = Vec::new();
    for number in 0..10 {
        let called = format!("f{number}");
        let ino = shard.create(ROOT, &called, file()).unwrap().ino;
        shard.call_as(BOB, MetaOp::Open { ino }).unwrap();
        let extents = (0..100).map(|index| data(index * 10, 10, u128::from(number * 100 + index)));
        shard.write(ino, extents.collect()).unwrap();
        shard.unlink(ROOT, &called).unwrap();
        inos.push(ino);
    }
    let [taken] = shard.fence(BOB).try_into().expect("it has little");
    // The session's last reply, and of each file the hold, by inode and by session.
    assert_eq!(taken.batch.len(), 1 + 2 * inos.len());
    assert_eq!(taken.follow_up, inos.iter().map(|ino| FollowUp::Reap { ino: *ino }).collect::<Vec<_>>());
    shard.reap();
    for ino in inos {
        assert_eq!(errno(shard.attr(ino)), Errno::ESTALE);
    }
    check(&[(shard.id, &shard.state)]).unwrap();
}

/// A session with the holds and write leases of some 1,500 files, and with three locks on every third.
fn owner_of_many() -> (Shard, Vec<Ino>) {
    let mut shard = Shard::new();
    let mut inos = Vec::new();
    for number in 0..1500 {
        let create = MetaOp::Create { dir: ROOT, name: name(&format!("f{number}")), node: file(), hold: true };
        let ino = match shard.call_as(BOB, create) {
            Ok(MetaReply::Entry(entry)) => entry.attr.ino,
            other => panic!("{other:?}"),
        };
        for start in [0, 10, 20].into_iter().filter(|_| number % 3 == 0) {
            let lock =
                LockRange { family: LockFamily::Posix, kind: LockKind::Write, start, end: start, owner: 1, pid: 1 };
            assert_eq!(shard.call_as(BOB, MetaOp::Lock { ino, lock, wait: false }), Ok(MetaReply::Done));
        }
        inos.push(ino);
    }
    (shard, inos)
}

fn is_leased(shard: &Shard, ino: Ino) -> bool {
    now_or_never(lease_holder(&shard.state, shard.id, ino)).is_some()
}

#[test]
fn what_a_fenced_session_had_keeps_others_out_until_it_is_taken_in_entries_of_bounded_size() {
    let (mut shard, inos) = owner_of_many();
    assert_eq!(shard.entry(LogEntry::Fence { session: BOB }), Reply::Done);
    assert!(inos.iter().all(|ino| is_leased(&shard, *ino)), "it may still write what it has");
    assert_eq!(now_or_never(list_half_fenced(&shard.state, shard.id)), [BOB]);
    let mut entries = 0;
    loop {
        let told = now_or_never(list_leases(&shard.state, shard.id, BOB));
        let before: Vec<Ino> = inos.iter().copied().filter(|ino| is_leased(&shard, *ino)).collect();
        let taken = shard.outcome(LogEntry::Dispossess { session: BOB });
        entries += 1;
        // Two rows of each lease and hold; the last inode's locks may go beyond.
        assert!(taken.batch.len() <= 2 * 1024 + 3, "{} rows in an entry", taken.batch.len());
        assert!(before.iter().all(|ino| told.contains(ino) || is_leased(&shard, *ino)), "a lease went unannounced");
        check(&[(shard.id, &shard.state)]).unwrap();
        if taken.reply == Reply::Done {
            break;
        }
        assert_eq!(taken.reply, Reply::Unfinished);
    }
    assert!(entries > 3, "{entries}");
    assert!(now_or_never(list_half_fenced(&shard.state, shard.id)).is_empty());
    for ino in inos {
        let lock = LockRange { family: LockFamily::Posix, kind: LockKind::Write, start: 0, end: 99, owner: 1, pid: 1 };
        assert_eq!(shard.call(MetaOp::Lock { ino, lock, wait: false }), Ok(MetaReply::Done));
        assert!(matches!(shard.call(MetaOp::AcquireLease { ino }), Ok(MetaReply::Lease { granted: true, .. })));
    }
}

#[test]
fn a_session_that_has_much_is_closed_in_entries_of_bounded_size() {
    let (mut shard, inos) = owner_of_many();
    let close = shard.next_call(BOB, MetaOp::CloseSession);
    let mut replies = Vec::new();
    while replies.last().is_none_or(|reply| *reply == Reply::Unfinished) {
        let closed = shard.outcome(close.clone());
        assert!(closed.batch.len() <= 2 * 1024 + 3, "{} rows in an entry", closed.batch.len());
        replies.push(closed.reply);
    }
    assert!(replies.len() > 3 && replies.last() == Some(&Reply::Meta(Ok(MetaReply::Done))), "{replies:?}");
    assert!(!inos.iter().any(|ino| is_leased(&shard, *ino)));
    let late = MetaOp::Open { ino: inos[0] };
    assert_eq!(shard.call_as(BOB, late), Err(MetaError::SessionUnknown));
    check(&[(shard.id, &shard.state)]).unwrap();
}

#[test]
fn a_closed_session_leaves_no_reply_behind_however_many_transactions_have_left() {
    let mut shard = Shard::new();
    shard.create(ROOT, "f", file()).unwrap();
    let all = keys::of_session(shard.id, keys::REPLY, ALICE);
    let replies = |shard: &Shard| shard.state.map.keys().filter(|key| key.starts_with(&all)).count();
    let kept = shard.state.map.iter().find(|(key, _)| key.starts_with(&all)).unwrap().1.clone();
    for sequence in 0..2 * SESSION_REPLIES_MAX as u64 {
        shard
            .state
            .map
            .insert(keys::reply(shard.id, RequestId { session: ALICE, sequence: 5000 + sequence }), kept.clone());
    }
    assert!(replies(&shard) > 2 * SESSION_REPLIES_MAX);
    shard.call(MetaOp::CloseSession).unwrap();
    assert_eq!(replies(&shard), 0);
}

#[test]
fn only_what_a_fenced_session_has_is_taken() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    shard.call_as(BOB, MetaOp::AcquireLease { ino }).unwrap();
    let before = shard.state.clone();
    for session in [BOB, SessionId(77)] {
        assert_eq!(shard.entry(LogEntry::Dispossess { session }), Reply::Done);
    }
    assert_eq!(shard.state, before);
}

#[test]
fn an_unlinked_file_lives_until_the_last_session_releases_it() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    for session in [ALICE, BOB] {
        shard.call_as(session, MetaOp::Open { ino }).unwrap();
        shard.call_as(session, MetaOp::Open { ino }).unwrap();
    }
    shard.unlink(ROOT, "f").unwrap();
    // Not a file made without a name: it can't come back.
    let link = MetaOp::Link { ino, dir: ROOT, name: name("g") };
    assert_eq!(errno(shard.call(link)), Errno::ENOENT);
    shard.call(MetaOp::Release { inos: vec![ino] }).unwrap();
    shard.write(ino, vec![data(0, 5, 1)]).unwrap();
    assert_eq!(shard.attr(ino).unwrap().size, 5);
    shard.call_as(BOB, MetaOp::CloseSession).unwrap();
    shard.reap();
    assert_eq!(errno(shard.attr(ino)), Errno::ESTALE);
    check(&[(shard.id, &shard.state)]).unwrap();
}

#[test]
fn whoever_makes_and_opens_a_file_may_write_it_until_the_release_of_many_at_once() {
    let mut shard = Shard::new();
    let mut make = |called| {
        let create = MetaOp::Create { dir: ROOT, name: name(called), node: file(), hold: true };
        match shard.call_as(BOB, create) {
            Ok(MetaReply::Entry(entry)) => (entry.attr.ino, entry.grant.write),
            other => panic!("{other:?}"),
        }
    };
    let made = [make("a"), make("b")];
    assert!(made.iter().all(|(_, write)| *write));
    let inos: Vec<Ino> = made.iter().map(|(ino, _)| *ino).collect();
    let granted_to = |shard: &mut Shard, session| match shard.call_as(session, MetaOp::AcquireLease { ino: inos[0] }) {
        Ok(MetaReply::Lease { granted, .. }) => granted,
        other => panic!("{other:?}"),
    };
    assert!(!granted_to(&mut shard, ALICE));
    shard.unlink(ROOT, "b").unwrap();
    shard.call_as(BOB, MetaOp::Release { inos: inos.clone() }).unwrap();
    assert_eq!(errno(shard.attr(inos[1])), Errno::ESTALE, "nothing keeps an unlinked file");
    check(&[(shard.id, &shard.state)]).unwrap();
    assert!(granted_to(&mut shard, ALICE));
    // Another's lease is not given back.
    shard.call_as(BOB, MetaOp::Release { inos: vec![inos[0]] }).unwrap();
    assert!(!granted_to(&mut shard, BOB));
    let foreign = Ino::new(ShardId(9), 1);
    let too_many = vec![inos[0]; cfs_wire::limits::RELEASES_MAX + 1];
    for inos in [vec![inos[0], foreign], too_many] {
        assert!(matches!(shard.call(MetaOp::Release { inos }), Err(MetaError::Malformed(_))));
    }
}

#[test]
fn a_nameless_file_is_linked_once_and_is_a_file_like_any_other() {
    let mut shard = Shard::new();
    let ino = match shard.call(MetaOp::Tmpfile { dir: ROOT, node: file() }) {
        Ok(MetaReply::Entry(entry)) => entry.attr.ino,
        other => panic!("{other:?}"),
    };
    let link = |called| MetaOp::Link { ino, dir: ROOT, name: name(called) };
    assert_eq!(errno(shard.call_as(BOB, link("b"))), Errno::ENOENT);
    shard.call(link("a")).unwrap();
    shard.call(MetaOp::Release { inos: vec![ino] }).unwrap();
    assert_eq!(shard.lookup(ROOT, "a").unwrap().nlink, 1);
    check(&[(shard.id, &shard.state)]).unwrap();
}

#[test]
fn replies_are_kept_until_acknowledged_and_bounded() {
    let mut shard = Shard::new();
    let call = |sequence, lowest_unacknowledged, called: &str| {
        let op = MetaOp::Create { dir: ROOT, name: name(called), node: file(), hold: false };
        let id = RequestId { session: ALICE, sequence };
        let call = MetaCall { id, lowest_unacknowledged, shard: ShardId(0), op };
        LogEntry::Client { call, now: at(3000), facts: Facts::default() }
    };
    let mut first = None;
    for sequence in 0..SESSION_REPLIES_MAX as u64 {
        let reply = shard.entry(call(10 + sequence, 0, &format!("f{sequence}")));
        assert!(matches!(reply, Reply::Meta(Ok(_))), "{sequence}: {reply:?}");
        first.get_or_insert(reply);
    }
    let next = 10 + SESSION_REPLIES_MAX as u64;
    assert!(matches!(shard.entry(call(next, 0, "one more")), Reply::Meta(Err(MetaError::Unavailable(_)))));
    assert_eq!(Some(shard.entry(call(10, 0, "f0"))), first);
    assert!(matches!(shard.entry(call(next, 12, "one more")), Reply::Meta(Ok(_))));
    // A late repeat of what was acknowledged is not run again.
    shard.sequence = 5000;
    shard.unlink(ROOT, "f0").unwrap();
    assert!(matches!(shard.entry(call(10, 0, "f0")), Reply::Meta(Err(MetaError::Malformed(_)))));
    assert_eq!(errno(shard.lookup(ROOT, "f0")), Errno::ENOENT);
}

#[test]
fn a_shard_is_initialised_once_and_only_as_it_can_be() {
    let mut shard = Shard::new();
    let before = shard.state.clone();
    assert_eq!(shard.entry(LogEntry::Init(init(1))), Reply::Done);
    assert!(matches!(shard.entry(LogEntry::Init(init(2))), Reply::Meta(Err(MetaError::Malformed(_)))));
    assert_eq!(shard.state, before);
    let fence = LogEntry::Fence { session: ALICE };
    let fresh = MemoryState::default();
    assert_eq!(apply(&fresh, ShardId(0), &fence).now_or_never().unwrap(), Err(StateError::Uninitialised));
    let newer = Init { feature_level: 2, ..init(1) };
    let outcome = now_or_never(apply(&fresh, ShardId(0), &LogEntry::Init(newer)));
    assert!(matches!(outcome.reply, Reply::Meta(Err(MetaError::Malformed(_)))) && outcome.batch.is_empty());
}
