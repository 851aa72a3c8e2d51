//! One pair of queues: entries written to the submission queue, completions taken from the other
//! (NVM Express 2.0, section 3.3.1).
//!
//! Both have the same number of entries, and its owner has at most one command less than that under
//! way. So neither can overflow, and how far the controller has come needs no looking after.

use super::bus::{Bus, SharedMemory};
use super::spec::{Capabilities, Command, Completion, register};
use crate::DeviceResult;
use std::sync::atomic::{Ordering, fence};

const SUBMISSION_BYTES: usize = size_of::<Command>();
const COMPLETION_BYTES: usize = size_of::<Completion>();

/// A place in a ring of entries, and whose turn the entry there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    entries: u16,
    at: u16,
    /// Of completions: the phase tag that a new one has. It begins as 1 and turns with every round.
    phase: bool,
}

impl Place {
    fn first(entries: u16) -> Place {
        assert!(entries >= 2, "a queue of {entries} entries");
        Place { entries, at: 0, phase: true }
    }

    #[inline]
    fn advance(&mut self) {
        self.at += 1;
        if self.at == self.entries {
            self.at = 0;
            self.phase = !self.phase;
        }
    }
}

pub(super) struct QueuePair {
    id: u16,
    submissions: SharedMemory,
    completions: SharedMemory,
    tail: Place,
    /// The tail that the controller was told.
    rung: u16,
    head: Place,
    acknowledged: u16,
    tail_doorbell: usize,
    head_doorbell: usize,
}

impl QueuePair {
    pub fn new<B: Bus>(bus: &B, id: u16, entries: u16, capabilities: Capabilities) -> DeviceResult<QueuePair> {
        let stride = capabilities.doorbell_stride();
        let tail_doorbell = register::DOORBELLS + 2 * usize::from(id) * stride;
        Ok(QueuePair {
            id,
            submissions: bus.allocate(usize::from(entries) * SUBMISSION_BYTES)?,
            completions: bus.allocate(usize::from(entries) * COMPLETION_BYTES)?,
            tail: Place::first(entries),
            rung: 0,
            head: Place::first(entries),
            acknowledged: 0,
            tail_doorbell,
            head_doorbell: tail_doorbell + stride,
        })
    }

    pub fn id(&self) -> u16 {
        self.id
    }

    pub fn entries(&self) -> u16 {
        self.tail.entries
    }

    /// Where the controller finds the submissions, and the completions.
    pub fn device_addresses(&self) -> [u64; 2] {
        [self.submissions.device_address(0), self.completions.device_address(0)]
    }

    /// As it was made. The controller must not use it.
    pub fn start_again(&mut self) {
        self.submissions.clear();
        self.completions.clear();
        let entries = self.entries();
        (self.tail, self.head) = (Place::first(entries), Place::first(entries));
        (self.rung, self.acknowledged) = (0, 0);
    }

    /// Writes an entry, of which the controller learns with the next [`QueuePair::ring`].
    #[inline]
    pub fn push(&mut self, command: Command) {
        // Not looked at before the doorbell, which orders it: a plain copy will do.
        self.submissions.copy_in(usize::from(self.tail.at) * SUBMISSION_BYTES, bytemuck::bytes_of(&command));
        self.tail.advance();
    }

    /// Entries that the controller was not told of.
    #[inline]
    pub fn unrung(&self) -> u16 {
        match self.tail.at >= self.rung {
            true => self.tail.at - self.rung,
            false => self.tail.at + self.entries() - self.rung,
        }
    }

    pub fn ring<B: Bus>(&mut self, bus: &B) {
        if self.rung != self.tail.at {
            self.rung = self.tail.at;
            bus.write32(self.tail_doorbell, self.tail.at.into());
        }
    }

    /// The next completion, if the controller has written it.
    #[inline]
    pub fn take(&mut self) -> Option<Completion> {
        let place = usize::from(self.head.at) * COMPLETION_BYTES;
        let last: u32 = self.completions.read(place + 12);
        let seen = Completion { dwords: [0, 0, 0, last] };
        if seen.phase() != self.head.phase {
            return None;
        }
        // The rest of the entry, and the data that was read, are not looked at before.
        fence(Ordering::Acquire);
        let completion = Completion { dwords: self.completions.read(place) };
        self.head.advance();
        Some(completion)
    }

    /// Gives the entries of what was taken back to the controller.
    pub fn acknowledge<B: Bus>(&mut self, bus: &B) {
        if self.acknowledged != self.head.at {
            self.acknowledged = self.head.at;
            bus.write32(self.head_doorbell, self.head.at.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number of entries, for some rounds: the phase turns exactly where the ring begins anew.
    #[test]
    fn places_follow_each_other_and_phases_turn_with_every_round() {
        for entries in 2..70 {
            let mut place = Place::first(entries);
            for step in 0..u32::from(entries) * 5 {
                let round = step / u32::from(entries);
                let at = (step % u32::from(entries)) as u16;
                assert_eq!(place, Place { entries, at, phase: round.is_multiple_of(2) });
                place.advance();
            }
        }
    }
}
