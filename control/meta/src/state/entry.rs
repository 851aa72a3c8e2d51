//! What goes into a shard's log and what applying it gives.

use super::records::{Inode, XattrList};
use cfs_wire::meta::{FileKind, MetaCall, MetaReply, MetaResult, Name, ShardOp, ShardReply};
use cfs_wire::{Errno, Ino, Policy, RequestId, SessionId, ShardId, Timestamp, VolumeId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// One entry of a shard's Raft log (postcard). Whatever is not a function of the state is in
/// it: the leader's time, and what the leader found in other shards.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum LogEntry {
    /// The first entry of every shard.
    Init(Init),
    /// A client's operation. Reads are refused as malformed: they go to [`super::read`].
    Client {
        call: MetaCall,
        now: Timestamp,
        facts: Facts,
    },
    /// A server's or mover's operation.
    Shard {
        op: ShardOp,
        now: Timestamp,
    },
    /// On a participant: check and lock.
    Prepare {
        txn: TxnId,
        actions: Vec<Action>,
        now: Timestamp,
    },
    /// On the coordinator: the transaction's outcome, its own effects and the stored reply.
    Decide {
        txn: TxnId,
        verdict: Verdict,
        now: Timestamp,
    },
    /// On a participant: carry the prepared actions out.
    Commit {
        txn: TxnId,
    },
    /// On a participant: drop the prepared actions.
    Abort {
        txn: TxnId,
    },
    /// On the coordinator after every participant acknowledged, then on the participants.
    Forget {
        txn: TxnId,
    },
    /// Fences a session in this shard: from here on it can do nothing. What it holds keeps others
    /// out until `Dispossess` takes it. Also written for sessions the shard never saw.
    Fence {
        session: SessionId,
    },
    /// Goes on releasing the extents of an orphan without holds, or those behind a truncated
    /// file's end: a bounded batch at a time.
    Reap {
        ino: Ino,
        now: Timestamp,
    },
    /// On the shard of the volume's root. `steal`: the holder is presumed dead.
    TakeRenameLock {
        holder: RequestId,
        steal: bool,
    },
    ReleaseRenameLock {
        token: u64,
    },
    /// Takes the replies, leases, locks and holds of a fenced session, a bounded batch at a time:
    /// [`Reply::Unfinished`] asks for another entry.
    Dispossess {
        session: SessionId,
    },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Init {
    /// Shards of the cluster; fixed at creation.
    pub shards: u16,
    pub volume: VolumeId,
    /// The volume's root directory; its shard creates the inode.
    pub root: Ino,
    pub root_mode: u32,
    pub root_uid: u32,
    pub root_gid: u32,
    /// For new bytes of files, unless a directory says otherwise.
    pub policy: Policy,
    /// What a directory's policy may ask: lost targets that the metadata survives, and targets.
    pub tolerated: u8,
    pub targets: u16,
    /// Key of the name hash: drawn at creation, the same in all shards.
    pub name_key: [u8; 32],
    /// `apply` behaves by this level, not by the version of the binary. This version knows 1.
    pub feature_level: u32,
    pub now: Timestamp,
}

/// The only feature level there is.
pub const FEATURE_LEVEL: u32 = 1;

/// What the leader found out in other shards before it proposed the entry. Empty at first; the
/// replies [`Reply::NeedTarget`] and [`Reply::NeedRenameLock`] ask for more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Facts {
    /// What the name asked for by `NeedTarget` named: `Some(None)` is nothing. Verified again
    /// when that shard prepares.
    pub target: Option<Option<(Ino, FileKind)>>,
    /// The volume's rename lock is held with this token and the walks `NeedRenameLock` asked
    /// for found no cycle.
    pub rename_token: Option<u64>,
    /// The node's targets are full: what would add metadata is refused with ENOSPC, so that
    /// there is room left to delete with.
    pub full: bool,
}

/// A transaction: its coordinator and a number which that shard never reuses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct TxnId {
    pub coordinator: ShardId,
    pub number: u64,
}

impl fmt::Display for TxnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.coordinator, self.number)
    }
}

/// One shard's part of a namespace operation. It is first checked (and its keys locked when the
/// operation spans shards), then carried out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Action {
    /// Puts a name into a directory. `ino: None`: the inode that `MakeDir` creates elsewhere.
    Insert {
        dir: Ino,
        name: Name,
        ino: Option<Ino>,
        kind: FileKind,
        /// What the name must stand for before.
        replaces: Option<(Ino, FileKind)>,
        /// Change of the directory's link count (subdirectories gained or lost).
        links: i32,
        now: Timestamp,
    },
    /// Takes a name out of a directory.
    Remove {
        dir: Ino,
        name: Name,
        ino: Ino,
        kind: FileKind,
        links: i32,
        now: Timestamp,
    },
    /// Creates a directory whose parent is in another shard.
    MakeDir {
        inode: Box<Inode>,
        xattrs: XattrList,
    },
    AddLink {
        ino: Ino,
        session: SessionId,
        now: Timestamp,
    },
    /// Takes a link from a file, or the last two from an empty directory.
    DropLink {
        ino: Ino,
        now: Timestamp,
    },
    /// The inode was renamed: its change time, and a directory's parent.
    Moved {
        ino: Ino,
        parent: Option<Ino>,
        now: Timestamp,
    },
    /// Keeps the rename lock from being taken over while the transaction is undecided.
    HoldRenameLock {
        token: u64,
    },
}

/// What an action found when it was checked, as far as others need it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Answer {
    Nothing,
    /// `MakeDir`, `AddLink`: attributes as they will be.
    Attr(cfs_wire::meta::Attr),
    /// `DropLink`: links that will remain.
    Links {
        ino: Ino,
        nlink: u32,
    },
    /// `Moved`.
    Moved {
        ino: Ino,
    },
}

/// Why a shard can't prepare.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Refusal {
    /// The operation's answer.
    Errno(Errno),
    /// Another transaction holds a key, or what the leader found is no longer so: abort, then
    /// run the operation anew.
    Retry,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Verdict {
    /// Every participant prepared.
    Commit { answers: Vec<(ShardId, Vec<Answer>)> },
    /// The operation fails with this.
    Refuse(Errno),
    /// Nothing happened; the operation may be run anew.
    Retry,
}

/// A transaction as its driver needs it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Transaction {
    pub id: TxnId,
    pub request: RequestId,
    /// Other shards with their parts, in shard order.
    pub participants: Vec<(ShardId, Vec<Action>)>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// To be written atomically, with the applied index. `None` deletes. One write per key, in
    /// key order.
    pub batch: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    pub reply: Reply,
    /// What others may have cached and must drop.
    pub changes: Vec<Change>,
    pub follow_up: Vec<FollowUp>,
}

#[derive(Clone, PartialEq, Debug)]
pub enum Reply {
    /// For the client (of `Client`).
    Meta(MetaResult),
    /// Of `Shard`.
    Shard(ShardReply),
    /// Nothing was done: a prepared transaction holds a key. Wait until it is finished in this
    /// shard, then propose the operation again.
    Blocked { txn: TxnId },
    /// Nothing was done: propose again with `Facts::target` from a lookup in `dir`'s shard.
    NeedTarget { dir: Ino, name: Name },
    /// Nothing was done: take the rename lock, walk from each `from` to the root by
    /// [`super::parent_of`]; when a walk meets its `avoid`, the answer is the errno given there;
    /// else propose again with `Facts::rename_token`. Release the lock when all is over.
    NeedRenameLock { walks: Vec<AncestorWalk> },
    /// The operation spans shards and is prepared in this one: drive it (the follow-up says
    /// how). The client's reply comes with the decision.
    Begun { txn: TxnId },
    /// Of `Prepare`.
    Prepared(Result<Vec<Answer>, Refusal>),
    /// Of `Decide`: whether it committed (a verdict can come too late) and the client's reply,
    /// `None` when the operation is to be run anew.
    Decided { committed: bool, client: Option<MetaResult> },
    /// Of `TakeRenameLock`: `None` when another holds it.
    RenameLock { token: Option<u64> },
    /// Of `Dispossess` and of a client's `CloseSession`: a part is done; propose the same again.
    Unfinished,
    /// Of all others.
    Done,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AncestorWalk {
    pub from: Ino,
    pub avoid: Ino,
    pub errno: Errno,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum ChangeKind {
    Created,
    Attributes,
    /// Bytes (and attributes).
    Content,
    /// Names in a directory (and its attributes).
    Entries,
    Removed,
}

/// One inode that an entry changed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Change {
    pub ino: Ino,
    pub kind: ChangeKind,
}

/// What the service must see to after the entry is applied. After a restart the same work is
/// found by [`super::list_transactions`] and [`super::list_orphans`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FollowUp {
    /// Propose [`LogEntry::Reap`].
    Reap { ino: Ino },
    /// Drive to the end with a [`super::transaction::Driver`].
    Drive(Transaction),
    /// The transaction no longer holds keys in this shard: what it blocked can go on.
    Unblocked { txn: TxnId },
    /// Locks were dropped: waiting lock calls of the inode may succeed now.
    LocksFreed { ino: Ino },
}

/// Of [`super::read`].
#[derive(Clone, PartialEq, Debug)]
pub enum ReadReply {
    Meta(MetaResult),
    /// A prepared transaction holds the key: wait and read again.
    Blocked {
        txn: TxnId,
    },
}

/// Of [`super::read_shard`].
pub type ShardReadReply = Option<ShardReply>;

impl Reply {
    pub(crate) fn meta(reply: MetaReply) -> Reply {
        Reply::Meta(Ok(reply))
    }
}
