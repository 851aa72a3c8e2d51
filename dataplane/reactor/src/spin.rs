//! How long an idle executor polls before it sleeps.
//!
//! A poll that finds something saves the sleep and the wake-up; one that finds nothing is a core
//! burnt, and on a shared core worse: the scheduler makes up for it by running others first just
//! when the completion comes. So an executor polls only while that pays.

use crate::clock::Instant;
use std::time::Duration;

/// Two looks at the clock this far apart with nothing between them: others ran on this core.
const PREEMPTED: Duration = Duration::from_micros(200);
/// Sleeps before polling is tried again after it did not pay, and the most there can be after it
/// failed again and again: at 4096, a few thousandths of the time.
const SLEEPS_MIN: u32 = 64;
const SLEEPS_MAX: u32 = 4096;
/// A miss counts two, a find takes one back; at this many polling is given up for a while. So it
/// goes on only while two of three polls find something.
const MISSES_MAX: u32 = 6;

pub(crate) struct Spin {
    limit: Duration,
    /// Start of this poll, and when the clock was last looked at.
    polling: Option<(Instant, Instant)>,
    misses: u32,
    /// Sleeps left before the next try.
    sleeps: u32,
    sleeps_next: u32,
}

impl Spin {
    pub fn new(limit: Duration) -> Spin {
        Spin { limit, polling: None, misses: 0, sleeps: 0, sleeps_next: SLEEPS_MIN }
    }

    /// There is work. It counts for polling only if polling had to wait for it: what the first look finds
    /// (that what was just submitted is done) a sleep would have found as soon.
    pub fn found(&mut self) {
        if let Some((start, last)) = self.polling.take()
            && last > start
        {
            self.misses = self.misses.saturating_sub(1);
            self.sleeps_next = SLEEPS_MIN.max(self.sleeps_next / 2);
        }
    }

    /// A look at `now` saw something completed. It counts against polling if others ran meanwhile: what
    /// came while they had the core was not found by polling, and a sleep would have left it to them.
    pub fn completed(&mut self, now: Instant) {
        if self.polling.is_some_and(|(_, last)| now - last >= PREEMPTED) {
            self.give_up();
        }
    }

    /// There is no work: whether to look once more rather than sleep.
    pub fn again(&mut self, now: Instant) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let Some((start, last)) = self.polling else {
            if self.sleeps > 0 {
                self.sleeps -= 1;
                return false;
            }
            self.polling = Some((now, now));
            return true;
        };
        let preempted = now - last >= PREEMPTED;
        if !preempted && now - start < self.limit {
            self.polling = Some((start, now));
            return true;
        }
        self.polling = None;
        self.misses += 2;
        if preempted || self.misses >= MISSES_MAX {
            self.give_up();
        }
        false
    }

    fn give_up(&mut self) {
        self.polling = None;
        self.misses = 0;
        self.sleeps = self.sleeps_next;
        self.sleeps_next = (self.sleeps_next * 2).min(SLEEPS_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(20);

    fn at(micros: u64) -> Instant {
        Instant::from_nanos(micros * 1000)
    }

    /// Polls in steps of 5 µs from `start` until told to sleep; the number of looks.
    fn looks(spin: &mut Spin, start: u64) -> u64 {
        (0..).find(|step| !spin.again(at(start + 5 * step))).unwrap_or(0)
    }

    #[test]
    fn it_polls_for_its_limit_and_then_sleeps() {
        let mut spin = Spin::new(LIMIT);
        assert_eq!(looks(&mut spin, 0), 4);
        assert_eq!(looks(&mut Spin::new(Duration::ZERO), 0), 0);
    }

    #[test]
    fn polling_that_never_pays_is_tried_ever_less_often_until_it_pays_again() {
        let mut spin = Spin::new(LIMIT);
        let mut tries = Vec::new();
        for idle in 0..10_000u64 {
            if looks(&mut spin, idle * 1000) > 0 {
                tries.push(idle);
            }
        }
        assert_eq!(tries[..7], [0, 1, 2, 67, 68, 69, 198]);
        assert_eq!(tries.len(), 24);
        // It pays: from then on every idle moment is polled again.
        while !spin.again(at(20_000_000)) {}
        spin.found();
        for idle in 0..100 {
            assert!(spin.again(at(30_000_000 + idle * 1000)));
            assert!(spin.again(at(30_000_005 + idle * 1000)));
            spin.found();
        }
    }

    #[test]
    fn what_the_first_look_finds_does_not_count_for_polling() {
        // As in a round trip: what was sent is done at once, the answer never comes in time.
        let mut spin = Spin::new(LIMIT);
        let polled = (0..20).filter(|trip| {
            spin.again(at(1000 * trip));
            spin.found();
            looks(&mut spin, 1000 * trip + 5) > 0
        });
        assert_eq!(polled.count(), 3);
    }

    #[test]
    fn what_completes_while_others_have_the_core_counts_against_polling() {
        for (completed, kept) in [(4000, false), (10, true)] {
            let mut spin = Spin::new(LIMIT);
            assert!(spin.again(at(0)));
            assert!(spin.again(at(5)));
            spin.completed(at(completed));
            spin.found();
            assert_eq!(spin.again(at(5000)), kept, "seen after {completed} µs");
        }
    }

    #[test]
    fn polling_that_pays_every_other_time_is_given_up_and_two_times_of_three_is_kept() {
        for (period, kept) in [(2, false), (3, true)] {
            let mut spin = Spin::new(LIMIT);
            let polled = (0..60).filter(|idle| {
                let start = 1000 * idle;
                if idle % period == 0 {
                    return looks(&mut spin, start) > 0;
                }
                let polled = spin.again(at(start)) && spin.again(at(start + 5));
                spin.found();
                polled
            });
            assert_eq!(polled.count() == 60, kept, "a miss in {period}");
        }
    }

    #[test]
    fn a_core_that_others_want_is_left_to_them_at_once() {
        let mut spin = Spin::new(LIMIT);
        assert!(spin.again(at(0)));
        assert!(!spin.again(at(4000)));
        assert_eq!((0..100).filter(|idle| spin.again(at(5000 + idle * 1000))).count(), 1);
    }
}
