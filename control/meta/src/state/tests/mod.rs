//! Tests of the state machine. [`Shard`] runs entries on a state in memory, [`model`] is a plain
//! file system that replies are compared with, [`check`] knows what must hold between records.

mod acl;
mod bounds;
mod check;
mod content;
mod golden;
mod liveness;
mod locks;
mod model;
mod names;
#[cfg(feature = "planted")]
mod planted;
mod policy;
mod random;
mod sessions;
mod transactions;

use super::entry::{Change, Facts, FollowUp, Init, LogEntry, Outcome, ReadReply, Reply};
use super::{MemoryState, StateError, apply, read};
use cfs_wire::data::{Extent, Location};
use cfs_wire::meta::{
    Attr, AttrChanges, Commit, DirEntry, ExtentsReply, FileKind, FileWrite, MetaCall, MetaError, MetaOp, MetaReply,
    MetaResult, Name, NewNode, ShardOp, ShardReply,
};
use cfs_wire::{BlobId, Epoch, Errno, Ino, Policy, RequestId, SessionId, ShardId, TargetId, Timestamp, VolumeId};
use futures_util::FutureExt as _;
use smallvec::{SmallVec, smallvec};

pub(super) const ALICE: SessionId = SessionId(0xa11ce);
pub(super) const BOB: SessionId = SessionId(0xb0b);
pub(super) const ROOT: Ino = Ino::ROOT;

pub(super) fn now_or_never<T>(future: impl Future<Output = Result<T, StateError>>) -> T {
    future.now_or_never().expect("a state in memory never waits").expect("the state is sound")
}

pub(super) fn name(text: &str) -> Name {
    SmallVec::from_slice(text.as_bytes())
}

pub(super) fn at(secs: i64) -> Timestamp {
    Timestamp { secs, nanos: 0 }
}

pub(super) fn node(kind: FileKind, mode: u32) -> NewNode {
    NewNode { kind, mode, umask: 0o022, uid: 10, gid: 20, rdev: 0, target: Vec::new() }
}

pub(super) fn file() -> NewNode {
    node(FileKind::File, 0o666)
}

pub(super) fn dir() -> NewNode {
    node(FileKind::Directory, 0o777)
}

pub(super) fn hot(blob: u128, offset: u32) -> Location {
    Location::Hot { blob: BlobId(blob), targets: smallvec![TargetId(1)], offset }
}

pub(super) fn init(shards: u16) -> Init {
    Init {
        shards,
        volume: VolumeId(1),
        root: ROOT,
        root_mode: 0o755,
        root_uid: 0,
        root_gid: 0,
        policy: Policy::new(2, 1).unwrap(),
        tolerated: 1,
        targets: 3,
        name_key: [7; 32],
        feature_level: 1,
        now: at(1000),
    }
}

/// One shard with two open sessions; every call gets the next sequence and the next second.
pub(super) struct Shard {
    pub id: ShardId,
    pub state: MemoryState,
    pub log: Vec<LogEntry>,
    pub clock: i64,
    pub sequence: u64,
    pub changes: Vec<Change>,
    pub follow_up: Vec<FollowUp>,
}

impl Shard {
    pub fn new() -> Shard {
        Shard::of(ShardId(0), 1)
    }

    pub fn of(id: ShardId, shards: u16) -> Shard {
        let mut shard = Shard {
            id,
            state: MemoryState::default(),
            log: Vec::new(),
            clock: 1000,
            sequence: 0,
            changes: Vec::new(),
            follow_up: Vec::new(),
        };
        assert_eq!(shard.entry(LogEntry::Init(init(shards))), Reply::Done);
        for session in [ALICE, BOB] {
            let opened = shard.call_as(session, MetaOp::OpenSession { client: "test".into() });
            assert_eq!(opened, Ok(MetaReply::Session { lease_ms: 0 }));
        }
        shard
    }

    pub fn outcome(&mut self, entry: LogEntry) -> Outcome {
        let outcome = now_or_never(apply(&self.state, self.id, &entry));
        self.log.push(entry);
        self.state.write(&outcome);
        self.changes = outcome.changes.clone();
        self.follow_up = outcome.follow_up.clone();
        outcome
    }

    pub fn entry(&mut self, entry: LogEntry) -> Reply {
        self.outcome(entry).reply
    }

    /// Shuts a session out and takes all it has; gives the outcomes of the entries that take.
    pub fn fence(&mut self, session: SessionId) -> Vec<Outcome> {
        assert_eq!(self.entry(LogEntry::Fence { session }), Reply::Done);
        let mut taken = vec![self.outcome(LogEntry::Dispossess { session })];
        while taken.last().is_some_and(|outcome| outcome.reply == Reply::Unfinished) {
            taken.push(self.outcome(LogEntry::Dispossess { session }));
        }
        taken
    }

    pub fn next_call(&mut self, session: SessionId, op: MetaOp) -> LogEntry {
        self.clock += 1;
        self.sequence += 1;
        let id = RequestId { session, sequence: self.sequence };
        // The harness acknowledges at once: only the last reply is kept.
        let call = MetaCall { id, lowest_unacknowledged: self.sequence, shard: self.id, op };
        LogEntry::Client { call, now: at(self.clock), facts: Facts::default() }
    }

    pub fn call_as(&mut self, session: SessionId, op: MetaOp) -> MetaResult {
        let entry = self.next_call(session, op);
        match self.entry(entry) {
            Reply::Meta(result) => result,
            other => panic!("not a client's reply: {other:?}"),
        }
    }

    pub fn call(&mut self, op: MetaOp) -> MetaResult {
        self.call_as(ALICE, op)
    }

    pub fn read(&self, op: MetaOp) -> MetaResult {
        match now_or_never(read(&self.state, self.id, ALICE, &op)) {
            ReadReply::Meta(result) => result,
            ReadReply::Blocked { txn } => panic!("blocked by {txn}"),
        }
    }

    pub fn shard_op(&mut self, op: ShardOp) -> ShardReply {
        match self.entry(LogEntry::Shard { op, now: at(self.clock) }) {
            Reply::Shard(reply) => reply,
            other => panic!("not a shard's reply: {other:?}"),
        }
    }

    pub fn create(&mut self, dir: Ino, called: &str, node: NewNode) -> Result<Attr, MetaError> {
        match self.call(MetaOp::Create { dir, name: name(called), node, hold: false })? {
            MetaReply::Entry(entry) => Ok(entry.attr),
            other => panic!("not an entry: {other:?}"),
        }
    }

    pub fn unlink(&mut self, dir: Ino, called: &str) -> MetaResult {
        self.call(MetaOp::Unlink { dir, name: name(called) })
    }

    pub fn rename(&mut self, dir: Ino, from: &str, to_dir: Ino, to: &str, flags: u32) -> MetaResult {
        self.call(MetaOp::Rename { dir, name: name(from), to_dir, to_name: name(to), flags })
    }

    pub fn set(&mut self, ino: Ino, changes: AttrChanges) -> Result<Attr, MetaError> {
        match self.call(MetaOp::SetAttr { ino, changes })? {
            MetaReply::Attr { attr, .. } => Ok(attr),
            other => panic!("not attributes: {other:?}"),
        }
    }

    /// A commit that begins its session's count anew.
    pub fn write(&mut self, ino: Ino, writes: Vec<FileWrite>) -> Result<Attr, MetaError> {
        let commit = Commit { ino, sequence: 1, writes, mtime: None, kill_privileges: false };
        match self.call(MetaOp::Commit(commit))? {
            MetaReply::Committed { attr, .. } => Ok(attr),
            other => panic!("not a commit's reply: {other:?}"),
        }
    }

    pub fn attr(&self, ino: Ino) -> Result<Attr, MetaError> {
        match self.read(MetaOp::GetAttr { ino })? {
            MetaReply::Attr { attr, .. } => Ok(attr),
            other => panic!("not attributes: {other:?}"),
        }
    }

    pub fn lookup(&self, dir: Ino, called: &str) -> Result<Attr, MetaError> {
        match self.read(MetaOp::Lookup { dir, name: name(called) })? {
            MetaReply::Entry(entry) => Ok(entry.attr),
            other => panic!("not an entry: {other:?}"),
        }
    }

    pub fn list(&self, dir: Ino, after: u64, entries_max: u32) -> Result<(Vec<DirEntry>, bool), MetaError> {
        match self.read(MetaOp::ReadDir { dir, after, entries_max, with_attrs: true })? {
            MetaReply::Entries { entries, end, .. } => Ok((entries, end)),
            other => panic!("not entries: {other:?}"),
        }
    }

    pub fn extents(&self, ino: Ino) -> ExtentsReply {
        match self.read(MetaOp::GetExtents { ino, offset: 0, length: u64::MAX, extents_max: 8192 }) {
            Ok(MetaReply::Extents(reply)) => reply,
            other => panic!("not extents: {other:?}"),
        }
    }

    /// The bytes a client would read, every location resolved by [`byte_at`].
    pub fn content(&self, ino: Ino) -> Vec<u8> {
        let reply = self.extents(ino);
        let mut bytes = vec![0; reply.attr.size as usize];
        let inline = reply.inline.unwrap_or_default();
        bytes[..inline.len()].copy_from_slice(&inline);
        for Extent { offset, length, location, .. } in reply.extents {
            for index in 0..length {
                bytes[offset as usize + index as usize] = byte_at(&location.skip(index));
            }
        }
        bytes
    }

    /// Proposes what the last entry's follow-ups ask for, as the service does.
    pub fn reap(&mut self) {
        for follow_up in std::mem::take(&mut self.follow_up) {
            let mut next = Some(follow_up);
            while let Some(FollowUp::Reap { ino }) = next {
                let outcome = self.outcome(LogEntry::Reap { ino, now: at(self.clock) });
                next = outcome.follow_up.first().cloned();
            }
        }
    }
}

/// The byte that a location begins at: a function of blob and offset.
pub(super) fn byte_at(location: &Location) -> u8 {
    let (id, offset) = match location {
        Location::Hot { blob, offset, .. } => (blob.0, *offset),
        Location::Chunk { segment, slot, offset, .. } => (segment.0 + u128::from(*slot) * 7919, *offset),
    };
    let mixed = (id as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(offset).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (mixed >> 32) as u8
}

pub(super) fn data(offset: u64, length: u32, blob: u128) -> FileWrite {
    FileWrite::Data { offset, length, location: hot(blob, 0), epoch: Epoch(0) }
}

pub(super) fn errno(result: Result<impl std::fmt::Debug, MetaError>) -> Errno {
    match result {
        Err(MetaError::Errno(errno)) => errno,
        other => panic!("not refused with an errno: {other:?}"),
    }
}
