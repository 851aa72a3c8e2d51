//! The receiving side of Raft's messages.

use super::machine::SnapshotSink;
use super::rpc::{self, AppendReply, SnapshotBegin, SnapshotReply, Status, Transfer, TransferLeaderReply, VoteReply};
use super::{Group, RaftHost, SnapshotData, possible};
use crate::types::{LogId, SnapshotMeta, Vote};
use bytes::Bytes;
use cfs_fabric::Message;
use cfs_wire::ShardId;
use openraft::storage::Snapshot;
use std::rc::Rc;

/// A snapshot being taken in.
pub(super) struct Receiving {
    id: u64,
    vote: Vote,
    meta: SnapshotMeta,
    chunks: u64,
    /// Taken out while a chunk is pushed.
    sink: Option<Box<dyn SnapshotSink>>,
}

fn stopped<E: std::fmt::Display>(error: E) -> Status {
    tracing::debug!(%error, "a Raft request was refused");
    Status::Stopped
}

impl RaftHost {
    /// Answers a peer's request; the server calls this for opcodes in [`super::OPCODES`].
    pub async fn handle_rpc(&self, request: Message) -> Message {
        let (group, rest) = match rpc::read_group(&request.body) {
            Ok(read) => read,
            Err(status) => return rpc::reply::<()>(Err(status)),
        };
        let Some(group) = self.group(ShardId(group)) else { return rpc::reply::<()>(Err(Status::UnknownGroup)) };
        match request.opcode {
            rpc::APPEND => rpc::reply(append(&group, rest).await),
            rpc::VOTE => rpc::reply(vote(&group, rest).await),
            rpc::PRE_VOTE => rpc::reply(pre_vote(&group, rest).await),
            rpc::TRANSFER_LEADER => rpc::reply(transfer_leader(&group, rest).await),
            rpc::SNAPSHOT_BEGIN => rpc::reply(self.begin(&group, rest).await),
            rpc::SNAPSHOT_CHUNK => rpc::reply(chunk(&group, rest, request.bulk).await),
            rpc::SNAPSHOT_FINISH => rpc::reply(finish(&group, rest).await),
            _ => rpc::reply::<()>(Err(Status::UnknownOpcode)),
        }
    }

    async fn begin(&self, group: &Rc<Group>, rest: &[u8]) -> Result<u64, Status> {
        let begin: SnapshotBegin = rpc::read_body(rest)?;
        if !possible::is_snapshot(&begin) {
            return Err(Status::Malformed);
        }
        let SnapshotBegin { vote, meta } = begin;
        let id = self.handle.random_u64();
        // Whatever was coming before ends here, and its sink is dropped.
        drop(group.receiving.borrow_mut().take());
        let sink = group.machine.restore().await.map_err(refused)?;
        *group.receiving.borrow_mut() = Some(Receiving { id, vote, meta, chunks: 0, sink: Some(sink) });
        Ok(id)
    }
}

fn refused(error: super::StateError) -> Status {
    tracing::warn!(%error, "a snapshot is refused");
    Status::Refused
}

async fn append(group: &Group, rest: &[u8]) -> Result<AppendReply, Status> {
    let call = rpc::read_body(rest)?;
    if !possible::is_append(&call) {
        return Err(Status::Malformed);
    }
    group.raft.append_entries(call).await.map_err(stopped)
}

async fn vote(group: &Group, rest: &[u8]) -> Result<VoteReply, Status> {
    group.raft.vote(rpc::read_body(rest)?).await.map_err(stopped)
}

async fn pre_vote(group: &Group, rest: &[u8]) -> Result<VoteReply, Status> {
    group.raft.pre_vote(rpc::read_body(rest)?).await.map_err(stopped)
}

async fn transfer_leader(group: &Group, rest: &[u8]) -> Result<TransferLeaderReply, Status> {
    group.raft.handle_transfer_leader(rpc::read_body(rest)?).await.map_err(stopped)
}

async fn chunk(group: &Group, rest: &[u8], bytes: Bytes) -> Result<(), Status> {
    let transfer: Transfer = rpc::read_body(rest)?;
    let mut sink = {
        let mut receiving = group.receiving.borrow_mut();
        let current =
            receiving.as_mut().filter(|current| current.id == transfer.id && current.chunks == transfer.number);
        current.and_then(|current| current.sink.take()).ok_or(Status::NoTransfer)?
    };
    sink.push(bytes).await.map_err(refused)?;
    let mut receiving = group.receiving.borrow_mut();
    let current = receiving.as_mut().filter(|current| current.id == transfer.id).ok_or(Status::NoTransfer)?;
    current.sink = Some(sink);
    current.chunks += 1;
    Ok(())
}

async fn finish(group: &Group, rest: &[u8]) -> Result<SnapshotReply, Status> {
    let transfer: Transfer = rpc::read_body(rest)?;
    let received = {
        let mut receiving = group.receiving.borrow_mut();
        let whole = receiving.as_ref().is_some_and(|current| {
            current.id == transfer.id && current.chunks == transfer.number && current.sink.is_some()
        });
        if whole { receiving.take() } else { None }
    };
    let Some(Receiving { vote, meta, sink: Some(sink), .. }) = received else { return Err(Status::NoTransfer) };
    // What is committed is in every snapshot that goes further.
    let last = meta.last_log_id;
    let contradicts = move |committed: Option<&LogId>| {
        last.zip(committed).is_some_and(|(last, committed)| last > *committed && last.index <= committed.index)
    };
    if group.raft.with_raft_state(move |state| contradicts(state.local_committed())).await.map_err(stopped)? {
        return Err(Status::Malformed);
    }
    let snapshot = Snapshot { meta, snapshot: SnapshotData::Sink(sink) };
    group.raft.install_full_snapshot(vote, snapshot).await.map_err(stopped)
}
