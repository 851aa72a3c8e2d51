//! Lock calls that wait, in the order they came. What is held is Raft state; who waits is leader
//! memory, rebuilt by the clients repeating their calls.

use cfs_reactor::sync::{Notify, Semaphore};
use cfs_wire::meta::{LockRange, MetaCall, MetaError, MetaResult};
use cfs_wire::{Errno, Ino, SessionId};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
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
pub(super) struct LockQueues(RefCell<BTreeMap<Ino, Queue>>);

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
        let mut queues = self.0.borrow_mut();
        let queue =
            queues.entry(ino).or_insert_with(|| Queue { waiting: VecDeque::new(), turn: Semaphore::new(1) });
        queue.waiting.push_back(waiter.clone());
        waiter
    }

    /// Those that wait, the first come first, and the turn to take before looking.
    pub fn turn(&self, ino: Ino) -> Option<Rc<Semaphore>> {
        self.0.borrow().get(&ino).map(|queue| queue.turn.clone())
    }

    pub fn waiting(&self, ino: Ino) -> Vec<Rc<Waiter>> {
        self.0.borrow().get(&ino).map(|queue| queue.waiting.iter().cloned().collect()).unwrap_or_default()
    }

    pub fn remove(&self, ino: Ino, waiter: &Rc<Waiter>) {
        let mut queues = self.0.borrow_mut();
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

    /// A session is gone: its waiting calls are answered with what it now is.
    pub fn forget(&self, session: SessionId) {
        self.answer_all(|waiter| waiter.call.id.session == session, &Err(MetaError::Fenced));
    }

    /// Leadership is lost: all have to ask elsewhere.
    pub fn answer_all(&self, chosen: impl Fn(&Waiter) -> bool, result: &MetaResult) {
        let waiters: Vec<Rc<Waiter>> =
            self.0.borrow().values().flat_map(|queue| queue.waiting.iter().cloned()).collect();
        for waiter in waiters.into_iter().filter(|waiter| chosen(waiter)) {
            waiter.answer(result.clone());
        }
    }
}

/// What a cancelled call is answered with.
pub(super) const CANCELLED: MetaError = MetaError::Errno(Errno::EINTR);
