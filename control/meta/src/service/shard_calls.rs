//! Calls of servers and movers on a shard's state: registrations, liveness, compaction.

use super::MetaService;
use super::call::{BLOCKED_RECHECK, unreadable};
use super::peers::unexpected;
use crate::state::{self, LogEntry, Reply};
use cfs_wire::ShardId;
use cfs_wire::meta::{MetaError, ShardOp, ShardReply};

impl MetaService {
    /// Carries one out on a shard that this node leads. Nothing is recalled from clients:
    /// relocated content stays readable at its old place, or `fetch` says that it is gone.
    pub async fn shard_call(&self, shard: ShardId, op: ShardOp) -> Result<ShardReply, MetaError> {
        state::check_shard_op(&op)?;
        let shard = self.serving(shard).await?;
        let service = self.clone();
        let work = self.inner.handle.spawn(async move {
            if let Some(reply) = service.read_shard(&shard, &op).await? {
                return Ok(reply);
            }
            loop {
                let unblocked = shard.applied.unblocked().notified();
                let entry = LogEntry::Shard { op: op.clone(), now: service.inner.handle.wall() };
                let reply = service.propose(&shard, &entry).await?.outcome.reply;
                match reply {
                    Reply::Shard(reply) => return Ok(reply),
                    Reply::Meta(Err(error)) => return Err(error),
                    Reply::Blocked { .. } => {
                        let _ = service.inner.handle.timeout(BLOCKED_RECHECK, unblocked).await;
                    }
                    other => return Err(unexpected(&other)),
                }
            }
        });
        work.await.unwrap_or_else(|_| Err(MetaError::Unavailable("the node is shutting down".to_owned())))
    }

    async fn read_shard(&self, shard: &super::shard::Shard, op: &ShardOp) -> Result<Option<ShardReply>, MetaError> {
        self.inner.proposer.read_barrier(shard.id).await?;
        state::read_shard(&*shard.view(), shard.id, op).await.map_err(unreadable)
    }
}
