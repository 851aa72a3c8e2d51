//! One file system mounted twice.

use crate::harness::{mount, mount_on, start_server_with};
use cfs_fabric::Address;
use cfs_fuse::{MountConfig, spawn_mount};
use cfs_meta::service::ServiceConfig;
use cfs_reactor::clock::{Clock, KernelClock};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

/// Bytes of one line of the shared log.
const RECORD: usize = 50;

#[test]
fn two_mounts_of_one_file_system_see_each_others_changes() {
    let Some(mounted) = mount() else { return };
    let second = tempfile::tempdir().unwrap();
    let other = spawn_mount(MountConfig::new(second.path(), mounted.server.address.clone())).unwrap();
    fs::write(mounted.path("shared"), b"one").unwrap();
    assert_eq!(fs::read(second.path().join("shared")).unwrap(), b"one");
    for round in 0..20 {
        let (here, there) = (mounted.path("shared"), second.path().join("shared"));
        fs::write(&here, format!("from the first {round}")).unwrap();
        assert_eq!(fs::read_to_string(&there).unwrap(), format!("from the first {round}"));
        fs::write(&there, format!("from the second mount {round}")).unwrap();
        assert_eq!(fs::read_to_string(&here).unwrap(), format!("from the second mount {round}"));
        fs::rename(&here, mounted.path("renamed")).unwrap();
        assert!(!there.exists(), "round {round}");
        fs::rename(second.path().join("renamed"), &there).unwrap();
        assert!(here.exists() && !mounted.path("renamed").exists(), "round {round}");
    }
    drop(other);
    mounted.unmount();
}

/// One round of changes in a directory whose names are in the kernel's cache when they come.
fn change_names(directory: &Path, side: &str, number: u32) -> io::Result<()> {
    let name = directory.join(format!("{side}-{number}"));
    assert_eq!(fs::metadata(directory.join("known"))?.len(), 0);
    assert!(is_absent(&directory.join("absent"))?);
    fs::write(&name, b"content")?;
    assert_eq!(fs::metadata(&name)?.len(), 7);
    fs::rename(&name, directory.join(format!("moved-{side}-{number}")))?;
    assert!(is_absent(&name)?);
    Ok(())
}

fn is_absent(path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        found => found.map(|_| false),
    }
}

fn names(directory: &Path) -> BTreeSet<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn two_mounts_that_change_one_directory_at_once_do_not_wait_for_their_leases_to_end() {
    const ROUNDS: u32 = 50;
    let Some(mounted) = mount() else { return };
    let second = tempfile::tempdir().unwrap();
    let other = spawn_mount(MountConfig::new(second.path(), mounted.server.address.clone())).unwrap();
    let shared = [mounted.path("shared"), second.path().join("shared")];
    fs::create_dir(&shared[0]).unwrap();
    fs::write(shared[0].join("known"), b"").unwrap();
    let clock = KernelClock::new();
    let started = clock.now();
    let churn = |directory: PathBuf, side: &'static str| {
        let run = move || (0..ROUNDS).for_each(|number| change_names(&directory, side, number).unwrap());
        thread::Builder::new().spawn(run).unwrap()
    };
    let sides = [churn(shared[0].clone(), "one"), churn(shared[1].clone(), "two")];
    sides.into_iter().for_each(|side| side.join().unwrap());
    // One lease is 10 s: a single wait for one would show.
    let took = clock.now() - started;
    assert!(took < Duration::from_secs(9), "it took {took:?}");
    let moved = ["one", "two"].map(|side| (0..ROUNDS).map(move |number| format!("moved-{side}-{number}")));
    let expected: BTreeSet<String> = moved.into_iter().flatten().chain(["known".to_owned()]).collect();
    for directory in &shared {
        assert_eq!(names(directory), expected);
        for name in &expected {
            assert!(directory.join(name).exists(), "{name}");
        }
    }
    drop(other);
    mounted.unmount();
}

/// Writes one side's half of a page again and again, and appends to a log; looks at both. The sides
/// begin each round together, with what both were allowed to keep of the files.
fn share_a_page(directory: &Path, side: usize, rounds: u64, together: &Barrier) {
    let page = File::options().read(true).write(true).open(directory.join("page")).unwrap();
    let mut log = File::options().append(true).open(directory.join("log")).unwrap();
    let mut theirs_before = 0;
    for round in 1..=rounds {
        assert_eq!(log.metadata().unwrap().len(), (round - 1) * 2 * RECORD as u64);
        together.wait();
        page.write_all_at(&round.to_le_bytes(), side as u64 * 8).unwrap();
        log.write_all(&[side as u8; RECORD]).unwrap();
        let mut halves = [[0; 8]; 2];
        page.read_exact_at(halves.as_flattened_mut(), 0).unwrap();
        let [ours, theirs] = [side, 1 - side].map(|half| u64::from_le_bytes(halves[half]));
        assert_eq!(ours, round);
        assert!(theirs >= theirs_before, "{theirs} after {theirs_before}");
        theirs_before = theirs;
        together.wait();
    }
}

#[test]
fn two_mounts_that_write_one_page_and_append_to_one_log_do_not_wait_for_their_leases_to_end() {
    const ROUNDS: u64 = 100;
    let Some(mounted) = mount() else { return };
    let second = tempfile::tempdir().unwrap();
    let other = spawn_mount(MountConfig::new(second.path(), mounted.server.address.clone())).unwrap();
    fs::write(mounted.path("page"), [0; 4096]).unwrap();
    fs::write(mounted.path("log"), b"").unwrap();
    let directories = [mounted.path("."), second.path().to_owned()];
    let clock = KernelClock::new();
    let started = clock.now();
    let together = Arc::new(Barrier::new(2));
    let sides = [0, 1].map(|side| {
        let (directory, together) = (directories[side].clone(), together.clone());
        thread::Builder::new().spawn(move || share_a_page(&directory, side, ROUNDS, &together)).unwrap()
    });
    sides.into_iter().for_each(|side| side.join().unwrap());
    let took = clock.now() - started;
    assert!(took < Duration::from_secs(9), "it took {took:?}");
    for directory in &directories {
        let page = fs::read(directory.join("page")).unwrap();
        assert_eq!(page[..16], [ROUNDS.to_le_bytes(), ROUNDS.to_le_bytes()].concat());
        let log = fs::read(directory.join("log")).unwrap();
        let (records, rest) = log.as_chunks::<RECORD>();
        assert!(rest.is_empty() && records.iter().all(|record| record.iter().all(|byte| *byte == record[0])));
        for side in [0, 1] {
            assert_eq!(records.iter().filter(|record| record[0] == side).count() as u64, ROUNDS);
        }
    }
    drop(other);
    mounted.unmount();
}

/// Opens a file that need not be there, and one that must not, at the same time as the other side.
/// Whether the latter was made here, for each round.
fn create_at_once(directory: &Path, side: usize, rounds: usize, together: &Barrier) -> Vec<io::Result<bool>> {
    let create_both = |round| {
        together.wait();
        let shared = directory.join(format!("shared-{round}"));
        let shared = File::options().write(true).create(true).truncate(false).open(shared)?;
        shared.write_all_at(&[side as u8 + 1], side as u64)?;
        match File::create_new(directory.join(format!("exclusive-{round}"))) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    };
    (0..rounds).map(create_both).collect()
}

#[test]
fn of_two_mounts_that_create_one_file_at_once_both_open_it_unless_exclusively() {
    const ROUNDS: usize = 100;
    let Some(mounted) = mount() else { return };
    let second = tempfile::tempdir().unwrap();
    let other = spawn_mount(MountConfig::new(second.path(), mounted.server.address.clone())).unwrap();
    let together = Arc::new(Barrier::new(2));
    let sides = [mounted.path("."), second.path().to_owned()].into_iter().enumerate().map(|(side, directory)| {
        let together = together.clone();
        thread::Builder::new().spawn(move || create_at_once(&directory, side, ROUNDS, &together)).unwrap()
    });
    let sides: Vec<_> = sides.collect();
    let made: io::Result<Vec<Vec<bool>>> =
        sides.into_iter().map(|side| side.join().unwrap().into_iter().collect()).collect();
    let made = made.unwrap();
    for round in 0..ROUNDS {
        assert!(made[0][round] != made[1][round], "round {round}: made by {made:?}");
        assert_eq!(fs::read(mounted.path(&format!("shared-{round}"))).unwrap(), [1, 2], "round {round}");
    }
    drop(other);
    mounted.unmount();
}

/// Changes names until that fails; tells of each round and how it ended.
fn churn_until_gone(directory: PathBuf, side: &'static str) -> Receiver<Option<io::Error>> {
    let (tell, told) = channel();
    let run = move || {
        let failed = (0..).find_map(|number| {
            let outcome = change_names(&directory, side, number);
            if outcome.is_ok() {
                let _ = tell.send(None);
            }
            outcome.err()
        });
        let _ = tell.send(failed);
    };
    thread::Builder::new().spawn(run).unwrap();
    told
}

/// How it ended.
fn end(told: &Receiver<Option<io::Error>>, patience: Duration) -> io::Error {
    loop {
        if let Some(error) = told.recv_timeout(patience).expect("an end in time") {
            return error;
        }
    }
}

/// A mount of its own process.
fn mount_in_a_process(mountpoint: &Path, server: &Address) -> Child {
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "a_mount_to_try_by_hand"])
        .env("CFS_MOUNT", mountpoint)
        .env("CFS_ADDRESS", &server.0)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("mounted")), "the mount ended");
    process
}

#[test]
fn a_mount_that_is_killed_while_both_change_one_directory_is_gone_at_once() {
    // The dead mount is waited for no longer than its lease.
    let config = ServiceConfig { read_lease: Duration::from_secs(2), ..ServiceConfig::default() };
    let Some(mounted) = mount_on(start_server_with(config)) else { return };
    let second = tempfile::tempdir().unwrap();
    let shared = mounted.path("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("known"), b"").unwrap();
    let mut process = mount_in_a_process(second.path(), &mounted.server.address);
    let (ours, theirs) =
        (churn_until_gone(shared.clone(), "one"), churn_until_gone(second.path().join("shared"), "two"));
    for told in [&ours, &theirs] {
        let rounds: Vec<_> = told.iter().take(10).collect();
        assert!(rounds.iter().all(Option::is_none), "{rounds:?}");
    }
    process.kill().unwrap();
    // No thread of it stays, waiting in the kernel; its device is closed, so its programs get an error.
    let (reap, reaped) = channel();
    thread::Builder::new().spawn(move || reap.send(process.wait())).unwrap();
    let status = reaped.recv_timeout(Duration::from_secs(5)).expect("the process ends in time").unwrap();
    assert!(!status.success());
    let error = end(&theirs, Duration::from_secs(5));
    assert!([libc::ENOTCONN, libc::ECONNABORTED].contains(&error.raw_os_error().unwrap()), "{error}");

    rustix::mount::unmount(second.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    while ours.try_recv().is_ok() {}
    assert!(ours.recv_timeout(Duration::from_secs(10)).expect("the other mount goes on").is_none());
    fs::remove_file(shared.join("known")).unwrap();
    assert_eq!(end(&ours, Duration::from_secs(10)).kind(), ErrorKind::NotFound);
    mounted.unmount();
}
