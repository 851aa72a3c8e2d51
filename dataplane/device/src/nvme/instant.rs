//! A controller that answers the moment its doorbell rings, and moves no data: what a run on it takes is
//! the driver's own, once what this takes by itself is subtracted. For measurements only.
//!
//! It is brought up as a [`Model`], and answers the I/O queue itself from [`Instant::begin`] on.

use super::bus::{Bus, SharedMemory};
use super::model::{Model, ModelOptions, RawQueue};
use super::spec::{Completion, Status, register};
use crate::DeviceResult;
use cfs_reactor::Handle;
use std::cell::Cell;
use std::rc::Rc;

const IO_QUEUE: u16 = 1;
const STRIDE: usize = 4;
const IO_TAIL: usize = register::DOORBELLS + 2 * STRIDE;
const IO_HEAD: usize = IO_TAIL + STRIDE;

/// Where it is in its one pair of I/O queues.
#[derive(Clone, Copy)]
struct Rings {
    queue: RawQueue,
    head: u16,
    tail: u16,
    phase: bool,
}

/// See the module.
pub struct Instant {
    model: Rc<Model>,
    rings: Cell<Option<Rings>>,
    commands: Cell<u64>,
    doorbells: Cell<u64>,
}

impl Instant {
    pub fn new(options: ModelOptions, handle: &Handle) -> Rc<Instant> {
        let model = Model::new(options, 1);
        model.serve(handle);
        Rc::new(Instant { model, rings: Cell::new(None), commands: Cell::new(0), doorbells: Cell::new(0) })
    }

    /// Takes over the I/O queue that a driver has made, and that nothing was asked of yet.
    ///
    /// # Panics
    /// If there is none.
    pub fn begin(&self) {
        let queue = self.model.raw_queue(IO_QUEUE).expect("a driver has made its I/O queue");
        self.rings.set(Some(Rings { queue, head: 0, tail: 0, phase: true }));
    }

    /// Commands answered, and doorbells rung, since [`Instant::begin`].
    pub fn counts(&self) -> (u64, u64) {
        (self.commands.get(), self.doorbells.get())
    }

    /// Answers so many commands, so many at a time, that nobody asked for: what is in the queue, again and
    /// again. The driver whose queue it is must not be used any more.
    pub fn answer_alone(&self, commands: u64, lot: u16) {
        let mut left = commands;
        while left > 0 {
            let Some(rings) = self.rings.get() else { return };
            let lot = left.min(u64::from(lot)) as u16;
            left -= u64::from(lot);
            self.ring(rings, (rings.head + lot) % rings.queue.entries);
        }
    }

    fn ring(&self, mut rings: Rings, tail: u16) {
        self.doorbells.set(self.doorbells.get() + 1);
        while rings.head != tail {
            let command = rings.queue.submission(rings.head);
            rings.head += 1;
            if rings.head == rings.queue.entries {
                rings.head = 0;
            }
            self.commands.set(self.commands.get() + 1);
            let completion = Completion::new(0, IO_QUEUE, rings.head, command.id(), Status::SUCCESS, rings.phase);
            rings.queue.complete(rings.tail, completion);
            rings.tail += 1;
            if rings.tail == rings.queue.entries {
                rings.tail = 0;
                rings.phase = !rings.phase;
            }
        }
        self.rings.set(Some(rings));
    }
}

impl Bus for Rc<Instant> {
    fn name(&self) -> &str {
        "instant"
    }

    fn register_bytes(&self) -> usize {
        self.model.register_bytes()
    }

    fn read32(&self, offset: usize) -> u32 {
        self.model.read32(offset)
    }

    fn write32(&self, offset: usize, value: u32) {
        match (offset, self.rings.get()) {
            (IO_TAIL, Some(rings)) => self.ring(rings, value as u16),
            (IO_HEAD, Some(_)) => self.doorbells.set(self.doorbells.get() + 1),
            _ => self.model.write32(offset, value),
        }
    }

    fn allocate(&self, bytes: usize) -> DeviceResult<SharedMemory> {
        self.model.allocate(bytes)
    }

    fn device_address(&self, bytes: &[u8]) -> Option<u64> {
        self.model.device_address(bytes)
    }

    fn cut_off(&self) {
        self.rings.set(None);
        self.model.cut_off();
    }
}
