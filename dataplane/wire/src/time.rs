//! File times: nanoseconds since 1970, signed, as `statx` gives them.

use serde::{Deserialize, Serialize};

/// Seconds and nanoseconds since the Unix epoch; `nanos` is below 1,000,000,000.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Timestamp {
    pub secs: i64,
    pub nanos: u32,
}

impl Timestamp {
    pub const NANOS_PER_SEC: u32 = 1_000_000_000;

    pub fn from_nanos(total: i128) -> Timestamp {
        let per = i128::from(Self::NANOS_PER_SEC);
        let secs = total.div_euclid(per).clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64;
        Timestamp { secs, nanos: total.rem_euclid(per) as u32 }
    }

    /// This time, or where it lies before `shown` the first after that: for what must not go back and
    /// yet tell of every change.
    pub fn not_before(self, shown: Timestamp) -> Timestamp {
        if self >= shown { self } else { shown.next() }
    }

    /// The first time after this one.
    pub fn next(self) -> Timestamp {
        match self.nanos.checked_add(1).filter(|nanos| *nanos < Self::NANOS_PER_SEC) {
            Some(nanos) => Timestamp { nanos, ..self },
            None => Timestamp { secs: self.secs.saturating_add(1), nanos: 0 },
        }
    }
}
