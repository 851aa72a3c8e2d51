//! A single-threaded executor whose tasks belong to domains.
//!
//! A domain is the unit of death: the simulation gives every node one and kills the node by
//! dropping all of the domain's tasks, and with them its whole object graph. In production a
//! process has one domain.

use crate::clock::{Clock, Instant};
use crate::spin::Spin;
use crate::timer::{Sleep, Timers};
use cfs_wire::Timestamp;
use crossbeam_queue::SegQueue;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// Tasks polled before the driver is looked at again: bounds how long a completion waits.
const POLL_BATCH: usize = 64;

/// No task should hold its core longer: everything else on it waits as long.
pub const POLL_MAX: Duration = Duration::from_micros(200);

/// Bytes that one poll of a task may code, check or copy before it lets others run. The slowest of
/// these, a copy of memory that is in no cache, does 4 GB/s: 65 µs.
const WORK_BYTES_MAX: usize = 256 << 10;

/// How long an idle executor polls, at most, before it sleeps. A loopback round trip is about
/// 20 µs: within it the answer of the other side arrives without a sleep, beyond it the core is
/// better given away on a machine with two.
pub const SPIN_DEFAULT: Duration = Duration::from_micros(20);

/// What makes outside events happen: io_uring in production, nothing in simulation.
pub trait Driver {
    /// Reaps what has completed without waiting; true when anything had.
    fn poll(&mut self) -> bool;

    /// Waits for an event, an unpark or the timeout.
    fn park(&mut self, timeout: Option<Duration>);

    /// Wakes a parked driver from any thread.
    fn unparker(&self) -> Arc<dyn Unpark>;
}

/// Wakes a parked [`Driver`].
pub trait Unpark: Send + Sync {
    fn unpark(&self);
}

/// The executor found nothing runnable and no timer: in simulation, a deadlock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no task can run and no timer is set")]
pub struct Stalled;

/// A task ended because its domain was killed or it was aborted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the task was cancelled")]
pub struct Cancelled;

/// How long polls of tasks took.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PollRecord {
    pub polls: u64,
    pub longest: Duration,
    /// Polls that took longer than [`POLL_MAX`].
    pub too_long: u64,
}

impl PollRecord {
    fn note(&mut self, took: Duration) {
        self.polls += 1;
        self.longest = self.longest.max(took);
        self.too_long += u64::from(took > POLL_MAX);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct TaskKey {
    index: usize,
    serial: u64,
}

struct Task {
    serial: u64,
    domain: u32,
    /// Taken out while the task is being polled.
    runnable: Option<Runnable>,
    queued: Arc<AtomicBool>,
}

struct Runnable {
    future: Pin<Box<dyn Future<Output = ()>>>,
    waker: Waker,
}

/// What other threads may touch: wake-ups that come from outside.
struct Remote {
    queue: SegQueue<TaskKey>,
    unpark: std::sync::OnceLock<Arc<dyn Unpark>>,
}

struct TaskWaker {
    key: TaskKey,
    queued: Arc<AtomicBool>,
    remote: Arc<Remote>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let local = CURRENT.with(|current| {
            let current = current.borrow();
            match current.as_ref() {
                Some(inner) if Arc::ptr_eq(&inner.remote, &self.remote) => {
                    inner.ready.borrow_mut().push_back(self.key);
                    true
                }
                _ => false,
            }
        });
        if !local {
            self.remote.queue.push(self.key);
            if let Some(unpark) = self.remote.unpark.get() {
                unpark.unpark();
            }
        }
    }
}

thread_local! {
    /// The executor this thread is running, so that wakers find its queue without a lock.
    static CURRENT: RefCell<Option<Rc<Inner>>> = const { RefCell::new(None) };
}

struct Domain {
    alive: bool,
    /// Added to the clock: how far this node's clock is off in simulation.
    skew_nanos: Cell<i64>,
}

pub(crate) struct Inner {
    clock: Rc<dyn Clock>,
    tasks: RefCell<Slab<Task>>,
    ready: RefCell<VecDeque<TaskKey>>,
    remote: Arc<Remote>,
    pub(crate) timers: RefCell<Timers>,
    domains: RefCell<Vec<Domain>>,
    running_domain: Cell<u32>,
    next_serial: Cell<u64>,
    trace: Cell<u64>,
    /// Bytes worked on in the poll that is under way; see [`Handle::work`].
    worked: Cell<usize>,
    /// When the clock was last looked at between polls; see [`Handle::now_coarse`].
    turn: Cell<Instant>,
    record: Cell<Option<PollRecord>>,
}

/// Owns the tasks of one thread. Dropping it drops them all.
pub struct Executor {
    inner: Rc<Inner>,
}

/// A domain of an executor: spawns tasks, tells time, draws random numbers. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    inner: Rc<Inner>,
    domain: u32,
}

impl Executor {
    pub fn new(clock: Rc<dyn Clock>) -> Executor {
        let remote = Arc::new(Remote { queue: SegQueue::new(), unpark: std::sync::OnceLock::new() });
        let inner = Inner {
            tasks: RefCell::new(Slab::new()),
            ready: RefCell::new(VecDeque::new()),
            remote,
            timers: RefCell::new(Timers::default()),
            domains: RefCell::new(Vec::new()),
            running_domain: Cell::new(0),
            next_serial: Cell::new(0),
            trace: Cell::new(0xcbf2_9ce4_8422_2325),
            worked: Cell::new(0),
            turn: Cell::new(clock.now()),
            record: Cell::new(None),
            clock,
        };
        Executor { inner: Rc::new(inner) }
    }

    /// A new domain.
    pub fn domain(&self) -> Handle {
        let mut domains = self.inner.domains.borrow_mut();
        domains.push(Domain { alive: true, skew_nanos: Cell::new(0) });
        Handle { inner: self.inner.clone(), domain: (domains.len() - 1) as u32 }
    }

    /// A hash over every scheduling decision so far: two runs of one seed must agree on it.
    /// On a real clock only what devices and fabrics record is in it.
    pub fn trace_hash(&self) -> u64 {
        self.inner.trace.get()
    }

    /// From now on takes the time of every poll. Not always done: it reads the clock twice a poll.
    pub fn record_polls(&self) {
        self.inner.record.set(Some(PollRecord::default()));
    }

    /// What was recorded since [`Executor::record_polls`]; `None` if that was not called.
    pub fn poll_record(&self) -> Option<PollRecord> {
        self.inner.record.get()
    }

    /// Runs until `main` ends, sleeping in `driver` when idle, after polling for up to `spin`
    /// while that pays. `main` runs in `handle`'s domain.
    pub fn run<T: 'static>(
        &self,
        driver: &mut dyn Driver,
        spin: Duration,
        handle: &Handle,
        main: impl Future<Output = T> + 'static,
    ) -> Result<T, Cancelled> {
        let _ = self.inner.remote.unpark.set(driver.unparker());
        let _entered = self.enter();
        let join = handle.spawn(main);
        let mut spin = Spin::new(spin);
        loop {
            if self.inner.run_batch() {
                spin.found();
            }
            if let Some(result) = join.try_take() {
                return result;
            }
            let now = self.inner.begin_turn();
            // In every turn, whether tasks are ready or not: one that only yields must not keep the
            // others asleep.
            let fired = self.inner.fire_timers(now);
            if fired || self.inner.has_ready() {
                driver.poll();
                continue;
            }
            if spin.again(now) {
                if driver.poll() {
                    spin.completed(self.inner.now());
                } else {
                    std::hint::spin_loop();
                }
                continue;
            }
            // What was queued is submitted by the very call that waits.
            let timeout = self.inner.timers.borrow_mut().next_deadline().map(|deadline| deadline - now);
            driver.park(timeout);
            self.inner.begin_turn();
        }
    }

    /// Runs until `main` ends on a clock that jumps (simulation and tests).
    pub fn run_simulated<T: 'static>(
        &self,
        handle: &Handle,
        main: impl Future<Output = T> + 'static,
    ) -> Result<Result<T, Cancelled>, Stalled> {
        let _entered = self.enter();
        let join = handle.spawn(main);
        loop {
            while self.inner.run_batch() {
                if let Some(result) = join.try_take() {
                    return Ok(result);
                }
            }
            if let Some(result) = join.try_take() {
                return Ok(result);
            }
            let deadline = self.inner.timers.borrow_mut().next_deadline().ok_or(Stalled)?;
            if !self.inner.clock.advance_to(deadline) {
                return Err(Stalled);
            }
            self.inner.fire_timers(self.inner.begin_turn());
        }
    }

    fn enter(&self) -> Entered {
        CURRENT.with(|current| {
            let before = current.borrow_mut().replace(self.inner.clone());
            assert!(before.is_none(), "an executor already runs on this thread");
        });
        Entered
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        for domain in self.inner.domains.borrow_mut().iter_mut() {
            domain.alive = false;
        }
        self.inner.drop_tasks(|_| true);
    }
}

struct Entered;

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.with(|current| current.borrow_mut().take());
    }
}

impl Inner {
    pub(crate) fn now(&self) -> Instant {
        self.clock.now()
    }

    fn begin_turn(&self) -> Instant {
        let now = self.clock.now();
        self.turn.set(now);
        now
    }

    fn has_ready(&self) -> bool {
        !self.ready.borrow().is_empty() || !self.remote.queue.is_empty()
    }

    /// Polls up to [`POLL_BATCH`] ready tasks; true when any was.
    fn run_batch(&self) -> bool {
        while let Some(key) = self.remote.queue.pop() {
            self.ready.borrow_mut().push_back(key);
        }
        let mut polled = 0;
        while polled < POLL_BATCH {
            let key = {
                let mut ready = self.ready.borrow_mut();
                match self.clock.pick(ready.len()) {
                    0 => ready.pop_front(),
                    other => ready.swap_remove_back(other),
                }
            };
            let Some(key) = key else { break };
            self.poll_task(key);
            polled += 1;
        }
        polled > 0
    }

    fn poll_task(&self, key: TaskKey) {
        let (mut runnable, domain) = {
            let mut tasks = self.tasks.borrow_mut();
            let Some(task) = tasks.get_mut(key.index).filter(|task| task.serial == key.serial) else { return };
            task.queued.store(false, Ordering::Release);
            let Some(runnable) = task.runnable.take() else { return };
            (runnable, task.domain)
        };
        if self.clock.is_simulated() {
            self.fold_trace(key.serial);
            self.fold_trace(self.clock.now().as_nanos());
        }
        let outer = self.running_domain.replace(domain);
        self.worked.set(0);
        let begun = self.record.get().map(|record| (record, self.clock.now()));
        let outcome = runnable.future.as_mut().poll(&mut Context::from_waker(&runnable.waker));
        if let Some((mut record, begun)) = begun {
            record.note(self.clock.now() - begun);
            self.record.set(Some(record));
        }
        self.running_domain.set(outer);
        let finished = {
            let mut tasks = self.tasks.borrow_mut();
            let ours = tasks.get(key.index).is_some_and(|task| task.serial == key.serial);
            match outcome {
                Poll::Pending if ours => {
                    tasks[key.index].runnable = Some(runnable);
                    return;
                }
                Poll::Ready(()) if ours => Some(tasks.remove(key.index)),
                // Aborted or killed by its own poll: only the future is left to drop.
                _ => None,
            }
        };
        drop(runnable);
        drop(finished);
    }

    /// Wakes what waits for a deadline up to `now`; true when anything did.
    fn fire_timers(&self, now: Instant) -> bool {
        let mut fired = false;
        loop {
            let due = self.timers.borrow_mut().pop_due(now);
            let Some(waker) = due else { return fired };
            waker.wake();
            fired = true;
        }
    }

    fn fold_trace(&self, word: u64) {
        // FNV-1a over 64-bit words: order-sensitive, which is all a trace comparison needs.
        self.trace.set((self.trace.get() ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(17));
    }

    fn drop_tasks(&self, doomed: impl Fn(&Task) -> bool) {
        let dropped: Vec<Task> = {
            let mut tasks = self.tasks.borrow_mut();
            let keys: Vec<usize> = tasks.iter().filter(|(_, task)| doomed(task)).map(|(key, _)| key).collect();
            keys.into_iter().map(|key| tasks.remove(key)).collect()
        };
        // Destructors may wake, spawn or drop more: no borrow is held here.
        drop(dropped);
    }
}

impl Handle {
    /// The domain of the task that is being polled on this thread.
    ///
    /// # Panics
    /// Outside a task.
    pub fn current() -> Handle {
        Handle::try_current().expect("called from a task of an executor")
    }

    pub fn try_current() -> Option<Handle> {
        CURRENT.with(|current| {
            let current = current.borrow();
            current.as_ref().map(|inner| Handle { inner: inner.clone(), domain: inner.running_domain.get() })
        })
    }

    /// Starts a task in this domain. A dead domain's task is dropped at once.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> JoinHandle<T> {
        let state = Rc::new(JoinState { result: RefCell::new(None), waker: RefCell::new(None) });
        let guard = Completion { state: state.clone(), done: false };
        let body = async move {
            let mut guard = guard;
            let value = future.await;
            guard.finish(Ok(value));
        };
        if !self.is_alive() {
            drop(body);
            return JoinHandle { state, handle: self.clone(), key: None };
        }
        let serial = self.inner.next_serial.get();
        self.inner.next_serial.set(serial + 1);
        let key = {
            let mut tasks = self.inner.tasks.borrow_mut();
            let entry = tasks.vacant_entry();
            let key = TaskKey { index: entry.key(), serial };
            let queued = Arc::new(AtomicBool::new(true));
            let wake = TaskWaker { key, queued: queued.clone(), remote: self.inner.remote.clone() };
            let waker = Waker::from(Arc::new(wake));
            let runnable = Some(Runnable { future: Box::pin(body), waker });
            entry.insert(Task { serial, domain: self.domain, runnable, queued });
            key
        };
        self.inner.ready.borrow_mut().push_back(key);
        JoinHandle { state, handle: self.clone(), key: Some(key) }
    }

    /// Drops every task of this domain. Nothing can be spawned in it afterwards.
    pub fn kill(&self) {
        self.inner.domains.borrow_mut()[self.domain as usize].alive = false;
        let domain = self.domain;
        self.inner.drop_tasks(|task| task.domain == domain);
    }

    pub fn is_alive(&self) -> bool {
        self.inner.domains.borrow()[self.domain as usize].alive
    }

    /// A sibling domain of the same executor.
    pub fn new_domain(&self) -> Handle {
        let mut domains = self.inner.domains.borrow_mut();
        domains.push(Domain { alive: true, skew_nanos: Cell::new(0) });
        Handle { inner: self.inner.clone(), domain: (domains.len() - 1) as u32 }
    }

    pub fn now(&self) -> Instant {
        self.inner.clock.now()
    }

    /// Wall-clock time of this domain, skew included.
    pub fn wall(&self) -> Timestamp {
        let skew = self.inner.domains.borrow()[self.domain as usize].skew_nanos.get();
        let wall = self.inner.clock.wall();
        if skew == 0 {
            return wall;
        }
        let total = i128::from(wall.secs) * i128::from(Timestamp::NANOS_PER_SEC) + i128::from(wall.nanos);
        Timestamp::from_nanos(total + i128::from(skew))
    }

    /// Puts this domain's wall clock off by so much (simulation).
    pub fn set_skew_nanos(&self, skew: i64) {
        self.inner.domains.borrow()[self.domain as usize].skew_nanos.set(skew);
    }

    pub fn random_u64(&self) -> u64 {
        self.inner.clock.random()
    }

    pub fn random_u128(&self) -> u128 {
        (u128::from(self.random_u64()) << 64) | u128::from(self.random_u64())
    }

    /// The time as of the executor's last look at the clock: earlier than now by what the tasks
    /// since then took, which costs no look of its own.
    #[inline]
    pub fn now_coarse(&self) -> Instant {
        self.inner.turn.get()
    }

    pub fn sleep(&self, duration: Duration) -> Sleep {
        self.sleep_until(self.now() + duration)
    }

    pub fn sleep_until(&self, deadline: Instant) -> Sleep {
        Sleep::new(self.inner.clone(), deadline)
    }

    /// `future`, or `None` if `duration` passes first.
    pub async fn timeout<F: Future>(&self, duration: Duration, future: F) -> Option<F::Output> {
        let sleep = self.sleep(duration);
        futures_util::pin_mut!(future);
        match futures_util::future::select(future, sleep).await {
            futures_util::future::Either::Left((value, _)) => Some(value),
            futures_util::future::Either::Right(_) => None,
        }
    }

    /// Lets other tasks run; long loops call it so that no task holds the core over 200 µs.
    pub fn yield_now(&self) -> YieldNow {
        YieldNow { yielded: false }
    }

    /// Waits until this task may work on `bytes` more bytes: at once, unless that is too much for one
    /// poll, all that is joined in the task taken together. Long work on bytes asks before each piece.
    pub fn work(&self, bytes: usize) -> Work<'_> {
        Work { inner: &self.inner, bytes }
    }

    /// Folds a word into the trace hash (devices and fabrics record what they were asked).
    pub fn trace(&self, word: u64) {
        self.inner.fold_trace(word);
    }

    /// Tasks alive in this domain.
    pub fn task_count(&self) -> usize {
        self.inner.tasks.borrow().iter().filter(|(_, task)| task.domain == self.domain).count()
    }
}

/// See [`Handle::yield_now`].
pub struct YieldNow {
    yielded: bool,
}

impl Future for YieldNow {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.yielded {
            return Poll::Ready(());
        }
        self.yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

/// See [`Handle::work`].
pub struct Work<'a> {
    inner: &'a Inner,
    bytes: usize,
}

impl Future for Work<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let worked = self.inner.worked.get();
        // A piece that is too large by itself has a poll of its own.
        if worked > 0 && worked + self.bytes > WORK_BYTES_MAX {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.inner.worked.set(worked + self.bytes);
        Poll::Ready(())
    }
}

struct JoinState<T> {
    result: RefCell<Option<Result<T, Cancelled>>>,
    waker: RefCell<Option<Waker>>,
}

/// Reports a task's end to its join handle, also when the task is dropped unfinished.
struct Completion<T> {
    state: Rc<JoinState<T>>,
    done: bool,
}

impl<T> Completion<T> {
    fn finish(&mut self, result: Result<T, Cancelled>) {
        self.done = true;
        *self.state.result.borrow_mut() = Some(result);
        let waker = self.state.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Completion<T> {
    fn drop(&mut self) {
        if !self.done {
            self.finish(Err(Cancelled));
        }
    }
}

/// Waits for a task's result. Dropping it lets the task run on.
pub struct JoinHandle<T> {
    state: Rc<JoinState<T>>,
    handle: Handle,
    key: Option<TaskKey>,
}

impl<T> JoinHandle<T> {
    pub fn abort(&self) {
        if let Some(key) = self.key {
            self.handle.inner.drop_tasks(|task| task.serial == key.serial);
        }
    }

    pub fn is_finished(&self) -> bool {
        self.state.result.borrow().is_some()
    }

    fn try_take(&self) -> Option<Result<T, Cancelled>> {
        self.state.result.borrow_mut().take()
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, Cancelled>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(result) = self.try_take() {
            return Poll::Ready(result);
        }
        *self.state.waker.borrow_mut() = Some(context.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
#[path = "executor_tests.rs"]
mod tests;
