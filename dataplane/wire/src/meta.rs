//! Bodies of the metadata service: one call names its session, its sequence and one operation
//! on one shard. Operations that change anything are answered from the stored reply when they
//! are repeated.

use crate::data::{Extent, Location, Referent, Registration};
use crate::errno::Errno;
use crate::ids::{Epoch, Ino, NodeId, RequestId, SegmentId, SessionId, ShardId, VolumeId};
use crate::policy::Policy;
use crate::time::Timestamp;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// One [`MetaCall`] in, one [`MetaResult`] out.
pub const OP_META: u16 = 0x0300;
/// [`EventsCall`] in, `Result<EventsReply, MetaError>` out: held until there is an event or the hold time is over.
pub const OP_EVENTS: u16 = 0x0301;

/// A name in a directory: 1 to 255 bytes without `/` and NUL, not necessarily UTF-8.
pub type Name = SmallVec<[u8; 24]>;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MetaCall {
    pub id: RequestId,
    /// Every sequence of this session below this one was answered and will not be repeated.
    pub lowest_unacknowledged: u64,
    /// The shard the operation goes to; a server checks that it is the right one.
    pub shard: ShardId,
    pub op: MetaOp,
}

pub type MetaResult = Result<MetaReply, MetaError>;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum MetaError {
    /// The operation's own answer, to be handed to the program.
    #[error("{0}")]
    Errno(Errno),
    /// Ask that node instead, or any other when unknown.
    #[error("this node does not lead the shard")]
    NotLeader { hint: Option<NodeId> },
    /// The shard has no record of the session: open it there and repeat.
    #[error("session unknown to this shard")]
    SessionUnknown,
    /// The session was fenced: its leases and dirty data are lost.
    #[error("session fenced")]
    Fenced,
    /// A location in a commit was handed out too long ago or is being collected: store again.
    #[error("a stored reference is no longer accepted")]
    StaleReference,
    /// Nothing was done; repeat the same request.
    #[error("try again: {0}")]
    Unavailable(String),
    #[error("malformed request: {0}")]
    Malformed(String),
    /// Nothing was done; something is in the way that advances and may take minutes. Repeat the same
    /// request for as long as this is the answer.
    #[error("busy: {0}")]
    Busy(String),
}

impl From<Errno> for MetaError {
    fn from(errno: Errno) -> MetaError {
        MetaError::Errno(errno)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[repr(u8)]
pub enum FileKind {
    File = 1,
    Directory = 2,
    Symlink = 3,
    Fifo = 4,
    Socket = 5,
    CharDevice = 6,
    BlockDevice = 7,
}

impl FileKind {
    /// The `S_IFMT` bits of `st_mode`.
    pub fn mode_bits(self) -> u32 {
        match self {
            FileKind::File => 0o100_000,
            FileKind::Directory => 0o040_000,
            FileKind::Symlink => 0o120_000,
            FileKind::Fifo => 0o010_000,
            FileKind::Socket => 0o140_000,
            FileKind::CharDevice => 0o020_000,
            FileKind::BlockDevice => 0o060_000,
        }
    }
}

/// What `statx` tells.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attr {
    pub ino: Ino,
    pub kind: FileKind,
    /// Permission, setuid, setgid and sticky bits (0o7777).
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// Linux's 32-bit encoding of a device number (`new_encode_dev`); 0 unless a device.
    pub rdev: u32,
    pub size: u64,
    /// Bytes allocated: what extents and inline data cover.
    pub allocated: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub btime: Timestamp,
    /// Counts every change of this inode; the NFS change attribute.
    pub version: u64,
    /// Whether any extended attribute (an ACL among them) is set: a client may then skip asking.
    pub has_xattrs: bool,
    /// How redundantly new bytes of a file are stored; of a directory: of what is created in it.
    pub policy: Policy,
}

/// The extended attribute that shows [`Attr::policy`]. On directories it can be set (to what
/// `Policy` parses) and removed; it is never listed, so that copying attributes does not copy it.
pub const XATTR_POLICY: &[u8] = b"cfs.policy";
/// What a program may do beyond its caller (capabilities(7), "File capabilities").
pub const XATTR_CAPABILITY: &[u8] = b"security.capability";

/// What a client may keep, and for how long, counted from when its request was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Grant {
    /// Milliseconds for which attributes (for a directory: its entries and their absence too)
    /// may be served from cache; 0: do not cache.
    pub read_ms: u32,
    /// Whether this session holds the inode's write lease (write-behind, size and times local).
    pub write: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    pub attr: Attr,
    pub grant: Grant,
    /// The grant on the directory that was searched.
    pub dir_grant: Grant,
}

/// A new inode's properties. Mode inheritance (setgid directories) and default ACLs are
/// applied by the shard.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NewNode {
    pub kind: FileKind,
    /// As the program gave it, before the umask.
    pub mode: u32,
    /// Applied unless the parent has a default ACL.
    pub umask: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    /// Symlink target; empty for all else.
    pub target: Vec<u8>,
}

/// A time to set: explicitly, or to the shard leader's clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum SetTime {
    Now,
    At(Timestamp),
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AttrChanges {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Truncates or extends (with a hole), dropping the extents beyond.
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
    /// Only with a write-back of cached times; otherwise the shard sets it.
    pub ctime: Option<Timestamp>,
    /// Clear setuid, and setgid where group-executable: the caller lacks CAP_FSETID.
    pub kill_privileges: bool,
}

/// One step of a commit; steps apply in order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FileWrite {
    /// Stored bytes become the file's content at an offset.
    Data { offset: u64, length: u32, location: Location, epoch: Epoch },
    /// The same at the end of the file, wherever that is when the commit applies.
    Append { length: u32, location: Location, epoch: Epoch },
    /// Bytes carried in the commit itself, for files of at most `INLINE_BYTES_MAX` in all; a
    /// shard answers EFBIG when the file is or would become larger: store the bytes instead.
    Inline { offset: u64, bytes: Vec<u8> },
    /// Inline bytes at the end of the file.
    AppendInline { bytes: Vec<u8> },
    /// A hole. The size stays. With more than `PUNCH_EXTENTS_MAX` extents in a commit's holes it
    /// is refused with E2BIG: punch in pieces.
    Punch { offset: u64, length: u64 },
    /// Sets the size, dropping what lies beyond.
    Truncate { size: u64 },
    /// Raises the size to at least this (fallocate without keep-size).
    Extend { size: u64 },
    /// Takes `security.capability` away, as a program's write does (capabilities(7)).
    DropCapability,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Commit {
    pub ino: Ino,
    /// Grows by one with each commit of this session to this inode; applied in this order (one
    /// that comes too early is answered `Unavailable`). A commit refused with any error does
    /// not use its number up: what replaces it carries the same. 1 begins anew, for a client
    /// that has no commit of this inode outstanding and forgot its count.
    pub sequence: u64,
    pub writes: Vec<FileWrite>,
    /// When the program wrote; sets mtime and ctime. `None`: the leader's clock.
    pub mtime: Option<Timestamp>,
    pub kill_privileges: bool,
}

pub const RENAME_NOREPLACE: u32 = 1;
pub const RENAME_EXCHANGE: u32 = 2;
pub const RENAME_WHITEOUT: u32 = 4;
pub const XATTR_CREATE: u32 = 1;
pub const XATTR_REPLACE: u32 = 2;
/// With an access ACL: clear setgid too, the caller being neither in the group nor privileged
/// (FUSE_SETXATTR_ACL_KILL_SGID).
pub const XATTR_CLEAR_SGID: u32 = 1 << 16;

/// How far a byte-range lock reaches and what it excludes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum LockKind {
    Read,
    Write,
}

/// Which of the three lock families a lock belongs to; they don't exclude each other except
/// that process and open-file-description locks (POSIX and OFD) share one space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum LockFamily {
    Posix,
    Flock,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LockRange {
    pub family: LockFamily,
    pub kind: LockKind,
    pub start: u64,
    /// Inclusive; `u64::MAX` for "to the end".
    pub end: u64,
    /// The lock owner within the session (kernel's owner word).
    pub owner: u64,
    pub pid: u32,
}

/// An operation. Those of the first group read; all others change state and are logged.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum MetaOp {
    // Reads, sent to the shard of the inode they name.
    Lookup {
        dir: Ino,
        name: Name,
    },
    GetAttr {
        ino: Ino,
    },
    ReadLink {
        ino: Ino,
    },
    /// Entries after the cookie `after` (0: from the start), at most `entries_max`.
    ReadDir {
        dir: Ino,
        after: u64,
        entries_max: u32,
        with_attrs: bool,
    },
    GetXattr {
        ino: Ino,
        name: Name,
    },
    ListXattr {
        ino: Ino,
    },
    /// Extents overlapping a range, at most `extents_max`, and inline content if that is what
    /// the file has.
    GetExtents {
        ino: Ino,
        offset: u64,
        length: u64,
        extents_max: u32,
    },
    /// Space; the inodes in use of the shard asked, or with `count_inodes` of all shards.
    StatFs {
        count_inodes: bool,
    },
    /// The first lock that would keep this one out.
    TestLock {
        ino: Ino,
        lock: LockRange,
    },

    // Sessions, sent to every shard the session talks to.
    OpenSession {
        client: String,
    },
    CloseSession,

    // Namespace, sent to the shard of the (source) directory.
    /// `hold`: register an open-file hold for this session, as `Open` does.
    Create {
        dir: Ino,
        name: Name,
        node: NewNode,
        hold: bool,
    },
    Tmpfile {
        dir: Ino,
        node: NewNode,
    },
    Link {
        ino: Ino,
        dir: Ino,
        name: Name,
    },
    Unlink {
        dir: Ino,
        name: Name,
    },
    Rmdir {
        dir: Ino,
        name: Name,
    },
    Rename {
        dir: Ino,
        name: Name,
        to_dir: Ino,
        to_name: Name,
        flags: u32,
    },

    // Inodes, sent to the inode's shard.
    SetAttr {
        ino: Ino,
        changes: AttrChanges,
    },
    SetXattr {
        ino: Ino,
        name: Name,
        value: Vec<u8>,
        flags: u32,
    },
    RemoveXattr {
        ino: Ino,
        name: Name,
    },
    Commit(Commit),
    /// Keeps an unlinked inode alive until released or the session ends. Idempotent.
    Open {
        ino: Ino,
    },
    /// Gives holds and write leases of up to [`RELEASES_MAX`](crate::limits::RELEASES_MAX) inodes
    /// of one shard back; everything dirty was committed before. Idempotent.
    Release {
        inos: Vec<Ino>,
    },
    /// Asks for the inode's write lease; the reply says whether it was granted.
    AcquireLease {
        ino: Ino,
    },
    /// Gives the write lease back; everything dirty was committed before.
    ReturnLease {
        ino: Ino,
    },
    /// `wait`: the call is held until the lock is granted or `CancelLock` names it.
    Lock {
        ino: Ino,
        lock: LockRange,
        wait: bool,
    },
    CancelLock {
        ino: Ino,
        owner: u64,
    },
    Unlock {
        ino: Ino,
        lock: LockRange,
    },
    /// Drops every lock of an owner on an inode (last close of that owner).
    UnlockOwner {
        ino: Ino,
        family: LockFamily,
        owner: u64,
    },

    // A read.
    /// Renews the grants of up to [`RENEWALS_MAX`](crate::limits::RENEWALS_MAX) inodes of one shard.
    Renew {
        inos: Vec<Ino>,
    },
}

impl MetaOp {
    /// Whether the operation only reads.
    pub fn is_read(&self) -> bool {
        use MetaOp::*;
        matches!(
            self,
            Lookup { .. }
                | GetAttr { .. }
                | ReadLink { .. }
                | ReadDir { .. }
                | GetXattr { .. }
                | ListXattr { .. }
                | GetExtents { .. }
                | StatFs { .. }
                | TestLock { .. }
                | Renew { .. }
        )
    }

    /// The inode whose shard the operation goes to; `None` for those sent to any shard.
    pub fn home(&self) -> Option<Ino> {
        use MetaOp::*;
        match self {
            Lookup { dir, .. }
            | ReadDir { dir, .. }
            | Create { dir, .. }
            | Tmpfile { dir, .. }
            | Link { dir, .. }
            | Unlink { dir, .. }
            | Rmdir { dir, .. }
            | Rename { dir, .. } => Some(*dir),
            GetAttr { ino }
            | ReadLink { ino }
            | GetXattr { ino, .. }
            | ListXattr { ino }
            | GetExtents { ino, .. }
            | TestLock { ino, .. }
            | SetAttr { ino, .. }
            | SetXattr { ino, .. }
            | RemoveXattr { ino, .. }
            | Open { ino }
            | AcquireLease { ino }
            | ReturnLease { ino }
            | Lock { ino, .. }
            | CancelLock { ino, .. }
            | Unlock { ino, .. }
            | UnlockOwner { ino, .. } => Some(*ino),
            Commit(commit) => Some(commit.ino),
            Release { inos } | Renew { inos } => inos.first().copied(),
            StatFs { .. } | OpenSession { .. } | CloseSession => None,
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DirEntry {
    pub name: Name,
    pub ino: Ino,
    pub kind: FileKind,
    /// Pass as `after` to continue behind this entry; never 0, stable for the entry's life.
    pub cookie: u64,
    /// With `with_attrs`, for entries whose inode lives in the directory's shard.
    pub attr: Option<Attr>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum MetaReply {
    Done,
    Entry(Entry),
    /// The entry's inode lives in another shard: ask that one for its attributes.
    Remote {
        ino: Ino,
        kind: FileKind,
        dir_grant: Grant,
    },
    Attr {
        attr: Attr,
        grant: Grant,
    },
    Target(Vec<u8>),
    /// `parent` is what `..` names.
    Entries {
        entries: Vec<DirEntry>,
        end: bool,
        parent: Ino,
        grant: Grant,
    },
    Value(Vec<u8>),
    Names(Vec<Name>),
    Extents(ExtentsReply),
    StatFs(StatFs),
    /// `None`: nothing conflicts.
    Conflict(Option<LockRange>),
    Lease {
        granted: bool,
        attr: Attr,
        grant: Grant,
    },
    /// Attributes after the commit; `append_offset` of the first append in it.
    Committed {
        attr: Attr,
        append_offset: Option<u64>,
    },
    Session {
        lease_ms: u32,
    },
    /// After unlink and rmdir: the inode that lost its name, and its remaining links.
    Removed {
        ino: Ino,
        nlink: u32,
    },
    /// After a rename that changed anything: the inodes that got another name, in ascending order,
    /// and the one that lost its name to them, with its remaining links.
    Renamed {
        moved: Vec<Ino>,
        replaced: Option<(Ino, u32)>,
    },
    /// To `Renew`, in its order.
    Renewed(Vec<Renewal>),
}

/// An inode whose grant was to be renewed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Renewal {
    /// As in [`Attr`]; 0 where nothing is granted: another session has the write lease, or the inode
    /// is changing or gone.
    pub version: u64,
    pub grant: Grant,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExtentsReply {
    pub attr: Attr,
    pub grant: Grant,
    /// Bytes of the file's start that are kept in the inode record. Where an extent covers
    /// them the extent wins. A file without extents of at most `INLINE_BYTES_MAX` has its whole
    /// content here (`size` bytes); a larger one may have a head here until it is rewritten.
    pub inline: Option<Vec<u8>>,
    /// Ordered, not overlapping; the range they describe ends at `covered`.
    pub extents: Vec<Extent>,
    pub covered: u64,
}

/// Space is that of the node's targets, redundancy taken off; inodes are not limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct StatFs {
    pub bytes_total: u64,
    pub bytes_free: u64,
    pub inodes_used: u64,
}

/// [`MountCall`] in, [`MountReply`] or [`MetaError`] out: a client's first call. The server draws
/// the session; the client opens it in each shard when that shard first says it is unknown.
pub const OP_MOUNT: u16 = 0x0303;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MountCall {
    /// What the client calls itself, for people to read.
    pub client: String,
}

/// The body of the reply is a `MountResult`.
pub type MountResult = Result<MountReply, MetaError>;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MountReply {
    pub volume: VolumeId,
    pub root: Ino,
    pub shards: u16,
    /// A session that was not heard of for so long may be fenced.
    pub lease_ms: u32,
    pub session: SessionId,
    /// The volume's policy: the one that `StatFs` counts bytes by.
    pub policy: Policy,
}

/// What the server wants of a client: held as a long poll, one per session and node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EventsCall {
    pub session: SessionId,
    /// Events up to this number were carried out.
    pub acknowledged: u64,
    /// And of those behind it these, up to [`RENEWALS_MAX`](crate::limits::RENEWALS_MAX): one that
    /// takes long holds up nobody who waits for another.
    pub done: Vec<u64>,
    pub hold_ms: u32,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EventsReply {
    /// Numbered upwards by one per event.
    pub events: Vec<(u64, Event)>,
    /// False when some shard of this node has fenced the session.
    pub alive: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Event {
    /// Drop what is cached of the inode: attributes, extents, pages; for a directory, entries.
    Invalidate { ino: Ino },
    /// Commit what is dirty, return the write lease, then drop what is cached.
    RecallWrite { ino: Ino },
    /// The same as `Invalidate`, for another client that writes pages of a mapping back. Whoever is just
    /// writing such pages of the inode back does not wait for them: each would wait for the other.
    InvalidateForPages { ino: Ino },
}

/// Calls between servers and movers on a shard's state, never from clients. Sent inside the
/// node, and by [`OP_SHARD`] to the leader's node.
pub const OP_SHARD: u16 = 0x0302;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ShardOp {
    /// Records a segment; sent to `registration_shard`.
    Register(Registration),
    GetRegistration(SegmentId),
    /// Registrations after a segment id, for the collector and repair.
    ListRegistrations {
        after: Option<SegmentId>,
        max: u32,
    },
    /// Replaces a registration's places after repair or relocation: compare-and-swap on the old.
    Replace {
        old: Registration,
        new: Registration,
    },
    /// Forgets a registration whose shards are deleted.
    Deregister(SegmentId),
    /// Referents that lost a reference in this shard since they were last resolved.
    ListReleased {
        max: u32,
    },
    /// Whether this shard references each; from then on it refuses new references to them. Refused
    /// when the shard has handed out a newer epoch with references.
    Freeze {
        referents: Vec<Referent>,
        epoch: Epoch,
    },
    /// Takes freezes back.
    Thaw {
        referents: Vec<Referent>,
    },
    /// Removes entries from the released list that a `Freeze` looked at; one that was released
    /// again since then stays.
    Resolve {
        referents: Vec<Referent>,
    },
    /// Marks slots dead in the registration; the reply says which segments have none alive.
    MarkDead {
        slots: Vec<(SegmentId, u16)>,
    },
    /// The inodes and file offsets that reference something (packer, compaction).
    Holders {
        referent: Referent,
    },
    /// Swaps locations of one inode where the old one still stands.
    /// The new extents cover the old one exactly.
    Swap {
        ino: Ino,
        swaps: Vec<(Extent, Vec<Extent>)>,
    },
    /// Raises the shard's minimum accepted reference epoch: freezes below it mean nothing any
    /// more. Some of them are deleted; the reply says from where to go on.
    AdvanceEpoch {
        minimum: Epoch,
        after: Option<Vec<u8>>,
    },
    /// The shard's records, for a check: at most `max` after an opaque position.
    Audit {
        after: Option<Vec<u8>>,
        max: u32,
    },
    /// Sets or (`None`) takes away a directory's own policy.
    SetPolicy {
        ino: Ino,
        policy: Option<Policy>,
    },
    /// The shard's minimum accepted reference epoch.
    GetEpoch,
    /// Extents of one inode that overlap a range, at most `max`, with the file's policy.
    Extents {
        ino: Ino,
        offset: u64,
        length: u64,
        max: u32,
    },
    /// What something references, each once, in ascending order after one (orphan search).
    ListReferenced {
        after: Option<Referent>,
        max: u32,
    },
}

/// One record of a shard's state as a check sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum AuditRecord {
    /// `parent`: of directories. `inline`: bytes of content in the record.
    Inode {
        ino: Ino,
        kind: FileKind,
        nlink: u32,
        size: u64,
        allocated: u64,
        inline: u32,
        parent: Option<Ino>,
    },
    Entry {
        dir: Ino,
        name: Name,
        ino: Ino,
        kind: FileKind,
    },
    Extent {
        ino: Ino,
        extent: Extent,
    },
    BackReference {
        referent: Referent,
        ino: Ino,
        offset: u64,
    },
    /// An inode without links that waits for its last close or for its removal.
    Orphan {
        ino: Ino,
    },
    Registration {
        registration: Registration,
        dead: Vec<u16>,
    },
    /// A cross-shard transaction that is not finished.
    Transaction {
        detail: String,
    },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ShardReply {
    Done,
    Registration(Option<Registration>),
    Registrations {
        list: Vec<(Registration, Vec<u16>)>,
        end: bool,
    },
    Released(Vec<(Referent, Option<Location>)>),
    /// In the order asked: true where a reference exists.
    Held(Vec<bool>),
    Dead(Vec<SegmentId>),
    Holders(Vec<(Ino, u64)>),
    Swapped(u32),
    /// Nothing was done: what the operation takes for granted is not so (a segment registered
    /// with other content, a registration replaced by another, an epoch gone by).
    Refused,
    /// `next`: where to go on; `None` at the end.
    Audit {
        records: Vec<AuditRecord>,
        next: Option<Vec<u8>>,
    },
    Epoch(Epoch),
    /// `next`: where to go on; `None` at the end.
    Forgotten {
        next: Option<Vec<u8>>,
    },
    Extents {
        extents: Vec<Extent>,
        policy: Policy,
    },
    Referenced {
        list: Vec<Referent>,
        end: bool,
    },
}

/// The shard that keeps a segment's registration.
pub fn registration_shard(segment: SegmentId, shards: u16) -> ShardId {
    // Segment ids are uniformly random: the low bits are as good as any hash.
    ShardId((segment.0 % u128::from(shards.max(1))) as u16)
}
