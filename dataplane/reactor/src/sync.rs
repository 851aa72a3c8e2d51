//! Synchronisation between tasks of one executor: no locks, no atomics, FIFO order.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The other half was dropped without sending.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the sender was dropped")]
pub struct Closed;

struct OneshotState<T> {
    value: Option<T>,
    waker: Option<Waker>,
    sender_alive: bool,
    receiver_alive: bool,
}

pub struct OneshotSender<T>(Rc<RefCell<OneshotState<T>>>);
pub struct OneshotReceiver<T>(Rc<RefCell<OneshotState<T>>>);

/// A value sent once.
pub fn oneshot<T>() -> (OneshotSender<T>, OneshotReceiver<T>) {
    let state = OneshotState { value: None, waker: None, sender_alive: true, receiver_alive: true };
    let state = Rc::new(RefCell::new(state));
    (OneshotSender(state.clone()), OneshotReceiver(state))
}

impl<T> OneshotSender<T> {
    /// Gives the value back when nobody waits for it any more.
    pub fn send(self, value: T) -> Result<(), T> {
        let mut state = self.0.borrow_mut();
        if !state.receiver_alive {
            return Err(value);
        }
        state.value = Some(value);
        Ok(())
    }

    pub fn is_closed(&self) -> bool {
        !self.0.borrow().receiver_alive
    }
}

impl<T> Drop for OneshotSender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut state = self.0.borrow_mut();
            state.sender_alive = false;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> OneshotReceiver<T> {
    pub fn try_recv(&self) -> Option<T> {
        self.0.borrow_mut().value.take()
    }
}

impl<T> Future for OneshotReceiver<T> {
    type Output = Result<T, Closed>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.borrow_mut();
        if let Some(value) = state.value.take() {
            return Poll::Ready(Ok(value));
        }
        if !state.sender_alive {
            return Poll::Ready(Err(Closed));
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<T> Drop for OneshotReceiver<T> {
    fn drop(&mut self) {
        let value = {
            let mut state = self.0.borrow_mut();
            state.receiver_alive = false;
            state.value.take()
        };
        drop(value);
    }
}

struct Waiter {
    waker: Option<Waker>,
    granted: bool,
}

/// Counted permits, granted in the order they were asked for.
pub struct Semaphore {
    permits: Cell<usize>,
    waiters: RefCell<VecDeque<(usize, Rc<RefCell<Waiter>>)>>,
}

impl Semaphore {
    pub fn new(permits: usize) -> Rc<Semaphore> {
        Rc::new(Semaphore { permits: Cell::new(permits), waiters: RefCell::new(VecDeque::new()) })
    }

    /// Waits for `count` permits. They return when the [`Permit`] is dropped.
    pub fn acquire(self: &Rc<Self>, count: usize) -> Acquire {
        Acquire { semaphore: self.clone(), count, waiter: None }
    }

    #[inline]
    pub fn try_acquire(self: &Rc<Self>, count: usize) -> Option<Permit> {
        if !self.waiters.borrow().is_empty() || self.permits.get() < count {
            return None;
        }
        self.permits.set(self.permits.get() - count);
        Some(Permit { semaphore: self.clone(), count })
    }

    pub fn available(&self) -> usize {
        self.permits.get()
    }

    fn release(&self, count: usize) {
        self.permits.set(self.permits.get() + count);
        loop {
            let waker = {
                let mut waiters = self.waiters.borrow_mut();
                match waiters.front() {
                    Some((count, waiter)) if *count <= self.permits.get() => {
                        self.permits.set(self.permits.get() - count);
                        let mut waiter = waiter.borrow_mut();
                        waiter.granted = true;
                        let waker = waiter.waker.take();
                        drop(waiter);
                        waiters.pop_front();
                        waker
                    }
                    _ => return,
                }
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

pub struct Acquire {
    semaphore: Rc<Semaphore>,
    count: usize,
    waiter: Option<Rc<RefCell<Waiter>>>,
}

impl Future for Acquire {
    type Output = Permit;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Permit> {
        if let Some(waiter) = self.waiter.clone() {
            if waiter.borrow().granted {
                self.waiter = None;
                return Poll::Ready(Permit { semaphore: self.semaphore.clone(), count: self.count });
            }
            waiter.borrow_mut().waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        if let Some(permit) = self.semaphore.try_acquire(self.count) {
            return Poll::Ready(permit);
        }
        let waiter = Rc::new(RefCell::new(Waiter { waker: Some(context.waker().clone()), granted: false }));
        self.semaphore.waiters.borrow_mut().push_back((self.count, waiter.clone()));
        self.waiter = Some(waiter);
        Poll::Pending
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        let Some(waiter) = self.waiter.take() else { return };
        if waiter.borrow().granted {
            self.semaphore.release(self.count);
        } else {
            self.semaphore.waiters.borrow_mut().retain(|(_, other)| !Rc::ptr_eq(other, &waiter));
            self.semaphore.release(0);
        }
    }
}

/// Permits held; returned when dropped.
pub struct Permit {
    semaphore: Rc<Semaphore>,
    count: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.semaphore.release(self.count);
    }
}

/// Wakes every task that waits; a task that registers after a notification does not see it.
#[derive(Default)]
pub struct Notify {
    version: Cell<u64>,
    next: Cell<u64>,
    /// By registration: a waiter that is dropped takes its waker along.
    waiters: RefCell<BTreeMap<u64, Waker>>,
}

impl Notify {
    pub fn new() -> Rc<Notify> {
        Rc::new(Notify::default())
    }

    pub fn notify_all(&self) {
        self.version.set(self.version.get() + 1);
        let waiters = std::mem::take(&mut *self.waiters.borrow_mut());
        for waker in waiters.into_values() {
            waker.wake();
        }
    }

    /// Completes at the first `notify_all` after this call (not after the first poll).
    pub fn notified(self: &Rc<Self>) -> Notified {
        Notified { notify: self.clone(), seen: self.version.get(), registration: None }
    }
}

pub struct Notified {
    notify: Rc<Notify>,
    seen: u64,
    registration: Option<u64>,
}

impl Future for Notified {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.notify.version.get() != self.seen {
            self.registration = None;
            return Poll::Ready(());
        }
        let registration = self.registration.unwrap_or_else(|| {
            let registration = self.notify.next.get();
            self.notify.next.set(registration + 1);
            registration
        });
        self.registration = Some(registration);
        self.notify.waiters.borrow_mut().insert(registration, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Notified {
    fn drop(&mut self) {
        if let Some(registration) = self.registration {
            let waker = self.notify.waiters.borrow_mut().remove(&registration);
            drop(waker);
        }
    }
}

struct Queue<T> {
    items: VecDeque<T>,
    capacity: usize,
    senders: usize,
    receiver_alive: bool,
}

/// A bounded queue between tasks of one executor.
pub struct Sender<T> {
    queue: Rc<RefCell<Queue<T>>>,
    /// Told when an item arrives or the last sender goes.
    filled: Rc<Notify>,
    /// Told when an item is taken or the receiver goes.
    drained: Rc<Notify>,
}

pub struct Receiver<T> {
    queue: Rc<RefCell<Queue<T>>>,
    filled: Rc<Notify>,
    drained: Rc<Notify>,
}

pub fn channel<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    assert!(capacity > 0, "a channel needs room for one item");
    let queue = Queue { items: VecDeque::new(), capacity, senders: 1, receiver_alive: true };
    let queue = Rc::new(RefCell::new(queue));
    let (filled, drained) = (Notify::new(), Notify::new());
    let sender = Sender { queue: queue.clone(), filled: filled.clone(), drained: drained.clone() };
    (sender, Receiver { queue, filled, drained })
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.queue.borrow_mut().senders += 1;
        Sender { queue: self.queue.clone(), filled: self.filled.clone(), drained: self.drained.clone() }
    }
}

impl<T> Sender<T> {
    /// Gives the item back when the queue is full or nobody receives any more.
    pub fn try_send(&self, item: T) -> Result<(), T> {
        {
            let mut queue = self.queue.borrow_mut();
            if !queue.receiver_alive || queue.items.len() >= queue.capacity {
                return Err(item);
            }
            queue.items.push_back(item);
        }
        self.filled.notify_all();
        Ok(())
    }

    /// Waits for room; gives the item back when nobody receives any more.
    pub async fn send(&self, item: T) -> Result<(), T> {
        let mut item = item;
        loop {
            let drained = self.drained.notified();
            match self.try_send(item) {
                Ok(()) => return Ok(()),
                Err(back) if !self.queue.borrow().receiver_alive => return Err(back),
                Err(back) => item = back,
            }
            drained.await;
        }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.queue.borrow_mut().senders -= 1;
        self.filled.notify_all();
    }
}

impl<T> Receiver<T> {
    pub fn try_recv(&self) -> Option<T> {
        let item = self.queue.borrow_mut().items.pop_front();
        if item.is_some() {
            self.drained.notify_all();
        }
        item
    }

    /// The next item, or `None` when all senders are gone and the queue is empty.
    pub async fn recv(&self) -> Option<T> {
        loop {
            let filled = self.filled.notified();
            if let Some(item) = self.try_recv() {
                return Some(item);
            }
            if self.queue.borrow().senders == 0 {
                return None;
            }
            filled.await;
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let items = {
            let mut queue = self.queue.borrow_mut();
            queue.receiver_alive = false;
            std::mem::take(&mut queue.items)
        };
        drop(items);
        self.drained.notify_all();
    }
}

/// Mutual exclusion across await points, in FIFO order.
pub struct Mutex<T> {
    turn: Rc<Semaphore>,
    value: RefCell<T>,
}

pub struct MutexGuard<'a, T> {
    value: std::cell::RefMut<'a, T>,
    _turn: Permit,
}

impl<T> Mutex<T> {
    pub fn new(value: T) -> Mutex<T> {
        Mutex { turn: Semaphore::new(1), value: RefCell::new(value) }
    }

    pub async fn lock(&self) -> MutexGuard<'_, T> {
        let turn = self.turn.acquire(1).await;
        MutexGuard { value: self.value.borrow_mut(), _turn: turn }
    }
}

impl<T> std::ops::Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> std::ops::DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}
