//! Whether a flush may vouch for the writes before it.
//!
//! A controller that reports a fatal error is reset and goes on, but nobody says what became of its volatile
//! cache. A flush that succeeds afterwards speaks only of what the cache holds then, so writes that were
//! answered before the failure, and not flushed, must not be called durable by it. (Any other reset leaves the
//! cache as it is: NVM Express 2.0, section 3.7.2, names what a reset changes.)

use std::cell::Cell;

/// Answered writes that no flush has vouched for yet.
#[derive(Default)]
pub(super) struct Unflushed {
    /// How many writes were answered.
    written: Cell<u64>,
    /// How often the controller had failed when the oldest of those that are not flushed was answered.
    since: Cell<Option<u64>>,
}

impl Unflushed {
    /// A write was answered that went to the cache.
    pub fn written(&self, failures: u64) {
        self.written.set(self.written.get() + 1);
        if self.since.get().is_none() {
            self.since.set(Some(failures));
        }
    }

    /// What [`Unflushed::flush_ended`] has to be given.
    pub fn flush_begins(&self) -> u64 {
        self.written.get()
    }

    /// The controller has answered the flush: whether that can be believed. Once it can't it never can again.
    pub fn flush_ended(&self, written: u64, failures: u64) -> bool {
        match self.since.get() {
            Some(since) if since != failures => false,
            _ => {
                // What came during the flush is still to be flushed.
                let more = self.written.get() != written;
                self.since.set(more.then_some(failures));
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_reactor::clock::SplitMix64;

    /// Against a list of all writes, each with what is known of it.
    #[test]
    fn a_flush_is_believed_exactly_while_no_failure_came_between_it_and_an_unflushed_write() {
        for seed in 0..300 {
            let mut random = SplitMix64::new(seed);
            let unflushed = Unflushed::default();
            let mut failures = 0;
            // Failures when each was answered; None once a flush has vouched for it.
            let mut writes: Vec<Option<u64>> = Vec::new();
            let mut flushes: Vec<u64> = Vec::new();
            for _ in 0..60 {
                match random.below(if seed % 3 == 0 { 7 } else { 6 }) {
                    0..3 => {
                        unflushed.written(failures);
                        writes.push(Some(failures));
                    }
                    3 => flushes.push(unflushed.flush_begins()),
                    4 | 5 if !flushes.is_empty() => {
                        let written = flushes.swap_remove(random.below(flushes.len() as u64) as usize);
                        let sound = writes.iter().flatten().all(|answered| *answered == failures);
                        assert_eq!(unflushed.flush_ended(written, failures), sound, "seed {seed}");
                        if sound {
                            writes[..written as usize].fill(None);
                        }
                    }
                    6 => failures += 1,
                    _ => {}
                }
            }
        }
    }
}
