//! Lock calls that wait, in the order they came. What is held is Raft state; who waits is leader
//! memory, rebuilt by the clients repeating their calls.

use cfs_reactor::sync::{Notify, Semaphore};
use cfs_wire::meta::{LockRange, MetaCall, MetaError, MetaResult};
use cfs_wire::{Errno, Ino, RequestId, SessionId};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

/// A lock call that is held.
pub(super) struct Waiter {
    pub call: MetaCall,
    pub lock: LockRange,
    /// While its entry is being proposed it may have been granted already.
    pub proposed: Cell<bool>,
    pub cancelled: Cell<bool>,
    result: RefCell<Option<MetaResult>>,
    answered: Rc<Notify>,
}

impl Waiter {
    pub fn answer(&self, result: MetaResult) {
        self.result.borrow_mut().get_or_insert(result);
        self.answered.notify_all();
    }

    pub fn is_answered(&self) -> bool {
        self.result.borrow().is_some()
    }

    pub async fn answered(&self) -> MetaResult {
        loop {
            let answered = self.answered.notified();
            if let Some(result) = self.result.borrow().clone() {
                return result;
            }
            answered.await;
        }
    }
}

struct Queue {
    waiting: VecDeque<Rc<Waiter>>,
    /// Testing and granting take turns per inode.
    turn: Rc<Semaphore>,
}

/// The waiting lock calls of one shard.
#[derive(Default)]
pub(super) struct LockQueues {
    queues: RefCell<BTreeMap<Ino, Queue>>,
    /// Calls that were answered with EINTR, in case the answer is lost and they are repeated.
    cancelled: RefCell<BTreeSet<RequestId>>,
}

impl LockQueues {
    pub fn enqueue(&self, ino: Ino, call: MetaCall, lock: LockRange) -> Rc<Waiter> {
        let waiter = Rc::new(Waiter {
            call,
            lock,
            proposed: Cell::new(false),
            cancelled: Cell::new(false),
            result: RefCell::new(None),
            answered: Notify::new(),
        });
        let mut queues = self.queues.borrow_mut();
        let queue = queues.entry(ino).or_insert_with(|| Queue { waiting: VecDeque::new(), turn: Semaphore::new(1) });
        queue.waiting.push_back(waiter.clone());
        waiter
    }

    /// The turn to take before looking at who waits.
    pub fn turn(&self, ino: Ino) -> Option<Rc<Semaphore>> {
        self.queues.borrow().get(&ino).map(|queue| queue.turn.clone())
    }

    /// Those that wait, the first come first.
    pub fn waiting(&self, ino: Ino) -> Vec<Rc<Waiter>> {
        self.queues.borrow().get(&ino).map(|queue| queue.waiting.iter().cloned().collect()).unwrap_or_default()
    }

    pub fn remove(&self, ino: Ino, waiter: &Rc<Waiter>) {
        let mut queues = self.queues.borrow_mut();
        let Some(queue) = queues.get_mut(&ino) else { return };
        queue.waiting.retain(|other| !Rc::ptr_eq(other, waiter));
        if queue.waiting.is_empty() {
            queues.remove(&ino);
        }
    }

    /// The waiting calls of an owner.
    pub fn of_owner(&self, ino: Ino, session: SessionId, owner: u64) -> Vec<Rc<Waiter>> {
        let mut waiting = self.waiting(ino);
        waiting.retain(|waiter| waiter.call.id.session == session && waiter.lock.owner == owner);
        waiting
    }

    pub fn note_cancelled(&self, id: RequestId) {
        self.cancelled.borrow_mut().insert(id);
    }

    /// Whether the call was cancelled before. What its client has acknowledged is forgotten.
    pub fn was_cancelled(&self, call: &MetaCall) -> bool {
        let mut cancelled = self.cancelled.borrow_mut();
        let session = call.id.session;
        cancelled.retain(|id| id.session != session || id.sequence >= call.lowest_unacknowledged);
        cancelled.contains(&call.id)
    }

    /// A session is gone: its waiting calls are answered with what it now is.
    pub fn forget(&self, session: SessionId) {
        self.cancelled.borrow_mut().retain(|id| id.session != session);
        self.answer_all(|waiter| waiter.call.id.session == session, &Err(MetaError::Fenced));
    }

    /// Leadership is lost: all have to ask elsewhere.
    pub fn answer_all(&self, chosen: impl Fn(&Waiter) -> bool, result: &MetaResult) {
        let waiters: Vec<Rc<Waiter>> =
            self.queues.borrow().values().flat_map(|queue| queue.waiting.iter().cloned()).collect();
        for waiter in waiters.into_iter().filter(|waiter| chosen(waiter)) {
            waiter.answer(result.clone());
        }
    }
}

/// What a cancelled call is answered with.
pub(super) const CANCELLED: MetaError = MetaError::Errno(Errno::EINTR);
