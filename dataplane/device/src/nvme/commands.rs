//! What became of every command on an I/O queue. A command's identifier is its place here.

use super::spec::{Command, Completion, Status};
use cfs_reactor::Instant;
use std::any::Any;
use std::task::Waker;

/// How a command ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    Completed(Status),
    /// The controller did not answer, also not after it was reset and asked again.
    TimedOut,
    /// The controller is gone, or could not be reset.
    Gone,
}

enum Progress {
    Free,
    /// The controller has it, or is to get it, and a future waits for it.
    Waiting(Option<Waker>),
    /// The same, and nobody waits; what it works on is kept here.
    Orphaned(Box<dyn Any>),
    /// Ended, and not fetched by its future yet.
    Ended(Outcome),
}

struct Slot {
    progress: Progress,
    command: Command,
    since: Instant,
    resets: u8,
}

/// What is to be done once no borrow is held: both run other people's code.
#[derive(Default)]
pub(super) struct Harvest {
    pub wakers: Vec<Waker>,
    pub released: Vec<Box<dyn Any>>,
}

pub(super) struct Commands {
    slots: Vec<Slot>,
    free: Vec<u16>,
}

impl Commands {
    pub fn new(count: u16) -> Commands {
        let slot =
            || Slot { progress: Progress::Free, command: Command::default(), since: Instant::default(), resets: 0 };
        Commands { slots: (0..count).map(|_| slot()).collect(), free: (0..count).rev().collect() }
    }

    pub fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// A free place; the caller has a permit for it.
    pub fn take(&mut self) -> u16 {
        self.free.pop().expect("whoever has a permit finds a place")
    }

    pub fn start(&mut self, id: u16, command: Command, now: Instant) -> Command {
        let command = command.with_id(id);
        self.slots[usize::from(id)] = Slot { progress: Progress::Waiting(None), command, since: now, resets: 0 };
        command
    }

    fn release(&mut self, id: u16) -> Progress {
        self.free.push(id);
        std::mem::replace(&mut self.slots[usize::from(id)].progress, Progress::Free)
    }

    /// How the command ended, or `None` after noting whom to wake.
    pub fn poll(&mut self, id: u16, waker: &Waker) -> Option<Outcome> {
        match &mut self.slots[usize::from(id)].progress {
            Progress::Ended(outcome) => {
                let outcome = *outcome;
                self.release(id);
                Some(outcome)
            }
            Progress::Waiting(current) => {
                match current {
                    Some(current) => current.clone_from(waker),
                    None => *current = Some(waker.clone()),
                }
                None
            }
            Progress::Free | Progress::Orphaned(_) => unreachable!("a command that is waited for has its place"),
        }
    }

    /// Nobody waits any more: keeps what the command works on until the controller is done with it, or
    /// gives it back.
    pub fn orphan(&mut self, id: u16, kept: Box<dyn Any>) -> Option<Box<dyn Any>> {
        let progress = &mut self.slots[usize::from(id)].progress;
        if let Progress::Ended(_) = progress {
            self.release(id);
            return Some(kept);
        }
        *progress = Progress::Orphaned(kept);
        None
    }

    /// Takes a completion in. False if there is no such command: the controller made it up.
    pub fn complete(&mut self, completion: &Completion, harvest: &mut Harvest) -> bool {
        let id = completion.id();
        match self.slots.get(usize::from(id)).map(|slot| &slot.progress) {
            Some(Progress::Waiting(_) | Progress::Orphaned(_)) => {
                self.end(id, Outcome::Completed(completion.status()), harvest);
                true
            }
            _ => false,
        }
    }

    fn end(&mut self, id: u16, outcome: Outcome, harvest: &mut Harvest) {
        let progress = &mut self.slots[usize::from(id)].progress;
        match std::mem::replace(progress, Progress::Ended(outcome)) {
            Progress::Waiting(waker) => harvest.wakers.extend(waker),
            Progress::Orphaned(kept) => {
                self.release(id);
                harvest.released.push(kept);
            }
            before => *progress = before,
        }
    }

    /// What the controller has, or is to get.
    fn living(&self) -> Vec<u16> {
        let lives = |slot: &Slot| matches!(slot.progress, Progress::Waiting(_) | Progress::Orphaned(_));
        (0u16..).zip(&self.slots).filter(|(_, slot)| lives(slot)).map(|(id, _)| id).collect()
    }

    /// The commands that the controller has had since before this time.
    pub fn older_than(&self, time: Instant) -> Vec<u16> {
        self.living().into_iter().filter(|id| self.slots[usize::from(*id)].since < time).collect()
    }

    /// After the controller was reset, and touches no memory any more: what it has to be told again, oldest
    /// first. What was asked for twice already, and those that nobody waits for, end here.
    ///
    /// All of them may be carried out twice: reads, writes of the same bytes to the same blocks,
    /// which nobody else writes while they are under way, flushes and deallocations.
    pub fn after_reset(&mut self, now: Instant, again_max: u8, harvest: &mut Harvest) -> Vec<Command> {
        let mut again = Vec::new();
        for id in self.living() {
            let slot = &mut self.slots[usize::from(id)];
            match slot.progress {
                Progress::Orphaned(_) => self.end(id, Outcome::Gone, harvest),
                _ if slot.resets == again_max => self.end(id, Outcome::TimedOut, harvest),
                _ => {
                    slot.resets += 1;
                    again.push((slot.since, slot.command));
                    slot.since = now;
                }
            }
        }
        again.sort_by_key(|(since, _)| *since);
        again.into_iter().map(|(_, command)| command).collect()
    }

    /// The controller is gone.
    pub fn end_all(&mut self, harvest: &mut Harvest) {
        for id in self.living() {
            self.end(id, Outcome::Gone, harvest);
        }
    }
}
