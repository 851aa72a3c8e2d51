//! Reads for administrators: no session, no leases, nothing recalled.

use super::MetaService;
use cfs_wire::meta::{MetaError, MetaOp, MetaResult};
use cfs_wire::{SessionId, ShardId};

impl MetaService {
    /// Answers a read from committed state. What a client has written and not yet committed is
    /// not in it.
    pub async fn inspect(&self, shard: ShardId, op: &MetaOp) -> MetaResult {
        if !op.is_read() {
            return Err(MetaError::Malformed("only reads can be inspected".to_owned()));
        }
        let shard = self.serving(shard).await?;
        self.inner.proposer.read_barrier(shard.id).await?;
        self.read_state(&shard, SessionId(0), op).await?
    }

    /// Sessions that some shard of this node knows.
    pub fn session_count(&self) -> usize {
        let mut sessions = std::collections::BTreeSet::new();
        for shard in self.inner.shards.values() {
            sessions.extend(shard.known.borrow().iter().copied());
        }
        sessions.len()
    }
}
