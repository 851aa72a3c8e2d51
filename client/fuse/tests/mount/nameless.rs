//! O_TMPFILE, capabilities, and what statx tells.

use crate::harness::mount;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, XattrFlags, flistxattr, getxattr, linkat, open, setxattr, statx};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

fn nameless(directory: &Path, flags: OFlags) -> OwnedFd {
    open(directory, OFlags::TMPFILE | OFlags::RDWR | flags, Mode::from_raw_mode(0o640)).unwrap()
}

#[test]
fn a_nameless_file_has_no_name_until_it_is_linked_and_never_one_if_it_was_opened_so() {
    let Some(mounted) = mount() else { return };
    let directory = mounted.directory.path();
    let descriptor = nameless(directory, OFlags::empty());
    let mut file = File::from(descriptor);
    file.write_all(b"content").unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert_eq!(fs::read_dir(directory).unwrap().count(), 0);
    let magic = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(rustix::fs::CWD, &magic, rustix::fs::CWD, mounted.path("named"), AtFlags::SYMLINK_FOLLOW).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 1);
    linkat(&file, "", rustix::fs::CWD, mounted.path("again"), AtFlags::EMPTY_PATH).unwrap();
    file.write_all(b" and more").unwrap();
    drop(file);
    for name in ["named", "again"] {
        assert_eq!(fs::read(mounted.path(name)).unwrap(), b"content and more");
        let found = fs::metadata(mounted.path(name)).unwrap();
        assert_eq!((found.nlink(), found.mode() & 0o7777), (2, 0o640));
    }

    let exclusive = nameless(directory, OFlags::EXCL);
    let magic = format!("/proc/self/fd/{}", exclusive.as_raw_fd());
    let refused = linkat(rustix::fs::CWD, &magic, rustix::fs::CWD, mounted.path("never"), AtFlags::SYMLINK_FOLLOW);
    assert_eq!(refused, Err(Errno::NOENT));
    drop(exclusive);
    mounted.unmount();
}

/// `struct vfs_cap_data` of revision 2: cap_net_raw permitted and effective (capabilities(7)).
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// What is written with O_DIRECT or O_APPEND the kernel does not look at.
#[test]
fn however_a_program_is_written_to_its_capabilities_go() {
    let Some(mounted) = mount() else { return };
    let path = mounted.path("program");
    let page = vec![7_u8; 2 * 4096];
    let at = page.as_ptr().align_offset(4096);
    let page = &page[at..at + 4096];
    for how in [OFlags::empty(), OFlags::APPEND, OFlags::DIRECT] {
        fs::write(&path, b"program").unwrap();
        setxattr(&path, "security.capability", &CAPABILITY, XattrFlags::CREATE).unwrap();
        let mut buffer = [0; 64];
        assert_eq!(getxattr(&path, "security.capability", &mut buffer), Ok(CAPABILITY.len()));
        let mut file = File::from(open(&path, OFlags::WRONLY | how, Mode::empty()).unwrap());
        file.write_all(page).unwrap();
        drop(file);
        assert_eq!(getxattr(&path, "security.capability", &mut buffer), Err(Errno::NODATA), "{how:?}");
    }
    mounted.unmount();
}

/// Carries something out as a user without rights.
#[allow(unsafe_code, reason = "libc's setresuid changes all threads, and rustix has none for one")]
fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    const NOBODY: libc::uid_t = 65534;
    let run = || {
        // SAFETY: numbers only; the system call changes the calling thread alone, which ends with `work`.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) }, 0);
        work()
    };
    std::thread::scope(|scope| scope.spawn(run).join().unwrap())
}

/// As on ext4. To read them the kernel lets only the former.
#[test]
fn trusted_attributes_are_listed_for_the_superuser_only() {
    let Some(mounted) = mount() else { return };
    fs::write(mounted.path("file"), b"").unwrap();
    // Opened before: the way there may be closed to others.
    let file = File::open(mounted.path("file")).unwrap();
    setxattr(mounted.path("file"), "user.seen", b"1", XattrFlags::CREATE).unwrap();
    match setxattr(mounted.path("file"), "trusted.kept", b"2", XattrFlags::CREATE) {
        Err(Errno::PERM) => {
            eprintln!("SKIPPED: only the superuser may set trusted attributes");
            return;
        }
        set => set.unwrap(),
    }
    let names = || {
        let mut list = [0; 256];
        let length = flistxattr(&file, &mut list).unwrap();
        assert_eq!(flistxattr(&file, &mut list[..length]), Ok(length));
        assert_eq!(flistxattr(&file, &mut [0; 256][..length - 1]), Err(Errno::RANGE));
        list[..length].to_vec()
    };
    assert_eq!(as_nobody(names), b"user.seen\0");
    assert!(names().windows(13).any(|name| name == b"trusted.kept\0"));
    mounted.unmount();
}

#[test]
fn statx_tells_when_a_file_was_born_and_writing_does_not_change_that() {
    let Some(mounted) = mount() else { return };
    let ask = || {
        let all = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        statx(rustix::fs::CWD, mounted.path("file"), AtFlags::empty(), all).unwrap()
    };
    fs::write(mounted.path("file"), b"1").unwrap();
    let born = ask();
    let told = StatxFlags::from_bits_retain(born.stx_mask);
    assert!(told.contains(StatxFlags::BASIC_STATS | StatxFlags::BTIME), "{told:?}");
    let time = |time: rustix::fs::StatxTimestamp| (time.tv_sec, time.tv_nsec);
    assert!(born.stx_btime.tv_sec > 0);
    assert!(time(born.stx_btime) <= time(born.stx_mtime));
    let file = File::options().write(true).open(mounted.path("file")).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    fs::write(mounted.path("file"), b"longer").unwrap();
    drop(file);
    let later = ask();
    assert_eq!(time(later.stx_btime), time(born.stx_btime));
    assert_eq!((later.stx_size, later.stx_nlink, later.stx_ino), (6, 1, born.stx_ino));
    mounted.unmount();
}
