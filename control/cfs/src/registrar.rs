//! The metadata side of segments, by way of the shards this node can reach.

use cfs_movers::ShardCalls;
use cfs_store::segment::Registrar;
use cfs_wire::data::{DataError, Registration};
use cfs_wire::meta::{MetaError, ShardOp, ShardReply, registration_shard};
use cfs_wire::{Epoch, SegmentId, ShardId};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::Cell;
use std::rc::Rc;

/// Registers segments in their shards and hands out the reference epoch.
pub struct ShardRegistrar {
    calls: Rc<dyn ShardCalls>,
    epoch: Cell<Epoch>,
}

impl ShardRegistrar {
    pub fn new(calls: Rc<dyn ShardCalls>) -> Rc<ShardRegistrar> {
        Rc::new(ShardRegistrar { calls, epoch: Cell::new(Epoch(0)) })
    }

    /// The epoch handed out from now on.
    pub fn set_epoch(&self, epoch: Epoch) {
        self.epoch.set(epoch);
    }

    async fn call(&self, shard: ShardId, op: ShardOp) -> Result<ShardReply, DataError> {
        self.calls.shard_call(shard, op).await.map_err(|error| match error {
            MetaError::Errno(cfs_wire::Errno::ENOSPC) => DataError::NoSpace,
            // The shard will be led again; the caller repeats the store under new ids.
            _ => DataError::Closed,
        })
    }

    /// A change of a registration. One that its shard refuses has not happened: taken for done,
    /// a segment would be answered that nothing keeps from the orphan search.
    async fn change(&self, segment: SegmentId, op: ShardOp) -> Result<(), DataError> {
        match self.call(self.home(segment), op).await? {
            ShardReply::Done => Ok(()),
            _ => Err(DataError::Closed),
        }
    }

    fn home(&self, segment: SegmentId) -> ShardId {
        registration_shard(segment, self.calls.shards())
    }
}

impl Registrar for ShardRegistrar {
    fn epoch(&self) -> Epoch {
        self.epoch.get()
    }

    fn register(&self, registration: Registration) -> LocalBoxFuture<'_, Result<(), DataError>> {
        async move { self.change(registration.segment, ShardOp::Register(registration)).await }.boxed_local()
    }

    fn replace(&self, old: Registration, new: Registration) -> LocalBoxFuture<'_, Result<(), DataError>> {
        async move { self.change(new.segment, ShardOp::Replace { old, new }).await }.boxed_local()
    }

    fn deregister(&self, segment: SegmentId) -> LocalBoxFuture<'_, Result<(), DataError>> {
        async move { self.change(segment, ShardOp::Deregister(segment)).await }.boxed_local()
    }

    fn lookup(&self, segment: SegmentId) -> LocalBoxFuture<'_, Result<Option<Registration>, DataError>> {
        async move {
            match self.call(self.home(segment), ShardOp::GetRegistration(segment)).await? {
                ShardReply::Registration(found) => Ok(found),
                _ => Err(DataError::Closed),
            }
        }
        .boxed_local()
    }
}
