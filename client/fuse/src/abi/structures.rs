//! The messages' structures, named as in `fuse.h` without their prefix.

use bytemuck::{Pod, Zeroable};

macro_rules! structures {
    ($($(#[$doc:meta])* $name:ident, $bytes:literal { $($(#[$note:meta])* $field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
            pub(crate) struct $name { $($(#[$note])* pub $field: $type),* }
            const _: () = assert!(size_of::<$name>() == $bytes);
        )*
    };
}

structures! {
    /// Begins every request.
    InHeader, 40 {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        /// Extensions at the end of the request, in words of 8 bytes.
        total_extlen: u16, padding: u16,
    }
    /// Begins every reply (`error` is 0 or a negative errno) and notification (`unique` is 0,
    /// `error` the notification's code).
    OutHeader, 16 { len: u32, error: i32, unique: u64 }

    Attributes, 88 {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    EntryOut, 128 {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32,
        attr: Attributes,
    }
    GetAttrIn, 16 { getattr_flags: u32, dummy: u32, fh: u64 }
    AttrOut, 104 { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attributes }

    StatxTime, 16 { tv_sec: i64, tv_nsec: u32, reserved: i32 }
    Statx, 256 {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16, spare0: u16, ino: u64,
        size: u64, blocks: u64, attributes_mask: u64, atime: StatxTime, btime: StatxTime, ctime: StatxTime,
        mtime: StatxTime, rdev_major: u32, rdev_minor: u32, dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    StatxIn, 24 { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32 }
    StatxOut, 288 { attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx }

    InitIn, 64 { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11] }
    InitOut, 64 {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    }

    SetAttrIn, 88 {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    MkNodIn, 16 { mode: u32, rdev: u32, umask: u32, padding: u32 }
    MkDirIn, 8 { mode: u32, umask: u32 }
    RenameIn, 8 { newdir: u64 }
    Rename2In, 16 { newdir: u64, flags: u32, padding: u32 }
    LinkIn, 8 { oldnodeid: u64 }
    /// Also OPENDIR's.
    OpenIn, 8 { flags: u32, open_flags: u32 }
    /// Also TMPFILE's.
    CreateIn, 16 { flags: u32, mode: u32, umask: u32, open_flags: u32 }
    OpenOut, 16 { fh: u64, open_flags: u32, backing_id: i32 }
    /// Also READDIR's.
    ReadIn, 40 {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    WriteIn, 40 {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    /// Also the 32-bit answer to COPY_FILE_RANGE.
    WriteOut, 8 { size: u32, padding: u32 }
    FlushIn, 24 { fh: u64, unused: u32, padding: u32, lock_owner: u64 }
    /// Also RELEASEDIR's.
    ReleaseIn, 24 { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    /// Also FSYNCDIR's.
    FsyncIn, 16 { fh: u64, fsync_flags: u32, padding: u32 }
    StatFsOut, 80 {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    }
    /// What SETXATTR begins with; where SETXATTR_EXT was agreed upon [`SetXattrExt`] follows.
    SetXattrIn, 8 { size: u32, flags: u32 }
    SetXattrExt, 8 { setxattr_flags: u32, padding: u32 }
    /// Also LISTXATTR's.
    GetXattrIn, 8 { size: u32, padding: u32 }
    GetXattrOut, 8 { size: u32, padding: u32 }
    /// `end` is inclusive; the largest offset means "to the end". Also the answer to GETLK.
    FileLock, 24 { start: u64, end: u64, kind: u32, pid: u32 }
    LockIn, 48 { fh: u64, owner: u64, lk: FileLock, lk_flags: u32, padding: u32 }
    InterruptIn, 8 { unique: u64 }
    FallocateIn, 32 { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    LseekIn, 24 { fh: u64, offset: u64, whence: u32, padding: u32 }
    LseekOut, 8 { offset: u64 }
    CopyFileRangeIn, 56 {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
    CopyFileRangeOut, 8 { bytes_copied: u64 }

    /// Followed by the name, without a terminator, padded to 8 bytes.
    DirEntryHead, 24 { ino: u64, off: u64, namelen: u32, kind: u32 }

    /// A negative `off` leaves the pages alone.
    NotifyInvalInode, 24 { ino: u64, off: i64, len: i64 }
}
