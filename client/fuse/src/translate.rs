//! From the kernel's words to what the file system is asked to do.

use crate::abi::{self, Call, FileLock, LockIn, MkNodIn, Request, SetAttrIn, WriteIn};
use crate::interrupts::Interrupts;
use crate::operation::{Asked, Handle, Operation};
use bytes::Bytes;
use cfs_client::{Caller, OpenFlags, Whence, WriteFlags};
use cfs_wire::meta::{
    AttrChanges, FileKind, LockFamily, LockKind, LockRange, SetTime, XATTR_CLEAR_SGID, XATTR_CREATE, XATTR_REPLACE,
};
use cfs_wire::{Errno, Ino, Timestamp};
use std::rc::Rc;

/// What a request asks for; `payload` makes a write's bytes outlive the request's buffer, and what
/// may wait for others is entered in `interrupts`. The calls that the reader answers itself are
/// ENOSYS here.
pub(crate) fn asked(
    request: &Request,
    payload: impl FnOnce(&[u8]) -> Bytes,
    interrupts: &Rc<Interrupts>,
) -> Result<Asked, Errno> {
    let header = &request.header;
    let caller = Caller { uid: header.uid, gid: header.gid, pid: header.pid };
    let ino = Ino::from_u64(header.nodeid);
    let operation = match request.call {
        Call::Open(_)
        | Call::Read(_)
        | Call::Write { .. }
        | Call::Flush(_)
        | Call::Fsync(_)
        | Call::Release(_)
        | Call::Fallocate(_)
        | Call::Lseek(_)
        | Call::CopyFileRange { .. } => file_operation(ino, &request.call, payload)?,
        Call::Lookup { .. }
        | Call::Symlink { .. }
        | Call::MkNod { .. }
        | Call::MkDir { .. }
        | Call::Unlink { .. }
        | Call::RmDir { .. }
        | Call::Rename { .. }
        | Call::Link { .. }
        | Call::Create { .. }
        | Call::TmpFile(_) => name_operation(ino, &request.call)?,
        Call::GetLk(_) | Call::SetLk { .. } => lock_operation(ino, request, interrupts)?,
        _ => inode_operation(ino, &request.call)?,
    };
    Ok(Asked { caller, operation })
}

fn name_operation(dir: Ino, call: &Call) -> Result<Operation, Errno> {
    Ok(match *call {
        Call::Lookup { name } => Operation::Lookup { dir, name: name.to_vec() },
        Call::Unlink { name } => Operation::Unlink { dir, name: name.to_vec() },
        Call::RmDir { name } => Operation::RmDir { dir, name: name.to_vec() },
        Call::Symlink { name, target } => Operation::Symlink { dir, name: name.to_vec(), target: target.to_vec() },
        Call::MkNod { arguments: MkNodIn { mode, rdev, umask, .. }, name } => {
            let kind = kind_of(mode).ok_or(Errno::EINVAL)?;
            Operation::MkNod { dir, name: name.to_vec(), kind, mode, umask, rdev }
        }
        Call::MkDir { arguments, name } => {
            Operation::MkDir { dir, name: name.to_vec(), mode: arguments.mode, umask: arguments.umask }
        }
        Call::Rename { arguments, name, new_name } => Operation::Rename {
            dir,
            name: name.to_vec(),
            to_dir: Ino::from_u64(arguments.newdir),
            to_name: new_name.to_vec(),
            flags: arguments.flags,
        },
        Call::Link { arguments, name } => {
            Operation::Link { ino: Ino::from_u64(arguments.oldnodeid), dir, name: name.to_vec() }
        }
        Call::Create { arguments, name } => Operation::Create {
            dir,
            name: name.to_vec(),
            mode: arguments.mode,
            umask: arguments.umask,
            flags: arguments.flags as i32,
        },
        Call::TmpFile(arguments) => {
            Operation::TmpFile { dir, mode: arguments.mode, umask: arguments.umask, flags: arguments.flags as i32 }
        }
        _ => return Err(Errno::ENOSYS),
    })
}

/// What holds for this write is in its own flags; pages of a mapping come without any.
fn write_flags(arguments: WriteIn) -> WriteFlags {
    let OpenFlags { append, sync, .. } = OpenFlags::from_bits(arguments.flags as i32);
    let is = |flag| arguments.write_flags & flag != 0;
    WriteFlags { append, sync, kill_privileges: is(abi::WRITE_KILL_SUIDGID), mapped: is(abi::WRITE_CACHE) }
}

fn file_operation(ino: Ino, call: &Call, payload: impl FnOnce(&[u8]) -> Bytes) -> Result<Operation, Errno> {
    Ok(match *call {
        Call::Open(arguments) => Operation::Open {
            ino,
            flags: arguments.flags as i32,
            kill_privileges: arguments.open_flags & abi::OPEN_KILL_SUIDGID != 0,
        },
        Call::Read(arguments) => {
            Operation::Read { handle: Handle(arguments.fh), offset: arguments.offset, length: arguments.size }
        }
        Call::Write { arguments, data } => Operation::Write {
            handle: Handle(arguments.fh),
            offset: arguments.offset,
            data: payload(data),
            how: write_flags(arguments),
        },
        Call::Flush(arguments) => Operation::Flush { handle: Handle(arguments.fh), owner: arguments.lock_owner },
        Call::Fsync(arguments) => Operation::Fsync {
            handle: Handle(arguments.fh),
            datasync: arguments.fsync_flags & abi::FSYNC_FDATASYNC != 0,
        },
        Call::Release(arguments) => {
            let flock = arguments.release_flags & abi::RELEASE_FLOCK_UNLOCK != 0;
            Operation::Release { handle: Handle(arguments.fh), flock_owner: flock.then_some(arguments.lock_owner) }
        }
        Call::Fallocate(arguments) => Operation::Fallocate {
            handle: Handle(arguments.fh),
            offset: arguments.offset,
            length: arguments.length,
            mode: arguments.mode as i32,
        },
        Call::Lseek(arguments) => {
            let whence = match arguments.whence as i32 {
                libc::SEEK_DATA => Whence::Data,
                libc::SEEK_HOLE => Whence::Hole,
                _ => return Err(Errno::EINVAL),
            };
            // Negative as the kernel means it.
            if i64::try_from(arguments.offset).is_err() {
                return Err(Errno::ENXIO);
            }
            Operation::Seek { handle: Handle(arguments.fh), offset: arguments.offset, whence }
        }
        Call::CopyFileRange { arguments, wide } => Operation::CopyRange {
            from: Handle(arguments.fh_in),
            from_offset: arguments.off_in,
            to: Handle(arguments.fh_out),
            to_offset: arguments.off_out,
            length: arguments.len,
            wide,
        },
        _ => return Err(Errno::ENOSYS),
    })
}

fn lock_operation(ino: Ino, request: &Request, interrupts: &Rc<Interrupts>) -> Result<Operation, Errno> {
    Ok(match request.call {
        Call::GetLk(arguments) => Operation::GetLock { ino, lock: lock_range(&arguments)?.0 },
        Call::SetLk { arguments, wait } => match lock_range(&arguments)? {
            (lock, true) => Operation::Unlock { ino, lock },
            (lock, false) => {
                let interruption = wait.then(|| interrupts.watch(request.header.unique));
                Operation::SetLock { ino, handle: Handle(arguments.fh), lock, interruption }
            }
        },
        _ => return Err(Errno::ENOSYS),
    })
}

/// The largest offset, which means "to the end" in fcntl's locks.
const OFFSET_MAX: u64 = i64::MAX as u64;

/// A lock, and whether it is to be given up.
fn lock_range(arguments: &LockIn) -> Result<(LockRange, bool), Errno> {
    let FileLock { start, end, kind, pid } = arguments.lk;
    let (kind, unlock) = match kind as i32 {
        libc::F_RDLCK => (LockKind::Read, false),
        libc::F_WRLCK => (LockKind::Write, false),
        libc::F_UNLCK => (LockKind::Read, true),
        _ => return Err(Errno::EINVAL),
    };
    let family = if arguments.lk_flags & abi::LK_FLOCK != 0 { LockFamily::Flock } else { LockFamily::Posix };
    let end = if end >= OFFSET_MAX { u64::MAX } else { end };
    Ok((LockRange { family, kind, start, end, owner: arguments.owner, pid }, unlock))
}

/// The lock in the way as F_GETLK tells it, or that there is none.
pub(crate) fn file_lock(conflict: Option<&LockRange>) -> FileLock {
    let Some(lock) = conflict else { return FileLock { kind: libc::F_UNLCK as u32, ..FileLock::default() } };
    let kind = match lock.kind {
        LockKind::Read => libc::F_RDLCK,
        LockKind::Write => libc::F_WRLCK,
    };
    FileLock { start: lock.start.min(OFFSET_MAX), end: lock.end.min(OFFSET_MAX), kind: kind as u32, pid: lock.pid }
}

fn inode_operation(ino: Ino, call: &Call) -> Result<Operation, Errno> {
    Ok(match *call {
        Call::GetAttr(arguments) => {
            Operation::GetAttr { ino, for_pages: arguments.getattr_flags & abi::GETATTR_FH != 0 }
        }
        Call::Statx => Operation::Statx { ino },
        Call::SetAttr(arguments) => Operation::SetAttr { ino, changes: changes(&arguments)? },
        Call::ReadLink => Operation::ReadLink { ino },
        Call::OpenDir => Operation::OpenDir { ino },
        Call::ReadDir(arguments) => {
            Operation::ReadDir { handle: Handle(arguments.fh), after: arguments.offset, room: arguments.size as usize }
        }
        Call::ReleaseDir(arguments) => Operation::ReleaseDir { handle: Handle(arguments.fh) },
        Call::FsyncDir => Operation::FsyncDir { ino },
        Call::SyncFs => Operation::SyncFs,
        Call::StatFs => Operation::StatFs,
        Call::SetXattr { flags, extended, name, value } => {
            // Nothing else is the caller's to say.
            let mut flags = flags & (XATTR_CREATE | XATTR_REPLACE);
            if extended & abi::SETXATTR_ACL_KILL_SGID != 0 {
                flags |= XATTR_CLEAR_SGID;
            }
            Operation::SetXattr { ino, name: name.to_vec(), value: value.to_vec(), flags }
        }
        Call::GetXattr { size, name } => Operation::GetXattr { ino, name: name.to_vec(), room: size as usize },
        Call::ListXattr { size } => Operation::ListXattr { ino, room: size as usize },
        Call::RemoveXattr { name } => Operation::RemoveXattr { ino, name: name.to_vec() },
        _ => return Err(Errno::ENOSYS),
    })
}

/// The `S_IFMT` bits of a mode.
fn kind_of(mode: u32) -> Option<FileKind> {
    let kinds = [
        FileKind::File,
        FileKind::Directory,
        FileKind::Symlink,
        FileKind::Fifo,
        FileKind::Socket,
        FileKind::CharDevice,
        FileKind::BlockDevice,
    ];
    match mode & libc::S_IFMT {
        // mknod(2): zero means a regular file.
        0 => Some(FileKind::File),
        bits => kinds.into_iter().find(|kind| kind.mode_bits() == bits),
    }
}

fn changes(arguments: &SetAttrIn) -> Result<AttrChanges, Errno> {
    let valid = arguments.valid;
    let given = |bit: u32, value: u32| (valid & bit != 0).then_some(value);
    let time = |bit: u32, now: u32, secs: u64, nanos: u32| {
        if valid & now != 0 {
            return Ok(Some(SetTime::Now));
        }
        if valid & bit == 0 {
            return Ok(None);
        }
        if nanos >= Timestamp::NANOS_PER_SEC {
            return Err(Errno::EINVAL);
        }
        // Seconds before 1970 travel as the two's complement.
        Ok(Some(SetTime::At(Timestamp { secs: secs as i64, nanos })))
    };
    Ok(AttrChanges {
        mode: given(abi::FATTR_MODE, arguments.mode & 0o7777),
        uid: given(abi::FATTR_UID, arguments.uid),
        gid: given(abi::FATTR_GID, arguments.gid),
        size: (valid & abi::FATTR_SIZE != 0).then_some(arguments.size),
        atime: time(abi::FATTR_ATIME, abi::FATTR_ATIME_NOW, arguments.atime, arguments.atimensec)?,
        mtime: time(abi::FATTR_MTIME, abi::FATTR_MTIME_NOW, arguments.mtime, arguments.mtimensec)?,
        ctime: None,
        kill_privileges: valid & abi::FATTR_KILL_SUIDGID != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mknod_modes_name_their_kind_and_unknown_ones_none() {
        assert_eq!(kind_of(0o644), Some(FileKind::File));
        assert_eq!(kind_of(libc::S_IFIFO | 0o600), Some(FileKind::Fifo));
        assert_eq!(kind_of(libc::S_IFSOCK), Some(FileKind::Socket));
        assert_eq!(kind_of(libc::S_IFBLK), Some(FileKind::BlockDevice));
        assert_eq!(kind_of(libc::S_IFMT), None);
    }

    #[test]
    fn locks_to_the_end_reach_to_the_end_and_flock_is_told_apart() {
        let lk = FileLock { start: 5, end: OFFSET_MAX, kind: libc::F_WRLCK as u32, pid: 9 };
        let arguments = LockIn { fh: 1, owner: 77, lk, lk_flags: 0, padding: 0 };
        let expected =
            LockRange { family: LockFamily::Posix, kind: LockKind::Write, start: 5, end: u64::MAX, owner: 77, pid: 9 };
        assert_eq!(lock_range(&arguments), Ok((expected, false)));
        assert_eq!(file_lock(Some(&expected)), lk);
        assert_eq!(file_lock(None).kind, libc::F_UNLCK as u32);
        let flock = LockIn { lk_flags: abi::LK_FLOCK, lk: FileLock { kind: libc::F_UNLCK as u32, ..lk }, ..arguments };
        let expected = LockRange { family: LockFamily::Flock, kind: LockKind::Read, ..expected };
        assert_eq!(lock_range(&flock), Ok((expected, true)));
        let wild = LockIn { lk: FileLock { kind: 3, ..lk }, ..arguments };
        assert_eq!(lock_range(&wild), Err(Errno::EINVAL));
    }

    #[test]
    fn a_setattr_changes_what_its_bits_name_and_nothing_else() {
        let all = SetAttrIn {
            size: 9,
            mode: libc::S_IFREG | 0o4640,
            uid: 5,
            gid: 6,
            atime: -1i64 as u64,
            atimensec: 3,
            mtime: 8,
            ..SetAttrIn::default()
        };
        assert_eq!(changes(&all).unwrap(), AttrChanges::default());
        let valid =
            abi::FATTR_MODE | abi::FATTR_GID | abi::FATTR_ATIME | abi::FATTR_MTIME_NOW | abi::FATTR_KILL_SUIDGID;
        let expected = AttrChanges {
            mode: Some(0o4640),
            gid: Some(6),
            atime: Some(SetTime::At(Timestamp { secs: -1, nanos: 3 })),
            mtime: Some(SetTime::Now),
            kill_privileges: true,
            ..AttrChanges::default()
        };
        assert_eq!(changes(&SetAttrIn { valid, ..all }).unwrap(), expected);
        let wild = SetAttrIn { valid: abi::FATTR_ATIME, atimensec: 1_000_000_000, ..all };
        assert_eq!(changes(&wild), Err(Errno::EINVAL));
    }
}
