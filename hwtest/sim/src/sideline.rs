//! Checks beside the model, for operations that really run at the same time: who may hold what,
//! what must be in a file that all append to, where things are that several move about, and what
//! a listing must show while a directory changes.

use crate::history::ActorId;
use crate::report::{Checker, Violation};
use bytes::Bytes;
use cfs_client::LockRequest;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::Ino;
use cfs_wire::meta::LockKind;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of one record of a common log file.
pub const RECORD_BYTES: usize = 32;
/// Names that several programs try to create at once.
pub const RACE_NAMES: u64 = 3;
/// Names that are always there, so that a listing takes several calls.
pub const LASTING_NAMES: u64 = 12;
/// Log files that all append to.
pub const LOGS: usize = 3;
/// Things that are moved between the grounds: these many files, and as many directories.
pub const PAWNS: usize = 3;
/// Directories whose inside is looked at here, not compared with the model's, begin so.
pub const PREFIX: &[u8] = b"sideline";

/// Where the games take place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Grounds {
    /// Two directories, on different shards where there are several. The first holds the log
    /// files, the lock file and the lasting names.
    pub dirs: [Ino; 2],
    pub logs: Vec<Ino>,
    pub lock: Ino,
    /// Files, then directories.
    pub pawns: Vec<Ino>,
    /// A large file that nobody touches, so that the targets have to collect zones for the rest;
    /// and its length.
    pub ballast: Option<(Ino, u64)>,
}

/// The ballast's bytes from `offset` on.
pub fn ballast_bytes(offset: u64, length: usize) -> Vec<u8> {
    let mut random = SplitMix64::new(offset);
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes()).collect();
    bytes.truncate(length);
    bytes
}

/// Whether a name that programs race for is to be a directory: those lie on other shards.
pub fn is_race_directory(number: u64) -> bool {
    number % 2 == 1
}

/// A name that programs race for.
pub fn race_name(number: u64) -> Vec<u8> {
    format!("race{number}").into_bytes()
}

/// A pawn's name.
pub fn pawn_name(pawn: usize) -> Vec<u8> {
    format!("pawn{pawn}").into_bytes()
}

pub fn lasting_name(number: u64) -> Vec<u8> {
    format!("lasting{number}").into_bytes()
}

/// How often a file was moved there and back, by those who were told so.
#[derive(Clone, Copy, Default, Debug)]
struct Moves {
    balance: i64,
    /// Somebody died moving it.
    unsure: bool,
}

/// What the programs believe to hold, to have written, to have moved.
#[derive(Default)]
pub struct Sideline {
    locks: RefCell<BTreeMap<ActorId, LockRequest>>,
    /// Who was told to have created a name and has not begun to remove it.
    race: RefCell<BTreeMap<u64, ActorId>>,
    /// The name that a program is creating or removing.
    racing: RefCell<BTreeMap<ActorId, u64>>,
    /// Names that somebody died with: whether they are there has to be looked up.
    unsure: RefCell<BTreeSet<u64>>,
    /// Records by log and program: the highest begun, and those synced.
    begun: RefCell<BTreeMap<(usize, ActorId), u64>>,
    synced: RefCell<BTreeSet<(usize, ActorId, u64)>>,
    moves: RefCell<BTreeMap<usize, Moves>>,
    moving: RefCell<BTreeMap<ActorId, usize>>,
}

fn overlap(one: &LockRequest, other: &LockRequest) -> bool {
    one.family == other.family && one.start <= other.end && other.start <= one.end
}

impl Sideline {
    /// The program was granted the lock.
    pub fn locked(&self, actor: ActorId, lock: LockRequest) -> Result<(), Violation> {
        let mut locks = self.locks.borrow_mut();
        let excludes =
            |held: &LockRequest| overlap(held, &lock) && (held.kind == LockKind::Write || lock.kind == LockKind::Write);
        let other = locks.iter().find(|(holder, held)| **holder != actor && excludes(held));
        let refused = other.map(|(holder, held)| format!("{actor:?} was granted {lock:?}, {holder:?} holds {held:?}"));
        locks.insert(actor, lock);
        refused.map_or(Ok(()), |detail| Err(Violation::new(Checker::Exclusion, detail)))
    }

    /// The program is about to unlock.
    pub fn unlocking(&self, actor: ActorId) {
        self.locks.borrow_mut().remove(&actor);
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

    /// The program begins to create or to remove a name.
    pub fn racing(&self, actor: ActorId, name: u64) {
        self.racing.borrow_mut().insert(actor, name);
    }

    /// A name that somebody is creating or removing.
    pub fn raced_for(&self) -> Option<u64> {
        self.racing.borrow().values().next().copied()
    }

    /// It was told what came of it.
    pub fn raced(&self, actor: ActorId) {
        self.racing.borrow_mut().remove(&actor);
    }

    /// Which names are there, now that nobody creates or removes any: those that were created and
    /// not removed.
    pub fn check_race(&self, names: &[Vec<u8>]) -> Result<(), Violation> {
        let wrong = |detail: String| Err(Violation::new(Checker::Exclusion, detail));
        for number in 0..RACE_NAMES {
            match (self.owner(number), names.contains(&race_name(number))) {
                (Some(owner), false) => {
                    return wrong(format!("name {number} is gone, which {owner:?} created and nobody removed"));
                }
                (None, true) if !self.unsure.borrow().contains(&number) => {
                    return wrong(format!("name {number} is there, which nobody created or somebody removed"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What somebody died with is not there any more.
    pub fn cleared(&self) {
        self.unsure.borrow_mut().clear();
    }

    /// The program begins to move a file.
    pub fn moving(&self, actor: ActorId, pawn: usize) {
        self.moving.borrow_mut().insert(actor, pawn);
    }

    /// The move ended; `to`: where it went, if it did.
    pub fn moved(&self, actor: ActorId, pawn: usize, to: Option<usize>) {
        self.moving.borrow_mut().remove(&actor);
        let mut moves = self.moves.borrow_mut();
        let moves = moves.entry(pawn).or_default();
        moves.balance += match to {
            None => 0,
            Some(0) => -1,
            Some(_) => 1,
        };
    }

    /// Where each file is, now that nobody moves any: in one place, and in the one where those
    /// who moved it left it.
    pub fn check_moves(&self, found: &[Vec<usize>]) -> Result<(), Violation> {
        let wrong = |detail: String| Err(Violation::new(Checker::Exclusion, detail));
        for (pawn, places) in found.iter().enumerate() {
            let [place] = places[..] else {
                return wrong(format!("{} is in {} places", String::from_utf8_lossy(&pawn_name(pawn)), places.len()));
            };
            let mut moves = self.moves.borrow_mut();
            let moves = moves.entry(pawn).or_default();
            if moves.unsure {
                *moves = Moves { balance: place as i64, unsure: false };
            }
            if moves.balance != place as i64 {
                let balance = moves.balance;
                return wrong(format!("pawn {pawn} is in {place}; it was moved there {balance} times more than back"));
            }
        }
        Ok(())
    }

    /// A whole listing of the grounds: no name twice, the lasting ones all there.
    pub fn check_listing(&self, names: &[Vec<u8>]) -> Result<(), Violation> {
        let wrong = |detail: String| Err(Violation::new(Checker::Reply, detail));
        let mut seen = BTreeSet::new();
        if let Some(twice) = names.iter().find(|name| !seen.insert(*name)) {
            return wrong(format!("a listing shows '{}' twice", String::from_utf8_lossy(twice)));
        }
        match (0..LASTING_NAMES).find(|number| !seen.contains(&lasting_name(*number))) {
            Some(number) => wrong(format!("a listing lacks lasting{number}, which is always there")),
            None => Ok(()),
        }
    }

    /// A new record of this program.
    pub fn next_record(&self, log: usize, actor: ActorId) -> (u64, Bytes) {
        let mut begun = self.begun.borrow_mut();
        let number = begun.entry((log, actor)).or_default();
        *number += 1;
        (*number, record(actor, *number))
    }

    pub fn record_synced(&self, log: usize, actor: ActorId, number: u64) {
        self.synced.borrow_mut().insert((log, actor, number));
    }

    /// A program died with whatever it held.
    pub fn died(&self, actor: ActorId) {
        self.locks.borrow_mut().remove(&actor);
        let begun = self.racing.borrow_mut().remove(&actor);
        let owned =
            self.race.borrow_mut().extract_if(.., |_, owner| *owner == actor).map(|(name, _)| name).collect::<Vec<_>>();
        self.unsure.borrow_mut().extend(begun.into_iter().chain(owned));
        if let Some(pawn) = self.moving.borrow_mut().remove(&actor) {
            self.moves.borrow_mut().entry(pawn).or_default().unsure = true;
        }
    }

    /// Every record whole and once, each program's in order, all synced ones there.
    pub fn check_log(&self, log: usize, bytes: &[u8]) -> Result<(), Violation> {
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
            seen.insert((log, actor, number));
        }
        let synced = self.synced.borrow();
        let mut lost = synced.iter().filter(|record| record.0 == log && !seen.contains(record));
        match lost.next() {
            None => Ok(()),
            Some((_, actor, number)) => Err(wrong(format!("{actor:?}'s synced record {number} is lost"))),
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
    use cfs_wire::meta::LockFamily;

    #[test]
    fn a_lost_a_repeated_and_a_torn_record_are_told_apart() {
        let sideline = Sideline::default();
        let actor = ActorId(2);
        let (first, one) = sideline.next_record(0, actor);
        let (second, two) = sideline.next_record(0, actor);
        sideline.record_synced(0, actor, first);
        assert_eq!((first, second), (1, 2));
        let log = |parts: &[&[u8]]| sideline.check_log(0, &parts.concat()).map_err(|violation| violation.detail);
        assert_eq!(log(&[&one, &two]), Ok(()));
        assert_eq!(log(&[&one]), Ok(()), "the second was not synced");
        assert_eq!(log(&[&two]), Err("ActorId(2)'s synced record 1 is lost".into()));
        assert_eq!(log(&[&one, &one]), Err("record 1: ActorId(2)'s number 1 comes after its number 1".into()));
        assert!(log(&[&one, &two[..31]]).unwrap_err().contains("63 bytes"));
        assert!(log(&[&two[..16], &one[16..]]).unwrap_err().contains("damaged"));
        assert_eq!(sideline.check_log(1, b""), Ok(()), "another log holds others");
    }

    #[test]
    fn two_holders_are_one_too_many() {
        let sideline = Sideline::default();
        let lock = |kind, start, end| LockRequest { family: LockFamily::Posix, kind, start, end, owner: 1, pid: 1 };
        sideline.locked(ActorId(0), lock(LockKind::Read, 0, 9)).unwrap();
        sideline.locked(ActorId(1), lock(LockKind::Read, 5, 19)).unwrap();
        sideline.locked(ActorId(2), lock(LockKind::Write, 20, 29)).unwrap();
        let refused = sideline.locked(ActorId(2), lock(LockKind::Write, 19, 29)).unwrap_err();
        assert_eq!(refused.checker, Checker::Exclusion);
        sideline.created(ActorId(0), 1).unwrap();
        sideline.created(ActorId(0), 2).unwrap();
        assert_eq!(sideline.created(ActorId(1), 1).unwrap_err().checker, Checker::Exclusion);
    }

    #[test]
    fn a_name_is_there_if_it_was_created_and_not_removed() {
        let sideline = Sideline::default();
        let check = |numbers: &[u64]| {
            let names: Vec<Vec<u8>> = numbers.iter().copied().map(race_name).collect();
            sideline.check_race(&names).map_err(|violation| violation.detail)
        };
        assert_eq!(check(&[]), Ok(()));
        assert!(check(&[1]).unwrap_err().contains("name 1 is there"));
        sideline.created(ActorId(0), 1).unwrap();
        assert_eq!(check(&[1]), Ok(()));
        assert!(check(&[]).unwrap_err().contains("name 1 is gone"));
        sideline.racing(ActorId(0), 1);
        sideline.removing(1);
        sideline.died(ActorId(0));
        assert_eq!(check(&[]), Ok(()), "whoever died may have removed it");
        assert_eq!(check(&[1]), Ok(()), "or not");
        sideline.cleared();
        assert!(check(&[1]).unwrap_err().contains("name 1 is there"), "nothing brings it back");
        sideline.racing(ActorId(0), 2);
        sideline.died(ActorId(0));
        assert_eq!(check(&[2]), Ok(()), "whoever died may have created it");
    }

    #[test]
    fn a_file_is_where_its_movers_left_it() {
        let sideline = Sideline::default();
        let check = |place: &[usize]| sideline.check_moves(&[place.to_vec()]).map_err(|violation| violation.detail);
        assert_eq!(check(&[0]), Ok(()));
        sideline.moved(ActorId(0), 0, Some(1));
        assert!(check(&[0]).unwrap_err().contains("1 times more"));
        assert_eq!(check(&[1]), Ok(()));
        sideline.moved(ActorId(1), 0, Some(1));
        assert!(check(&[1]).unwrap_err().contains("2 times more"), "two were told that they moved it there");
        sideline.moving(ActorId(1), 0);
        sideline.died(ActorId(1));
        assert_eq!(check(&[0]), Ok(()), "whoever died may have moved it back");
        assert!(check(&[]).unwrap_err().contains("0 places"));
        assert!(check(&[0, 1]).unwrap_err().contains("2 places"));
    }

    #[test]
    fn a_listing_lacks_nothing_that_lasts_and_repeats_nothing() {
        let sideline = Sideline::default();
        let mut names: Vec<Vec<u8>> = (0..LASTING_NAMES).map(lasting_name).collect();
        assert_eq!(sideline.check_listing(&names), Ok(()));
        names.push(lasting_name(3));
        assert!(sideline.check_listing(&names).unwrap_err().detail.contains("twice"));
        names.truncate(5);
        assert!(sideline.check_listing(&names).unwrap_err().detail.contains("lasting5"));
    }
}
