//! What the programs of one run share: the model, what was done, and when to stop.

use crate::model::Model;
use crate::op::Op;
use crate::report::{Checker, Violation};
use crate::sideline::Sideline;
use cfs_reactor::Handle;
use cfs_reactor::sync::{Notify, Permit, Semaphore};
use futures_util::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

/// Lines kept for a failure's message.
const LINES_MAX: usize = 2000;

/// A program. Each runs on one client.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ActorId(pub usize);

/// Shared by all programs and the scenario.
pub struct History {
    handle: Handle,
    pub model: RefCell<Model>,
    pub sideline: Sideline,
    /// Operations that are under way.
    pub pending: RefCell<BTreeMap<ActorId, Op>>,
    /// Whose turn it is in the directories that all programs use.
    shared_turn: Rc<Semaphore>,
    turn_holder: Cell<Option<ActorId>>,
    violation: RefCell<Option<Violation>>,
    lines: RefCell<VecDeque<String>>,
    paused: Cell<bool>,
    budget: Cell<u64>,
    running: RefCell<BTreeSet<ActorId>>,
    dead: RefCell<BTreeSet<ActorId>>,
    /// Operations that each program has ended.
    ended: RefCell<BTreeMap<ActorId, u64>>,
    /// Programs that rest after an operation which promised durability.
    synced: RefCell<BTreeSet<ActorId>>,
    changed: Rc<Notify>,
    digest: Cell<u64>,
    operations: Cell<u64>,
}

impl History {
    pub fn new(handle: &Handle, model: Model) -> Rc<History> {
        Rc::new(History {
            handle: handle.clone(),
            model: RefCell::new(model),
            sideline: Sideline::default(),
            pending: RefCell::default(),
            shared_turn: Semaphore::new(1),
            turn_holder: Cell::new(None),
            violation: RefCell::default(),
            lines: RefCell::default(),
            paused: Cell::new(false),
            budget: Cell::new(0),
            running: RefCell::default(),
            dead: RefCell::default(),
            ended: RefCell::default(),
            synced: RefCell::default(),
            changed: Notify::new(),
            digest: Cell::new(0xcbf2_9ce4_8422_2325),
            operations: Cell::new(0),
        })
    }

    /// Notes something for a failure's message.
    pub fn note(&self, line: String) {
        let micros = self.handle.now().as_nanos() / 1000;
        let mut lines = self.lines.borrow_mut();
        if lines.len() == LINES_MAX {
            lines.pop_front();
        }
        let line = format!("{:>5}.{:06} {line}", micros / 1_000_000, micros % 1_000_000);
        tracing::debug!(target: "history", "{line}");
        lines.push_back(line);
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.borrow().iter().cloned().collect()
    }

    /// The first violation counts.
    pub fn fail(&self, violation: Violation) {
        self.violation.borrow_mut().get_or_insert(violation);
        self.changed.notify_all();
    }

    pub fn fail_with(&self, checker: Checker, detail: impl Into<String>) {
        self.fail(Violation::new(checker, detail));
    }

    pub fn verdict(&self) -> Result<(), Violation> {
        self.violation.borrow().clone().map_or(Ok(()), Err)
    }

    pub fn has_failed(&self) -> bool {
        self.violation.borrow().is_some()
    }

    /// Folds an answer into the digest.
    pub fn fold(&self, text: &str) {
        let fnv = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        self.digest.set(text.as_bytes().iter().fold(self.digest.get(), fnv));
    }

    pub fn digest(&self) -> u64 {
        self.digest.get()
    }

    pub fn operations(&self) -> u64 {
        self.operations.get()
    }

    /// Waits until the program may do one more operation; counts it as running from then on.
    pub async fn enter(&self, actor: ActorId) {
        loop {
            let changed = self.changed.notified();
            if !self.paused.get() && self.budget.get() > 0 && !self.has_failed() {
                self.budget.set(self.budget.get() - 1);
                self.running.borrow_mut().insert(actor);
                self.synced.borrow_mut().remove(&actor);
                return;
            }
            changed.await;
        }
    }

    /// The program's operation under way was told that something is durable.
    pub fn synced(&self, actor: ActorId) {
        self.synced.borrow_mut().insert(actor);
    }

    /// The operation is over.
    pub fn leave(&self, actor: ActorId) {
        self.operations.set(self.operations.get() + 1);
        self.running.borrow_mut().remove(&actor);
        *self.ended.borrow_mut().entry(actor).or_default() += 1;
        self.changed.notify_all();
    }

    pub fn is_paused(&self) -> bool {
        self.paused.get()
    }

    /// Gives the turn back.
    pub fn end_turn(&self, turn: Permit) {
        self.turn_holder.set(None);
        drop(turn);
        self.changed.notify_all();
    }

    /// Begins a pause and waits until none but these programs is in the common directories: what
    /// the others do there would depend on what is lost with the death of these.
    pub async fn corner(&self, dying: &[ActorId]) {
        self.pause();
        loop {
            let changed = self.changed.notified();
            if self.has_failed() || self.turn_holder.get().is_none_or(|holder| dying.contains(&holder)) {
                return;
            }
            changed.await;
        }
    }

    /// Waits until these programs have ended so many more operations, with `synced` the last of
    /// them one that promised durability, and could die that moment (see [`Self::corner`]), or
    /// nothing is under way any more. Nothing new begins then.
    pub async fn catch_after(&self, dying: &[ActorId], operations: u64, synced: bool) {
        let ended = || -> u64 {
            let ended = self.ended.borrow();
            dying.iter().filter_map(|actor| ended.get(actor)).sum()
        };
        let target = ended() + operations;
        loop {
            let changed = self.changed.notified();
            let alone = self.turn_holder.get().is_none_or(|holder| dying.contains(&holder));
            let idle = self.budget.get() == 0 && self.running.borrow().is_empty();
            let promised = !synced || dying.iter().any(|actor| self.synced.borrow().contains(actor));
            if self.has_failed() || (alone && promised && ended() >= target) || idle {
                self.pause();
                return;
            }
            changed.await;
        }
    }

    /// Nothing new begins until the next [`Self::grant`].
    pub fn pause(&self) {
        self.paused.set(true);
        self.changed.notify_all();
    }

    /// The turn in the common directories; `None` if a pause comes first, since whoever has the
    /// turn may never give it back.
    pub async fn take_turn(&self, actor: ActorId) -> Option<Permit> {
        let taking = Box::pin(self.shared_turn.acquire(1));
        let pausing = Box::pin(async {
            loop {
                let changed = self.changed.notified();
                if self.paused.get() || self.has_failed() {
                    return;
                }
                changed.await;
            }
        });
        match select(pausing, taking).await {
            Either::Left(_) => None,
            Either::Right((turn, _)) => {
                self.turn_holder.set(Some(actor));
                Some(turn)
            }
        }
    }

    /// Lets the programs do so many more operations.
    pub fn grant(&self, operations: u64) {
        self.paused.set(false);
        self.budget.set(operations);
        self.changed.notify_all();
    }

    /// A program died: it is not waited for. What it had under way stays pending.
    pub fn died(&self, actor: ActorId) {
        self.running.borrow_mut().remove(&actor);
        self.dead.borrow_mut().insert(actor);
        if self.turn_holder.get() == Some(actor) {
            self.turn_holder.set(None);
        }
        self.changed.notify_all();
    }

    /// Its successor begins.
    pub fn reborn(&self, actor: ActorId) {
        self.dead.borrow_mut().remove(&actor);
    }

    pub fn is_dead(&self, actor: ActorId) -> bool {
        self.dead.borrow().contains(&actor)
    }

    /// Waits until nothing is under way and nothing more may begin.
    pub async fn idle(&self) {
        loop {
            let changed = self.changed.notified();
            let spent = self.paused.get() || self.budget.get() == 0;
            if self.has_failed() || (spent && self.running.borrow().is_empty()) {
                return;
            }
            changed.await;
        }
    }
}
