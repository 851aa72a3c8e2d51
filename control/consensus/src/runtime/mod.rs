//! openraft's runtime traits on our executor: a task openraft spawns lands in the domain of the
//! task that spawned it, so killing a node kills its Raft with it, and every wait and every
//! random draw comes from the executor's clock.

mod block_on;
mod instant;
mod mpsc;
mod oneshot;
mod random;
mod watch;

pub use instant::RaftInstant;
pub use mpsc::RcMpsc;
pub use oneshot::RcOneshot;
pub use watch::RcWatch;

use cfs_reactor::Handle;
use cfs_reactor::executor::{Cancelled, JoinHandle};
use cfs_reactor::timer::Sleep;
use openraft::OptionalSend;
use openraft::async_runtime::AsyncRuntime;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// The runtime openraft runs on. Inside the executor it is stateless: everything comes from
/// [`Handle::current`]. An instance exists only for openraft's own test suites.
pub struct CfsRuntime {
    standalone: block_on::Standalone,
}

impl fmt::Debug for CfsRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CfsRuntime")
    }
}

/// The domain to spawn in and take time from.
fn handle() -> Handle {
    Handle::try_current().unwrap_or_else(block_on::outer_handle)
}

/// The deadline passed first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the deadline passed")]
pub struct Elapsed;

/// A future with a deadline. The future is boxed: without `unsafe` that is how it is pinned.
pub struct Timeout<F> {
    future: Pin<Box<F>>,
    sleep: Pin<Box<Sleep>>,
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(value) = self.future.as_mut().poll(context) {
            return Poll::Ready(Ok(value));
        }
        self.sleep.as_mut().poll(context).map(|()| Err(Elapsed))
    }
}

/// cfs_reactor's mutex behind openraft's trait.
pub struct RcMutex<T>(cfs_reactor::sync::Mutex<T>);

impl<T: OptionalSend + 'static> openraft::async_runtime::Mutex<T> for RcMutex<T> {
    type Guard<'a> = cfs_reactor::sync::MutexGuard<'a, T>;

    fn new(value: T) -> Self {
        RcMutex(cfs_reactor::sync::Mutex::new(value))
    }

    fn lock(&self) -> impl Future<Output = Self::Guard<'_>> + OptionalSend {
        self.0.lock()
    }
}

impl AsyncRuntime for CfsRuntime {
    type JoinError = Cancelled;
    type JoinHandle<T: OptionalSend + 'static> = JoinHandle<T>;
    type Sleep = Sleep;
    type Instant = RaftInstant;
    type TimeoutError = Elapsed;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = Timeout<T>;
    type ThreadLocalRng = random::HandleRng;
    type Mpsc = RcMpsc;
    type Watch = RcWatch;
    type Oneshot = RcOneshot;
    type Mutex<T: OptionalSend + 'static> = RcMutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        handle().spawn(future)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        handle().sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        handle().sleep_until(deadline.0)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        Timeout { future: Box::pin(future), sleep: Box::pin(handle().sleep(duration)) }
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: Self::Instant, future: F) -> Self::Timeout<R, F> {
        Timeout { future: Box::pin(future), sleep: Box::pin(handle().sleep_until(deadline.0)) }
    }

    fn is_panic(_join_error: &Self::JoinError) -> bool {
        // A panicking task takes the executor down with it; the join error is only cancellation.
        false
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        random::HandleRng::new(handle())
    }

    fn new(_threads: usize) -> Self {
        CfsRuntime { standalone: block_on::Standalone::new() }
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.standalone.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use super::CfsRuntime;

    #[test]
    fn openrafts_runtime_suite_passes() {
        openraft::testing::runtime::Suite::<CfsRuntime>::test_all();
    }
}
