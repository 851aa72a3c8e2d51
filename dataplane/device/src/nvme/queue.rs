//! One pair of queues: entries written to the submission queue, completions taken from the other
//! (NVM Express 2.0, section 3.3.1).
//!
//! Both have the same number of entries, and its owner has at most one command less than that under
//! way. So neither can overflow, and how far the controller has come needs no looking after.

use super::bus::{Bus, SharedMemory};
use super::controller::PAGE;
use super::memory::fence;
use super::spec::{Capabilities, Command, Completion, register};
use crate::DeviceResult;
use std::rc::Rc;
use std::sync::atomic::Ordering;

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

/// Doorbells in memory (section 5.8): the controller, which is a program there, reads them when it looks for
/// work, and says up to where it needs not be told by the register, which would interrupt its machine.
pub(super) struct ShadowDoorbells {
    values: SharedMemory,
    /// What it has seen of each when it looked last.
    seen: SharedMemory,
}

impl ShadowDoorbells {
    pub fn new<B: Bus>(bus: &B) -> DeviceResult<ShadowDoorbells> {
        Ok(ShadowDoorbells { values: bus.allocate(PAGE)?, seen: bus.allocate(PAGE)? })
    }

    pub fn device_addresses(&self) -> [u64; 2] {
        [self.values.device_address(0), self.seen.device_address(0)]
    }

    pub fn clear(&self) {
        self.values.clear();
        self.seen.clear();
    }

    /// Whether one of them fits.
    fn holds(&self, doorbell: usize) -> bool {
        (doorbell - register::DOORBELLS) + 4 <= PAGE
    }

    /// Changes a doorbell; whether the register has to be written too.
    fn ring(&self, doorbell: usize, before: u16, value: u16) -> bool {
        let at = doorbell - register::DOORBELLS;
        // What it speaks of before it.
        fence(Ordering::Release);
        self.values.write(at, u32::from(value).to_le());
        // Either the controller, which says first what it has seen and then looks once more, sees the
        // value, or we see what it said.
        fence(Ordering::SeqCst);
        let seen = u32::from_le(self.seen.read(at)) as u16;
        is_passed(seen, before, value)
    }
}

/// Whether going from `before` to `value`, on a ring of 2^16, passes what was seen.
fn is_passed(seen: u16, before: u16, value: u16) -> bool {
    value.wrapping_sub(seen).wrapping_sub(1) < value.wrapping_sub(before)
}

pub(super) struct QueuePair {
    id: u16,
    shadow: Option<Rc<ShadowDoorbells>>,
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
            shadow: None,
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
            let before = std::mem::replace(&mut self.rung, self.tail.at);
            self.tell(bus, self.tail_doorbell, before, self.tail.at);
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
            let before = std::mem::replace(&mut self.acknowledged, self.head.at);
            self.tell(bus, self.head_doorbell, before, self.head.at);
        }
    }

    #[inline]
    fn tell<B: Bus>(&self, bus: &B, doorbell: usize, before: u16, value: u16) {
        let needed = self.shadow.as_ref().is_none_or(|shadow| shadow.ring(doorbell, before, value));
        if needed {
            bus.write32(doorbell, value.into());
        }
    }

    /// From now on, on empty rings: the controller was told where they are. `None`: it has none.
    pub fn use_shadow(&mut self, shadow: Option<Rc<ShadowDoorbells>>) {
        self.shadow = shadow.filter(|shadow| shadow.holds(self.head_doorbell));
    }
}

#[cfg(all(test, feature = "loom"))]
mod protocol_tests;

#[cfg(test)]
mod tests {
    use super::*;

    /// Against counting, one step at a time: the register is needed when a step leaves what was seen.
    #[test]
    fn a_doorbell_is_needed_when_it_passes_what_was_seen() {
        for seen in 0..64u16 {
            for before in 0..64u16 {
                for steps in 1..64u16 {
                    let value = before.wrapping_add(steps);
                    let leaves = (0..steps).any(|step| before.wrapping_add(step) == seen);
                    assert_eq!(is_passed(seen, before, value), leaves, "{seen} of {before} to {value}");
                    let far = |number: u16| number.wrapping_sub(32);
                    assert_eq!(is_passed(far(seen), far(before), far(value)), leaves);
                }
            }
        }
    }

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
