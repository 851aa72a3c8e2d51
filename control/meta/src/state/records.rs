//! The values of a shard's state. Each is one format byte, then postcard; those a snapshot will
//! keep versions of (inodes, entries, extents, xattrs) carry the snapshot sequence they were
//! written at in front. An unknown format byte is an error, never a default.

use super::entry::{Action, Answer, TxnId};
use super::{StateError, keys};
use cfs_wire::data::{Location, Registration};
use cfs_wire::meta::{Attr, FileKind, LockKind, MetaCall, MetaResult, Name};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Epoch, Ino, Policy, RequestId, SessionId, ShardId, Timestamp, VolumeId};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};

/// The first format of every record; it has no predecessor.
const FORMAT: u8 = 1;

pub type XattrList = Vec<(Name, Vec<u8>)>;

pub(crate) fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    // Serialising these plain types into memory can't fail.
    postcard::to_extend(record, vec![FORMAT]).expect("postcard into a Vec")
}

pub(crate) fn decode<T: DeserializeOwned>(key: &[u8], value: &[u8]) -> Result<T, StateError> {
    match value.split_first() {
        Some((&FORMAT, rest)) => {
            let corrupt = |reason| StateError::Corrupt { key: key.to_vec(), reason };
            let (record, rest) = postcard::take_from_bytes(rest).map_err(|_| corrupt("not decodable"))?;
            if !rest.is_empty() {
                return Err(corrupt("trailing bytes"));
            }
            Ok(record)
        }
        Some((&format, _)) => Err(StateError::UnknownFormat { key: key.to_vec(), format }),
        None => Err(StateError::Corrupt { key: key.to_vec(), reason: "empty" }),
    }
}

/// The value of any row as this version writes it, if this version reads it. For the fuzzer: what a
/// row holds is decided where it is read.
#[doc(hidden)]
pub fn rewritten(key: &[u8], value: &[u8]) -> Result<Vec<u8>, StateError> {
    let rewrite = match key.get(keys::TABLE_AT) {
        Some(&keys::CONFIG) => again::<Config>,
        Some(&keys::COUNTERS) => again::<Counters>,
        Some(&keys::INODE) => again::<Versioned<Inode>>,
        Some(&keys::ENTRY) => again::<Versioned<EntryRecord>>,
        Some(&keys::EXTENT) => again::<Versioned<ExtentRecord>>,
        Some(&keys::XATTR) => again::<Versioned<Vec<u8>>>,
        Some(&keys::RELEASED) => again::<ReleasedRecord>,
        Some(&keys::FROZEN) => again::<FrozenRecord>,
        Some(&keys::REGISTRATION) => again::<Registration>,
        Some(&keys::DEAD_SLOTS) => again::<Vec<u8>>,
        Some(&keys::SESSION) => again::<SessionRecord>,
        Some(&keys::REPLY) => again::<MetaResult>,
        Some(&keys::LEASE) => again::<LeaseRecord>,
        Some(&keys::LOCK) => again::<LockRecord>,
        Some(&keys::TRANSACTION) => again::<TxnRecord>,
        Some(&(keys::KEY_LOCK | keys::REQUEST_TXN)) => again::<TxnId>,
        Some(&keys::RENAME_LOCK) => again::<RenameLockRecord>,
        Some(
            &(keys::REFERENCE
            | keys::HOLD
            | keys::SESSION_HOLD
            | keys::SESSION_LEASE
            | keys::SESSION_LOCK
            | keys::ORPHAN
            | keys::TRIMMING),
        ) => again::<()>,
        _ => return Err(StateError::Corrupt { key: key.to_vec(), reason: "no such table" }),
    };
    rewrite(key, value)
}

fn again<T: Serialize + DeserializeOwned>(key: &[u8], value: &[u8]) -> Result<Vec<u8>, StateError> {
    Ok(encode(&decode::<T>(key, value)?))
}

/// A number that is counted up from little: one above half of its range was never counted, and would
/// leave no room to count on.
fn counted<'de, D, N>(deserializer: D) -> Result<N, D::Error>
where
    D: Deserializer<'de>,
    N: Deserialize<'de> + Copy + Into<u64>,
{
    let number = N::deserialize(deserializer)?;
    let half = u64::MAX >> (u64::BITS as usize - 8 * size_of::<N>() + 1);
    if number.into() > half { Err(D::Error::custom("it was never counted")) } else { Ok(number) }
}

/// A record and the snapshot sequence at which this version of it was written.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Versioned<T> {
    pub since: u64,
    pub record: T,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Config {
    pub shards: u16,
    pub volume: VolumeId,
    pub root: Ino,
    pub policy: Policy,
    pub tolerated: u8,
    pub targets: u16,
    pub name_key: [u8; 32],
    pub feature_level: u32,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Counters {
    /// The next inode's counter part.
    pub next_ino: u64,
    #[serde(deserialize_with = "counted")]
    pub inodes: u64,
    #[serde(deserialize_with = "counted")]
    pub next_txn: u64,
    /// Fencing tokens of leases, locks and the rename lock.
    #[serde(deserialize_with = "counted")]
    pub next_token: u64,
    #[serde(deserialize_with = "counted")]
    pub minimum_epoch: Epoch,
    /// Prepared transactions with keys locked; while 0 no key lock is looked up.
    #[serde(deserialize_with = "counted")]
    pub prepared: u32,
    /// The newest snapshot sequence this shard adopted.
    pub snapshot: u64,
}

/// The last commit of one session to an inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CommitMark {
    pub session: SessionId,
    pub sequence: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Inode {
    pub ino: Ino,
    pub kind: FileKind,
    pub mode: u32,
    #[serde(deserialize_with = "counted")]
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    /// Of files; a directory's and a symlink's are derived.
    pub size: u64,
    /// Bytes that extents cover.
    #[serde(deserialize_with = "counted")]
    pub mapped: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub btime: Timestamp,
    #[serde(deserialize_with = "counted")]
    pub version: u64,
    /// A file's bytes from 0 on that are kept here (zero where an extent covers them), or a
    /// symlink's target.
    pub inline: Vec<u8>,
    /// Of directories; the root is its own.
    pub parent: Option<Ino>,
    /// Names in a directory.
    pub entries: u64,
    #[serde(deserialize_with = "counted")]
    pub xattrs: u32,
    /// What listing the xattrs' names takes, NULs included.
    #[serde(deserialize_with = "counted")]
    pub xattr_list_bytes: u32,
    pub access_acl: bool,
    pub default_acl: bool,
    /// Made without a name and never linked since: may be linked although it has no links.
    pub tmpfile: bool,
    /// The newest first, bounded.
    pub commits: Vec<CommitMark>,
    /// A truncation to this size left extents behind it that are still being released. They
    /// don't count as content, and content doesn't change until they are gone.
    pub trim: Option<u64>,
    /// Some session's mark was dropped from `commits`.
    pub commits_forgotten: bool,
    /// Other than the volume's. A file's was its directory's when it was made, and stays.
    pub policy: Option<Policy>,
}

/// What `st_size` says of any directory, as ext4 says of a small one.
const DIRECTORY_SIZE: u64 = 4096;

impl Inode {
    pub(crate) fn is_dir(&self) -> bool {
        self.kind == FileKind::Directory
    }

    /// `volume`: the volume's policy.
    pub fn attr(&self, volume: Policy) -> Attr {
        let inline = self.inline.len() as u64;
        let (size, allocated) = match self.kind {
            FileKind::File => (self.size, self.mapped.saturating_add(inline)),
            FileKind::Directory => (DIRECTORY_SIZE, 0),
            FileKind::Symlink => (inline, 0),
            _ => (0, 0),
        };
        Attr {
            ino: self.ino,
            kind: self.kind,
            mode: self.mode,
            nlink: self.nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
            size,
            allocated,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            btime: self.btime,
            version: self.version,
            has_xattrs: self.xattrs > 0,
            policy: self.policy.unwrap_or(volume),
        }
    }
}

/// A name in a directory. An empty name marks a vacant first ordinal whose hash still has
/// others behind it, so that a lookup that finds nothing there needs no scan.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct EntryRecord {
    pub name: Name,
    pub ino: Ino,
    pub kind: FileKind,
}

/// An extent; its end is in the key.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct ExtentRecord {
    pub length: u32,
    pub location: Location,
    pub epoch: Epoch,
}

/// A referent that lost its last reference in this shard.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct ReleasedRecord {
    pub location: Location,
    /// A freeze has looked at it since: `Resolve` may take it off the list.
    pub seen: bool,
}

/// References that are refused because what they name is being collected, or was: a hot blob, or
/// some slots of a segment.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct FrozenRecord {
    /// The latest under which any of it was frozen: forgotten when the minimum accepted one is
    /// above.
    pub epoch: Epoch,
    /// Bit n of byte n/8: slot n. Empty for a hot blob.
    pub slots: Vec<u8>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct SessionRecord {
    pub client: String,
    pub opened: Timestamp,
    pub fenced: bool,
    /// Sequences below were acknowledged: their replies are gone, they are not run again.
    pub lowest: u64,
    #[serde(deserialize_with = "counted")]
    pub replies: u32,
}

impl SessionRecord {
    /// Whether nothing of the session is accepted any more.
    pub fn is_fenced(&self) -> bool {
        self.fenced && !planted::is(Bug::MetaSkipFencing)
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct LeaseRecord {
    pub session: SessionId,
    pub token: u64,
}

/// A lock; inode, family, session, owner and start are in the key.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct LockRecord {
    pub end: u64,
    pub kind: LockKind,
    pub pid: u32,
    pub token: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct RenameLockRecord {
    pub token: u64,
    /// `None`: free. The record stays so that tokens are never reused.
    pub holder: Option<RequestId>,
}

/// A shard's part in a transaction.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct TxnRecord {
    /// Of this shard.
    pub actions: Vec<Action>,
    pub answers: Vec<Answer>,
    /// Keys held while undecided.
    pub locks: Vec<Vec<u8>>,
    pub decided: bool,
    /// On the coordinator: the request, and the other shards' parts.
    pub lead: Option<Lead>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Lead {
    pub call: MetaCall,
    pub participants: Vec<(ShardId, Vec<Action>)>,
}
