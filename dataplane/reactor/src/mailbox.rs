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

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::sync::atomic::AtomicU32;
    use std::task::{Context, Wake, Waker};
    use std::thread::{self, Thread};

    #[test]
    fn a_full_mailbox_gives_the_message_back_and_keeps_the_order_of_the_others() {
        let (sender, mut receiver) = mailbox(2);
        assert_eq!([1, 2, 3].map(|message| sender.try_send(message)), [Ok(()), Ok(()), Err(3)]);
        assert_eq!(receiver.recv().now_or_never(), Some(Some(1)));
        assert_eq!([4, 5].map(|message| sender.clone().try_send(message)), [Ok(()), Err(5)]);
        assert_eq!([2, 4].map(|_| receiver.recv().now_or_never()), [Some(Some(2)), Some(Some(4))]);
        assert_eq!(receiver.recv().now_or_never(), None);
    }

    #[test]
    fn the_end_comes_after_the_last_message_of_the_last_sender() {
        let (sender, mut receiver) = mailbox(2);
        let other = sender.clone();
        drop(sender);
        assert_eq!(receiver.recv().now_or_never(), None, "one can still send");
        other.try_send(1).unwrap();
        drop(other);
        assert_eq!(receiver.recv().now_or_never(), Some(Some(1)));
        assert_eq!(receiver.recv().now_or_never(), Some(None));
    }

    /// A mailbox that nobody empties any more is like one that nobody empties yet.
    #[test]
    fn a_mailbox_without_a_receiver_takes_what_fits() {
        let (sender, receiver) = mailbox(1);
        drop(receiver);
        assert_eq!([1, 2].map(|message| sender.try_send(message)), [Ok(()), Err(2)]);
    }

    #[test]
    fn messages_that_nobody_took_are_dropped_with_the_mailbox() {
        let message = Arc::new(());
        let (sender, receiver) = mailbox(1);
        sender.try_send(message.clone()).unwrap();
        drop((sender, receiver));
        assert_eq!(Arc::strong_count(&message), 1);
    }

    /// Counts how often it was woken, and unparks a thread.
    struct Wakes(Thread, AtomicU32);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.unpark();
        }
    }

    #[test]
    fn who_waits_is_woken_by_a_message_and_by_the_last_senders_end() {
        let wakes = Arc::new(Wakes(thread::current(), AtomicU32::new(0)));
        let waker = Waker::from(wakes.clone());
        let mut context = Context::from_waker(&waker);
        let (sender, mut receiver) = mailbox(1);
        let woken = || wakes.1.load(Ordering::Relaxed);
        assert!(receiver.recv().boxed_local().poll_unpin(&mut context).is_pending());
        assert_eq!(woken(), 0);
        sender.try_send(1).unwrap();
        assert_eq!((woken(), receiver.recv().now_or_never()), (1, Some(Some(1))));
        assert!(receiver.recv().boxed_local().poll_unpin(&mut context).is_pending());
        drop(sender);
        assert_eq!((woken(), receiver.recv().now_or_never()), (2, Some(None)));
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "another thread is what this test is about")]
    fn each_message_of_other_threads_arrives_once_and_in_their_order() {
        const EACH: u32 = 10_000;
        let waker = Waker::from(Arc::new(Wakes(thread::current(), AtomicU32::new(0))));
        let mut context = Context::from_waker(&waker);
        let (sender, mut receiver) = mailbox(4);
        let senders = [0, 1].map(|side: usize| {
            let sender = sender.clone();
            thread::spawn(move || {
                for number in 0..EACH {
                    while sender.try_send((side, number)).is_err() {
                        thread::yield_now();
                    }
                }
            })
        });
        drop(sender);
        let mut next = [0; 2];
        loop {
            match receiver.recv().boxed_local().poll_unpin(&mut context) {
                Poll::Ready(Some((side, number))) => {
                    assert_eq!(number, next[side], "of side {side}");
                    next[side] += 1;
                }
                Poll::Ready(None) => break,
                // Without a wake-up the test never ends.
                Poll::Pending => thread::park(),
            }
        }
        assert_eq!(next, [EACH; 2]);
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    }
}
