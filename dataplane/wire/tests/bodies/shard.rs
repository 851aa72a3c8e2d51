//! What servers and movers ask of a shard, and what it answers.

use super::data::{SEGMENT, chunk, extent, hot, registration};
use super::{DIR, GOLDEN, INO, OTHER_DIR, SHARD, policy};
use cfs_wire::data::{Referent, Registration};
use cfs_wire::meta::{AuditRecord, FileKind, MetaError, Name, OP_SHARD, ShardOp, ShardReply};
use cfs_wire::{BlobId, Epoch, SegmentId, ShardId};

fn referents() -> Vec<Referent> {
    vec![Referent::Hot(BlobId(0x0102_0304)), Referent::Slot(SEGMENT, 0x0506)]
}

fn ops() -> Vec<ShardOp> {
    let referents = referents();
    let (ino, epoch, after) = (INO, Epoch(0x1112), Some(b"position".to_vec()));
    let new = registration();
    let old = Registration { epoch: Epoch(0x9090), ..registration() };
    vec![
        ShardOp::Register(registration()),
        ShardOp::GetRegistration(SEGMENT),
        ShardOp::ListRegistrations { after: Some(SEGMENT), max: 0x40 },
        ShardOp::Replace { old, new },
        ShardOp::Deregister(SEGMENT),
        ShardOp::ListReleased { max: 0x1000 },
        ShardOp::Freeze { referents: referents.clone(), epoch },
        ShardOp::Thaw { referents: referents.clone() },
        ShardOp::Resolve { referents: referents.clone() },
        ShardOp::MarkDead { slots: vec![(SEGMENT, 0x0708), (SegmentId(9), 1)] },
        ShardOp::Holders { referent: referents[1] },
        ShardOp::Swap { ino, swaps: vec![(extent(hot()), vec![extent(chunk()), extent(hot())])] },
        ShardOp::AdvanceEpoch { minimum: epoch, after: after.clone() },
        ShardOp::Audit { after, max: 0x0200 },
        ShardOp::SetPolicy { ino, policy: Some(policy(1, 2)) },
        ShardOp::GetEpoch,
        ShardOp::Extents { ino, offset: 0x2122_2324, length: 0x3132, max: 0x80 },
        ShardOp::ListReferenced { after: Some(referents[1]), max: 0x0400 },
    ]
}

fn records() -> Vec<AuditRecord> {
    let ino = INO;
    vec![
        AuditRecord::Inode {
            ino,
            kind: FileKind::Directory,
            nlink: 2,
            size: 0x4142_4344,
            allocated: 0x5152_5354,
            inline: 0x6162,
            parent: Some(DIR),
        },
        AuditRecord::Entry { dir: DIR, name: Name::from_slice(b"entry"), ino, kind: FileKind::File },
        AuditRecord::Extent { ino, extent: extent(chunk()) },
        AuditRecord::BackReference { referent: referents()[0], ino, offset: 0x7172_7374 },
        AuditRecord::Orphan { ino },
        AuditRecord::Registration { registration: registration(), dead: vec![3, 0x0101] },
        AuditRecord::Transaction { detail: "prepared".to_owned() },
    ]
}

fn replies() -> Vec<ShardReply> {
    let next = Some(b"next".to_vec());
    vec![
        ShardReply::Done,
        ShardReply::Registration(Some(registration())),
        ShardReply::Registrations { list: vec![(registration(), vec![5, 0x0202])], end: true },
        ShardReply::Released(vec![(referents()[0], Some(hot())), (referents()[1], None)]),
        ShardReply::Held(vec![true, false, true]),
        ShardReply::Dead(vec![SEGMENT]),
        ShardReply::Holders(vec![(INO, 0x1112), (OTHER_DIR, 0x2122)]),
        ShardReply::Swapped(0x3132),
        ShardReply::Refused,
        ShardReply::Audit { records: vec![AuditRecord::Orphan { ino: INO }], next: next.clone() },
        ShardReply::Epoch(Epoch(0x4142)),
        ShardReply::Forgotten { next },
        ShardReply::Extents { extents: vec![extent(hot())], policy: policy(4, 1) },
        ShardReply::Referenced { list: referents(), end: true },
    ]
}

#[test]
fn what_servers_ask_of_shards_is_what_it_was() {
    let mut golden = GOLDEN("shard");
    golden.bytes("OP_SHARD", &OP_SHARD.to_le_bytes());
    golden.body::<(ShardId, ShardOp)>("shard-call", &(SHARD, ShardOp::GetEpoch));
    golden.body::<Result<ShardReply, MetaError>>("shard-reply", &Ok(ShardReply::Held(vec![true])));
    golden.variants(&ops());
    golden.variants(&replies());
    golden.variants(&records());
    golden.check();
}
