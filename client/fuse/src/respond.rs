//! Answers as `fuser` sends them. A responder that is dropped answers EIO, so that no request
//! stays open whatever happens to the executor.

use crate::operation::{Answer, Opened, Outcome};
use cfs_wire::meta::{Attr, FileKind};
use cfs_wire::{Errno, Timestamp};
use fuser::{
    FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

/// Inode numbers are never reused, so one generation is enough.
const GENERATION: Generation = Generation(0);
/// What `stat` shows as the preferred size of reads and writes.
const BLOCK_BYTES: u32 = 4096;

pub(crate) enum Respond {
    Empty(ReplyEmpty),
    Entry(ReplyEntry),
    Attr(ReplyAttr),
    Create(ReplyCreate),
    Open(ReplyOpen),
    OpenDir(ReplyOpen),
    Data(ReplyData),
    Write(ReplyWrite),
    Directory(ReplyDirectory),
    StatFs(ReplyStatfs),
    /// With the size of the caller's buffer; 0 asks for the length only.
    Xattr(ReplyXattr, u32),
    Seek(ReplyLseek),
}

impl Respond {
    pub fn send(self, outcome: Outcome) {
        match (self, outcome) {
            (Respond::Empty(reply), Ok(Answer::Done)) => reply.ok(),
            (Respond::Entry(reply), Ok(Answer::Entry { attr, attr_valid, entry_valid })) => {
                reply.entry_with_ttls(&attr_valid, &entry_valid, &file_attr(&attr), GENERATION);
            }
            (Respond::Entry(reply), Ok(Answer::Absent { valid })) => absent(reply, valid),
            (Respond::Attr(reply), Ok(Answer::Attr { attr, valid })) => reply.attr(&valid, &file_attr(&attr)),
            (Respond::Create(reply), Ok(Answer::Created { attr, valid, opened })) => {
                let handle = FileHandle(opened.handle.0);
                reply.created(&valid, &file_attr(&attr), GENERATION, handle, open_flags(opened));
            }
            (Respond::Open(reply), Ok(Answer::Opened(opened))) => {
                reply.opened(FileHandle(opened.handle.0), open_flags(opened));
            }
            (Respond::OpenDir(reply), Ok(Answer::Opened(opened))) => {
                reply.opened(FileHandle(opened.handle.0), FopenFlags::empty());
            }
            (Respond::Data(reply), Ok(Answer::Bytes(bytes))) => reply.data(&bytes),
            (Respond::Write(reply), Ok(Answer::Written(length))) => reply.written(length),
            (Respond::Directory(reply), Ok(Answer::Entries(entries))) => directory(reply, &entries),
            (Respond::StatFs(reply), Ok(Answer::StatFs(stat))) => {
                let blocks = |bytes: u64| bytes / u64::from(BLOCK_BYTES);
                let (total, free) = (blocks(stat.bytes_total), blocks(stat.bytes_free));
                // Inodes are not limited; what is free for data bounds them well enough.
                let files = stat.inodes_used.saturating_add(free);
                let name_max = cfs_wire::limits::NAME_BYTES_MAX as u32;
                reply.statfs(total, free, free, files, free, BLOCK_BYTES, name_max, BLOCK_BYTES);
            }
            (Respond::Xattr(reply, size), Ok(Answer::Bytes(value))) => xattr(reply, size, &value),
            (Respond::Xattr(reply, size), Ok(Answer::Names(list))) => xattr(reply, size, &list),
            (Respond::Seek(reply), Ok(Answer::Offset(offset))) => {
                reply.offset(i64::try_from(offset).unwrap_or(i64::MAX));
            }
            (respond, Ok(_)) => {
                tracing::error!("an operation was answered with something else than was asked");
                respond.fail(Errno::EIO);
            }
            (respond, Err(errno)) => respond.fail(errno),
        }
    }

    fn fail(self, errno: Errno) {
        let errno = fuser::Errno::from_i32(errno.0);
        match self {
            Respond::Empty(reply) => reply.error(errno),
            Respond::Entry(reply) => reply.error(errno),
            Respond::Attr(reply) => reply.error(errno),
            Respond::Create(reply) => reply.error(errno),
            Respond::Open(reply) | Respond::OpenDir(reply) => reply.error(errno),
            Respond::Data(reply) => reply.error(errno),
            Respond::Write(reply) => reply.error(errno),
            Respond::Directory(reply) => reply.error(errno),
            Respond::StatFs(reply) => reply.error(errno),
            Respond::Xattr(reply, _) => reply.error(errno),
            Respond::Seek(reply) => reply.error(errno),
        }
    }
}

/// Inode 0 with a time says for how long the name is known to be absent.
fn absent(reply: ReplyEntry, valid: Duration) {
    if valid.is_zero() {
        reply.error(fuser::Errno::ENOENT);
        return;
    }
    let epoch = SystemTime::UNIX_EPOCH;
    let nothing = FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: epoch,
        mtime: epoch,
        ctime: epoch,
        crtime: epoch,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    };
    reply.entry_with_ttls(&Duration::ZERO, &valid, &nothing, GENERATION);
}

fn directory(mut reply: ReplyDirectory, entries: &[cfs_wire::meta::DirEntry]) {
    for entry in entries {
        let full =
            reply.add(INodeNo(entry.ino.as_u64()), entry.cookie, file_type(entry.kind), OsStr::from_bytes(&entry.name));
        if full {
            break;
        }
    }
    reply.ok();
}

fn xattr(reply: ReplyXattr, size: u32, value: &[u8]) {
    if size == 0 {
        reply.size(value.len() as u32);
    } else if value.len() > size as usize {
        reply.error(fuser::Errno::ERANGE);
    } else {
        reply.data(value);
    }
}

fn open_flags(opened: Opened) -> FopenFlags {
    if opened.direct {
        FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
    } else {
        // Pages stay from one open to the next: whoever changes the file elsewhere has them
        // invalidated, and the kernel drops them itself when size or times differ.
        FopenFlags::FOPEN_KEEP_CACHE
    }
}

pub(crate) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.as_u64()),
        size: attr.size,
        blocks: attr.allocated.div_ceil(512),
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.btime),
        kind: file_type(attr.kind),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// Times before 1970 and beyond what the platform has end at its bounds.
fn system_time(time: Timestamp) -> SystemTime {
    let epoch = SystemTime::UNIX_EPOCH;
    let nanos = Duration::from_nanos(time.nanos.into());
    let whole = Duration::from_secs(time.secs.unsigned_abs());
    let secs = if time.secs < 0 { epoch.checked_sub(whole) } else { epoch.checked_add(whole) };
    secs.and_then(|secs| secs.checked_add(nanos)).unwrap_or(epoch)
}

/// The same backwards.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => Timestamp::from_nanos(since.as_nanos() as i128),
        Err(before) => Timestamp::from_nanos(-(before.duration().as_nanos() as i128)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_keep_their_nanoseconds_on_both_sides_of_1970() {
        for time in [(0, 0), (1_700_000_000, 999_999_999), (-1, 999_999_999), (-5_000_000_000, 1), (4_294_967_296, 7)] {
            let time = Timestamp { secs: time.0, nanos: time.1 };
            assert_eq!(timestamp(system_time(time)), time);
        }
    }
}
