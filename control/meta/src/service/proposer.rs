//! What the service asks of consensus. The Raft host implements it; tests apply directly.

use bytes::Bytes;
use cfs_wire::meta::MetaError;
use cfs_wire::{NodeId, ShardId};
use futures_util::future::LocalBoxFuture;

/// Why an entry was not, or perhaps not, committed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProposeError {
    #[error("this node does not lead the shard")]
    NotLeader { hint: Option<NodeId> },
    /// The entry may be committed now, later or never.
    #[error("the outcome is unknown: {0}")]
    Unknown(String),
    #[error("an entry of {length} bytes exceeds the limit of {limit}")]
    TooLarge { length: usize, limit: usize },
    #[error("the shard has stopped on this node")]
    Closed,
}

impl From<ProposeError> for MetaError {
    fn from(error: ProposeError) -> MetaError {
        match error {
            ProposeError::NotLeader { hint } => MetaError::NotLeader { hint },
            ProposeError::TooLarge { .. } => MetaError::Malformed(error.to_string()),
            // Repeating is right either way: the request id finds what was done.
            other => MetaError::Unavailable(other.to_string()),
        }
    }
}

pub trait Proposer: 'static {
    /// Commits an entry and waits until this node has applied it.
    fn propose(&self, shard: ShardId, entry: Bytes) -> LocalBoxFuture<'_, Result<Bytes, ProposeError>>;

    /// Ends when the applied state holds everything that was committed before the call.
    fn read_barrier(&self, shard: ShardId) -> LocalBoxFuture<'_, Result<(), ProposeError>>;

    /// The term in which this node leads the shard; `None` when it does not. It differs whenever
    /// another node may have led in between.
    fn leads(&self, shard: ShardId) -> Option<u64>;

    /// Who leads instead, as far as known.
    fn hint(&self, shard: ShardId) -> Option<NodeId> {
        let _ = shard;
        None
    }
}
