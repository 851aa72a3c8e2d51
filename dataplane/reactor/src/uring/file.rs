//! Operations on files and block devices.
//!
//! A [`RingFile`] has a place in the ring's table of registered files, and memory of the arena is
//! registered as the ring's one fixed buffer: the kernel then neither looks up the file nor pins
//! pages for each operation. Where a registration is refused (an old kernel, a low limit of
//! locked memory) the same operations run the ordinary way.

use super::core::{Layout, Medium, Plain, SUBMIT_AT, SUBMIT_AT_BY_WORKER};
use super::operation::{Extra, Kept};
use super::{Command, Operation, Ring, clamp, iovecs};
use crate::arena;
use crate::buffer::DmaBuf;
use bytes::Bytes;
use cfs_wire::limits::PAGE;
use io_uring::{opcode, squeue, types};
use rustix::fs::{FallocateFlags, FileType, fstat, fstatfs};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};

/// The arena's place in the table of registered buffers.
pub(super) const ARENA: u16 = 0;
/// IORING_OP_WRITEV_FIXED (Linux 6.15), which the io-uring crate does not know yet.
pub(super) const WRITEV_FIXED: u8 = 61;
/// TMPFS_MAGIC, which the files of memfd_create have too.
const TMPFS: u64 = 0x0102_1994;

/// An open file or block device as one ring knows it.
pub struct RingFile<L: Layout = Plain> {
    pub(super) fd: OwnedFd,
    /// Its place in the ring's table of registered files.
    pub(super) slot: Option<u32>,
    /// Whether the kernel gives every read and write of it to a thread, having no other way not to
    /// wait for them.
    by_worker: bool,
    medium: Medium,
    ring: Weak<Ring<L>>,
}

impl<L: Layout> AsFd for RingFile<L> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<L: Layout> RingFile<L> {
    pub fn is_registered(&self) -> bool {
        self.slot.is_some()
    }

    /// Entries that are submitted together.
    pub(super) fn lot(&self) -> usize {
        if self.by_worker { SUBMIT_AT_BY_WORKER } else { SUBMIT_AT }
    }
}

/// Whether the file has no reads that don't wait. Asked where nothing is, so that none is done.
fn waits_always(fd: &OwnedFd) -> bool {
    const BEYOND_ALL: u64 = 1 << 62;
    let mut page = DmaBuf::uninitialised(PAGE);
    let into = &mut [IoSliceMut::new(&mut page)];
    preadv2(fd, into, BEYOND_ALL, ReadWriteFlags::NOWAIT) == Err(Errno::OPNOTSUPP)
}

/// Whether it is a regular file in memory; the nodes of devices are on a tmpfs too.
fn medium(fd: &OwnedFd) -> Medium {
    let regular = fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
    match regular && fstatfs(fd).is_ok_and(|system| system.f_type as u64 == TMPFS) {
        true => Medium::Memory,
        false => Medium::Device,
    }
}

impl<L: Layout> Drop for RingFile<L> {
    fn drop(&mut self) {
        // No operation on it is under way: each holds the file. A ring that is going away forgets
        // all its files.
        if let Some(ring) = self.ring.upgrade() {
            ring.core.borrow_mut().unregister_file(self.slot, self.medium);
        }
    }
}

/// An entry for a file by its place in the table, or by its descriptor.
macro_rules! entry {
    ($file:expr, $target:ident => $entry:expr) => {
        match $file.slot {
            Some(slot) => {
                let $target = types::Fixed(slot);
                $entry.build()
            }
            None => {
                let $target = types::Fd($file.fd.as_raw_fd());
                $entry.build()
            }
        }
    };
}
pub(super) use entry;

/// Turns a vectored write into one from registered memory.
fn from_arena(mut entry: squeue::Entry) -> squeue::Entry {
    const OPCODE_AT: usize = 0;
    const BUFFER_AT: usize = 40;
    const _: () = assert!(size_of::<squeue::Entry>() == 64);
    let raw = (&raw mut entry).cast::<u8>();
    // SAFETY: an entry is a plain io_uring_sqe, whose layout is the kernel's ABI: the opcode is
    // its first byte, the buffer's index the 16 bits at 40, which a Writev leaves 0.
    unsafe {
        raw.add(OPCODE_AT).write(WRITEV_FIXED);
        raw.add(BUFFER_AT).cast::<u16>().write(ARENA);
    }
    entry
}

impl<L: Layout> Ring<L> {
    /// Takes a file or device over. The first one makes the ring register the arena.
    pub fn file(self: &Rc<Self>, fd: OwnedFd) -> Rc<RingFile<L>> {
        let medium = medium(&fd);
        let slot = self.core.borrow_mut().register_file(&fd, medium);
        let by_worker = waits_always(&fd);
        Rc::new(RingFile { fd, slot, by_worker, medium, ring: Rc::downgrade(self) })
    }

    /// Whether operations on arena memory run without pinning it.
    pub fn has_registered_buffers(&self) -> bool {
        self.core.borrow().fixed.buffers
    }
}

impl Ring {
    /// Reads up to the whole buffer. May read less.
    pub fn read_at(self: &Rc<Self>, file: &Rc<RingFile>, buffer: DmaBuf, offset: u64) -> Operation<DmaBuf> {
        let range = 0..buffer.len();
        self.read_range_at(file, buffer, range, offset)
    }

    /// Reads into a part of the buffer. May read less.
    ///
    /// # Panics
    /// If `range` lies outside the buffer.
    pub fn read_range_at(
        self: &Rc<Self>,
        file: &Rc<RingFile>,
        mut buffer: DmaBuf,
        range: Range<usize>,
        offset: u64,
    ) -> Operation<DmaBuf> {
        let target = &mut buffer[range];
        // Nothing is pinned for a copy, and page by page it is slower than in one go (a twentieth
        // of the rate of 4 KiB reads).
        let fixed = file.medium == Medium::Device && self.core.borrow().fixed.buffers && arena::contains(target);
        let (pointer, length) = (target.as_mut_ptr(), clamp(target.len()));
        let entry = match fixed {
            true => entry!(file, target => opcode::ReadFixed::new(target, pointer, length, ARENA).offset(offset)),
            false => entry!(file, target => opcode::Read::new(target, pointer, length).offset(offset)),
        };
        // SAFETY: the buffer's memory is kept in the operation and only ever given back by its
        // completion; nothing else refers to it.
        unsafe { Operation::start_in_lots(self, entry, Kept::new(buffer, file.clone()), file.lot()) }
    }

    /// Writes `parts`, at most [`super::PARTS_MAX`], one after the other. May write less.
    pub fn write_at(
        self: &Rc<Self>,
        file: &Rc<RingFile>,
        parts: Vec<Bytes>,
        offset: u64,
        flags: ReadWriteFlags,
    ) -> Operation<Vec<Bytes>> {
        let flags = flags.bits() as i32;
        let fixed = {
            let fixed = self.core.borrow().fixed;
            fixed.buffers && (fixed.vectors || parts.len() == 1) && parts.iter().all(|part| arena::contains(part))
        };
        if let ([part], true) = (parts.as_slice(), fixed) {
            let (pointer, length) = (part.as_ptr(), clamp(part.len()));
            let entry = entry!(file, target => opcode::WriteFixed::new(target, pointer, length, ARENA)
                .offset(offset).rw_flags(flags));
            // SAFETY: the part is kept, and `Bytes` is never written through by anyone.
            return unsafe { Operation::start(self, entry, Kept::new(parts, file.clone()), false) };
        }
        let vectors = iovecs(&parts);
        let (pointer, count) = (vectors.as_ptr(), vectors.len() as u32);
        let entry = entry!(file, target => opcode::Writev::new(target, pointer, count).offset(offset).rw_flags(flags));
        let entry = if fixed { from_arena(entry) } else { entry };
        // SAFETY: as above; the vectors are kept too.
        unsafe { Operation::start(self, entry, Kept::new(parts, file.clone()).with(Extra::Vectors(vectors)), false) }
    }

    /// Makes written data durable; with `datasync` without file times.
    pub fn sync(self: &Rc<Self>, file: &Rc<RingFile>, datasync: bool) -> Command {
        let flags = if datasync { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
        let entry = entry!(file, target => opcode::Fsync::new(target).flags(flags));
        // SAFETY: refers to no memory.
        Command(unsafe { Operation::start(self, entry, Kept::new((), file.clone()), false) })
    }

    pub fn fallocate(self: &Rc<Self>, file: &Rc<RingFile>, mode: FallocateFlags, offset: u64, length: u64) -> Command {
        let mode = mode.bits() as i32;
        let entry = entry!(file, target => opcode::Fallocate::new(target, length).offset(offset).mode(mode));
        // SAFETY: refers to no memory.
        Command(unsafe { Operation::start(self, entry, Kept::new((), file.clone()), false) })
    }
}
