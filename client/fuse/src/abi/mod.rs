//! The kernel's FUSE protocol 7.x as `include/uapi/linux/fuse.h` of Linux documents it: what its
//! messages look like, and nothing of what they mean for this file system.
//!
//! Everything is in the machine's own byte order, since both ends run on one machine. Bytes from
//! the device are checked: whatever they are, decoding answers a request or an error.

mod dirents;
mod flags;
mod init;
mod opcode;
mod request;
mod structures;

pub(crate) use dirents::Dirents;
pub(crate) use flags::*;
pub(crate) use init::{Features, Refusal, negotiate};
pub(crate) use opcode::Opcode;
pub(crate) use request::{Call, Request};
pub(crate) use structures::*;

/// The version spoken here; the kernel's may be newer or older in its minor number.
pub(crate) const MAJOR: u32 = 7;
/// Linux 6.18: 64-bit results of copy_file_range.
pub(crate) const MINOR: u32 = 45;
/// Linux 5.17: the longer INIT with its second word of flags.
pub(crate) const MINOR_MIN: u32 = 36;
/// Linux 6.16: the kernel can be told in one word to look all names up again.
pub(crate) const MINOR_EPOCH: u32 = 44;

/// One write at most: what the kernel allows by default (fs.fuse.max_pages_limit).
pub(crate) const WRITE_BYTES_MAX: usize = 1 << 20;
/// What stands before a write's payload: the header of every request and that of WRITE.
pub(crate) const WRITE_HEAD_BYTES: usize = size_of::<InHeader>() + size_of::<WriteIn>();
/// What a read of the device must have room for: the largest request.
pub(crate) const REQUEST_BYTES_MAX: usize = WRITE_HEAD_BYTES + WRITE_BYTES_MAX;

// The kernel refuses to deliver into less (FUSE_MIN_READ_BUFFER).
const _: () = assert!(REQUEST_BYTES_MAX >= 8192);
