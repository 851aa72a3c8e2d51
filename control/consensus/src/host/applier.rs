//! openraft's state machine over ours.

use super::machine::{AppliedEntry, SnapshotSink, SnapshotSource, StateError, StateMachine};
use crate::log::SharedLog;
use crate::types::{Entry, LogId, Mark, Raft, SnapshotMeta, StoredMembership};
use bytes::Bytes;
use cfs_wire::ShardId;
use cfs_wire::planted::{self, Bug};
use futures_util::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot};
use openraft::type_config::alias::SnapshotOf;
use openraft::{EntryPayload, OptionalSend};
use std::io;
use std::rc::Rc;

/// Entries handed to `apply` at once: bounds how long the task runs before it yields, and the
/// size of the state machine's batch.
const APPLY_AT_ONCE: usize = 64;

/// A snapshot on its way out or in.
pub enum SnapshotData {
    Source(Box<dyn SnapshotSource>),
    Sink(Box<dyn SnapshotSink>),
    /// Only says that a checkpoint exists; nobody reads it.
    Record,
}

/// Feeds one group's committed entries to its state machine.
pub struct Applier {
    group: ShardId,
    machine: Rc<dyn StateMachine>,
    log: Rc<SharedLog>,
    position: Mark,
    hosted: bool,
}

fn broken(error: StateError) -> io::Error {
    io::Error::other(error)
}

fn decode(bytes: Option<Bytes>) -> Result<Mark, io::Error> {
    match bytes {
        Some(bytes) => Mark::decode(&bytes).map_err(io::Error::other),
        None => Ok(Mark::default()),
    }
}

fn meta(mark: Mark) -> SnapshotMeta {
    SnapshotMeta { last_log_id: mark.applied, last_membership: mark.membership }
}

impl Applier {
    pub fn new(group: ShardId, machine: Rc<dyn StateMachine>, log: Rc<SharedLog>) -> Applier {
        Applier { group, machine, log, position: Mark::default(), hosted: false }
    }

    /// Leaves checkpoints to the host: what openraft asks to be built is then only a record of
    /// the last one, and one that finds no space does not stop the group.
    pub(super) fn checkpointed_by_host(self) -> Applier {
        Applier { hosted: true, ..self }
    }

    /// Moves the position over an entry and takes out what the state machine is to see.
    fn advance(&mut self, entry: Entry) -> AppliedEntry {
        self.position.applied = Some(entry.log_id);
        let payload = match entry.payload {
            EntryPayload::Blank => None,
            EntryPayload::Normal(command) => Some(command.0),
            EntryPayload::Membership(membership) => {
                self.position.membership = StoredMembership::new(Some(entry.log_id), membership);
                None
            }
        };
        AppliedEntry { mark: self.position.encode(), payload }
    }

    async fn pump(&self, mut source: Box<dyn SnapshotSource>, mark: Bytes) -> Result<(), StateError> {
        let mut sink = self.machine.restore().await?;
        while let Some(chunk) = source.next().await? {
            sink.push(chunk).await?;
        }
        sink.finish(mark).await
    }
}

impl RaftStateMachine<Raft> for Applier {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Checkpointer;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        self.position = decode(self.machine.applied())?;
        Ok((self.position.applied, self.position.membership.clone()))
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<Raft>, io::Error>> + Unpin + OptionalSend,
    {
        let mut chunks = entries.ready_chunks(APPLY_AT_ONCE);
        while let Some(chunk) = chunks.next().await {
            let mut batch = Vec::with_capacity(chunk.len());
            let mut responders = Vec::with_capacity(chunk.len());
            for item in chunk {
                let (entry, responder) = item?;
                batch.push(self.advance(entry));
                responders.push(responder);
            }
            let replies = self.machine.apply(batch).await.map_err(broken)?;
            if replies.len() != responders.len() {
                return Err(io::Error::other("the state machine answered another number of replies than entries"));
            }
            for (responder, reply) in responders.into_iter().zip(replies) {
                if let Some(responder) = responder {
                    responder.send(reply);
                }
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Checkpointer {
        Checkpointer { group: self.group, machine: self.machine.clone(), log: self.log.clone(), hosted: self.hosted }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotData) -> Result<(), io::Error> {
        let mark = Mark { applied: meta.last_log_id, membership: meta.last_membership.clone() };
        // Entries that the snapshot contradicts are cut off by now, but not durably: after a crash they
        // would be taken for what follows a state that has moved past them.
        self.log.flush().await?;
        match snapshot {
            SnapshotData::Sink(sink) => sink.finish(mark.encode()).await.map_err(broken)?,
            SnapshotData::Source(source) => self.pump(source, mark.encode()).await.map_err(broken)?,
            SnapshotData::Record => return Err(io::Error::other("a checkpoint's record is no snapshot")),
        }
        self.log.set_synced(self.group, mark.index());
        self.position = mark;
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<SnapshotOf<Raft, SnapshotData>>, io::Error> {
        // Always the present state, not the last checkpoint's: a follower that needs a snapshot
        // then has the least to catch up, and nothing is stored for it.
        if self.machine.applied().is_none() {
            return Ok(None);
        }
        let source = self.machine.snapshot().await.map_err(broken)?;
        let mark = decode(Some(source.mark()))?;
        Ok(Some(Snapshot { meta: meta(mark), snapshot: SnapshotData::Source(source) }))
    }
}

/// Builds what openraft calls a snapshot and we a checkpoint: the state made durable, after
/// which the log below may go.
pub struct Checkpointer {
    group: ShardId,
    machine: Rc<dyn StateMachine>,
    log: Rc<SharedLog>,
    hosted: bool,
}

impl RaftSnapshotBuilder<Raft> for Checkpointer {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<SnapshotOf<Raft, SnapshotData>, io::Error> {
        let mark = match (self.machine.applied(), self.machine.synced()) {
            (None, _) => Mark::default(),
            (applied, _) if planted::is(Bug::LogCutEarly) => decode(applied)?,
            (_, Some(synced)) if self.hosted => decode(Some(synced))?,
            _ => decode(Some(self.machine.checkpoint().await.map_err(broken)?))?,
        };
        if mark.applied.is_some() {
            self.log.set_synced(self.group, mark.index());
        }
        Ok(Snapshot { meta: meta(mark), snapshot: SnapshotData::Record })
    }
}
