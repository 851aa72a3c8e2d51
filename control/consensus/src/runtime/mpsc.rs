//! A bounded many-to-one channel between tasks of one executor. Unlike the executor's own it
//! has weak senders, and only the receiver wakes for an item.

use openraft::OptionalSend;
use openraft::async_runtime::{Mpsc, MpscReceiver, MpscSender, MpscWeakSender, SendError, TryRecvError};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

pub struct RcMpsc;

struct Channel<T> {
    items: VecDeque<T>,
    capacity: usize,
    senders: usize,
    receiver_alive: bool,
    receiver: Option<Waker>,
    /// Senders waiting for room; all wake when there is some.
    blocked: Vec<Waker>,
}

type Shared<T> = Rc<RefCell<Channel<T>>>;

pub struct Sender<T>(Shared<T>);
pub struct WeakSender<T>(Weak<RefCell<Channel<T>>>);
pub struct Receiver<T>(Shared<T>);

impl Mpsc for RcMpsc {
    type Sender<T: OptionalSend> = Sender<T>;
    type Receiver<T: OptionalSend> = Receiver<T>;
    type WeakSender<T: OptionalSend> = WeakSender<T>;

    fn channel<T: OptionalSend>(capacity: usize) -> (Sender<T>, Receiver<T>) {
        let channel = Channel {
            items: VecDeque::new(),
            capacity: capacity.max(1),
            senders: 1,
            receiver_alive: true,
            receiver: None,
            blocked: Vec::new(),
        };
        let shared = Rc::new(RefCell::new(channel));
        (Sender(shared.clone()), Receiver(shared))
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.borrow_mut().senders += 1;
        Sender(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut channel = self.0.borrow_mut();
            channel.senders -= 1;
            if channel.senders > 0 { None } else { channel.receiver.take() }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Clone for WeakSender<T> {
    fn clone(&self) -> Self {
        WeakSender(self.0.clone())
    }
}

impl<T: OptionalSend> MpscWeakSender<RcMpsc, T> for WeakSender<T> {
    fn upgrade(&self) -> Option<Sender<T>> {
        let shared = self.0.upgrade()?;
        {
            let mut channel = shared.borrow_mut();
            if channel.senders == 0 {
                return None;
            }
            channel.senders += 1;
        }
        Some(Sender(shared))
    }
}

impl<T: OptionalSend> MpscSender<RcMpsc, T> for Sender<T> {
    fn send(&self, item: T) -> impl Future<Output = Result<(), SendError<T>>> + OptionalSend {
        let mut item = Some(item);
        poll_fn(move |context| {
            let waker = {
                let mut channel = self.0.borrow_mut();
                let Some(value) = item.take() else { return Poll::Ready(Ok(())) };
                if !channel.receiver_alive {
                    return Poll::Ready(Err(SendError(value)));
                }
                if channel.items.len() >= channel.capacity {
                    item = Some(value);
                    channel.blocked.push(context.waker().clone());
                    return Poll::Pending;
                }
                channel.items.push_back(value);
                channel.receiver.take()
            };
            if let Some(waker) = waker {
                waker.wake();
            }
            Poll::Ready(Ok(()))
        })
    }

    fn downgrade(&self) -> WeakSender<T> {
        WeakSender(Rc::downgrade(&self.0))
    }
}

impl<T> Receiver<T> {
    fn take(&self) -> Result<T, TryRecvError> {
        let (item, blocked) = {
            let mut channel = self.0.borrow_mut();
            match channel.items.pop_front() {
                Some(item) => (item, std::mem::take(&mut channel.blocked)),
                None if channel.senders == 0 => return Err(TryRecvError::Disconnected),
                None => return Err(TryRecvError::Empty),
            }
        };
        blocked.into_iter().for_each(Waker::wake);
        Ok(item)
    }
}

impl<T: OptionalSend> MpscReceiver<T> for Receiver<T> {
    fn recv(&mut self) -> impl Future<Output = Option<T>> + OptionalSend {
        poll_fn(|context| match self.take() {
            Ok(item) => Poll::Ready(Some(item)),
            Err(TryRecvError::Disconnected) => Poll::Ready(None),
            Err(TryRecvError::Empty) => {
                self.0.borrow_mut().receiver = Some(context.waker().clone());
                Poll::Pending
            }
        })
    }

    fn try_recv(&mut self) -> Result<T, TryRecvError> {
        self.take()
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let (items, blocked) = {
            let mut channel = self.0.borrow_mut();
            channel.receiver_alive = false;
            (std::mem::take(&mut channel.items), std::mem::take(&mut channel.blocked))
        };
        // Items may hold senders of this very channel: no borrow is held while they drop.
        drop(items);
        blocked.into_iter().for_each(Waker::wake);
    }
}
