//! What applied entries entail.

use super::MetaService;
use super::shard::Shard;
use crate::state::{FollowUp, LogEntry};
use cfs_wire::Ino;
use std::rc::Rc;

impl MetaService {
    /// Starts what an applied entry asks for. Transactions are driven by the call that began
    /// them, and those blocked by one are woken when its end is published.
    pub(super) fn follow_up(&self, shard: &Rc<Shard>, follow_up: &[FollowUp]) {
        for next in follow_up {
            match next {
                FollowUp::Reap { ino } => self.reap(shard, *ino),
                FollowUp::LocksFreed { ino } => {
                    let (service, shard, ino) = (self.clone(), shard.clone(), *ino);
                    self.inner.handle.spawn(async move { service.grant_locks(&shard, ino).await });
                }
                FollowUp::Drive(_) | FollowUp::Unblocked { .. } => {}
            }
        }
    }

    /// Releases an orphan's extents, one bounded batch per entry, until none is left.
    pub(super) fn reap(&self, shard: &Rc<Shard>, ino: Ino) {
        if !shard.reaping.borrow_mut().insert(ino) {
            return;
        }
        let (service, shard) = (self.clone(), shard.clone());
        self.inner.handle.spawn(async move {
            loop {
                let entry = LogEntry::Reap { ino, now: service.inner.handle.wall() };
                // A failure is left to the next sweep, here or at the next leader.
                let Ok(delivery) = service.propose(&shard, &entry).await else { break };
                let more = |next: &FollowUp| matches!(next, FollowUp::Reap { ino: again } if *again == ino);
                if !delivery.outcome.follow_up.iter().any(more) {
                    break;
                }
                service.inner.handle.yield_now().await;
            }
            shard.reaping.borrow_mut().remove(&ino);
        });
    }
}
