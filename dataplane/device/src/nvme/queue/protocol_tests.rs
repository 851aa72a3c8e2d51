//! The rings and the doorbells against a controller on a thread of its own, in every order of their
//! accesses with two interruptions: cargo test -p cfs-device --features loom protocol_tests
//!
//! The host is the code of [`super`] on memory of loom; it pushes, rings, takes and acknowledges as a turn of
//! [`crate::nvme::controller`] does. The controller does what the specification says and no more: it fetches
//! up to the tail doorbell, writes the dword with the phase tag last, does not write over what was not
//! acknowledged, and sleeps until a register is written. With doorbells in memory it says up to where it
//! has seen and looks once more before it sleeps (section 5.8). A lost wake-up is a deadlock here, and loom
//! reports it; an entry, a completion or data that was read too early has the wrong contents.
//!
//! What it does not show: loom does not let a read happen after a later write of the same thread, so that
//! it does not matter here whether an entry was read before it is given back. Memory is words of 32 bits,
//! each read and written at once: how an access that is wider or narrower is torn is not tried, but every
//! order of its words is. Registers and interrupts are as ordered as [`Bus`] says; how a bus does that is
//! not seen here.

use super::*;
use crate::nvme::memory::{LEFT_OUT, Words};
use crate::nvme::spec::Status;
use loom::model::Builder;
use loom::sync::Notify;
use loom::sync::atomic::{AtomicU32, fence};
use loom::thread;
use std::ptr::NonNull;
use std::sync::Arc;

const TAIL: usize = 0;
const HEAD: usize = 1;
/// Of the pair.
const ID: u16 = 0;

/// The controller's registers as both see them.
struct Registers {
    doorbells: [AtomicU32; 2],
    /// One was written.
    written: Notify,
}

struct Wire(Arc<Registers>);

impl Bus for Wire {
    fn name(&self) -> &str {
        "loom"
    }

    fn register_bytes(&self) -> usize {
        register::DOORBELLS + 8
    }

    fn read32(&self, offset: usize) -> u32 {
        unreachable!("the rings read no register, and not {offset:#x}")
    }

    fn write32(&self, offset: usize, value: u32) {
        self.0.doorbells[(offset - register::DOORBELLS) / 4].store(value, Ordering::Release);
        self.0.written.notify();
    }

    fn allocate(&self, bytes: usize) -> DeviceResult<SharedMemory> {
        // Of a page of doorbells only these are used, and loom's words are dear.
        let bytes = if bytes == PAGE { 8 } else { bytes };
        // SAFETY: with the feature it is memory of loom, and nothing is at this address.
        Ok(unsafe { SharedMemory::new(NonNull::dangling(), bytes, 0, Box::new(())) })
    }

    fn device_address(&self, _: &[u8]) -> Option<u64> {
        None
    }

    fn cut_off(&self) {}
}

#[derive(Clone, Copy)]
struct Case {
    entries: u16,
    commands: u16,
    shadow: bool,
    /// A doorbell for each command, or for all that fit.
    ring_each: bool,
}

impl Case {
    /// Commands under way at most.
    fn places(self) -> u16 {
        self.entries - 1
    }

    fn steps(self, from: u16, to: u16) -> u16 {
        (to + self.entries - from) % self.entries
    }
}

/// What a command has in it, in its data, and in what is read.
fn command(number: u16) -> Command {
    Command::new(1, 0).with_id(number).with(15, 100 + u32::from(number))
}

fn written(number: u16) -> u32 {
    200 + u32::from(number)
}

fn answer(number: u16) -> u32 {
    300 + u32::from(number)
}

struct Device {
    case: Case,
    submissions: Words,
    completions: Words,
    /// Values, and what was seen of them.
    shadow: Option<[Words; 2]>,
    registers: Arc<Registers>,
    /// A word for each command that can be under way, written by the host and then by the device.
    data: Words,
    posted: Arc<Notify>,
    /// The doorbells as they were last seen.
    known: [u16; 2],
    unacknowledged: u16,
}

impl Device {
    fn run(mut self) {
        let Case { entries, commands, .. } = self.case;
        for number in 0..commands {
            let at = number % entries;
            while self.known[TAIL] == at {
                self.wait(TAIL);
            }
            self.fetch(number, usize::from(at));
            self.look(HEAD);
            while self.unacknowledged == entries - 1 {
                self.wait(HEAD);
            }
            self.post(number, usize::from(at));
        }
    }

    fn fetch(&self, number: u16, at: usize) {
        let expected = command(number);
        let expected: &[u32; 16] = bytemuck::cast_ref(&expected);
        for dword in [0, 15] {
            let found = self.submissions[at * 16 + dword].load(Ordering::Relaxed);
            assert_eq!(found, expected[dword], "dword {dword} of command {number}");
        }
        let data = &self.data[usize::from(number % self.case.places())];
        assert_eq!(data.load(Ordering::Relaxed), written(number), "what command {number} writes");
        data.store(answer(number), Ordering::Relaxed);
    }

    fn post(&mut self, number: u16, at: usize) {
        let round = number / self.case.entries;
        let head = (number + 1) % self.case.entries;
        let completion = Completion::new(answer(number), ID, head, number, Status::SUCCESS, round.is_multiple_of(2));
        let [first @ .., last] = completion.dwords;
        for (dword, value) in first.into_iter().enumerate() {
            self.completions[at * 4 + dword].store(value, Ordering::Relaxed);
        }
        fence(Ordering::Release);
        self.completions[at * 4 + 3].store(last, Ordering::Relaxed);
        self.unacknowledged += 1;
        // The host has nothing of this but that it need not look all the time.
        self.posted.notify();
    }

    /// Whether a doorbell has changed.
    fn look(&mut self, doorbell: usize) -> bool {
        let value = match &self.shadow {
            None => self.registers.doorbells[doorbell].load(Ordering::Acquire),
            Some([values, _]) => {
                let value = values[doorbell].load(Ordering::Relaxed);
                fence(Ordering::Acquire);
                value
            }
        };
        assert!(value < self.case.entries.into(), "doorbell {doorbell} says {value}");
        let before = std::mem::replace(&mut self.known[doorbell], value as u16);
        let steps = self.case.steps(before, value as u16);
        if doorbell == HEAD {
            assert!(steps <= self.unacknowledged, "{steps} of {} are acknowledged", self.unacknowledged);
            self.unacknowledged -= steps;
        }
        steps > 0
    }

    /// Until a doorbell has changed.
    fn wait(&mut self, doorbell: usize) {
        while !self.look(doorbell) {
            if let Some([_, seen]) = &self.shadow {
                seen[doorbell].store(self.known[doorbell].into(), Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if self.look(doorbell) {
                    return;
                }
            }
            self.registers.written.wait();
        }
    }
}

fn run(case: Case) {
    let Case { entries, commands, .. } = case;
    let registers = Arc::new(Registers { doorbells: [AtomicU32::new(0), AtomicU32::new(0)], written: Notify::new() });
    let bus = Wire(registers.clone());
    let mut queue = QueuePair::new(&bus, ID, entries, Capabilities(0)).expect("there is memory");
    let shadow = case.shadow.then(|| Rc::new(ShadowDoorbells::new(&bus).expect("there is memory")));
    let data = bus.allocate(usize::from(case.places()) * 4).expect("there is memory").words();
    let posted = Arc::new(Notify::new());
    let device = Device {
        case,
        submissions: queue.submissions.words(),
        completions: queue.completions.words(),
        shadow: shadow.as_ref().map(|shadow| [shadow.values.words(), shadow.seen.words()]),
        registers,
        data: data.clone(),
        posted: posted.clone(),
        known: [0, 0],
        unacknowledged: 0,
    };
    queue.use_shadow(shadow);
    let device = thread::spawn(move || device.run());

    let data = |number: u16| &data[usize::from(number % case.places())];
    let (mut sent, mut taken) = (0, 0);
    while taken < commands {
        while sent < commands && sent - taken < case.places() {
            data(sent).store(written(sent), Ordering::Relaxed);
            queue.push(command(sent));
            sent += 1;
            if case.ring_each {
                queue.ring(&bus);
            }
        }
        queue.ring(&bus);
        let before = taken;
        while let Some(completion) = queue.take() {
            let head = (taken + 1) % entries;
            let expected = (taken, answer(taken), head, Status::SUCCESS);
            let found = (completion.id(), completion.result(), completion.submission_head(), completion.status());
            assert_eq!(found, expected, "completion {taken}");
            assert_eq!(data(taken).load(Ordering::Relaxed), answer(taken), "what command {taken} reads");
            taken += 1;
        }
        queue.acknowledge(&bus);
        if taken == before {
            posted.wait();
        }
    }
    device.join().expect("the controller is well");
}

/// Every order in which a thread is interrupted so many times; all of them would be too many.
fn check(case: Case, interruptions: usize) {
    let mut model = Builder::new();
    model.max_branches = 10_000;
    model.preemption_bound = Some(interruptions);
    model.check(move || run(case));
}

/// Begun anew once.
#[test]
fn two_entries() {
    check(Case { entries: 2, commands: 3, shadow: false, ring_each: false }, 2);
}

#[test]
fn two_entries_with_doorbells_in_memory() {
    check(Case { entries: 2, commands: 3, shadow: true, ring_each: false }, 2);
}

/// Through rounds of both phases and into the first again, and longer rings.
#[test]
fn several_rounds() {
    for shadow in [false, true] {
        check(Case { entries: 2, commands: 5, shadow, ring_each: false }, 1);
        check(Case { entries: 3, commands: 4, shadow, ring_each: true }, 1);
        check(Case { entries: 4, commands: 5, shadow, ring_each: true }, 1);
    }
}

/// The model is able to fail: each of the fences of the host is needed.
fn check_without(fence: Ordering) {
    LEFT_OUT.set(Some(fence));
    check(Case { entries: 2, commands: 3, shadow: true, ring_each: false }, 2);
}

#[test]
#[should_panic(expected = "dword 0 of command")]
fn an_entry_is_read_too_early_without_the_fence_before_the_doorbell() {
    check_without(Ordering::Release);
}

#[test]
#[should_panic(expected = ": completion")]
fn a_completion_is_read_too_early_without_the_fence_behind_its_phase() {
    check_without(Ordering::Acquire);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_wake_up_is_lost_without_the_fence_behind_the_doorbell() {
    check_without(Ordering::SeqCst);
}
