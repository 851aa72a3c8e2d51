//! A bounded mailbox into an executor from any thread. The sender never waits here: a full
//! mailbox gives the message back and the caller decides.

use atomic_waker::AtomicWaker;
use crossbeam_queue::ArrayQueue;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

struct Shared<T> {
    queue: ArrayQueue<T>,
    waker: AtomicWaker,
    senders: AtomicUsize,
}

pub struct Sender<T>(Arc<Shared<T>>);
pub struct Receiver<T>(Arc<Shared<T>>);

pub fn mailbox<T: Send>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let shared = Shared { queue: ArrayQueue::new(capacity), waker: AtomicWaker::new(), senders: AtomicUsize::new(1) };
    let shared = Arc::new(shared);
    (Sender(shared.clone()), Receiver(shared))
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.fetch_add(1, Ordering::Relaxed);
        Sender(self.0.clone())
    }
}

impl<T> Sender<T> {
    /// Gives the message back when the mailbox is full.
    pub fn try_send(&self, message: T) -> Result<(), T> {
        self.0.queue.push(message)?;
        self.0.waker.wake();
        Ok(())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.0.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.waker.wake();
        }
    }
}

impl<T> Receiver<T> {
    /// The next message, or `None` when all senders are gone and the mailbox is empty.
    pub async fn recv(&mut self) -> Option<T> {
        std::future::poll_fn(|context| {
            if let Some(message) = self.0.queue.pop() {
                return Poll::Ready(Some(message));
            }
            self.0.waker.register(context.waker());
            // A message pushed between the pop and the registration would not wake us.
            if let Some(message) = self.0.queue.pop() {
                return Poll::Ready(Some(message));
            }
            if self.0.senders.load(Ordering::Acquire) == 0 {
                return Poll::Ready(self.0.queue.pop());
            }
            Poll::Pending
        })
        .await
    }
}
