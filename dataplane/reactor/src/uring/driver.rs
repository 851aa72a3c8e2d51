//! The ring as the executor's driver.

use super::Ring;
use super::core::Harvest;
use crate::executor::{Driver, Unpark};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Submits and reaps one [`Ring`], and its polled one if it has one, for `Executor::run`.
pub struct RingDriver {
    ring: Rc<Ring>,
    harvest: Harvest,
}

impl RingDriver {
    pub(super) fn new(ring: Rc<Ring>) -> RingDriver {
        RingDriver { ring, harvest: Harvest::default() }
    }

    /// Wakes and releases with no borrow held: both run other people's code.
    fn deliver(&mut self) {
        for waker in self.harvest.wakers.drain(..) {
            waker.wake();
        }
        self.harvest.released.clear();
    }
}

impl Driver for RingDriver {
    fn poll(&mut self) -> bool {
        let mut any = self.ring.core.borrow_mut().turn(&mut self.harvest);
        if let Some(polled) = self.ring.polled.get() {
            any |= polled.core.borrow_mut().turn(&mut self.harvest);
        }
        self.deliver();
        any
    }

    fn park(&mut self, timeout: Option<Duration>) {
        // Nobody announces what completes on a polled ring: no sleep before it is empty.
        if self.ring.polled.get().is_some_and(|polled| polled.in_flight() > 0) {
            self.poll();
            return;
        }
        self.ring.core.borrow_mut().wait(timeout, &mut self.harvest);
        self.deliver();
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        self.ring.core.borrow().wakeup()
    }
}
