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
mod operation;
mod sockets;
#[cfg(test)]
mod tests;

pub use self::core::RingError;
pub use driver::RingDriver;
pub use operation::{Command, Operation};
pub use rustix::io::Errno;
pub use sockets::{Accept, Connect};

use self::core::Core;
use crate::buffer::DmaBuf;
use bytes::Bytes;
use io_uring::{opcode, types};
use operation::{Extra, Kept};
use rustix::fs::FallocateFlags;
use rustix::io::ReadWriteFlags;
use std::cell::RefCell;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

/// Parts of one vectored call at most (Linux UIO_MAXIOV).
pub const PARTS_MAX: usize = 1024;

/// An offset that means the file's own position: for pipes, eventfds, character devices.
pub const AT_POSITION: u64 = u64::MAX;

/// An io_uring and the operations under way on it. Lives on the thread that made it.
pub struct Ring {
    core: RefCell<Core>,
}

fn raw(fd: &Rc<OwnedFd>) -> types::Fd {
    types::Fd(fd.as_raw_fd())
}

/// One iovec per part. The vector's heap memory is what the kernel reads; it must be kept.
fn iovecs(parts: &[Bytes]) -> Vec<libc::iovec> {
    let entry = |part: &Bytes| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
    parts.iter().map(entry).collect()
}

impl Ring {
    /// A ring for `entries` queued submissions. Completions are not bounded by it.
    pub fn new(entries: u32) -> Result<Rc<Ring>, RingError> {
        Ok(Rc::new(Ring { core: RefCell::new(Core::new(entries)?) }))
    }

    /// What `Executor::run` drives this ring with.
    pub fn driver(self: &Rc<Self>) -> RingDriver {
        RingDriver::new(self.clone())
    }

    /// Operations whose completion has not been reaped, cancelled ones included.
    pub fn in_flight(&self) -> usize {
        self.core.borrow().in_flight()
    }

    /// Reads up to the whole buffer. May read less.
    pub fn read_at(self: &Rc<Self>, fd: &Rc<OwnedFd>, buffer: DmaBuf, offset: u64) -> Operation<DmaBuf> {
        let range = 0..buffer.len();
        self.read_range_at(fd, buffer, range, offset)
    }

    /// Reads into a part of the buffer. May read less.
    ///
    /// # Panics
    /// If `range` lies outside the buffer.
    pub fn read_range_at(
        self: &Rc<Self>,
        fd: &Rc<OwnedFd>,
        mut buffer: DmaBuf,
        range: Range<usize>,
        offset: u64,
    ) -> Operation<DmaBuf> {
        let target = &mut buffer[range];
        let (pointer, length) = (target.as_mut_ptr(), clamp(target.len()));
        let entry = opcode::Read::new(raw(fd), pointer, length).offset(offset).build();
        // SAFETY: the buffer's heap memory is kept in the operation and only ever freed by its
        // completion; nothing else refers to it.
        unsafe { Operation::start(self, entry, Kept::new(buffer, fd), false) }
    }

    /// Writes `parts`, at most [`PARTS_MAX`], one after the other. May write less.
    pub fn write_at(
        self: &Rc<Self>,
        fd: &Rc<OwnedFd>,
        parts: Vec<Bytes>,
        offset: u64,
        flags: ReadWriteFlags,
    ) -> Operation<Vec<Bytes>> {
        let vectors = iovecs(&parts);
        let entry = opcode::Writev::new(raw(fd), vectors.as_ptr(), vectors.len() as u32)
            .offset(offset)
            .rw_flags(flags.bits() as i32)
            .build();
        // SAFETY: parts and vectors are kept; `Bytes` is never written through by anyone.
        unsafe { Operation::start(self, entry, Kept::new(parts, fd).with(Extra::Vectors(vectors)), false) }
    }

    /// Makes written data durable; with `datasync` without file times.
    pub fn sync(self: &Rc<Self>, fd: &Rc<OwnedFd>, datasync: bool) -> Command {
        let flags = if datasync { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
        let entry = opcode::Fsync::new(raw(fd)).flags(flags).build();
        // SAFETY: refers to no memory.
        Command(unsafe { Operation::start(self, entry, Kept::new((), fd), false) })
    }

    pub fn fallocate(self: &Rc<Self>, fd: &Rc<OwnedFd>, mode: FallocateFlags, offset: u64, length: u64) -> Command {
        let entry = opcode::Fallocate::new(raw(fd), length).offset(offset).mode(mode.bits() as i32).build();
        // SAFETY: refers to no memory.
        Command(unsafe { Operation::start(self, entry, Kept::new((), fd), false) })
    }

    /// Ends when the descriptor has something to read, or its peer hung up.
    pub fn poll_readable(self: &Rc<Self>, fd: &Rc<OwnedFd>) -> Command {
        let entry = opcode::PollAdd::new(raw(fd), libc::POLLIN as u32).build();
        // SAFETY: refers to no memory.
        Command(unsafe { Operation::start(self, entry, Kept::new((), fd), false) })
    }
}

/// The kernel transfers at most 2 GiB less a page at once; more is a short transfer.
fn clamp(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}
