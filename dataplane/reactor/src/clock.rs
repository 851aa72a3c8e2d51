//! The clock seam: time and randomness. Real ones read the kernel; the simulated one is driven
//! by the executor and a seed.

use cfs_wire::Timestamp;
use std::cell::Cell;
use std::fmt;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::time::Duration;

/// A monotonic instant, in nanoseconds since an origin that means nothing outside one process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant(u64);

impl Instant {
    pub const fn from_nanos(nanos: u64) -> Instant {
        Instant(nanos)
    }

    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time from `earlier` to here; zero if `earlier` is later.
    pub fn saturating_since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Debug for Instant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", Duration::from_nanos(self.0))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_add(nanos(duration)))
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, duration: Duration) {
        *self = *self + duration;
    }
}

impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_sub(nanos(duration)))
    }
}

impl SubAssign<Duration> for Instant {
    fn sub_assign(&mut self, duration: Duration) {
        *self = *self - duration;
    }
}

impl Sub for Instant {
    type Output = Duration;
    fn sub(self, earlier: Instant) -> Duration {
        self.saturating_since(earlier)
    }
}

/// Time and randomness. One per executor.
pub trait Clock: 'static {
    fn now(&self) -> Instant;

    /// Wall-clock time, for file times and certificates; may jump.
    fn wall(&self) -> Timestamp;

    /// 64 random bits: from the kernel in production, from the seed in simulation.
    fn random(&self) -> u64;

    /// Called when nothing can run before `deadline`. A simulated clock jumps there and answers
    /// true; a real one answers false and lets the driver sleep.
    fn advance_to(&self, deadline: Instant) -> bool;

    /// Whether runs on this clock can be repeated, so that their trace is worth keeping.
    fn is_simulated(&self) -> bool {
        false
    }

    /// Which of `ready` runnable tasks goes next. Real clocks take the oldest (0).
    fn pick(&self, ready: usize) -> usize {
        let _ = ready;
        0
    }
}

/// The kernel's clocks and random numbers.
#[derive(Default)]
pub struct KernelClock {
    random: Cell<Option<(u64, u64)>>,
}

impl KernelClock {
    pub fn new() -> KernelClock {
        KernelClock::default()
    }
}

impl Clock for KernelClock {
    fn now(&self) -> Instant {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Instant(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }

    fn wall(&self) -> Timestamp {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        Timestamp { secs: time.tv_sec, nanos: time.tv_nsec as u32 }
    }

    fn random(&self) -> u64 {
        // Two words a call: half the system calls. Identifiers must never repeat across
        // restarts, so nothing but the kernel's generator will do.
        if let Some((word, _)) = self.random.take() {
            return word;
        }
        let mut bytes = [0u8; 16];
        getrandom::fill(&mut bytes).expect("the kernel's random generator answers");
        let (low, high) = bytes.split_at(8);
        let word = |half: &[u8]| u64::from_le_bytes(half.try_into().expect("8 bytes"));
        self.random.set(Some((word(high), 0)));
        word(low)
    }

    fn advance_to(&self, _deadline: Instant) -> bool {
        false
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, seedable, and the same on every platform.
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    pub fn new(seed: u64) -> SplitMix64 {
        SplitMix64(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound` (which must not be 0).
    pub fn below(&mut self, bound: u64) -> u64 {
        // The bias of a plain remainder is below 2^-32 for the bounds used here.
        self.next_u64() % bound
    }

    /// True once in `n` draws.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Virtual time under a seed: moves only when nothing else can run.
pub struct SimClock {
    now: Cell<u64>,
    epoch_secs: i64,
    random: std::cell::RefCell<SplitMix64>,
    schedule: std::cell::RefCell<SplitMix64>,
}

impl SimClock {
    /// Task order and identifiers come from separate streams, so that a change in one does not
    /// shift the other.
    pub fn new(seed: u64) -> SimClock {
        SimClock {
            now: Cell::new(1_000_000_000),
            epoch_secs: 1_800_000_000,
            random: std::cell::RefCell::new(SplitMix64::new(seed)),
            schedule: std::cell::RefCell::new(SplitMix64::new(seed ^ 0x5EED_5C4E_D01E_0001)),
        }
    }
}

impl Clock for SimClock {
    fn now(&self) -> Instant {
        Instant(self.now.get())
    }

    fn wall(&self) -> Timestamp {
        let since = self.now.get();
        Timestamp { secs: self.epoch_secs + (since / 1_000_000_000) as i64, nanos: (since % 1_000_000_000) as u32 }
    }

    fn random(&self) -> u64 {
        self.random.borrow_mut().next_u64()
    }

    fn advance_to(&self, deadline: Instant) -> bool {
        self.now.set(self.now.get().max(deadline.0));
        true
    }

    fn is_simulated(&self) -> bool {
        true
    }

    fn pick(&self, ready: usize) -> usize {
        if ready < 2 { 0 } else { self.schedule.borrow_mut().below(ready as u64) as usize }
    }
}
