//! One io_uring per executor, shared by its devices and sockets.
//!
//! [`Ring`] starts operations; each is a future that owns the memory the kernel works on.
//! [`RingDriver`] submits what was queued, once per turn of the executor, and wakes the tasks
//! whose operations completed. An operation starts when its method is called; dropping its
//! future cancels it, and the memory stays with the ring until the kernel is done with it.
//!
//! Soundness rests on three rules. Memory the kernel may touch is on the heap and never moves.
//! It is freed only after its completion was reaped: until then it belongs to the future, or, once
//! that is dropped, to the ring. The ring waits for all of it before it goes away, and since a
//! future holds the ring, the ring outlives every future.

mod core;
mod driver;
mod file;
mod nvme;
mod operation;
mod sockets;
#[cfg(test)]
mod tests;

pub use self::core::{Layout, Plain, RingError, Wide};
pub use driver::RingDriver;
pub use file::RingFile;
pub use nvme::{NvmeCommand, NvmeData};
pub use operation::{Command, Operation};
pub use rustix::io::Errno;
pub use sockets::{Accept, Connect};

use self::core::{Completions, Core};
use bytes::Bytes;
use io_uring::{opcode, types};
use operation::Kept;
use std::cell::{OnceCell, RefCell};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

/// Submissions queued for polled devices; more take a call of their own.
const POLLED_ENTRIES: u32 = 256;
/// Commands that can follow one that takes long, before they have to wait for it ([`Layout::ENTRIES_STAY`]).
const COMMAND_ENTRIES: u32 = 4096;

/// Parts of one vectored call at most (Linux UIO_MAXIOV).
pub const PARTS_MAX: usize = 1024;

/// An io_uring and the operations under way on it. Lives on the thread that made it.
pub struct Ring<L: Layout = Plain> {
    core: RefCell<Core<L>>,
    beside: Beside,
}

/// Rings that are driven together with an executor's first one, for what that can't do. Each is made when
/// first asked for.
#[derive(Default)]
struct Beside {
    polled: OnceCell<Rc<Ring>>,
    commands: OnceCell<Rc<Ring<Wide>>>,
    polled_commands: OnceCell<Rc<Ring<Wide>>>,
}

fn raw(fd: &Rc<OwnedFd>) -> types::Fd {
    types::Fd(fd.as_raw_fd())
}

/// One iovec per part. The vector's heap memory is what the kernel reads; it must be kept.
fn iovecs(parts: &[Bytes]) -> Vec<libc::iovec> {
    let entry = |part: &Bytes| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
    parts.iter().map(entry).collect()
}

/// The ring in a place beside the first one.
fn beside<L: Layout>(place: &OnceCell<Rc<Ring<L>>>, entries: u32, kind: Completions) -> Result<Rc<Ring<L>>, RingError> {
    if let Some(ring) = place.get() {
        return Ok(ring.clone());
    }
    let ring = Ring::with(entries, kind)?;
    Ok(place.get_or_init(|| ring).clone())
}

impl<L: Layout> Ring<L> {
    fn with(entries: u32, kind: Completions) -> Result<Rc<Ring<L>>, RingError> {
        Ok(Rc::new(Ring { core: RefCell::new(Core::new(entries, kind)?), beside: Beside::default() }))
    }

    /// Operations whose completion has not been reaped, cancelled ones included.
    pub fn in_flight(&self) -> usize {
        self.core.borrow().in_flight()
    }
}

impl Ring {
    /// A ring for `entries` queued submissions. Completions are not bounded by it.
    pub fn new(entries: u32) -> Result<Rc<Ring>, RingError> {
        Ring::with(entries, Completions::Announced)
    }

    /// The ring beside this one on which completions are polled for (IORING_SETUP_IOPOLL). It takes reads
    /// and writes of files, and while any is under way the executor does not sleep.
    pub fn polled(&self) -> Result<Rc<Ring>, RingError> {
        beside(&self.beside.polled, POLLED_ENTRIES, Completions::Polled)
    }

    /// The ring beside this one that takes commands of devices, and wakes who sleeps in this one.
    pub fn commands(&self) -> Result<Rc<Ring<Wide>>, RingError> {
        beside(&self.beside.commands, COMMAND_ENTRIES, Completions::Signalled)
    }

    /// The same, on which completions are polled for.
    pub fn polled_commands(&self) -> Result<Rc<Ring<Wide>>, RingError> {
        beside(&self.beside.polled_commands, COMMAND_ENTRIES, Completions::Polled)
    }

    /// What `Executor::run` drives this ring with.
    pub fn driver(self: &Rc<Self>) -> RingDriver {
        RingDriver::new(self.clone())
    }

    /// Ends when the descriptor has something to read, or its peer hung up.
    pub fn poll_readable(self: &Rc<Self>, fd: &Rc<OwnedFd>) -> Command {
        let entry = opcode::PollAdd::new(raw(fd), libc::POLLIN as u32).build();
        // SAFETY: refers to no memory.
        Command(unsafe { Operation::start(self, entry, Kept::new((), fd.clone()), false) })
    }
}

/// The kernel transfers at most 2 GiB less a page at once; more is a short transfer.
fn clamp(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}
