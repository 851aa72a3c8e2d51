//! The executor's instant under openraft's trait.

use cfs_reactor::Instant;
use std::fmt;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::time::Duration;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RaftInstant(pub(super) Instant);

impl fmt::Debug for RaftInstant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Add<Duration> for RaftInstant {
    type Output = RaftInstant;
    fn add(self, duration: Duration) -> RaftInstant {
        RaftInstant(self.0 + duration)
    }
}

impl AddAssign<Duration> for RaftInstant {
    fn add_assign(&mut self, duration: Duration) {
        self.0 += duration;
    }
}

impl Sub<Duration> for RaftInstant {
    type Output = RaftInstant;
    fn sub(self, duration: Duration) -> RaftInstant {
        RaftInstant(self.0 - duration)
    }
}

impl Sub for RaftInstant {
    type Output = Duration;
    fn sub(self, earlier: RaftInstant) -> Duration {
        self.0 - earlier.0
    }
}

impl SubAssign<Duration> for RaftInstant {
    fn sub_assign(&mut self, duration: Duration) {
        self.0 -= duration;
    }
}

impl openraft::async_runtime::Instant for RaftInstant {
    fn now() -> Self {
        RaftInstant(super::handle().now())
    }
}
