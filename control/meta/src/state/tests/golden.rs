//! The bytes of keys, records and log entries are pinned: a change here needs a new format version.

use super::super::directory::{name_hash, placement};
use super::super::entry::{Action, Answer, Init, Refusal, TxnId, Verdict};
use super::super::records::{
    CommitMark, Config, Counters, EntryRecord, ExtentRecord, FrozenRecord, Inode, Lead, LeaseRecord, LockRecord,
    ReleasedRecord, RenameLockRecord, SessionRecord, TxnRecord, Versioned, encode, rewritten,
};
use super::super::{Facts, LogEntry, keys};
use super::name;
use cfs_wire::data::{Location, Referent, Registration, ShardPlace, Slot};
use cfs_wire::golden::Golden;
use cfs_wire::meta::{Attr, FileKind, LockFamily, LockKind, MetaCall, MetaError, MetaOp, MetaReply, ShardOp};
use cfs_wire::{
    BlobId, Epoch, Errno, Ino, Policy, RequestId, SegmentId, SessionId, ShardId, TargetId, Timestamp, VolumeId,
};
use std::collections::BTreeSet;

const SHARD: ShardId = ShardId(0x0102);
const INO: Ino = Ino::from_u64(0x0102_0000_0000_0303);
const DIR: Ino = Ino::from_u64(0x0102_0000_0000_0404);
const SESSION: SessionId = SessionId(0x5151_5252_5353_5454);
const REQUEST: RequestId = RequestId { session: SESSION, sequence: 0x6162_6364 };
const SEGMENT: SegmentId = SegmentId(0xa1a2_a3a4_a5a6_a7a8_a9aa_abac_adae_afb0);
const BLOB: BlobId = BlobId(0xb1b2_b3b4_b5b6_b7b8_b9ba_bbbc_bdbe_bfc0);
const SLOT: Referent = Referent::Slot(SEGMENT, 0x0708);
const TXN: TxnId = TxnId { coordinator: ShardId(0x0910), number: 0x1112_1314 };
const GOLDEN: fn(&str) -> Golden = |name| Golden::new(env!("CARGO_MANIFEST_DIR"), name);

fn time(secs: i64) -> Timestamp {
    Timestamp { secs, nanos: 123_456_000 + secs.unsigned_abs() as u32 }
}

fn policy(data: u8, parity: u8) -> Policy {
    Policy::new(data, parity).expect("a policy in range")
}

fn name_key() -> [u8; 32] {
    std::array::from_fn(|at| at as u8 + 0x41)
}

fn inode() -> Inode {
    Inode {
        ino: INO,
        kind: FileKind::Directory,
        mode: 0o2750,
        nlink: 5,
        uid: 1001,
        gid: 2002,
        rdev: 0x0103_0507,
        size: 0x2122_2324,
        mapped: 0x3132_3334,
        atime: time(11),
        mtime: time(22),
        ctime: time(33),
        btime: time(-44),
        version: 0x4142,
        inline: b"inline".to_vec(),
        parent: Some(DIR),
        entries: 0x5152,
        xattrs: 6,
        xattr_list_bytes: 0x6162,
        access_acl: true,
        default_acl: false,
        tmpfile: true,
        commits: vec![
            CommitMark { session: SESSION, sequence: 0x7172 },
            CommitMark { session: SessionId(1), sequence: 2 },
        ],
        trim: Some(0x8182),
        commits_forgotten: true,
        policy: Some(policy(3, 1)),
    }
}

fn location() -> Location {
    Location::Hot { blob: BLOB, targets: [TargetId(3), TargetId(0x0405)].into_iter().collect(), offset: 0x1213 }
}

fn registration() -> Registration {
    let place =
        |index, target, blob, length| ShardPlace { index, target: TargetId(target), blob: BlobId(blob), length };
    Registration {
        segment: SEGMENT,
        volume: VolumeId(0x8182),
        epoch: Epoch(0x9192_9394),
        data: 4,
        parity: 2,
        shards: vec![place(0, 0x0d0e, 0x1d1e_1f20, 0x20_2122), place(5, 0x0e0f, 0x2d2e_2f30, 0x30_3132)],
        slots: vec![Slot { shard: 1, start: 0x4041, stored: 0x5051, length: 0x6061 }],
    }
}

fn call() -> MetaCall {
    let op = MetaOp::Rmdir { dir: DIR, name: name("removed") };
    MetaCall { id: REQUEST, lowest_unacknowledged: 0x6162_0000, shard: SHARD, op }
}

fn actions() -> Vec<Action> {
    let (ino, dir, now, kind) = (INO, DIR, time(55), FileKind::Socket);
    let replaces = Some((Ino::from_u64(9), FileKind::Fifo));
    let xattrs = vec![(name("user.inherited"), b"value".to_vec())];
    vec![
        Action::Insert { dir, name: name("inserted"), ino: Some(ino), kind, replaces, links: -1, now },
        Action::Remove { dir, name: name("removed"), ino, kind, links: 1, now },
        Action::MakeDir { inode: Box::new(inode()), xattrs },
        Action::AddLink { ino, session: SESSION, now },
        Action::DropLink { ino, now },
        Action::Moved { ino, parent: Some(dir), now },
        Action::HoldRenameLock { token: 0x0b0c },
    ]
}

fn answers() -> Vec<Answer> {
    let attr: Attr = inode().attr(policy(2, 1));
    vec![Answer::Nothing, Answer::Attr(attr), Answer::Links { ino: INO, nlink: 3 }, Answer::Moved { ino: DIR }]
}

fn versioned<T>(record: T) -> Versioned<T> {
    Versioned { since: 0x0e0f, record }
}

fn config() -> Config {
    Config {
        shards: 0x0203,
        volume: VolumeId(0x8182),
        root: DIR,
        policy: policy(4, 2),
        tolerated: 2,
        targets: 0x0607,
        name_key: name_key(),
        feature_level: 1,
    }
}

fn counters() -> Counters {
    Counters {
        next_ino: 0x0101_0101,
        inodes: 0x0202_0202,
        next_txn: 0x0303_0303,
        next_token: 0x0404_0404,
        minimum_epoch: Epoch(0x0505_0505),
        prepared: 0x0606,
        snapshot: 0x0707,
    }
}

fn session() -> SessionRecord {
    SessionRecord { client: "host:/mnt".to_owned(), opened: time(66), fenced: true, lowest: 0x6162, replies: 7 }
}

fn transaction() -> TxnRecord {
    let participants = vec![(ShardId(0x0a0b), vec![Action::DropLink { ino: INO, now: time(77) }])];
    let lead = Some(Lead { call: call(), participants });
    TxnRecord { actions: actions(), answers: answers(), locks: vec![b"a key".to_vec()], decided: true, lead }
}

/// One row at least of each table: its name, key and value.
fn rows() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let (shard, ino, empty) = (SHARD, INO, encode(&()));
    let (family, start, end) = (LockFamily::Flock, 0x2122, 0x3132_3334);
    let of_session = |table| keys::session_ino(shard, table, SESSION, ino);
    let released = ReleasedRecord { location: location(), seen: true };
    let frozen = FrozenRecord { epoch: Epoch(0x4142), slots: vec![0x81, 0x03] };
    let lock = LockRecord { end, kind: LockKind::Write, pid: 4711, token: 0x0d0e };
    let extent = ExtentRecord { length: 0x5152, location: location(), epoch: Epoch(0x6162) };
    let entry = EntryRecord { name: name("entry"), ino, kind: FileKind::CharDevice };
    let held = RenameLockRecord { token: 0x0f10, holder: Some(REQUEST) };
    let reply = Err::<MetaReply, _>(MetaError::Errno(Errno::ENOTEMPTY));
    vec![
        ("CONFIG", keys::table(shard, keys::CONFIG), encode(&config())),
        ("COUNTERS", keys::table(shard, keys::COUNTERS), encode(&counters())),
        ("INODE", keys::inode(shard, ino), encode(&versioned(inode()))),
        ("ENTRY", keys::entry(shard, DIR, 0x1112_1314_1516_1718), encode(&versioned(entry))),
        ("EXTENT", keys::extent(shard, ino, end), encode(&versioned(extent))),
        ("XATTR", keys::xattr(shard, ino, b"user.color"), encode(&versioned(b"blue".to_vec()))),
        ("REFERENCE", keys::reference(shard, &SLOT, ino, start), empty.clone()),
        ("REFERENCE.hot", keys::reference(shard, &Referent::Hot(BLOB), ino, start), empty.clone()),
        ("RELEASED", keys::released(shard, &SLOT), encode(&released)),
        ("FROZEN", keys::frozen(shard, &SLOT), encode(&frozen)),
        ("FROZEN.hot", keys::frozen(shard, &Referent::Hot(BLOB)), encode(&FrozenRecord::default())),
        ("REGISTRATION", keys::registration(shard, SEGMENT), encode(&registration())),
        ("DEAD_SLOTS", keys::dead_slots(shard, SEGMENT), encode(&vec![0x81u8, 0x03])),
        ("SESSION", keys::session(shard, SESSION), encode(&session())),
        ("REPLY", keys::reply(shard, REQUEST), encode(&reply)),
        ("HOLD", keys::hold(shard, ino, SESSION), empty.clone()),
        ("SESSION_HOLD", of_session(keys::SESSION_HOLD), empty.clone()),
        ("LEASE", keys::lease(shard, ino), encode(&LeaseRecord { session: SESSION, token: 0x1011 })),
        ("SESSION_LEASE", of_session(keys::SESSION_LEASE), empty.clone()),
        ("LOCK", keys::lock(shard, ino, family, SESSION, 0xf1f2, start), encode(&lock)),
        ("LOCK.posix", keys::lock(shard, ino, LockFamily::Posix, SESSION, 0xf1f2, start), encode(&lock)),
        ("SESSION_LOCK", of_session(keys::SESSION_LOCK), empty.clone()),
        ("ORPHAN", keys::orphan(shard, ino), empty.clone()),
        ("TRIMMING", keys::trimming(shard, ino), empty),
        ("TRANSACTION", keys::transaction(shard, TXN), encode(&transaction())),
        ("KEY_LOCK.inode", keys::locked_inode(shard, ino), encode(&TXN)),
        ("KEY_LOCK.name", keys::locked_name(shard, DIR, 0x1112_1314_1516_1718), encode(&TXN)),
        ("KEY_LOCK.rename", keys::locked_rename_lock(shard), encode(&TXN)),
        ("REQUEST_TXN", keys::request_txn(shard, REQUEST), encode(&TXN)),
        ("RENAME_LOCK", keys::rename_lock(shard), encode(&held)),
    ]
}

#[test]
fn the_rows_of_all_tables_are_what_they_were() {
    let mut golden = GOLDEN("rows");
    let mut tables: BTreeSet<&(&str, u8)> = BTreeSet::new();
    for (name, key, value) in rows() {
        let declared = keys::TABLES.iter().find(|(_, number)| *number == key[keys::TABLE_AT]);
        assert_eq!(declared.map(|(table, _)| *table), name.split('.').next());
        tables.extend(declared);
        assert_eq!(rewritten(&key, &value), Ok(value.clone()), "{name}");
        golden.bytes(&format!("{name}.key"), &key);
        golden.bytes(&format!("{name}.value"), &value);
    }
    let missing: Vec<_> = keys::TABLES.iter().filter(|table| !tables.contains(table)).collect();
    assert!(missing.is_empty(), "nothing pins the bytes of {missing:?}");
    // Cookies are made of the first, the second says which shard a directory is in.
    golden.bytes("name-hash", &name_hash(&name_key(), b"a name").to_be_bytes());
    golden.bytes("placement", &placement(&name_key(), b"a name", 0x0100).0.to_be_bytes());
    golden.check();
}

fn entries() -> Vec<LogEntry> {
    let (txn, now) = (TXN, time(88));
    let init = Init {
        shards: 0x0203,
        volume: VolumeId(0x8182),
        root: DIR,
        root_mode: 0o1755,
        root_uid: 1003,
        root_gid: 2004,
        policy: policy(4, 2),
        tolerated: 2,
        targets: 0x0607,
        name_key: name_key(),
        feature_level: 1,
        now,
    };
    let facts = Facts { target: Some(Some((INO, FileKind::Directory))), rename_token: Some(0x0f10), full: true };
    let answers = vec![(ShardId(0x0a0b), answers())];
    vec![
        LogEntry::Init(init),
        LogEntry::Client { call: call(), now, facts },
        LogEntry::Shard { op: ShardOp::Deregister(SEGMENT), now },
        LogEntry::Prepare { txn, actions: actions(), now },
        LogEntry::Decide { txn, verdict: Verdict::Commit { answers }, now },
        LogEntry::Commit { txn },
        LogEntry::Abort { txn },
        LogEntry::Forget { txn },
        LogEntry::Fence { session: SESSION },
        LogEntry::Reap { ino: INO, now },
        LogEntry::TakeRenameLock { holder: REQUEST, steal: true },
        LogEntry::ReleaseRenameLock { token: 0x1011 },
        LogEntry::Dispossess { session: SESSION },
    ]
}

#[test]
fn the_entries_of_the_log_are_what_they_were() {
    let mut golden = GOLDEN("entries");
    golden.variants(&entries());
    golden.variants(&actions());
    golden.variants(&answers());
    golden.variants(&[Refusal::Errno(Errno::EMLINK), Refusal::Retry]);
    golden.variants(&[Verdict::Commit { answers: Vec::new() }, Verdict::Refuse(Errno::ENOENT), Verdict::Retry]);
    golden.check();
}
