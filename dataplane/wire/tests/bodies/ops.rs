//! What clients ask of a metadata shard.

use super::data::{chunk, hot};
use super::{DIR, GOLDEN, INO, OTHER_DIR, REQUEST, SESSION, SHARD, time};
use cfs_wire::Epoch;
use cfs_wire::meta::{
    AttrChanges, Commit, EventsCall, FileKind, FileWrite, LockFamily, LockKind, LockRange, MetaCall, MetaOp, MountCall,
    Name, NewNode, OP_EVENTS, OP_META, OP_MOUNT, RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, SetTime,
    XATTR_CLEAR_SGID, XATTR_CREATE, XATTR_POLICY, XATTR_REPLACE,
};

fn name(text: &str) -> Name {
    Name::from_slice(text.as_bytes())
}

fn node() -> NewNode {
    NewNode {
        kind: FileKind::CharDevice,
        mode: 0o6755,
        umask: 0o027,
        uid: 1001,
        gid: 2002,
        rdev: 0x0103_0507,
        target: b"a/target".to_vec(),
    }
}

fn changes() -> AttrChanges {
    AttrChanges {
        mode: Some(0o4711),
        uid: Some(1003),
        gid: Some(2004),
        size: Some(0x0101_0202_0303),
        atime: Some(SetTime::Now),
        mtime: Some(SetTime::At(time(22))),
        ctime: Some(time(33)),
        kill_privileges: true,
    }
}

fn writes() -> Vec<FileWrite> {
    let epoch = Epoch(0x2122);
    vec![
        FileWrite::Data { offset: 0x3132_3334, length: 0x4142, location: hot(), epoch },
        FileWrite::Append { length: 0x5152, location: chunk(), epoch },
        FileWrite::Inline { offset: 0x6162, bytes: b"inline".to_vec() },
        FileWrite::AppendInline { bytes: b"appended".to_vec() },
        FileWrite::Punch { offset: 0x7172, length: 0x8182_8384 },
        FileWrite::Truncate { size: 0x9192_9394 },
        FileWrite::Extend { size: 0xa1a2_a3a4 },
        FileWrite::DropCapability,
    ]
}

pub fn lock() -> LockRange {
    LockRange {
        family: LockFamily::Flock,
        kind: LockKind::Write,
        start: 0x0102,
        end: u64::MAX,
        owner: 0xf1f2_f3f4_f5f6_f7f8,
        pid: 4711,
    }
}

fn commit() -> Commit {
    Commit { ino: INO, sequence: 0x0b0c, writes: writes(), mtime: Some(time(-44)), kill_privileges: true }
}

fn reads() -> Vec<MetaOp> {
    let ino = INO;
    vec![
        MetaOp::Lookup { dir: DIR, name: name("looked up") },
        MetaOp::GetAttr { ino },
        MetaOp::ReadLink { ino },
        MetaOp::ReadDir { dir: DIR, after: 0x1112_1314, entries_max: 0x0200, with_attrs: true },
        MetaOp::GetXattr { ino, name: name("user.got") },
        MetaOp::ListXattr { ino },
        MetaOp::GetExtents { ino, offset: 0x2122, length: 0x3132_3334, extents_max: 0x0400 },
        MetaOp::StatFs { count_inodes: true },
        MetaOp::TestLock { ino, lock: lock() },
        MetaOp::Renew { inos: vec![INO, DIR] },
    ]
}

fn namespace_ops() -> Vec<MetaOp> {
    let (dir, node) = (DIR, node());
    vec![
        MetaOp::OpenSession { client: "host:/mnt".to_owned() },
        MetaOp::CloseSession,
        MetaOp::Create { dir, name: name("created"), node: node.clone(), hold: true },
        MetaOp::Tmpfile { dir, node },
        MetaOp::Link { ino: INO, dir, name: name("linked") },
        MetaOp::Unlink { dir, name: name("unlinked") },
        MetaOp::Rmdir { dir, name: name("removed") },
        MetaOp::Rename { dir, name: name("from"), to_dir: OTHER_DIR, to_name: name("to"), flags: RENAME_EXCHANGE },
    ]
}

fn inode_ops() -> Vec<MetaOp> {
    let (ino, lock) = (INO, lock());
    vec![
        MetaOp::SetAttr { ino, changes: changes() },
        MetaOp::SetXattr { ino, name: name("user.set"), value: b"value".to_vec(), flags: XATTR_CLEAR_SGID },
        MetaOp::RemoveXattr { ino, name: name("user.removed") },
        MetaOp::Commit(commit()),
        MetaOp::Open { ino },
        MetaOp::Release { inos: vec![INO, OTHER_DIR] },
        MetaOp::AcquireLease { ino },
        MetaOp::ReturnLease { ino },
        MetaOp::Lock { ino, lock, wait: true },
        MetaOp::CancelLock { ino, owner: 0x1f2f },
        MetaOp::Unlock { ino, lock },
        MetaOp::UnlockOwner { ino, family: LockFamily::Flock, owner: 0x3f4f },
    ]
}

#[test]
fn what_clients_ask_is_what_it_was() {
    let mut golden = GOLDEN("ops");
    for (name, opcode) in [("OP_META", OP_META), ("OP_EVENTS", OP_EVENTS), ("OP_MOUNT", OP_MOUNT)] {
        golden.bytes(name, &opcode.to_le_bytes());
    }
    let op = MetaOp::GetAttr { ino: INO };
    golden.body("MetaCall", &MetaCall { id: REQUEST, lowest_unacknowledged: 0x6161_0000, shard: SHARD, op });
    golden.body("MountCall", &MountCall { client: "host:/mnt".to_owned() });
    golden.body(
        "EventsCall",
        &EventsCall { session: SESSION, acknowledged: 0x0a0b, done: vec![0x0a0d, 0x0a0f], hold_ms: 25_000 },
    );
    golden.variants(&[reads(), namespace_ops(), inode_ops()].concat());
    golden.variants(&writes());
    golden.variants(&[SetTime::Now, SetTime::At(time(55))]);
    golden.variants(&[LockKind::Read, LockKind::Write]);
    golden.variants(&[LockFamily::Posix, LockFamily::Flock]);
    golden.variants(&[
        FileKind::File,
        FileKind::Directory,
        FileKind::Symlink,
        FileKind::Fifo,
        FileKind::Socket,
        FileKind::CharDevice,
        FileKind::BlockDevice,
    ]);
    let flags = [
        ("RENAME_NOREPLACE", RENAME_NOREPLACE),
        ("RENAME_EXCHANGE", RENAME_EXCHANGE),
        ("RENAME_WHITEOUT", RENAME_WHITEOUT),
        ("XATTR_CREATE", XATTR_CREATE),
        ("XATTR_REPLACE", XATTR_REPLACE),
        ("XATTR_CLEAR_SGID", XATTR_CLEAR_SGID),
    ];
    for (name, flag) in flags {
        golden.bytes(name, &flag.to_le_bytes());
    }
    golden.bytes("XATTR_POLICY", XATTR_POLICY);
    golden.check();
}
