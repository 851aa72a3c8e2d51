//! The keys of a shard's state: shard (2 bytes), table (1 byte), then the table's own fields,
//! all big-endian, so that one node's ordered store can hold many shards and each table sorts.
//! Drawn in `docs/on-disk.md`, "Metadata keys".

use cfs_wire::data::Referent;
use cfs_wire::meta::LockFamily;
use cfs_wire::{BlobId, Ino, RequestId, SegmentId, SessionId, ShardId};

use super::entry::TxnId;

/// Declares the tables, and a list of them.
macro_rules! tables {
    ($($name:ident = $number:literal,)*) => {
        $(pub(crate) const $name: u8 = $number;)*

        #[cfg(test)]
        pub(crate) const TABLES: &[(&str, u8)] = &[$((stringify!($name), $number)),*];
    };
}

tables! {
    CONFIG = 0x01,
    COUNTERS = 0x02,
    INODE = 0x10,
    ENTRY = 0x11,
    EXTENT = 0x12,
    XATTR = 0x13,
    REFERENCE = 0x20,
    RELEASED = 0x21,
    FROZEN = 0x22,
    REGISTRATION = 0x23,
    DEAD_SLOTS = 0x24,
    SESSION = 0x30,
    REPLY = 0x31,
    HOLD = 0x32,
    SESSION_HOLD = 0x33,
    LEASE = 0x34,
    SESSION_LEASE = 0x35,
    LOCK = 0x36,
    SESSION_LOCK = 0x37,
    ORPHAN = 0x38,
    TRIMMING = 0x39,
    TRANSACTION = 0x40,
    KEY_LOCK = 0x41,
    REQUEST_TXN = 0x42,
    RENAME_LOCK = 0x43,
}
// 0xf0 is reserved for versions of inodes, entries, extents and xattrs that a snapshot needs.

const LOCKED_INODE: u8 = 1;
const LOCKED_NAME: u8 = 2;
const LOCKED_RENAME_LOCK: u8 = 3;

/// A key under construction.
pub(crate) struct Key(Vec<u8>);

impl Key {
    pub(crate) fn new(shard: ShardId, table: u8) -> Key {
        let mut key = Vec::with_capacity(32);
        key.extend_from_slice(&shard.0.to_be_bytes());
        key.push(table);
        Key(key)
    }

    fn u64(mut self, value: u64) -> Key {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    fn u8(mut self, value: u8) -> Key {
        self.0.push(value);
        self
    }

    fn bytes(mut self, value: &[u8]) -> Key {
        self.0.extend_from_slice(value);
        self
    }

    fn ino(self, ino: Ino) -> Key {
        self.u64(ino.as_u64())
    }

    fn referent(self, referent: &Referent) -> Key {
        // One length for both kinds, so that no referent's key is a prefix of another's.
        let (tag, id, slot) = match referent {
            Referent::Hot(blob) => (0, blob.0, 0),
            Referent::Slot(segment, slot) => (1, segment.0, *slot),
        };
        self.u8(tag).bytes(&id.to_be_bytes()).bytes(&slot.to_be_bytes())
    }
}

/// All keys of a shard: `start <= key < end`. `None`: to the end of the store.
pub fn shard_range(shard: ShardId) -> (Vec<u8>, Option<Vec<u8>>) {
    let end = shard.0.checked_add(1).map(|next| next.to_be_bytes().to_vec());
    (shard.0.to_be_bytes().to_vec(), end)
}

/// The first key behind all that begin with `prefix`.
pub(crate) fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // Nothing sorts behind a prefix of 0xff alone; no table key begins so.
    vec![u8::MAX; prefix.len() + 1]
}

pub(crate) fn table(shard: ShardId, table: u8) -> Vec<u8> {
    Key::new(shard, table).0
}

pub(crate) fn inode(shard: ShardId, ino: Ino) -> Vec<u8> {
    Key::new(shard, INODE).ino(ino).0
}

pub(crate) fn entry(shard: ShardId, dir: Ino, cookie: u64) -> Vec<u8> {
    Key::new(shard, ENTRY).ino(dir).u64(cookie).0
}

/// Keyed by the extent's end (exclusive): the first key above an offset is the first extent
/// that reaches beyond it, found without stepping backwards.
pub(crate) fn extent(shard: ShardId, ino: Ino, end: u64) -> Vec<u8> {
    Key::new(shard, EXTENT).ino(ino).u64(end).0
}

pub(crate) fn xattr(shard: ShardId, ino: Ino, name: &[u8]) -> Vec<u8> {
    Key::new(shard, XATTR).ino(ino).bytes(name).0
}

pub(crate) fn references(shard: ShardId, referent: &Referent) -> Vec<u8> {
    Key::new(shard, REFERENCE).referent(referent).0
}

pub(crate) fn reference(shard: ShardId, referent: &Referent, ino: Ino, offset: u64) -> Vec<u8> {
    Key::new(shard, REFERENCE).referent(referent).ino(ino).u64(offset).0
}

pub(crate) fn released(shard: ShardId, referent: &Referent) -> Vec<u8> {
    Key::new(shard, RELEASED).referent(referent).0
}

/// One row for all slots of a segment: they die together more often than not, and every shard
/// keeps the row for two epochs.
pub(crate) fn frozen(shard: ShardId, referent: &Referent) -> Vec<u8> {
    let (tag, id) = match referent {
        Referent::Hot(blob) => (0, blob.0),
        Referent::Slot(segment, _) => (1, segment.0),
    };
    Key::new(shard, FROZEN).u8(tag).bytes(&id.to_be_bytes()).0
}

pub(crate) fn registration(shard: ShardId, segment: SegmentId) -> Vec<u8> {
    Key::new(shard, REGISTRATION).bytes(&segment.0.to_be_bytes()).0
}

pub(crate) fn dead_slots(shard: ShardId, segment: SegmentId) -> Vec<u8> {
    Key::new(shard, DEAD_SLOTS).bytes(&segment.0.to_be_bytes()).0
}

pub(crate) fn session(shard: ShardId, session: SessionId) -> Vec<u8> {
    Key::new(shard, SESSION).u64(session.0).0
}

pub(crate) fn reply(shard: ShardId, id: RequestId) -> Vec<u8> {
    Key::new(shard, REPLY).u64(id.session.0).u64(id.sequence).0
}

/// Prefix of a session's rows in `REPLY`, `SESSION_HOLD`, `SESSION_LEASE` or `SESSION_LOCK`.
pub(crate) fn of_session(shard: ShardId, table: u8, session: SessionId) -> Vec<u8> {
    Key::new(shard, table).u64(session.0).0
}

pub(crate) fn session_ino(shard: ShardId, table: u8, session: SessionId, ino: Ino) -> Vec<u8> {
    Key::new(shard, table).u64(session.0).ino(ino).0
}

/// Prefix of an inode's rows in any table keyed by inode first.
pub(crate) fn of_ino(shard: ShardId, table: u8, ino: Ino) -> Vec<u8> {
    Key::new(shard, table).ino(ino).0
}

pub(crate) fn hold(shard: ShardId, ino: Ino, session: SessionId) -> Vec<u8> {
    Key::new(shard, HOLD).ino(ino).u64(session.0).0
}

pub(crate) fn lease(shard: ShardId, ino: Ino) -> Vec<u8> {
    Key::new(shard, LEASE).ino(ino).0
}

fn family(family: LockFamily) -> u8 {
    match family {
        LockFamily::Posix => 0,
        LockFamily::Flock => 1,
    }
}

pub(crate) fn locks(shard: ShardId, ino: Ino, of: LockFamily) -> Vec<u8> {
    Key::new(shard, LOCK).ino(ino).u8(family(of)).0
}

pub(crate) fn owner_locks(shard: ShardId, ino: Ino, of: LockFamily, session: SessionId, owner: u64) -> Vec<u8> {
    Key::new(shard, LOCK).ino(ino).u8(family(of)).u64(session.0).u64(owner).0
}

pub(crate) fn lock(shard: ShardId, ino: Ino, of: LockFamily, session: SessionId, owner: u64, start: u64) -> Vec<u8> {
    Key::new(shard, LOCK).ino(ino).u8(family(of)).u64(session.0).u64(owner).u64(start).0
}

pub(crate) fn orphan(shard: ShardId, ino: Ino) -> Vec<u8> {
    Key::new(shard, ORPHAN).ino(ino).0
}

pub(crate) fn trimming(shard: ShardId, ino: Ino) -> Vec<u8> {
    Key::new(shard, TRIMMING).ino(ino).0
}

pub(crate) fn transaction(shard: ShardId, txn: TxnId) -> Vec<u8> {
    Key::new(shard, TRANSACTION).bytes(&txn.coordinator.0.to_be_bytes()).u64(txn.number).0
}

pub(crate) fn locked_inode(shard: ShardId, ino: Ino) -> Vec<u8> {
    Key::new(shard, KEY_LOCK).u8(LOCKED_INODE).ino(ino).0
}

pub(crate) fn locked_names(shard: ShardId, dir: Ino) -> Vec<u8> {
    Key::new(shard, KEY_LOCK).u8(LOCKED_NAME).ino(dir).0
}

/// Names are locked by their hash: two that collide exclude each other, which costs a wait.
pub(crate) fn locked_name(shard: ShardId, dir: Ino, first_cookie: u64) -> Vec<u8> {
    Key::new(shard, KEY_LOCK).u8(LOCKED_NAME).ino(dir).u64(first_cookie).0
}

pub(crate) fn locked_rename_lock(shard: ShardId) -> Vec<u8> {
    Key::new(shard, KEY_LOCK).u8(LOCKED_RENAME_LOCK).0
}

pub(crate) fn request_txn(shard: ShardId, id: RequestId) -> Vec<u8> {
    Key::new(shard, REQUEST_TXN).u64(id.session.0).u64(id.sequence).0
}

pub(crate) fn rename_lock(shard: ShardId) -> Vec<u8> {
    Key::new(shard, RENAME_LOCK).0
}

/// The big-endian number at `at` of a key: what follows shard and table begins at
/// [`FIELDS`]. `None` when the key is too short.
pub(crate) fn u64_at(key: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

pub(crate) fn u128_at(key: &[u8], at: usize) -> Option<u128> {
    Some(u128::from_be_bytes(key.get(at..at.checked_add(16)?)?.try_into().ok()?))
}

pub(crate) fn referent_at(key: &[u8], at: usize) -> Option<Referent> {
    let id = u128_at(key, at + 1)?;
    let slot = u16::from_be_bytes(key.get(at + 17..at + 19)?.try_into().ok()?);
    match key.get(at)? {
        0 => Some(Referent::Hot(BlobId(id))),
        1 => Some(Referent::Slot(SegmentId(id), slot)),
        _ => None,
    }
}

/// Where a key names its table.
pub(crate) const TABLE_AT: usize = 2;
/// Where a key's own fields begin.
pub(crate) const FIELDS: usize = 3;
/// Length of a referent in a key.
pub(crate) const REFERENT_BYTES: usize = 19;
