//! The bytes of Raft messages: opcodes, statuses, and bodies in postcard.

use crate::types::{LogId, NUMBER_MAX, Raft, SnapshotMeta, Vote};
use bytes::Bytes;
use cfs_fabric::Message;
use cfs_wire::body;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderError, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Opcodes of this crate: the server hands requests in this range to `RaftHost::handle_rpc`.
pub const OPCODES: std::ops::RangeInclusive<u16> = 0x0100..=0x010f;

pub(super) const APPEND: u16 = 0x0100;
pub(super) const VOTE: u16 = 0x0101;
pub(super) const PRE_VOTE: u16 = 0x0102;
pub(super) const TRANSFER_LEADER: u16 = 0x0103;
pub(super) const SNAPSHOT_BEGIN: u16 = 0x0104;
pub(super) const SNAPSHOT_CHUNK: u16 = 0x0105;
pub(super) const SNAPSHOT_FINISH: u16 = 0x0106;

/// How a request ended; the opcode field of its reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[repr(u16)]
pub enum Status {
    #[error("ok")]
    Ok = 0,
    #[error("the node does not host this group")]
    UnknownGroup = 1,
    #[error("the group has stopped on this node")]
    Stopped = 2,
    #[error("the request can't be read")]
    Malformed = 3,
    #[error("the snapshot's transfer was given up")]
    NoTransfer = 4,
    #[error("the opcode is unknown")]
    UnknownOpcode = 5,
    #[error("the snapshot can't be taken in")]
    Refused = 6,
}

impl Status {
    fn from_u16(raw: u16) -> Status {
        use Status::*;
        [Ok, UnknownGroup, Stopped, Malformed, NoTransfer, UnknownOpcode, Refused]
            .into_iter()
            .find(|status| *status as u16 == raw)
            .unwrap_or(Malformed)
    }
}

pub type AppendCall = AppendEntriesRequest<Raft>;
pub type AppendReply = AppendEntriesResponse<Raft>;
/// Also asked before an election, without effect.
pub type VoteCall = VoteRequest<Raft>;
pub type VoteReply = VoteResponse<Raft>;
pub type TransferLeaderCall = TransferLeaderRequest<Raft>;
pub type TransferLeaderReply = TransferLeaderResponse<Raft>;
/// Of the finish; a begin is answered by the transfer's id, a chunk by nothing.
pub type SnapshotReply = SnapshotResponse<Raft>;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotBegin {
    pub vote: Vote,
    pub meta: SnapshotMeta,
}

/// Names one transfer; a new `begin` for the group ends the one before.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Transfer {
    pub id: u64,
    /// Of the chunk; at the finish, how many there were.
    pub number: u64,
}

/// The votes and log ids in a body. One that was never counted is refused: it would be written to the
/// log, which does not believe it when it is read again.
pub(super) trait Counted {
    fn votes(&self) -> Vec<&Vote> {
        Vec::new()
    }

    fn log_ids(&self) -> Vec<&LogId> {
        Vec::new()
    }
}

impl Counted for () {}
impl Counted for u64 {}
impl Counted for Transfer {}

impl Counted for AppendCall {
    fn votes(&self) -> Vec<&Vote> {
        vec![&self.vote]
    }

    fn log_ids(&self) -> Vec<&LogId> {
        let entries = self.entries.iter().map(|entry| &entry.log_id);
        entries.chain(&self.prev_log_id).chain(&self.leader_commit).collect()
    }
}

impl Counted for AppendReply {
    fn votes(&self) -> Vec<&Vote> {
        match self {
            AppendReply::HigherVote(vote) => vec![vote],
            AppendReply::Success | AppendReply::PartialSuccess(_) | AppendReply::Conflict => Vec::new(),
        }
    }

    fn log_ids(&self) -> Vec<&LogId> {
        match self {
            AppendReply::PartialSuccess(id) => id.iter().collect(),
            AppendReply::Success | AppendReply::HigherVote(_) | AppendReply::Conflict => Vec::new(),
        }
    }
}

impl Counted for VoteCall {
    fn votes(&self) -> Vec<&Vote> {
        vec![&self.vote]
    }

    fn log_ids(&self) -> Vec<&LogId> {
        self.last_log_id.iter().collect()
    }
}

impl Counted for VoteReply {
    fn votes(&self) -> Vec<&Vote> {
        vec![&self.vote]
    }

    fn log_ids(&self) -> Vec<&LogId> {
        self.last_log_id.iter().collect()
    }
}

impl Counted for TransferLeaderCall {
    fn votes(&self) -> Vec<&Vote> {
        vec![self.from_leader()]
    }

    fn log_ids(&self) -> Vec<&LogId> {
        self.last_log_id().into_iter().collect()
    }
}

impl Counted for TransferLeaderReply {
    fn votes(&self) -> Vec<&Vote> {
        match self {
            Err(TransferLeaderError::VoteChanged { expected, actual }) => vec![expected, actual],
            Ok(()) | Err(TransferLeaderError::LogNotFlushed { .. }) => Vec::new(),
        }
    }

    fn log_ids(&self) -> Vec<&LogId> {
        match self {
            Err(TransferLeaderError::LogNotFlushed { expected, actual }) => expected.iter().chain(actual).collect(),
            Ok(()) | Err(TransferLeaderError::VoteChanged { .. }) => Vec::new(),
        }
    }
}

impl Counted for SnapshotBegin {
    fn votes(&self) -> Vec<&Vote> {
        vec![&self.vote]
    }

    fn log_ids(&self) -> Vec<&LogId> {
        self.meta.last_log_id.iter().chain(self.meta.last_membership.log_id()).collect()
    }
}

impl Counted for SnapshotReply {
    fn votes(&self) -> Vec<&Vote> {
        vec![&self.vote]
    }
}

pub(super) fn request<T: Serialize>(opcode: u16, group: u16, body: &T, bulk: Bytes) -> Message {
    Message { opcode, body: encode(&(group, body)), bulk }
}

pub(super) fn reply<T: Serialize>(result: Result<T, Status>) -> Message {
    match result {
        Ok(body) => Message { opcode: Status::Ok as u16, body: encode(&body), bulk: Bytes::new() },
        Err(status) => Message { opcode: status as u16, body: Bytes::new(), bulk: Bytes::new() },
    }
}

pub(super) fn read_reply<T: DeserializeOwned + Counted>(reply: &Message) -> Result<T, Status> {
    match Status::from_u16(reply.opcode) {
        Status::Ok => read_body(&reply.body),
        status => Err(status),
    }
}

/// The group a request is for, and the rest of its body.
pub(super) fn read_group(body: &[u8]) -> Result<(u16, &[u8]), Status> {
    postcard::take_from_bytes(body).map_err(|_| Status::Malformed)
}

pub(super) fn read_body<T: DeserializeOwned + Counted>(rest: &[u8]) -> Result<T, Status> {
    let read: T = body::decode(rest).map_err(|_| Status::Malformed)?;
    let terms = read.votes().into_iter().map(|vote| vote.leader_id.term);
    let numbers = terms.chain(read.log_ids().into_iter().flat_map(|id| [id.leader_id.term, id.index]));
    if numbers.max().is_some_and(|number| number > NUMBER_MAX) { Err(Status::Malformed) } else { Ok(read) }
}

fn encode<T: Serialize>(value: &T) -> Bytes {
    postcard::to_allocvec(value).expect("Raft messages hold nothing postcard can't encode").into()
}

#[cfg(test)]
#[path = "rpc_tests.rs"]
mod tests;
