//! Bits of the messages' flag words, named as in `fuse.h` without their prefix.

/// INIT: the second word of flags is used.
pub(crate) const INIT_EXT: u64 = 1 << 30;
pub(crate) const ASYNC_READ: u64 = 1 << 0;
pub(crate) const POSIX_LOCKS: u64 = 1 << 1;
pub(crate) const EXPORT_SUPPORT: u64 = 1 << 4;
pub(crate) const BIG_WRITES: u64 = 1 << 5;
pub(crate) const DONT_MASK: u64 = 1 << 6;
pub(crate) const FLOCK_LOCKS: u64 = 1 << 10;
pub(crate) const AUTO_INVAL_DATA: u64 = 1 << 12;
pub(crate) const ASYNC_DIO: u64 = 1 << 15;
pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
pub(crate) const POSIX_ACL: u64 = 1 << 20;
pub(crate) const MAX_PAGES: u64 = 1 << 22;
pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
/// From here on bits of the second word.
pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;

pub(crate) const FATTR_MODE: u32 = 1 << 0;
pub(crate) const FATTR_UID: u32 = 1 << 1;
pub(crate) const FATTR_GID: u32 = 1 << 2;
pub(crate) const FATTR_SIZE: u32 = 1 << 3;
pub(crate) const FATTR_ATIME: u32 = 1 << 4;
pub(crate) const FATTR_MTIME: u32 = 1 << 5;
pub(crate) const FATTR_ATIME_NOW: u32 = 1 << 7;
pub(crate) const FATTR_MTIME_NOW: u32 = 1 << 8;
pub(crate) const FATTR_KILL_SUIDGID: u32 = 1 << 11;

/// OPEN and CREATE: the caller lacks CAP_FSETID and truncates.
pub(crate) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// Asked for an open file: before its pages are used, never for stat.
pub(crate) const GETATTR_FH: u32 = 1 << 0;
pub(crate) const FOPEN_DIRECT_IO: u32 = 1 << 0;
pub(crate) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
pub(crate) const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// Written back from pages, not by a program at this moment.
pub(crate) const WRITE_CACHE: u32 = 1 << 0;
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
pub(crate) const FSYNC_FDATASYNC: u32 = 1 << 0;
/// The file's owner is named, whose flock locks go.
pub(crate) const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
/// The lock is flock's, not fcntl's.
pub(crate) const LK_FLOCK: u32 = 1 << 0;
pub(crate) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

pub(crate) const NOTIFY_INVAL_INODE: i32 = 2;
pub(crate) const NOTIFY_INC_EPOCH: i32 = 8;
