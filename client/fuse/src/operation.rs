//! What a kernel may ask of a file system, and what it may be answered.

use bytes::Bytes;
use cfs_client::Caller;
use cfs_wire::meta::{Attr, AttrChanges, DirEntry, FileKind};
use cfs_wire::{Errno, Ino};
use std::time::Duration;

/// A request with who made it.
pub struct Asked {
    pub caller: Caller,
    pub operation: Operation,
}

/// A number of an open file or directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Handle(pub u64);

pub enum Operation {
    Lookup { dir: Ino, name: Vec<u8> },
    GetAttr { ino: Ino },
    SetAttr { ino: Ino, changes: AttrChanges },
    ReadLink { ino: Ino },
    MkNod { dir: Ino, name: Vec<u8>, kind: FileKind, mode: u32, umask: u32, rdev: u32 },
    MkDir { dir: Ino, name: Vec<u8>, mode: u32, umask: u32 },
    Symlink { dir: Ino, name: Vec<u8>, target: Vec<u8> },
    Create { dir: Ino, name: Vec<u8>, mode: u32, umask: u32, flags: i32 },
    Link { ino: Ino, dir: Ino, name: Vec<u8> },
    Unlink { dir: Ino, name: Vec<u8> },
    RmDir { dir: Ino, name: Vec<u8> },
    Rename { dir: Ino, name: Vec<u8>, to_dir: Ino, to_name: Vec<u8>, flags: u32 },
    Open { ino: Ino, flags: i32 },
    Read { handle: Handle, offset: u64, length: u32 },
    Write { handle: Handle, offset: u64, data: Bytes, kill_privileges: bool },
    Flush { handle: Handle },
    Fsync { handle: Handle, datasync: bool },
    Release { handle: Handle },
    OpenDir { ino: Ino },
    ReadDir { ino: Ino, handle: Handle, after: u64 },
    ReleaseDir { handle: Handle },
    FsyncDir { ino: Ino },
    StatFs,
    SetXattr { ino: Ino, name: Vec<u8>, value: Vec<u8>, flags: u32 },
    GetXattr { ino: Ino, name: Vec<u8> },
    ListXattr { ino: Ino },
    RemoveXattr { ino: Ino, name: Vec<u8> },
    Fallocate { handle: Handle, offset: u64, length: u64, mode: i32 },
    Seek { handle: Handle, offset: u64, whence: cfs_client::Whence },
    CopyRange { from: Handle, from_offset: u64, to: Handle, to_offset: u64, length: u64 },
}

/// How an open file is to be treated by the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opened {
    pub handle: Handle,
    /// Past the page cache.
    pub direct: bool,
}

pub enum Answer {
    Done,
    Entry {
        attr: Attr,
        attr_valid: Duration,
        entry_valid: Duration,
    },
    /// The name does not exist, which may be relied on for so long.
    Absent {
        valid: Duration,
    },
    Attr {
        attr: Attr,
        valid: Duration,
    },
    Created {
        attr: Attr,
        valid: Duration,
        opened: Opened,
    },
    Opened(Opened),
    Bytes(Bytes),
    Written(u32),
    /// Entries in order; each one's cookie is where the next request goes on.
    Entries(Vec<DirEntry>),
    StatFs(cfs_wire::meta::StatFs),
    Names(Vec<u8>),
    Offset(u64),
}

pub type Outcome = Result<Answer, Errno>;
