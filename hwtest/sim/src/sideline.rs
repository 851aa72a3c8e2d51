//! Checks beside the model, for operations that really run at the same time: who may hold what,
//! and what must be in a file that all append to.

use crate::history::ActorId;
use crate::report::{Checker, Violation};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of one record of the common log file.
pub const RECORD_BYTES: usize = 32;
/// Names that several programs try to create at once.
pub const RACE_NAMES: u64 = 3;

/// What the programs believe to hold or to have written.
#[derive(Default)]
pub struct Sideline {
    lock_holder: Cell<Option<ActorId>>,
    /// Who was told to have created a name and has not begun to remove it.
    race: RefCell<BTreeMap<u64, ActorId>>,
    /// Records by program: the highest begun, and those synced.
    begun: RefCell<BTreeMap<ActorId, u64>>,
    synced: RefCell<BTreeSet<(ActorId, u64)>>,
}

impl Sideline {
    /// The program was granted the exclusive lock.
    pub fn locked(&self, actor: ActorId) -> Result<(), Violation> {
        match self.lock_holder.replace(Some(actor)) {
            None => Ok(()),
            Some(other) => {
                let detail = format!("{actor:?} was granted the exclusive lock that {other:?} holds");
                Err(Violation::new(Checker::Exclusion, detail))
            }
        }
    }

    /// The program is about to unlock.
    pub fn unlocking(&self) {
        self.lock_holder.set(None);
    }

    /// The program was told that it created the name.
    pub fn created(&self, actor: ActorId, name: u64) -> Result<(), Violation> {
        match self.race.borrow_mut().insert(name, actor) {
            None => Ok(()),
            Some(other) => {
                let detail = format!("{actor:?} created name {name}, which {other:?} had created and not removed");
                Err(Violation::new(Checker::Exclusion, detail))
            }
        }
    }

    pub fn owner(&self, name: u64) -> Option<ActorId> {
        self.race.borrow().get(&name).copied()
    }

    /// The program is about to remove the name.
    pub fn removing(&self, name: u64) {
        self.race.borrow_mut().remove(&name);
    }

    /// A new record of this program.
    pub fn next_record(&self, actor: ActorId) -> (u64, Bytes) {
        let mut begun = self.begun.borrow_mut();
        let number = begun.entry(actor).or_default();
        *number += 1;
        (*number, record(actor, *number))
    }

    pub fn record_synced(&self, actor: ActorId, number: u64) {
        self.synced.borrow_mut().insert((actor, number));
    }

    /// A program died with whatever it held.
    pub fn died(&self, actor: ActorId) {
        if self.lock_holder.get() == Some(actor) {
            self.lock_holder.set(None);
        }
        self.race.borrow_mut().retain(|_, owner| *owner != actor);
    }

    /// Every record whole and once, each program's in order, all synced ones there.
    pub fn check_log(&self, bytes: &[u8]) -> Result<(), Violation> {
        let wrong = |detail: String| Violation::new(Checker::Append, detail);
        if !bytes.len().is_multiple_of(RECORD_BYTES) {
            return Err(wrong(format!("the common log has {} bytes, no whole number of records", bytes.len())));
        }
        let mut last: BTreeMap<ActorId, u64> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for (index, found) in bytes.chunks(RECORD_BYTES).enumerate() {
            let word = |at: usize| found[at..at + 8].iter().fold(0u64, |sum, byte| (sum << 8) | u64::from(*byte));
            let (actor, number) = (ActorId(word(0) as usize), word(8));
            if record(actor, number) != found {
                return Err(wrong(format!("record {index} of the common log is damaged: {found:02x?}")));
            }
            let before = last.insert(actor, number).unwrap_or(0);
            if number <= before {
                let detail = format!("record {index}: {actor:?}'s number {number} comes after its number {before}");
                return Err(wrong(detail));
            }
            seen.insert((actor, number));
        }
        match self.synced.borrow().difference(&seen).next() {
            None => Ok(()),
            Some((actor, number)) => Err(wrong(format!("{actor:?}'s synced record {number} is lost"))),
        }
    }
}

/// A record that tells its writer and number and that it is whole.
fn record(actor: ActorId, number: u64) -> Bytes {
    let mut bytes = Vec::with_capacity(RECORD_BYTES);
    let check = (actor.0 as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ number.wrapping_mul(0xD1B5_4A32_D192_ED03);
    for word in [actor.0 as u64, number, check, !check] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_a_repeated_and_a_torn_record_are_told_apart() {
        let sideline = Sideline::default();
        let actor = ActorId(2);
        let (first, one) = sideline.next_record(actor);
        let (second, two) = sideline.next_record(actor);
        sideline.record_synced(actor, first);
        assert_eq!((first, second), (1, 2));
        let log = |parts: &[&[u8]]| sideline.check_log(&parts.concat()).map_err(|violation| violation.detail);
        assert_eq!(log(&[&one, &two]), Ok(()));
        assert_eq!(log(&[&one]), Ok(()), "the second was not synced");
        assert_eq!(log(&[&two]), Err("ActorId(2)'s synced record 1 is lost".into()));
        assert_eq!(log(&[&one, &one]), Err("record 1: ActorId(2)'s number 1 comes after its number 1".into()));
        assert!(log(&[&one, &two[..31]]).unwrap_err().contains("63 bytes"));
        assert!(log(&[&two[..16], &one[16..]]).unwrap_err().contains("damaged"));
    }

    #[test]
    fn two_holders_are_one_too_many() {
        let sideline = Sideline::default();
        sideline.locked(ActorId(0)).unwrap();
        assert_eq!(sideline.locked(ActorId(1)).unwrap_err().checker, Checker::Exclusion);
        sideline.created(ActorId(0), 1).unwrap();
        sideline.created(ActorId(0), 2).unwrap();
        assert_eq!(sideline.created(ActorId(1), 1).unwrap_err().checker, Checker::Exclusion);
    }
}
