//! Timers of one executor: a sorted map, since a node has hundreds and not millions.

use crate::clock::Instant;
use crate::executor::Inner;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

#[derive(Default)]
pub(crate) struct Timers {
    waiting: BTreeMap<(Instant, u64), Waker>,
    next: u64,
}

impl Timers {
    pub(crate) fn next_deadline(&mut self) -> Option<Instant> {
        self.waiting.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Waker> {
        let entry = self.waiting.first_entry()?;
        (entry.key().0 <= now).then(|| entry.remove())
    }
}

/// Ends at its deadline. Registered on first poll, removed when dropped.
pub struct Sleep {
    inner: Rc<Inner>,
    deadline: Instant,
    registered: Option<u64>,
}

impl Sleep {
    pub(crate) fn new(inner: Rc<Inner>, deadline: Instant) -> Sleep {
        Sleep { inner, deadline, registered: None }
    }

    pub fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let inner = self.inner.clone();
        let mut timers = inner.timers.borrow_mut();
        if inner.now() >= self.deadline {
            if let Some(serial) = self.registered.take() {
                timers.waiting.remove(&(self.deadline, serial));
            }
            return Poll::Ready(());
        }
        let serial = match self.registered {
            Some(serial) => serial,
            None => {
                timers.next += 1;
                timers.next
            }
        };
        self.registered = Some(serial);
        timers.waiting.insert((self.deadline, serial), context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(serial) = self.registered {
            let removed = self.inner.timers.borrow_mut().waiting.remove(&(self.deadline, serial));
            drop(removed);
        }
    }
}
