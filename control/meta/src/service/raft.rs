//! The Raft host as the service's [`Proposer`].

use super::proposer::{ProposeError, Proposer};
use bytes::Bytes;
use cfs_consensus::{ProposeError as HostError, RaftHost};
use cfs_wire::{NodeId, ShardId};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;

impl Proposer for RaftHost {
    fn propose(&self, shard: ShardId, entry: Bytes) -> LocalBoxFuture<'_, Result<Bytes, ProposeError>> {
        async move { RaftHost::propose(self, shard, entry).await.map_err(convert) }.boxed_local()
    }

    fn read_barrier(&self, shard: ShardId) -> LocalBoxFuture<'_, Result<(), ProposeError>> {
        async move { RaftHost::read_barrier(self, shard).await.map_err(convert) }.boxed_local()
    }

    fn leads(&self, shard: ShardId) -> Option<u64> {
        if !self.is_leader(shard) {
            return None;
        }
        self.metrics(shard).filter(|metrics| metrics.is_leader).map(|metrics| metrics.term)
    }

    fn hint(&self, shard: ShardId) -> Option<NodeId> {
        self.leader(shard)
    }
}

fn convert(error: HostError) -> ProposeError {
    match error {
        HostError::NotLeader { hint } => ProposeError::NotLeader { hint: hint.map(|hint| hint.node) },
        HostError::UnknownGroup(_) => ProposeError::NotLeader { hint: None },
        HostError::TooLarge { length, limit } => ProposeError::TooLarge { length, limit },
        HostError::Stopped { .. } => ProposeError::Closed,
        other @ (HostError::Undecided { .. } | HostError::NoQuorum) => ProposeError::Unknown(other.to_string()),
    }
}
