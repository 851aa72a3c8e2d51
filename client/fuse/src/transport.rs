//! `fuser`'s threads: each request becomes a job in the executor's mailbox. A full mailbox holds
//! the thread, and with it the kernel's queue; an executor that has died answers EIO.

use crate::operation::{Asked, Handle, Operation};
use crate::respond::{Respond, timestamp};
use bytes::Bytes;
use cfs_client::{Caller, Whence};
use cfs_reactor::mailbox::Sender;
use cfs_wire::meta::{AttrChanges, FileKind, SetTime};
use cfs_wire::{Errno, Ino};
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

/// One write request at most: what the kernel allows by default (fs.fuse.max_pages_limit).
const WRITE_BYTES_MAX: u32 = 1 << 20;
/// Requests of read-ahead and asynchronous direct I/O that the kernel keeps under way.
const BACKGROUND_MAX: u16 = 64;
/// A thread that finds the mailbox full looks again after this.
const FULL_PAUSE: Duration = Duration::from_micros(100);

/// What the executor is given to do.
pub(crate) enum Job {
    Request(Box<(Asked, Respond)>),
    /// The mount is over: commit everything and end.
    Stop,
}

pub(crate) struct Transport {
    jobs: Sender<Job>,
    alive: Arc<AtomicBool>,
}

impl Transport {
    pub fn new(jobs: Sender<Job>, alive: Arc<AtomicBool>) -> Transport {
        Transport { jobs, alive }
    }

    #[allow(clippy::disallowed_methods, reason = "a thread of fuser's, outside the executor")]
    fn submit(&self, request: &Request, operation: Operation, respond: Respond) {
        let caller = Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() };
        let mut job = Job::Request(Box::new((Asked { caller, operation }, respond)));
        while self.alive.load(Ordering::Acquire) {
            match self.jobs.try_send(job) {
                Ok(()) => return,
                Err(back) => job = back,
            }
            std::thread::sleep(FULL_PAUSE);
        }
        if let Job::Request(request) = job {
            request.1.send(Err(Errno::EIO));
        }
    }
}

fn ino(number: INodeNo) -> Ino {
    Ino::from_u64(number.0)
}

fn handle(number: FileHandle) -> Handle {
    Handle(number.0)
}

fn bytes(name: &OsStr) -> Vec<u8> {
    name.as_bytes().to_vec()
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

fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(timestamp(time)),
    }
}

/// What is asked of the kernel, if it has it. Never FUSE_ATOMIC_O_TRUNC: with it the kernel sends
/// O_TRUNC before it looks whether the file is a running program, which then dies.
fn wanted_capabilities() -> [InitFlags; 9] {
    [
        InitFlags::FUSE_EXPORT_SUPPORT,
        // The umask does not apply under a default ACL; only the shard knows.
        InitFlags::FUSE_DONT_MASK,
        InitFlags::FUSE_AUTO_INVAL_DATA,
        InitFlags::FUSE_ASYNC_DIO,
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_POSIX_ACL,
        InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        InitFlags::FUSE_CACHE_SYMLINKS,
        InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    ]
}

impl fuser::Filesystem for Transport {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        for wanted in wanted_capabilities() {
            if config.add_capabilities(wanted).is_err() {
                tracing::info!(?wanted, "the kernel lacks a FUSE feature");
            }
        }
        let _ = config.set_max_write(WRITE_BYTES_MAX);
        if let Err(most) = config.set_max_readahead(WRITE_BYTES_MAX) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let operation = Operation::Lookup { dir: ino(parent), name: bytes(name) };
        self.submit(request, operation, Respond::Entry(reply));
    }

    fn getattr(&self, request: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.submit(request, Operation::GetAttr { ino: ino(number) }, Respond::Attr(reply));
    }

    fn setattr(
        &self,
        request: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changes = AttrChanges {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            ctime: None,
            kill_privileges: false,
        };
        self.submit(request, Operation::SetAttr { ino: ino(number), changes }, Respond::Attr(reply));
    }

    fn readlink(&self, request: &Request, number: INodeNo, reply: ReplyData) {
        self.submit(request, Operation::ReadLink { ino: ino(number) }, Respond::Data(reply));
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(kind) = kind_of(mode) else { return reply.error(fuser::Errno::EINVAL) };
        let operation = Operation::MkNod { dir: ino(parent), name: bytes(name), kind, mode, umask, rdev };
        self.submit(request, operation, Respond::Entry(reply));
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let operation = Operation::MkDir { dir: ino(parent), name: bytes(name), mode, umask };
        self.submit(request, operation, Respond::Entry(reply));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.submit(request, Operation::Unlink { dir: ino(parent), name: bytes(name) }, Respond::Empty(reply));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.submit(request, Operation::RmDir { dir: ino(parent), name: bytes(name) }, Respond::Empty(reply));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let operation = Operation::Symlink { dir: ino(parent), name: bytes(name), target: bytes(target.as_os_str()) };
        self.submit(request, operation, Respond::Entry(reply));
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let operation = Operation::Rename {
            dir: ino(parent),
            name: bytes(name),
            to_dir: ino(new_parent),
            to_name: bytes(new_name),
            flags: flags.bits(),
        };
        self.submit(request, operation, Respond::Empty(reply));
    }

    fn link(&self, request: &Request, number: INodeNo, new_parent: INodeNo, new_name: &OsStr, reply: ReplyEntry) {
        let operation = Operation::Link { ino: ino(number), dir: ino(new_parent), name: bytes(new_name) };
        self.submit(request, operation, Respond::Entry(reply));
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let operation = Operation::Create { dir: ino(parent), name: bytes(name), mode, umask, flags };
        self.submit(request, operation, Respond::Create(reply));
    }

    fn open(&self, request: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.submit(request, Operation::Open { ino: ino(number), flags: flags.0 }, Respond::Open(reply));
    }

    fn read(
        &self,
        request: &Request,
        _: INodeNo,
        number: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let operation = Operation::Read { handle: handle(number), offset, length: size };
        self.submit(request, operation, Respond::Data(reply));
    }

    fn write(
        &self,
        request: &Request,
        _: INodeNo,
        number: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let operation = Operation::Write {
            handle: handle(number),
            offset,
            // The request's buffer is fuser's to use again.
            data: Bytes::copy_from_slice(data),
            kill_privileges: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
        };
        self.submit(request, operation, Respond::Write(reply));
    }

    fn flush(&self, request: &Request, _: INodeNo, number: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.submit(request, Operation::Flush { handle: handle(number) }, Respond::Empty(reply));
    }

    fn release(
        &self,
        request: &Request,
        _: INodeNo,
        number: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.submit(request, Operation::Release { handle: handle(number) }, Respond::Empty(reply));
    }

    fn fsync(&self, request: &Request, _: INodeNo, number: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.submit(request, Operation::Fsync { handle: handle(number), datasync }, Respond::Empty(reply));
    }

    fn opendir(&self, request: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.submit(request, Operation::OpenDir { ino: ino(number) }, Respond::OpenDir(reply));
    }

    fn readdir(&self, request: &Request, number: INodeNo, open: FileHandle, offset: u64, reply: ReplyDirectory) {
        let operation = Operation::ReadDir { ino: ino(number), handle: handle(open), after: offset };
        self.submit(request, operation, Respond::Directory(reply));
    }

    fn releasedir(&self, request: &Request, _: INodeNo, number: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.submit(request, Operation::ReleaseDir { handle: handle(number) }, Respond::Empty(reply));
    }

    fn fsyncdir(&self, request: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.submit(request, Operation::FsyncDir { ino: ino(number) }, Respond::Empty(reply));
    }

    fn statfs(&self, request: &Request, _: INodeNo, reply: ReplyStatfs) {
        self.submit(request, Operation::StatFs, Respond::StatFs(reply));
    }

    fn setxattr(
        &self,
        request: &Request,
        number: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        // XATTR_CREATE and XATTR_REPLACE; nothing else is the caller's to say.
        let flags = flags as u32 & 3;
        let operation = Operation::SetXattr { ino: ino(number), name: bytes(name), value: value.to_vec(), flags };
        self.submit(request, operation, Respond::Empty(reply));
    }

    fn getxattr(&self, request: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let operation = Operation::GetXattr { ino: ino(number), name: bytes(name) };
        self.submit(request, operation, Respond::Xattr(reply, size));
    }

    fn listxattr(&self, request: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        self.submit(request, Operation::ListXattr { ino: ino(number) }, Respond::Xattr(reply, size));
    }

    fn removexattr(&self, request: &Request, number: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let operation = Operation::RemoveXattr { ino: ino(number), name: bytes(name) };
        self.submit(request, operation, Respond::Empty(reply));
    }

    fn fallocate(
        &self,
        request: &Request,
        _: INodeNo,
        number: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let operation = Operation::Fallocate { handle: handle(number), offset, length, mode };
        self.submit(request, operation, Respond::Empty(reply));
    }

    fn lseek(&self, request: &Request, _: INodeNo, number: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let whence = match whence {
            libc::SEEK_DATA => Whence::Data,
            libc::SEEK_HOLE => Whence::Hole,
            _ => return reply.error(fuser::Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(fuser::Errno::ENXIO) };
        self.submit(request, Operation::Seek { handle: handle(number), offset, whence }, Respond::Seek(reply));
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _: INodeNo,
        from: FileHandle,
        from_offset: u64,
        _: INodeNo,
        to: FileHandle,
        to_offset: u64,
        length: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (from, to) = (handle(from), handle(to));
        let operation = Operation::CopyRange { from, from_offset, to, to_offset, length };
        self.submit(request, operation, Respond::Write(reply));
    }
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
}
