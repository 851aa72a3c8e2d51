//! An inode's attributes as the kernel wants them.

use crate::abi::{AttrOut, Attributes, EntryOut, Statx, StatxOut, StatxTime};
use cfs_wire::Timestamp;
use cfs_wire::meta::{Attr, FileKind};
use std::time::Duration;

/// What `stat` shows as the preferred size of reads and writes.
pub(crate) const BLOCK_BYTES: u32 = 4096;
/// STATX_BASIC_STATS and STATX_BTIME.
const STATX_MASK: u32 = 0x7ff | 0x800;
const SECTOR_BYTES: u64 = 512;

fn mode(attr: &Attr) -> u32 {
    attr.kind.mode_bits() | (attr.mode & 0o7777)
}

pub(crate) fn attributes(attr: &Attr) -> Attributes {
    Attributes {
        ino: attr.ino.as_u64(),
        size: attr.size,
        blocks: attr.allocated.div_ceil(SECTOR_BYTES),
        // Seconds before 1970 travel as the two's complement, as the kernel reads them.
        atime: attr.atime.secs as u64,
        mtime: attr.mtime.secs as u64,
        ctime: attr.ctime.secs as u64,
        atimensec: attr.atime.nanos,
        mtimensec: attr.mtime.nanos,
        ctimensec: attr.ctime.nanos,
        mode: mode(attr),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

pub(crate) fn attr_out(attr: &Attr, valid: Duration) -> AttrOut {
    AttrOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        attr: attributes(attr),
        ..AttrOut::default()
    }
}

/// Inode numbers are never reused, so generation 0 is enough for all.
pub(crate) fn entry_out(attr: &Attr, attr_valid: Duration, entry_valid: Duration) -> EntryOut {
    EntryOut {
        nodeid: attr.ino.as_u64(),
        entry_valid: entry_valid.as_secs(),
        entry_valid_nsec: entry_valid.subsec_nanos(),
        attr_valid: attr_valid.as_secs(),
        attr_valid_nsec: attr_valid.subsec_nanos(),
        attr: attributes(attr),
        ..EntryOut::default()
    }
}

/// Inode 0 with a time says for how long the name is known to be absent.
pub(crate) fn absent_out(valid: Duration) -> EntryOut {
    EntryOut { entry_valid: valid.as_secs(), entry_valid_nsec: valid.subsec_nanos(), ..EntryOut::default() }
}

pub(crate) fn statx_out(attr: &Attr, valid: Duration) -> StatxOut {
    let time = |time: Timestamp| StatxTime { tv_sec: time.secs, tv_nsec: time.nanos, reserved: 0 };
    let stat = Statx {
        mask: STATX_MASK,
        blksize: BLOCK_BYTES,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        mode: mode(attr) as u16,
        ino: attr.ino.as_u64(),
        size: attr.size,
        blocks: attr.allocated.div_ceil(SECTOR_BYTES),
        atime: time(attr.atime),
        btime: time(attr.btime),
        ctime: time(attr.ctime),
        mtime: time(attr.mtime),
        // Linux's `new_encode_dev` taken apart.
        rdev_major: (attr.rdev & 0xf_ff00) >> 8,
        rdev_minor: (attr.rdev & 0xff) | ((attr.rdev >> 12) & 0xf_ff00),
        ..Statx::default()
    };
    StatxOut { attr_valid: valid.as_secs(), attr_valid_nsec: valid.subsec_nanos(), stat, ..StatxOut::default() }
}

/// The `DT_*` of a directory entry.
pub(crate) fn dirent_kind(kind: FileKind) -> u32 {
    kind.mode_bits() >> 12
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_wire::Ino;

    fn attr() -> Attr {
        let time = |secs, nanos| Timestamp { secs, nanos };
        Attr {
            ino: Ino::from_u64(42),
            kind: FileKind::CharDevice,
            mode: 0o4755,
            nlink: 3,
            uid: 1000,
            gid: 1001,
            // makedev(0x123, 0x45678)
            rdev: 0x4561_2378,
            size: 1025,
            allocated: 513,
            atime: time(1, 2),
            mtime: time(-1, 999_999_999),
            ctime: time(4_294_967_296, 7),
            btime: time(5, 6),
            version: 1,
            has_xattrs: false,
            policy: cfs_wire::Policy::new(1, 0).unwrap(),
        }
    }

    #[test]
    fn stat_and_statx_tell_the_same_and_statx_the_birth_time_too() {
        let valid = Duration::new(9, 10);
        let plain = attr_out(&attr(), valid);
        assert_eq!((plain.attr_valid, plain.attr_valid_nsec), (9, 10));
        let found = plain.attr;
        assert_eq!((found.ino, found.size, found.blocks, found.mode), (42, 1025, 2, 0o020_000 | 0o4755));
        assert_eq!((found.mtime as i64, found.mtimensec, found.ctime), (-1, 999_999_999, 4_294_967_296));
        let wide = statx_out(&attr(), valid).stat;
        assert_eq!((wide.mask, u32::from(wide.mode), wide.blocks, wide.nlink), (0xfff, found.mode, 2, 3));
        assert_eq!((wide.btime.tv_sec, wide.btime.tv_nsec, wide.mtime.tv_sec), (5, 6, -1));
        assert_eq!((wide.rdev_major, wide.rdev_minor), (0x123, 0x45678));
        assert_eq!(libc::makedev(wide.rdev_major, wide.rdev_minor) as u32, found.rdev);
    }

    #[test]
    fn entries_carry_both_times_and_absent_ones_only_that_of_the_name() {
        let entry = entry_out(&attr(), Duration::from_millis(1500), Duration::from_secs(2));
        assert_eq!((entry.nodeid, entry.attr_valid, entry.attr_valid_nsec), (42, 1, 500_000_000));
        assert_eq!((entry.entry_valid, entry.entry_valid_nsec), (2, 0));
        let absent = absent_out(Duration::from_secs(3));
        assert_eq!((absent.nodeid, absent.entry_valid, absent.attr.mode), (0, 3, 0));
    }

    #[test]
    fn directory_entries_have_the_kernels_types() {
        assert_eq!(dirent_kind(FileKind::File), u32::from(libc::DT_REG));
        assert_eq!(dirent_kind(FileKind::Directory), u32::from(libc::DT_DIR));
        assert_eq!(dirent_kind(FileKind::Symlink), u32::from(libc::DT_LNK));
    }
}
