//! What a caller of the host may be told.

use super::machine::StateError;
use crate::log::LogError;
use crate::types::{Member, Raft};
use cfs_fabric::Address;
use cfs_wire::{NodeId, ShardId};
use openraft::errors::{ClientWriteError, ForwardToLeader, LinearizableReadError, RaftError};

/// A replica to ask instead.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LeaderHint {
    pub node: NodeId,
    pub address: Address,
}

/// Why a proposal or a read barrier was not carried out.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProposeError {
    #[error("this replica does not lead the group")]
    NotLeader { hint: Option<LeaderHint> },
    /// The leader changed under the proposal: it may or may not have been committed elsewhere.
    #[error("the leader changed before the proposal was decided")]
    Undecided { hint: Option<LeaderHint> },
    #[error("a quorum of the group can't be reached")]
    NoQuorum,
    #[error("a proposal of {length} bytes exceeds the limit of {limit}")]
    TooLarge { length: usize, limit: usize },
    #[error("this node does not host {0}")]
    UnknownGroup(ShardId),
    #[error("the group has stopped on this node: {reason}")]
    Stopped { reason: String },
}

impl ProposeError {
    /// Whether the same request may succeed later or elsewhere. It may have been carried out:
    /// retry under a request id.
    pub fn is_retryable(&self) -> bool {
        matches!(self, ProposeError::NotLeader { .. } | ProposeError::Undecided { .. } | ProposeError::NoQuorum)
    }

    /// Where the leader is thought to be.
    pub fn hint(&self) -> Option<&LeaderHint> {
        match self {
            ProposeError::NotLeader { hint } | ProposeError::Undecided { hint } => hint.as_ref(),
            _ => None,
        }
    }
}

fn hint(forward: ForwardToLeader<Raft>) -> Option<LeaderHint> {
    let node = NodeId(u16::try_from(forward.leader_id?).ok()?);
    let Member { address } = forward.leader_node?;
    Some(LeaderHint { node, address: Address(address) })
}

impl From<RaftError<Raft, ClientWriteError<Raft>>> for ProposeError {
    fn from(error: RaftError<Raft, ClientWriteError<Raft>>) -> Self {
        match error {
            RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
                ProposeError::NotLeader { hint: hint(forward) }
            }
            RaftError::APIError(ClientWriteError::LogEntryDiscarded(forward)) => {
                ProposeError::Undecided { hint: hint(forward) }
            }
            other => ProposeError::Stopped { reason: other.to_string() },
        }
    }
}

impl From<RaftError<Raft, LinearizableReadError<Raft>>> for ProposeError {
    fn from(error: RaftError<Raft, LinearizableReadError<Raft>>) -> Self {
        match error {
            RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)) => {
                ProposeError::NotLeader { hint: hint(forward) }
            }
            RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)) => ProposeError::NoQuorum,
            other => ProposeError::Stopped { reason: other.to_string() },
        }
    }
}

/// Why a group could not be started, checkpointed or stopped.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HostError {
    #[error("this node does not host {0}")]
    UnknownGroup(ShardId),
    #[error("this node hosts {0} already")]
    DuplicateGroup(ShardId),
    /// The state is there and the log is not: starting would forget what this replica voted.
    #[error("{0} has state but no log on this node: the targets that held the log are missing")]
    LogLost(ShardId),
    /// The log was cut up to where a checkpoint was, and the state is from before it.
    #[error(
        "the state of {group} reaches to entry {applied:?} and its log begins after {purged}: the targets that \
         held the newer state are missing"
    )]
    StateBehindLog { group: ShardId, applied: Option<u64>, purged: u64 },
    #[error("the state of {0} carries no readable position")]
    BadMark(ShardId),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("{group} has stopped on this node: {reason}")]
    Stopped { group: ShardId, reason: String },
}

impl HostError {
    pub fn is_retryable(&self) -> bool {
        match self {
            HostError::Log(error) => error.is_retryable(),
            HostError::State(error) => error.is_retryable(),
            _ => false,
        }
    }
}
