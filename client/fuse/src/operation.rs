//! What a kernel may ask of a file system, and what it may be answered.

use crate::interrupts::Interruption;
use bytes::Bytes;
use cfs_client::{Caller, WriteFlags};
use cfs_wire::meta::{Attr, AttrChanges, FileKind, LockRange};
use cfs_wire::{Errno, Ino};
use std::time::Duration;

/// A request with who made it.
pub(crate) struct Asked {
    pub caller: Caller,
    pub operation: Operation,
}

/// A number of an open file or directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Handle(pub u64);

pub(crate) enum Operation {
    Lookup {
        dir: Ino,
        name: Vec<u8>,
    },
    /// `for_pages`: the kernel is about to use the pages it has.
    GetAttr {
        ino: Ino,
        for_pages: bool,
    },
    Statx {
        ino: Ino,
    },
    SetAttr {
        ino: Ino,
        changes: AttrChanges,
    },
    ReadLink {
        ino: Ino,
    },
    MkNod {
        dir: Ino,
        name: Vec<u8>,
        kind: FileKind,
        mode: u32,
        umask: u32,
        rdev: u32,
    },
    MkDir {
        dir: Ino,
        name: Vec<u8>,
        mode: u32,
        umask: u32,
    },
    Symlink {
        dir: Ino,
        name: Vec<u8>,
        target: Vec<u8>,
    },
    Create {
        dir: Ino,
        name: Vec<u8>,
        mode: u32,
        umask: u32,
        flags: i32,
    },
    TmpFile {
        dir: Ino,
        mode: u32,
        umask: u32,
        flags: i32,
    },
    Link {
        ino: Ino,
        dir: Ino,
        name: Vec<u8>,
    },
    Unlink {
        dir: Ino,
        name: Vec<u8>,
    },
    RmDir {
        dir: Ino,
        name: Vec<u8>,
    },
    Rename {
        dir: Ino,
        name: Vec<u8>,
        to_dir: Ino,
        to_name: Vec<u8>,
        flags: u32,
    },
    /// `kill_privileges`, here and below: the caller lacks CAP_FSETID.
    Open {
        ino: Ino,
        flags: i32,
        kill_privileges: bool,
    },
    Read {
        handle: Handle,
        offset: u64,
        length: u32,
    },
    Write {
        handle: Handle,
        offset: u64,
        data: Bytes,
        how: WriteFlags,
    },
    /// `owner`: the lock owner of the process that closes the file.
    Flush {
        handle: Handle,
        owner: u64,
    },
    Fsync {
        handle: Handle,
        datasync: bool,
    },
    /// `flock_owner`: the file's lock owner, if flock was used on it.
    Release {
        handle: Handle,
        flock_owner: Option<u64>,
    },
    GetLock {
        ino: Ino,
        lock: LockRange,
    },
    /// `interruption`: waits until the lock is granted or that comes.
    SetLock {
        ino: Ino,
        handle: Handle,
        lock: LockRange,
        interruption: Option<Interruption>,
    },
    Unlock {
        ino: Ino,
        lock: LockRange,
    },
    OpenDir {
        ino: Ino,
    },
    /// `room`: bytes of the answer at most.
    ReadDir {
        handle: Handle,
        after: u64,
        room: usize,
    },
    ReleaseDir {
        handle: Handle,
    },
    FsyncDir {
        ino: Ino,
    },
    SyncFs,
    StatFs,
    SetXattr {
        ino: Ino,
        name: Vec<u8>,
        value: Vec<u8>,
        flags: u32,
    },
    /// `room`: the size of the caller's buffer; 0 asks for the length only.
    GetXattr {
        ino: Ino,
        name: Vec<u8>,
        room: usize,
    },
    ListXattr {
        ino: Ino,
        room: usize,
    },
    RemoveXattr {
        ino: Ino,
        name: Vec<u8>,
    },
    Fallocate {
        handle: Handle,
        offset: u64,
        length: u64,
        mode: i32,
    },
    Seek {
        handle: Handle,
        offset: u64,
        whence: cfs_client::Whence,
    },
    /// `wide`: the answer may exceed 32 bits.
    CopyRange {
        from: Handle,
        from_offset: u64,
        to: Handle,
        to_offset: u64,
        length: u64,
        wide: bool,
    },
}

/// How an open file is to be treated by the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Opened {
    pub handle: Handle,
    /// Past the page cache.
    pub direct: bool,
    /// The pages it has of the file are current.
    pub keep_pages: bool,
}

pub(crate) enum Answer {
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
    Statx {
        attr: Attr,
        valid: Duration,
    },
    Created {
        attr: Attr,
        attr_valid: Duration,
        entry_valid: Duration,
        opened: Opened,
    },
    Opened(Opened),
    OpenedDirectory(Handle),
    /// Content, a link's target, an attribute's value, directory entries.
    Bytes(Bytes),
    Written(u32),
    /// The 64-bit count of a wide copy.
    Copied(u64),
    /// How long a value or list of names is.
    Length(u32),
    StatFs(cfs_wire::meta::StatFs),
    Offset(u64),
    /// The lock in the way.
    Lock(Option<LockRange>),
}

pub(crate) type Outcome = Result<Answer, Errno>;
