//! FUSE_INTERRUPT: which requests may wait for long, and which of them the kernel has given up.

use cfs_reactor::sync::Notify;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

struct State {
    raised: Cell<bool>,
    changed: Rc<Notify>,
}

/// The requests that can be interrupted, by their numbers.
#[derive(Default)]
pub(crate) struct Interrupts {
    watched: RefCell<BTreeMap<u64, Rc<State>>>,
}

/// One request's ear for its interruption. Dropped with the request's end.
pub(crate) struct Interruption {
    interrupts: Rc<Interrupts>,
    unique: u64,
    state: Rc<State>,
}

impl Interrupts {
    /// A request that has just been read. The kernel interrupts none before.
    pub fn watch(self: &Rc<Self>, unique: u64) -> Interruption {
        let state = Rc::new(State { raised: Cell::new(false), changed: Notify::new() });
        self.watched.borrow_mut().insert(unique, state.clone());
        Interruption { interrupts: self.clone(), unique, state }
    }

    /// The kernel interrupts a request. One that is answered already, or that does not wait for
    /// others, is left alone.
    pub fn raise(&self, unique: u64) {
        if let Some(state) = self.watched.borrow().get(&unique) {
            state.raised.set(true);
            state.changed.notify_all();
        }
    }
}

impl Interruption {
    pub fn is_raised(&self) -> bool {
        self.state.raised.get()
    }

    /// Ends when the request is interrupted.
    pub async fn raised(&self) {
        loop {
            let changed = self.state.changed.notified();
            if self.is_raised() {
                return;
            }
            changed.await;
        }
    }
}

impl Drop for Interruption {
    fn drop(&mut self) {
        self.interrupts.watched.borrow_mut().remove(&self.unique);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn an_interrupt_reaches_its_request_and_no_other_and_none_that_has_ended() {
        let interrupts = Rc::new(Interrupts::default());
        let (one, two) = (interrupts.watch(1), interrupts.watch(2));
        interrupts.raise(1);
        assert!(one.raised().now_or_never().is_some());
        assert!(two.raised().now_or_never().is_none());
        drop(two);
        interrupts.raise(2);
        let again = interrupts.watch(2);
        assert!(!again.is_raised(), "what was raised for an earlier request is over");
    }
}
