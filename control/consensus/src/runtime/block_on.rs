//! `block_on` for openraft's test suites: a future that borrows from its caller can't be a task
//! of the executor, so it is polled from outside while its tasks and timers run inside.

use cfs_reactor::clock::SimClock;
use cfs_reactor::{Executor, Handle};
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

thread_local! {
    /// The domain of the `block_on` in progress on this thread, for code polled outside tasks.
    static OUTER: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

/// # Panics
/// When neither a task nor a `block_on` is running: openraft was called from outside.
pub(super) fn outer_handle() -> Handle {
    OUTER.with(|outer| outer.borrow().last().cloned()).expect("openraft runs in a task of the executor")
}

/// An executor of its own, under a simulated clock.
pub(super) struct Standalone {
    executor: Executor,
    handle: Handle,
}

/// Set when the outer future may go on; wakes the task that lends it the executor.
#[derive(Default)]
struct Flag {
    set: AtomicBool,
    waiting: Mutex<Option<Waker>>,
}

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.set.store(true, Ordering::Release);
        let waiting = self.waiting.lock().expect("no panic under this lock").take();
        if let Some(waker) = waiting {
            waker.wake();
        }
    }
}

struct Entered;

impl Drop for Entered {
    fn drop(&mut self) {
        OUTER.with(|outer| outer.borrow_mut().pop());
    }
}

impl Standalone {
    pub(super) fn new() -> Standalone {
        let executor = Executor::new(Rc::new(SimClock::new(1)));
        let handle = executor.domain();
        Standalone { executor, handle }
    }

    pub(super) fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        OUTER.with(|outer| outer.borrow_mut().push(self.handle.clone()));
        let _entered = Entered;
        let flag = Arc::new(Flag::default());
        let waker = Waker::from(flag.clone());
        let mut future = pin!(future);
        loop {
            if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return value;
            }
            let flag = flag.clone();
            let until_woken = poll_fn(move |context| {
                *flag.waiting.lock().expect("no panic under this lock") = Some(context.waker().clone());
                if flag.set.swap(false, Ordering::AcqRel) { Poll::Ready(()) } else { Poll::Pending }
            });
            let outcome = self.executor.run_simulated(&self.handle, until_woken);
            assert_eq!(outcome, Ok(Ok(())), "the future waits for something that never comes");
        }
    }
}
