//! Lock calls that wait: granted in the order they came, as far as what is held allows.

use super::MetaService;
use super::locks::{CANCELLED, Waiter};
use super::shard::Shard;
use cfs_wire::meta::{LockRange, MetaCall, MetaOp, MetaReply, MetaResult};
use cfs_wire::{Ino, SessionId};
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
        if shard.locks.was_cancelled(&call) {
            return Err(CANCELLED);
        }
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
        let (MetaOp::Lock { ino, .. }, session) = (&waiter.call.op, waiter.call.id.session) else { return };
        // Looked at before, so that a long queue does not write an entry per waiter and unlock.
        let test = MetaOp::TestLock { ino: *ino, lock: waiter.lock };
        if let Ok(Ok(MetaReply::Conflict(Some(_)))) = self.read_state(shard, session, &test).await {
            return;
        }
        if waiter.is_answered() {
            return;
        }
        waiter.proposed.set(true);
        let result = self.execute(shard, waiter.call.clone()).await;
        waiter.proposed.set(false);
        match result {
            Ok(MetaReply::Conflict(Some(_))) if waiter.cancelled.get() => self.cancel(shard, waiter),
            Ok(MetaReply::Conflict(Some(_))) => {}
            result => waiter.answer(result),
        }
    }

    /// Ends the waiting calls of a lock owner with EINTR, unless they have just been granted.
    pub(super) fn cancel_lock(&self, shard: &Shard, session: SessionId, ino: Ino, owner: u64) -> MetaResult {
        for waiter in shard.locks.of_owner(ino, session, owner) {
            waiter.cancelled.set(true);
            if !waiter.proposed.get() {
                self.cancel(shard, &waiter);
            }
        }
        Ok(MetaReply::Done)
    }

    fn cancel(&self, shard: &Shard, waiter: &Waiter) {
        shard.locks.note_cancelled(waiter.call.id);
        waiter.answer(Err(CANCELLED));
    }
}
