//! What is too large to be stored is refused by the entry, not by the store below.

use super::super::entry::{Action, Refusal, TxnId};
use super::super::keys;
use super::super::records::{Counters, decode, encode};
use super::*;
use cfs_kv::VALUE_BYTES_MAX;
use cfs_wire::SegmentId;
use cfs_wire::data::{Registration, Slot};
use cfs_wire::limits::{CLIENT_NAME_BYTES_MAX, HOT_COPIES_MAX, SEGMENT_SLOTS_MAX};

/// The reply, and that it left the state as it was.
fn refused(shard: &mut Shard, entry: LogEntry) -> Reply {
    let before = shard.state.clone();
    let reply = shard.entry(entry);
    assert!(shard.state == before, "something was stored");
    reply
}

fn detail(reply: Reply) -> String {
    match reply {
        Reply::Meta(Err(MetaError::Malformed(detail))) => detail,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_client_whose_name_is_too_long_gets_no_session() {
    let mut shard = Shard::new();
    let open = |length| MetaOp::OpenSession { client: "n".repeat(length) };
    let entry = shard.next_call(SessionId(5), open(CLIENT_NAME_BYTES_MAX + 1));
    assert_eq!(detail(refused(&mut shard, entry)), "4352 bytes in a client's name; at most 4351 are kept");
    assert_eq!(shard.call_as(SessionId(5), open(CLIENT_NAME_BYTES_MAX)), Ok(MetaReply::Session { lease_ms: 0 }));
}

#[test]
fn a_commit_names_no_more_copies_than_the_widest_policy_makes() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    let write = |copies| {
        let targets = (0..copies as u32).map(TargetId).collect();
        let location = Location::Hot { blob: BlobId(1), targets, offset: 0 };
        FileWrite::Data { offset: 0, length: 1, location, epoch: Epoch(0) }
    };
    let commit = Commit { ino, sequence: 1, writes: vec![write(10)], mtime: None, kill_privileges: false };
    let entry = shard.next_call(ALICE, MetaOp::Commit(commit));
    assert_eq!(detail(refused(&mut shard, entry)), "10 copies of a hot blob; at most 9 are kept");
    assert_eq!(shard.write(ino, vec![write(HOT_COPIES_MAX)]).unwrap().size, 1);
}

#[test]
fn a_segment_of_too_many_slots_is_not_registered() {
    let mut shard = Shard::new();
    let register = |slots| {
        let slots = vec![Slot { shard: 0, start: 0, stored: 1, length: 1 }; slots];
        let (segment, volume, epoch) = (SegmentId(1), VolumeId(1), Epoch(0));
        ShardOp::Register(Registration { segment, volume, epoch, data: 2, parity: 1, shards: Vec::new(), slots })
    };
    let entry = LogEntry::Shard { op: register(SEGMENT_SLOTS_MAX + 1), now: at(1) };
    assert_eq!(detail(refused(&mut shard, entry)), "513 slots of a segment; at most 512 are kept");
    assert_eq!(shard.shard_op(register(SEGMENT_SLOTS_MAX)), ShardReply::Done);
}

/// Whatever the entry: what the ordered store would not take fails it, and the replica lives.
#[test]
fn a_record_larger_than_the_store_takes_fails_the_entry_that_makes_it() {
    let mut shard = Shard::new();
    let prepare = |number, actions| {
        let action = Action::Moved { ino: ROOT, parent: None, now: at(1) };
        let txn = TxnId { coordinator: ShardId(1), number };
        LogEntry::Prepare { txn, actions: vec![action; actions], now: at(1) }
    };
    // Each action alone takes more than 16 bytes with its answer and its lock.
    let too_large = refused(&mut shard, prepare(1, VALUE_BYTES_MAX / 16));
    assert_eq!(too_large, Reply::Prepared(Err(Refusal::Errno(Errno::E2BIG))));
    assert!(matches!(shard.entry(prepare(2, 3)), Reply::Prepared(Ok(answers)) if answers.len() == 3));
}

/// A right checksum proves nothing: what is added to these would not fit.
#[test]
fn numbers_that_were_never_counted_are_refused() {
    let key = keys::table(ShardId(3), keys::COUNTERS);
    let counters = Counters { next_txn: u64::MAX >> 1, prepared: u32::MAX >> 1, ..Counters::default() };
    assert_eq!(decode(&key, &encode(&counters)), Ok(counters.clone()));
    for wrong in [
        Counters { next_txn: 1 << 63, ..counters.clone() },
        Counters { inodes: u64::MAX, ..counters.clone() },
        Counters { prepared: 1 << 31, ..counters.clone() },
        Counters { minimum_epoch: Epoch(1 << 63), ..counters.clone() },
    ] {
        let refused = StateError::Corrupt { key: key.clone(), reason: "not decodable" };
        assert_eq!(decode::<Counters>(&key, &encode(&wrong)), Err(refused), "{wrong:?}");
    }
}
