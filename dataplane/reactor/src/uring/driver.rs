//! The ring as the executor's driver.

use super::Ring;
use super::core::{Completed, Harvest};
use crate::executor::{Driver, Unpark};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Submits and reaps one [`Ring`], and those beside it, for `Executor::run`.
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
        let harvest = &mut self.harvest;
        let mut any = self.ring.core.borrow_mut().turn(harvest);
        let beside = &self.ring.beside;
        if let Some(polled) = beside.polled.get() {
            any |= polled.core.borrow_mut().turn(harvest);
        }
        for commands in [&beside.commands, &beside.polled_commands].into_iter().filter_map(|ring| ring.get()) {
            any |= commands.core.borrow_mut().turn(harvest);
        }
        self.deliver();
        any
    }

    fn park(&mut self, timeout: Option<Duration>) {
        let beside = &self.ring.beside;
        // Nobody announces what completes on a polled ring: no sleep before it is empty.
        if beside.polled.get().is_some_and(|polled| polled.in_flight() > 0)
            || beside.polled_commands.get().is_some_and(|polled| polled.in_flight() > 0)
        {
            self.poll();
            return;
        }
        if let Some(commands) = beside.commands.get() {
            let prepared = commands.core.borrow_mut().prepare_sleep(&mut self.harvest);
            match prepared {
                Ok(Some(signal)) => self.ring.core.borrow_mut().await_sibling(&signal),
                Ok(None) => {}
                Err(Completed) => {
                    self.deliver();
                    return;
                }
            }
        }
        self.ring.core.borrow_mut().wait(timeout, &mut self.harvest);
        self.deliver();
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        self.ring.core.borrow().wakeup()
    }
}
