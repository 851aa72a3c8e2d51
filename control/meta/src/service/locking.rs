//! Lock calls that wait: granted in the order they came, as far as what is held allows.

use super::locks::{CANCELLED, Waiter};
use super::shard::Shard;
use super::MetaService;
use cfs_wire::Ino;
use cfs_wire::meta::{LockRange, MetaCall, MetaOp, MetaReply, MetaResult};
use std::rc::Rc;

impl MetaService {
    /// Holds the call until its lock is granted, it is cancelled, or its session ends.
    pub(super) async fn wait_for_lock(
        &self,
        shard: &Rc<Shard>,
        call: MetaCall,
        ino: Ino,
        lock: LockRange,
    ) -> MetaResult {
        let waiter = shard.locks.enqueue(ino, call, lock);
        self.grant_locks(shard, ino).await;
        let result = waiter.answered().await;
        shard.locks.remove(ino, &waiter);
        result
    }

    /// Grants what can be granted on an inode, first come first served.
    pub(super) async fn grant_locks(&self, shard: &Rc<Shard>, ino: Ino) {
        let Some(turn) = shard.locks.turn(ino) else { return };
        let _turn = turn.acquire(1).await;
        for waiter in shard.locks.waiting(ino) {
            if !waiter.is_answered() {
                self.try_lock(shard, &waiter).await;
            }
        }
    }

    /// Proposes a waiting lock; a conflict leaves it waiting.
    async fn try_lock(&self, shard: &Rc<Shard>, waiter: &Rc<Waiter>) {
        waiter.proposed.set(true);
        let result = self.execute(shard, waiter.call.clone()).await;
        waiter.proposed.set(false);
        match result {
            Ok(MetaReply::Conflict(Some(_))) if waiter.cancelled.get() => waiter.answer(Err(CANCELLED)),
            Ok(MetaReply::Conflict(Some(_))) => {}
            result => waiter.answer(result),
        }
    }

    /// Ends the waiting calls of a lock owner with EINTR, unless they have just been granted.
    pub(super) async fn cancel_lock(&self, shard: &Rc<Shard>, call: MetaCall, ino: Ino, owner: u64) -> MetaResult {
        for waiter in shard.locks.of_owner(ino, call.id.session, owner) {
            waiter.cancelled.set(true);
            if !waiter.proposed.get() {
                waiter.answer(Err(CANCELLED));
            }
        }
        debug_assert!(matches!(call.op, MetaOp::CancelLock { .. }));
        Ok(MetaReply::Done)
    }
}
