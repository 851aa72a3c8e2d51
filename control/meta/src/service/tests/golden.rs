//! The bytes between leaders, and of what is proposed, are pinned: a change here needs a new
//! version of the protocol or of the format.

use super::super::applied::{EntryError, decode_entry, encode_entry};
use super::super::{OP_PEER, PeerCall, PeerReply};
use crate::state::{Action, Answer, LogEntry, Refusal, TxnId};
use cfs_wire::golden::Golden;
use cfs_wire::meta::{FileKind, MetaError, Name};
use cfs_wire::{Errno, Ino, RequestId, SessionId, ShardId, Timestamp};

const INO: Ino = Ino::from_u64(0x0003_0000_0000_0101);
const SESSION: SessionId = SessionId(0x5151_5252_5353_5454);
const TXN: TxnId = TxnId { coordinator: ShardId(0x0910), number: 0x1112_1314 };

fn calls() -> Vec<PeerCall> {
    let (txn, session, dir, now) = (TXN, SESSION, INO, Timestamp { secs: 99, nanos: 123_456_789 });
    vec![
        PeerCall::Prepare { txn, session, actions: vec![Action::DropLink { ino: INO, now }], now },
        PeerCall::Commit { txn, session },
        PeerCall::Abort { txn },
        PeerCall::Forget { txn },
        PeerCall::Lookup { dir, name: Name::from_slice(b"looked up") },
        PeerCall::ParentOf { dir },
        PeerCall::TakeRenameLock { holder: RequestId { session, sequence: 0x6162 }, steal: true },
        PeerCall::ReleaseRenameLock { token: 0x7172 },
        PeerCall::Status { txn },
        PeerCall::CountInodes,
    ]
}

fn replies() -> Vec<PeerReply> {
    vec![
        PeerReply::Done,
        PeerReply::Prepared(Ok(vec![Answer::Links { ino: INO, nlink: 3 }])),
        PeerReply::Prepared(Err(Refusal::Errno(Errno::EMLINK))),
        PeerReply::Named(Some((INO, FileKind::Symlink))),
        PeerReply::Parent(Ok(INO)),
        PeerReply::Parent(Err(Errno::ENOENT)),
        PeerReply::RenameLock(Some(0x8182)),
        PeerReply::Known(true),
        PeerReply::Inodes(0x9192),
    ]
}

#[test]
fn what_leaders_ask_of_each_other_is_what_it_was() {
    let mut golden = Golden::new(env!("CARGO_MANIFEST_DIR"), "peers");
    golden.bytes("OP_PEER", &OP_PEER.to_le_bytes());
    golden.body("peer-call", &(ShardId(0x0102), PeerCall::Abort { txn: TXN }));
    golden.variants(&calls());
    golden.variants(&replies());
    golden.variants::<Result<PeerReply, MetaError>>(&[Ok(PeerReply::Done), Err(MetaError::Fenced)]);
    golden.check();
}

#[test]
fn what_is_proposed_is_what_it_was() {
    let (nonce, entry) = (0xf1f2_f3f4_f5f6_f7f8, LogEntry::Fence { session: SESSION });
    let bytes = encode_entry(nonce, &entry);
    assert_eq!(decode_entry(&bytes), Ok((nonce, entry)));
    assert_eq!(decode_entry(&[&bytes[..], &[0]].concat()), Err(EntryError::Malformed), "a byte is left over");
    let mut golden = Golden::new(env!("CARGO_MANIFEST_DIR"), "proposal");
    golden.bytes("proposal", &bytes);
    golden.check();
}
