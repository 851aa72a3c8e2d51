//! Locks of programs on two mounts of one file system.

use crate::harness::{Mounted, mount};
use cfs_fuse::{MountConfig, MountHandle, spawn_mount};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// fcntl's lock commands on a range of a file.
#[allow(unsafe_code, reason = "rustix has fcntl locks of whole files only, and none of open files")]
fn fcntl_lock(file: &File, command: i32, kind: i32, start: i64, length: i64) -> io::Result<libc::flock> {
    let whence = libc::SEEK_SET as i16;
    let mut lock = libc::flock { l_type: kind as i16, l_whence: whence, l_start: start, l_len: length, l_pid: 0 };
    // SAFETY: the descriptor is open and the structure is ours for the length of the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(lock),
    }
}

fn errno<T>(outcome: io::Result<T>) -> Option<i32> {
    outcome.err().and_then(|error| error.raw_os_error())
}

/// One file, open on two mounts.
struct TwoMounts {
    /// Dropped before its directory, and before the server.
    _second: MountHandle,
    second_directory: tempfile::TempDir,
    first: Mounted,
}

impl TwoMounts {
    fn new() -> Option<TwoMounts> {
        let first = mount()?;
        fs::write(first.path("file"), b"content").unwrap();
        let second_directory = tempfile::tempdir().unwrap();
        let config = MountConfig::new(second_directory.path(), first.server.address.clone());
        let second = spawn_mount(config).unwrap();
        Some(TwoMounts { _second: second, second_directory, first })
    }

    fn here(&self) -> File {
        File::options().read(true).write(true).open(self.first.path("file")).unwrap()
    }

    fn there_path(&self) -> PathBuf {
        self.second_directory.path().join("file")
    }

    fn there(&self) -> File {
        File::options().read(true).write(true).open(self.there_path()).unwrap()
    }
}

#[test]
fn fcntl_locks_exclude_by_range_across_mounts_and_go_with_any_close_of_the_file() {
    let Some(mounts) = TwoMounts::new() else { return };
    let (here, there) = (mounts.here(), mounts.there());
    fcntl_lock(&here, libc::F_SETLK, libc::F_WRLCK, 10, 10).unwrap();
    assert_eq!(errno(fcntl_lock(&there, libc::F_SETLK, libc::F_RDLCK, 0, 11)), Some(libc::EAGAIN));
    fcntl_lock(&there, libc::F_SETLK, libc::F_WRLCK, 0, 10).unwrap();
    let conflict = fcntl_lock(&there, libc::F_GETLK, libc::F_WRLCK, 15, 0).unwrap();
    assert_eq!((i32::from(conflict.l_type), conflict.l_start, conflict.l_len), (libc::F_WRLCK, 10, 10));
    let free = fcntl_lock(&there, libc::F_GETLK, libc::F_WRLCK, 20, 0).unwrap();
    assert_eq!(i32::from(free.l_type), libc::F_UNLCK);
    // Any close by the process, of another opening too.
    drop(mounts.here());
    fcntl_lock(&there, libc::F_SETLK, libc::F_WRLCK, 0, 0).unwrap();
}

#[test]
fn flock_fcntl_and_open_file_locks_are_told_apart_and_end_when_they_should() {
    let Some(mounts) = TwoMounts::new() else { return };
    let (here, there) = (mounts.here(), mounts.there());
    flock(&here, FlockOperation::LockExclusive).unwrap();
    assert_eq!(flock(&there, FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
    // fcntl knows nothing of that.
    fcntl_lock(&there, libc::F_SETLK, libc::F_WRLCK, 0, 0).unwrap();
    // An open file's lock is in the way of fcntl's, and of another open file of this process.
    assert_eq!(errno(fcntl_lock(&here, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0)), Some(libc::EAGAIN));
    fcntl_lock(&there, libc::F_SETLK, libc::F_UNLCK, 0, 0).unwrap();
    fcntl_lock(&here, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0).unwrap();
    assert_eq!(errno(fcntl_lock(&mounts.here(), libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0)), Some(libc::EAGAIN));

    let duplicate = here.try_clone().unwrap();
    drop(here);
    assert_eq!(flock(&there, FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK), "a duplicate is open");
    assert_eq!(errno(fcntl_lock(&there, libc::F_OFD_SETLK, libc::F_RDLCK, 0, 0)), Some(libc::EAGAIN));
    drop(duplicate);
    // On the mount where it was closed it is over at once, elsewhere as soon as the server knows.
    flock(mounts.here(), FlockOperation::NonBlockingLockExclusive).unwrap();
    flock(&there, FlockOperation::LockExclusive).unwrap();
    fcntl_lock(&there, libc::F_OFD_SETLKW, libc::F_WRLCK, 0, 0).unwrap();
}

#[test]
fn a_wait_ends_with_the_lock_and_two_that_share_do_not_wait_for_each_other_for_ever() {
    let Some(mounts) = TwoMounts::new() else { return };
    let (here, there) = (mounts.here(), mounts.there());
    flock(&here, FlockOperation::LockShared).unwrap();
    flock(&there, FlockOperation::LockShared).unwrap();
    let upgrade = |file: File| {
        std::thread::Builder::new()
            .spawn(move || {
                flock(&file, FlockOperation::LockExclusive).unwrap();
                flock(&file, FlockOperation::Unlock).unwrap();
            })
            .unwrap()
    };
    let (one, two) = (upgrade(here), upgrade(there));
    one.join().unwrap();
    two.join().unwrap();
}

/// A process that waits for a lock on a file.
struct Waiter {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Waiter {
    fn start(file: &Path) -> Waiter {
        let arguments = ["--exact", "--ignored", "--nocapture", "locks::waits_for_a_lock"];
        let program = std::env::current_exe().unwrap();
        let mut child =
            Command::new(program).args(arguments).env("CFS_LOCKED", file).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut waiter = Waiter { child, output };
        while waiter.waiting_thread().is_none() {
            assert!(waiter.child.try_wait().unwrap().is_none(), "it does not wait: {}", waiter.outcome());
            std::thread::yield_now();
        }
        waiter
    }

    /// The thread that is in fcntl(2).
    fn waiting_thread(&self) -> Option<i32> {
        let in_fcntl = |call: &str| call.starts_with(&format!("{} ", libc::SYS_fcntl));
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let mut waiting = tasks
            .flatten()
            .filter(|task| fs::read_to_string(task.path().join("syscall")).is_ok_and(|call| in_fcntl(&call)));
        waiting.next()?.file_name().to_str()?.parse().ok()
    }

    #[allow(unsafe_code, reason = "no library signals a thread of another process")]
    fn signal_waiting_thread(&self, signal: i32) {
        let (process, thread) = (self.child.id() as i32, self.waiting_thread().expect("it waits"));
        // SAFETY: takes numbers only.
        assert_eq!(unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) }, 0);
    }

    /// What came of its wait.
    fn outcome(mut self) -> String {
        let found = self.output.by_ref().lines().map(|line| line.unwrap()).find(|line| line.contains("lock: "));
        self.child.wait().unwrap();
        found.unwrap_or_default()
    }
}

/// Not a test: the process of [`Waiter`].
#[test]
#[ignore = "run by the tests that wait for it"]
#[allow(unsafe_code, reason = "no library sets a handler that does not restart calls")]
fn waits_for_a_lock() {
    let Some(path) = std::env::var_os("CFS_LOCKED") else { return };
    extern "C" fn nothing(_: i32) {}
    // SAFETY: a zeroed action with a handler is valid, and the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
        assert_eq!(libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()), 0);
    }
    let file = File::options().read(true).write(true).open(path).unwrap();
    match fcntl_lock(&file, libc::F_SETLKW, libc::F_WRLCK, 0, 0) {
        Ok(_) => println!("lock: granted"),
        Err(error) => println!("lock: {}", error.raw_os_error().unwrap()),
    }
}

#[test]
fn a_signal_ends_a_wait_with_eintr_and_a_killed_waiter_goes_away_without_the_lock() {
    let Some(mounts) = TwoMounts::new() else { return };
    let here = mounts.here();
    fcntl_lock(&here, libc::F_SETLK, libc::F_WRLCK, 0, 0).unwrap();
    let interrupted = Waiter::start(&mounts.there_path());
    interrupted.signal_waiting_thread(libc::SIGALRM);
    assert_eq!(interrupted.outcome(), format!("lock: {}", libc::EINTR));

    let mut killed = Waiter::start(&mounts.there_path());
    killed.child.kill().unwrap();
    assert!(!killed.child.wait().unwrap().success());
    let patient = Waiter::start(&mounts.there_path());
    fcntl_lock(&here, libc::F_SETLK, libc::F_UNLCK, 0, 0).unwrap();
    assert_eq!(patient.outcome(), "lock: granted");
    // It has ended, and with it its lock; nobody holds or awaits any.
    fcntl_lock(&here, libc::F_SETLK, libc::F_WRLCK, 0, 0).unwrap();
}
