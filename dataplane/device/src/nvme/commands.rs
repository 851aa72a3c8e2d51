//! What became of every command on an I/O queue. The lower half of a command's identifier is its place
//! here.

use super::spec::{Command, Completion, Status};
use cfs_reactor::Instant;
use std::any::Any;
use std::task::Waker;

/// The highest number of a place.
const PLACES_MAX: u16 = 0xFF;

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
    /// The controller has it, or is to get it, and a future waits for it: once that was polled, by the
    /// slot's waker.
    Waiting {
        polled: bool,
    },
    /// The same, and nobody waits; what it works on is kept here.
    Orphaned(Box<dyn Any>),
    /// Ended, and not fetched by its future yet.
    Ended(Outcome),
}

struct Slot {
    progress: Progress,
    /// Of whoever waits, or waited here before: the next one is often the same task, and cloning a waker is
    /// not cheap.
    waker: Option<Waker>,
    command: Command,
    since: Instant,
    /// How often the controller was given it.
    sent: u8,
    /// The upper half of the command's identifier: a late answer to the one before is not taken for one to
    /// the next.
    generation: u8,
}

impl Slot {
    fn lives(&self) -> bool {
        matches!(self.progress, Progress::Waiting { .. } | Progress::Orphaned(_))
    }
}

/// What is to be done when all completions were taken in.
#[derive(Default)]
pub(super) struct Harvest {
    /// Commands that ended, and whose futures wait.
    pub ended: Vec<u16>,
    /// Dropped once no borrow is held: that runs other people's code.
    pub released: Vec<Box<dyn Any>>,
}

pub(super) struct Commands {
    slots: Vec<Slot>,
    free: Vec<u16>,
}

impl Commands {
    pub fn new(count: u16) -> Commands {
        assert!(count <= PLACES_MAX, "{count} places");
        let slot = || Slot {
            progress: Progress::Free,
            waker: None,
            command: Command::default(),
            since: Instant::default(),
            sent: 0,
            generation: 0,
        };
        Commands { slots: (0..count).map(|_| slot()).collect(), free: (0..count).rev().collect() }
    }

    #[inline]
    pub fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// A free place; the caller has a permit for it.
    #[inline]
    pub fn take(&mut self) -> u16 {
        self.free.pop().expect("whoever has a permit finds a place")
    }

    /// `sent`: the controller is given it now, not after the reset that is under way.
    #[inline]
    pub fn start(&mut self, id: u16, command: Command, now: Instant, sent: bool) -> Command {
        let slot = &mut self.slots[usize::from(id)];
        slot.generation = slot.generation.wrapping_add(1);
        let command = command.with_id(id | u16::from(slot.generation) << 8);
        slot.progress = Progress::Waiting { polled: false };
        (slot.command, slot.since, slot.sent) = (command, now, sent.into());
        command
    }

    /// Wakes whoever waits for a command. Wakers only note that a task is to run.
    #[inline]
    pub fn wake(&self, id: u16) {
        if let Some(waker) = &self.slots[usize::from(id)].waker {
            waker.wake_by_ref();
        }
    }

    /// The wakers of those that wait no more; nobody does now.
    pub fn take_wakers(&mut self) -> Vec<Waker> {
        self.slots.iter_mut().filter(|slot| !slot.lives()).filter_map(|slot| slot.waker.take()).collect()
    }

    #[inline]
    fn release(&mut self, id: u16) -> Progress {
        self.free.push(id);
        std::mem::replace(&mut self.slots[usize::from(id)].progress, Progress::Free)
    }

    /// How the command ended, or `None` after noting whom to wake.
    #[inline]
    pub fn poll(&mut self, id: u16, waker: &Waker) -> Option<Outcome> {
        let slot = &mut self.slots[usize::from(id)];
        match &mut slot.progress {
            Progress::Ended(outcome) => {
                let outcome = *outcome;
                self.release(id);
                Some(outcome)
            }
            Progress::Waiting { polled } => {
                *polled = true;
                match &mut slot.waker {
                    // Only where it is another task's.
                    Some(current) => current.clone_from(waker),
                    None => slot.waker = Some(waker.clone()),
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
    #[inline]
    pub fn complete(&mut self, completion: &Completion, harvest: &mut Harvest) -> bool {
        let id = completion.id() & PLACES_MAX;
        let asked = |slot: &Slot| slot.lives() && slot.command.id() == completion.id();
        let lives = self.slots.get(usize::from(id)).is_some_and(asked);
        if lives {
            self.end(id, Outcome::Completed(completion.status()), harvest);
        }
        lives
    }

    #[inline]
    fn end(&mut self, id: u16, outcome: Outcome, harvest: &mut Harvest) {
        let progress = &mut self.slots[usize::from(id)].progress;
        match std::mem::replace(progress, Progress::Ended(outcome)) {
            Progress::Waiting { polled: true } => harvest.ended.push(id),
            Progress::Waiting { polled: false } => {}
            Progress::Orphaned(kept) => {
                self.release(id);
                harvest.released.push(kept);
            }
            before => *progress = before,
        }
    }

    /// By what the controller knows the command in a place.
    pub fn identifier(&self, id: u16) -> u16 {
        self.slots[usize::from(id)].command.id()
    }

    pub fn any_lives(&self) -> bool {
        self.slots.iter().any(Slot::lives)
    }

    /// What the controller has, or is to get.
    fn living(&self) -> Vec<u16> {
        (0u16..).zip(&self.slots).filter(|(_, slot)| slot.lives()).map(|(id, _)| id).collect()
    }

    /// The commands that the controller has had since before this time.
    pub fn older_than(&self, time: Instant) -> Vec<u16> {
        self.living().into_iter().filter(|id| self.slots[usize::from(*id)].since < time).collect()
    }

    /// After the controller was reset, and touches no memory any more: what it has to be told, oldest first.
    /// What it was given so often already, and what nobody waits for, ends here. Writes go without a
    /// placement identifier: whether it still takes those is not known yet, and without is always right.
    ///
    /// All of them may be carried out twice: reads, writes of the same bytes to the same blocks,
    /// which nobody else writes while they are under way, flushes and deallocations.
    pub fn after_reset(&mut self, now: Instant, sent_max: u8, harvest: &mut Harvest) -> Vec<Command> {
        let mut again = Vec::new();
        for id in self.living() {
            let slot = &mut self.slots[usize::from(id)];
            match slot.progress {
                Progress::Orphaned(_) => self.end(id, Outcome::Gone, harvest),
                _ if slot.sent == sent_max => self.end(id, Outcome::TimedOut, harvest),
                _ => {
                    slot.sent += 1;
                    slot.command = slot.command.without_placement();
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
