//! Opening, locking, creating and measuring a file or block device. Blocking calls: a server
//! opens its targets before it serves.

use crate::{DeviceError, DeviceResult};
use cfs_wire::limits::PAGE;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, StatxFlags, fallocate, flock, fstat,
    fstatfs, fstatvfs, fsync, ftruncate, ioctl_blkpbszget, ioctl_blksszget, major, minor, open as open_file, seek,
    stat, statx, unlink,
};
use rustix::io::Errno;
use rustix::thread::{Timespec, nanosleep};
use std::os::fd::OwnedFd;
use std::path::Path;

/// How to open a target.
#[derive(Clone, Copy, Default, Debug)]
pub struct OpenOptions {
    /// Refuse writes; other read-only users may have it open too.
    pub read_only: bool,
    /// Make the file, of this many bytes, if it is not there. One that is there must have
    /// exactly this size. Not for block devices.
    pub create_size: Option<u64>,
}

pub(crate) struct Opened {
    pub file: OwnedFd,
    pub size: u64,
    pub block: u32,
    pub memory_align: u32,
    /// Whether allocated blocks that were never written make their first flush dear, and are
    /// where they are for good: ext4 and xfs.
    pub unwritten_extents: bool,
    pub is_block_device: bool,
}

/// The largest block size the store works with.
const BLOCK_MAX: u32 = PAGE as u32;
/// How long a file or device that another holds is waited for, and how often it is tried meanwhile.
const HELD_PATIENCE_MS: u32 = 1000;
const HELD_RETRY_MS: u32 = 10;
/// Superblock magics of ext2 to ext4, and of xfs.
const UNWRITTEN_EXTENTS: [u32; 2] = [0xEF53, 0x5846_5342];
/// The smallest: a sector.
const BLOCK_MIN: u32 = 512;

fn refuse<T>(path: &Path, reason: impl std::fmt::Display) -> DeviceResult<T> {
    Err(DeviceError::Open(format!("cannot open {}: {reason}", path.display())))
}

fn not_permitted<T>(path: &Path, reason: &str) -> DeviceResult<T> {
    Err(DeviceError::NotPermitted(format!("cannot open {}: {reason}", path.display())))
}

fn in_use<T>(path: &Path, reason: &str) -> DeviceResult<T> {
    Err(DeviceError::InUse(format!("cannot open {}: {reason}", path.display())))
}

pub(super) fn open(path: &Path, options: &OpenOptions) -> DeviceResult<Opened> {
    if let Some(size) = options.create_size
        && (size == 0 || !size.is_multiple_of(PAGE as u64) || options.read_only)
    {
        return refuse(
            path,
            format_args!("a file to create is writable and a multiple of {PAGE} bytes long, not {size}"),
        );
    }
    match stat(path).map(|found| FileType::from_raw_mode(found.st_mode)) {
        Ok(FileType::RegularFile) => open_regular(path, options, false),
        Ok(FileType::BlockDevice) => open_block_device(path, options),
        Ok(_) => refuse(path, "it is neither a regular file nor a block device"),
        Err(Errno::NOENT) if options.create_size.is_some() => open_regular(path, options, true),
        Err(Errno::NOENT) => refuse(path, "it does not exist"),
        Err(errno) => open_refused(path, errno),
    }
}

fn access(options: &OpenOptions) -> OFlags {
    let direction = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    direction | OFlags::DIRECT | OFlags::CLOEXEC
}

/// What the errno of an open means here, and what to do about it.
fn open_refused<T>(path: &Path, errno: Errno) -> DeviceResult<T> {
    match errno {
        Errno::INVAL => refuse(
            path,
            "its file system does not support O_DIRECT; put the file on ext4, xfs, btrfs or tmpfs, or use a block device",
        ),
        Errno::ROFS => not_permitted(path, "its file system or disk is read-only; make that writable"),
        Errno::ACCESS => not_permitted(
            path,
            "permission denied: this user may not read and write it, or not reach it; run as its owner, or change its mode or owner",
        ),
        Errno::PERM => not_permitted(
            path,
            "operation not permitted: it is immutable, or kept from this process; take that away (chattr -i)",
        ),
        Errno::BUSY => {
            in_use(path, "it is in use: mounted, or another server uses it; stop that first, or give another device")
        }
        Errno::NXIO | Errno::NODEV => refuse(path, "the device is not there"),
        errno => refuse(path, errno),
    }
}

fn open_regular(path: &Path, options: &OpenOptions, create: bool) -> DeviceResult<Opened> {
    let flags = access(options) | if create { OFlags::CREATE } else { OFlags::empty() };
    let file = match open_file(path, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => file,
        Err(errno) => return open_refused(path, errno),
    };
    let lock = match options.read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match patiently(Errno::WOULDBLOCK, || flock(&file, lock)) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            return in_use(
                path,
                "another server uses it (it holds the file's lock); stop that one first, or give another file",
            );
        }
        Err(errno) => return refuse(path, format_args!("locking it failed: {errno}")),
    }
    let mut size = length(path, &file)?;
    if let Some(wanted) = options.create_size {
        // Empty: just made by us, or by one who died before it had its size.
        if size == 0 {
            if let Err(error) = allocate(path, &file, wanted) {
                // A failed allocation may have changed the length.
                let _ = ftruncate(&file, 0);
                if create {
                    let _ = unlink(path);
                }
                return Err(error);
            }
            size = length(path, &file)?;
        }
        if size != wanted {
            return refuse(path, format_args!("it exists with {size} bytes, not {wanted}"));
        }
    }
    let (block, memory_align) = file_alignment(path, &file)?;
    let unwritten_extents = fstatfs(&file).is_ok_and(|found| UNWRITTEN_EXTENTS.contains(&(found.f_type as u32)));
    Ok(Opened { unwritten_extents, ..finish(path, file, size, block, memory_align)? })
}

/// Tries again for a little while when refused with `held`: the kernel closes the files of a server
/// that was killed only when the last of its operations are through.
fn patiently<T>(held: Errno, mut attempt: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 0..HELD_PATIENCE_MS / HELD_RETRY_MS {
        match attempt() {
            Err(errno) if errno == held => {}
            other => return other,
        }
        let pause = Timespec { tv_sec: 0, tv_nsec: i64::from(HELD_RETRY_MS) * 1_000_000 };
        // An interrupted pause is a shorter one.
        let _ = nanosleep(&pause);
    }
    attempt()
}

fn length(path: &Path, file: &OwnedFd) -> DeviceResult<u64> {
    match fstat(file) {
        Ok(found) => Ok(found.st_size as u64),
        Err(errno) => refuse(path, errno),
    }
}

/// Gives a new file its blocks, so that no write changes its length or finds the disk full, and
/// makes file and name durable.
fn allocate(path: &Path, file: &OwnedFd, size: u64) -> DeviceResult<()> {
    let no_room = |why: String| {
        refuse(path, format_args!("there is no room for {size} bytes ({why}); free some, or give a smaller size"))
    };
    // Asked first: a file system in memory may take all there is before it says no.
    if let Ok(found) = fstatvfs(file)
        && let free = found.f_bfree.saturating_mul(found.f_frsize)
        && free < size
    {
        return no_room(format!("{free} are free"));
    }
    match fallocate(file, FallocateFlags::empty(), 0, size) {
        Ok(()) => {}
        Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => return no_room(errno.to_string()),
        Err(Errno::OPNOTSUPP) => {
            return refuse(path, "its file system cannot preallocate; put the file on ext4, xfs, btrfs or tmpfs");
        }
        Err(errno) => return refuse(path, format_args!("preallocating {size} bytes failed: {errno}")),
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let synced = fsync(file).and_then(|()| {
        let directory = open_file(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        fsync(directory)
    });
    match synced {
        Ok(()) => Ok(()),
        Err(errno) => refuse(path, format_args!("making the new file durable failed: {errno}")),
    }
}

/// Block size and memory alignment of direct I/O on a file.
fn file_alignment(path: &Path, file: &OwnedFd) -> DeviceResult<(u32, u32)> {
    let found = match statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN) {
        Ok(found) => found,
        // A kernel without statx: a page is aligned enough for everything.
        Err(_) => return Ok((BLOCK_MAX, BLOCK_MAX)),
    };
    if found.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        // Linux before 6.1, or a file system that does not say (tmpfs).
        return Ok((BLOCK_MAX, BLOCK_MAX));
    }
    if found.stx_dio_offset_align == 0 {
        return open_refused(path, Errno::INVAL);
    }
    // Below the file system's own block, direct writes are serialised and can tear.
    let block = found.stx_dio_offset_align.max(found.stx_blksize.min(BLOCK_MAX));
    Ok((block, found.stx_dio_mem_align))
}

/// Opens a block device that nobody uses, and keeps others from it until the file is closed.
pub(crate) fn open_block_device(path: &Path, options: &OpenOptions) -> DeviceResult<Opened> {
    if options.create_size.is_some() {
        return refuse(path, "it is a block device, whose size is not ours to choose");
    }
    // O_EXCL on a block device: refused while it is mounted or otherwise claimed.
    let open = || open_file(path, access(options) | OFlags::EXCL, Mode::empty());
    let file = match patiently(Errno::BUSY, open) {
        Ok(file) => file,
        Err(errno) => return open_refused(path, errno),
    };
    if !options.read_only && is_read_only(&file) {
        return not_permitted(path, "the disk is read-only; make it writable (blockdev --setrw)");
    }
    let measured = ioctl_blksszget(&file).and_then(|logical| {
        let physical = ioctl_blkpbszget(&file)?;
        // The end of a block device is its size.
        Ok((logical, physical, seek(&file, SeekFrom::End(0))?))
    });
    match measured {
        // Below the physical sector the disk reads, modifies and writes, and can tear.
        Ok((logical, physical, size)) => {
            let block = logical.max(physical.min(BLOCK_MAX));
            Ok(Opened { is_block_device: true, ..finish(path, file, size, block, logical)? })
        }
        Err(errno) => refuse(path, format_args!("measuring it failed: {errno}")),
    }
}

/// Whether the kernel refuses writes to a block device. It lets it be opened for writing all the
/// same, and without `/sys` the first write is what finds out.
fn is_read_only(device: &OwnedFd) -> bool {
    let Ok(found) = fstat(device) else { return false };
    let attribute = format!("/sys/dev/block/{}:{}/ro", major(found.st_rdev), minor(found.st_rdev));
    std::fs::read_to_string(attribute).is_ok_and(|text| text.trim() == "1")
}

fn finish(path: &Path, file: OwnedFd, size: u64, block: u32, memory_align: u32) -> DeviceResult<Opened> {
    let block = block.max(BLOCK_MIN);
    if !block.is_power_of_two() || block > BLOCK_MAX || memory_align > BLOCK_MAX {
        return refuse(
            path,
            format_args!(
                "direct I/O on it needs blocks of {block} bytes and memory aligned to {memory_align}; at most {BLOCK_MAX} is supported"
            ),
        );
    }
    if size == 0 || !size.is_multiple_of(block.into()) {
        return refuse(
            path,
            format_args!("its size, {size} bytes, is not a positive multiple of its block size, {block}"),
        );
    }
    let memory_align = memory_align.max(1);
    Ok(Opened { file, size, block, memory_align, unwritten_extents: false, is_block_device: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_server_still_holds_is_waited_for_but_not_for_ever_and_nothing_else_is() {
        let attempts = |answers: &dyn Fn(u32) -> Result<u32, Errno>| {
            let mut made = 0;
            let outcome = patiently(Errno::BUSY, || {
                made += 1;
                answers(made)
            });
            (outcome, made)
        };
        let free_at_last = |attempt| if attempt < 4 { Err(Errno::BUSY) } else { Ok(attempt) };
        assert_eq!(attempts(&free_at_last), (Ok(4), 4));
        let made_at_most = HELD_PATIENCE_MS / HELD_RETRY_MS + 1;
        assert_eq!(attempts(&|_| Err(Errno::BUSY)), (Err(Errno::BUSY), made_at_most));
        assert_eq!(attempts(&|_| Err(Errno::ACCESS)), (Err(Errno::ACCESS), 1));
    }

    #[test]
    fn what_may_not_be_written_to_is_not_taken_for_lost() {
        let refused = |errno| open_refused::<()>(Path::new("/t"), errno).unwrap_err();
        for errno in [Errno::ACCESS, Errno::PERM, Errno::ROFS] {
            let error = refused(errno);
            assert!(
                matches!(&error, DeviceError::NotPermitted(why) if why.starts_with("cannot open /t: ")),
                "{error:?}"
            );
        }
        for errno in [Errno::NOENT, Errno::NXIO, Errno::NODEV, Errno::IO, Errno::INVAL] {
            let error = refused(errno);
            assert!(matches!(&error, DeviceError::Open(why) if why.starts_with("cannot open /t: ")), "{error:?}");
        }
    }
}
