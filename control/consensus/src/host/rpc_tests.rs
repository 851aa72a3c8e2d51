use super::*;
use crate::types::{Command, Entry, LeaderId, LogId, Member, Membership, StoredMembership, log_id};
use cfs_wire::golden::Golden;
use openraft::EntryPayload;
use openraft::vote::RaftLeaderId;
use std::collections::BTreeMap;
use std::fmt::Debug;

const GROUP: u16 = 0x0203;

fn vote(term: u64) -> Vote {
    Vote { leader_id: LeaderId::new(term, 0x0405), committed: true }
}

fn at(index: u64) -> LogId {
    log_id(0x0607, index)
}

fn membership() -> Membership {
    let members = [(1, "one:7001"), (0x0809, "other:7002")];
    let members = members.map(|(id, address)| (id, Member { address: address.to_owned() }));
    Membership::new(vec![[1].into(), [1, 0x0809].into()], BTreeMap::from(members)).expect("both are members")
}

fn payloads() -> Vec<EntryPayload<Command, u64, Member>> {
    vec![
        EntryPayload::Blank,
        EntryPayload::Normal(Command("a proposal".into())),
        EntryPayload::Membership(membership()),
    ]
}

fn append() -> AppendCall {
    let entries = payloads().into_iter().zip(0x0a0c..);
    let entries = entries.map(|(payload, index)| Entry { log_id: at(index), payload }).collect();
    AppendCall { vote: vote(0x0708), prev_log_id: Some(at(0x0a0b)), entries, leader_commit: Some(at(0x0a0a)) }
}

fn snapshot() -> SnapshotBegin {
    let last_membership = StoredMembership::new(Some(at(0x0b0b)), membership());
    SnapshotBegin { vote: vote(0x0809), meta: SnapshotMeta { last_log_id: Some(at(0x0c0c)), last_membership } }
}

/// Opcode and body, which must also be read as what it was.
fn call<T: Serialize + DeserializeOwned + Debug + Counted>(golden: &mut Golden, name: &str, opcode: u16, body: &T) {
    let message = request(opcode, GROUP, body, Bytes::new());
    let (group, rest) = read_group(&message.body).expect("a request names its group");
    let read: T = read_body(rest).expect("what was written is read");
    assert_eq!((group, format!("{read:?}")), (GROUP, format!("{body:?}")));
    golden.bytes(name, &[&message.opcode.to_le_bytes()[..], &message.body].concat());
}

/// openraft gives these bodies their form: another version of it may give them another.
#[test]
fn the_bodies_of_raft_are_what_they_were() {
    let mut golden = Golden::new(env!("CARGO_MANIFEST_DIR"), "rpc");
    call(&mut golden, "append", APPEND, &append());
    let vote_call = VoteCall { leadership_transfer: true, ..VoteCall::new(vote(0x0910), Some(at(0x0d0d))) };
    call(&mut golden, "vote", VOTE, &vote_call);
    call(&mut golden, "pre-vote", PRE_VOTE, &vote_call);
    let transfer_leader = TransferLeaderCall::new(vote(0x0a11), 0x0809, Some(at(0x0e0e)));
    call(&mut golden, "transfer-leader", TRANSFER_LEADER, &transfer_leader);
    call(&mut golden, "snapshot-begin", SNAPSHOT_BEGIN, &snapshot());
    let transfer = Transfer { id: 0x1112_1314, number: 0x1516 };
    call(&mut golden, "snapshot-chunk", SNAPSHOT_CHUNK, &transfer);
    call(&mut golden, "snapshot-finish", SNAPSHOT_FINISH, &transfer);
    golden.variants(&payloads());

    golden.variants(&[
        AppendReply::Success,
        AppendReply::PartialSuccess(Some(at(0x0f0f))),
        AppendReply::Conflict,
        AppendReply::HigherVote(vote(0x1112)),
    ]);
    golden.body("VoteReply", &VoteReply::new(vote(0x1213), Some(at(0x1010)), true));
    let (expected, actual) = (vote(0x1314), vote(0x1415));
    let unflushed = TransferLeaderError::LogNotFlushed { expected: Some(at(0x1111)), actual: Some(at(0x1110)) };
    golden.variants::<TransferLeaderReply>(&[Ok(()), Err(unflushed.clone())]);
    golden.variants(&[TransferLeaderError::VoteChanged { expected, actual }, unflushed]);
    golden.body("SnapshotReply", &SnapshotReply::new(vote(0x1516)));
    for raw in 0..=u16::MAX {
        let status = Status::from_u16(raw);
        // What is not known is taken for it.
        if status != Status::Malformed || raw == Status::Malformed as u16 {
            golden.bytes(&format!("Status::{status:?}"), &raw.to_le_bytes());
        }
    }
    golden.check();
}

#[test]
fn a_body_with_bytes_left_over_is_refused() {
    let longer = |bytes: &Bytes| Bytes::from([bytes, &b"\0"[..]].concat());
    let message = request(APPEND, GROUP, &append(), Bytes::new());
    let read =
        |body: &Bytes| read_group(body).and_then(|(_, rest)| read_body::<AppendCall>(rest)).map(|call| call.vote);
    assert_eq!(read(&message.body), Ok(vote(0x0708)));
    assert_eq!(read(&longer(&message.body)), Err(Status::Malformed));
    let good = reply(Ok(AppendReply::Conflict));
    assert_eq!(read_reply(&good), Ok(AppendReply::Conflict));
    let bad = Message { body: longer(&good.body), ..good };
    assert_eq!(read_reply::<AppendReply>(&bad), Err(Status::Malformed));
}

/// The log would refuse them when it is read again, and the node could not start.
#[test]
fn terms_and_indices_that_were_never_counted_are_refused() {
    fn is_refused<T: Serialize + DeserializeOwned + Counted>(body: &T) -> bool {
        match read_reply::<T>(&reply(Ok(body))) {
            Ok(_) => false,
            Err(status) => {
                assert_eq!(status, Status::Malformed);
                true
            }
        }
    }
    let (last, beyond) = (NUMBER_MAX, NUMBER_MAX + 1);
    for (number, refused) in [(last, false), (beyond, true), (u64::MAX, true)] {
        let (late, far, newer) = (vote(number), Some(at(number)), Some(log_id(number, 1)));
        for id in [far, newer] {
            assert_eq!(is_refused(&AppendCall { prev_log_id: id, ..append() }), refused);
            assert_eq!(is_refused(&AppendCall { leader_commit: id, ..append() }), refused);
            assert_eq!(is_refused(&AppendReply::PartialSuccess(id)), refused);
            assert_eq!(is_refused(&VoteCall::new(vote(1), id)), refused);
            assert_eq!(is_refused(&VoteReply::new(vote(1), id, true)), refused);
            assert_eq!(is_refused(&TransferLeaderCall::new(vote(1), 2, id)), refused);
            let unflushed = TransferLeaderError::LogNotFlushed { expected: None, actual: id };
            assert_eq!(is_refused::<TransferLeaderReply>(&Err(unflushed)), refused);
        }
        let mut appended = append();
        appended.entries[2].log_id = at(number);
        assert_eq!(is_refused(&appended), refused);
        let mut begin = snapshot();
        begin.meta.last_membership = StoredMembership::new(far, membership());
        assert_eq!(is_refused(&begin), refused);
        assert_eq!(is_refused(&SnapshotBegin { vote: late, ..snapshot() }), refused);
        assert_eq!(is_refused(&AppendCall { vote: late, ..append() }), refused);
        assert_eq!(is_refused(&AppendReply::HigherVote(late)), refused);
        assert_eq!(is_refused(&VoteReply::new(late, None, true)), refused);
        assert_eq!(is_refused(&TransferLeaderCall::new(late, 2, None)), refused);
        assert_eq!(is_refused(&SnapshotReply::new(late)), refused);
    }
}
