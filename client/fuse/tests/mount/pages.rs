//! The kernel's pages of a file that another mount writes.

use crate::harness::{Mounted, mount_on, start_server_with};
use cfs_fuse::{MountConfig, MountHandle, spawn_mount};
use cfs_meta::service::ServiceConfig;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, SystemTime};

const LEASE: Duration = Duration::from_millis(300);
/// Of the file that many read at once.
const PAGES: u64 = 1024;

fn two_mounts() -> Option<(Mounted, tempfile::TempDir, MountHandle)> {
    let config = ServiceConfig { read_lease: LEASE, ..ServiceConfig::default() };
    let mounted = mount_on(start_server_with(config))?;
    let second = tempfile::tempdir().unwrap();
    let other = spawn_mount(MountConfig::new(second.path(), mounted.server.address.clone())).unwrap();
    Some((mounted, second, other))
}

fn pass(time: Duration) {
    let (_kept, never) = channel::<()>();
    never.recv_timeout(time).unwrap_err();
}

/// New content of the same length and time, as `cp -p` and `rsync -t` make it.
fn rewrite(path: &Path, byte: u8, time: SystemTime) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[byte; 8192], 0).unwrap();
    file.set_modified(time).unwrap();
    file.sync_all().unwrap();
}

fn story() -> Option<(Mounted, tempfile::TempDir, MountHandle, [PathBuf; 2], SystemTime)> {
    let (mounted, second, other) = two_mounts()?;
    let paths = [mounted.path("file"), second.path().join("file")];
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::write(&paths[0], [1; 8192]).unwrap();
    rewrite(&paths[0], 1, time);
    Some((mounted, second, other, paths, time))
}

#[test]
fn a_file_that_was_closed_is_read_as_it_is_now_though_its_size_and_time_are_the_same() {
    let Some((mounted, _second, other, [here, there], time)) = story() else { return };
    assert!(fs::read(&there).unwrap() == [1; 8192]);
    // Nobody tells the second mount of changes any more.
    pass(LEASE * 2);
    rewrite(&here, 2, time);
    assert!(fs::read(&there).unwrap() == [2; 8192]);
    drop(other);
    mounted.unmount();
}

#[test]
fn a_file_that_stayed_open_is_read_as_it_is_now_though_its_size_and_time_are_the_same() {
    let Some((mounted, _second, other, [here, there], time)) = story() else { return };
    let open = File::open(&there).unwrap();
    let mut seen = [0; 8192];
    open.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == [1; 8192]);
    pass(LEASE * 2);
    rewrite(&here, 2, time);
    open.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == [2; 8192]);
    drop((open, other));
    mounted.unmount();
}

#[test]
fn a_reader_that_keeps_a_file_open_sees_each_line_that_is_added_elsewhere_at_once() {
    let Some((mounted, second, other)) = two_mounts() else { return };
    let writer = File::create(mounted.path("file")).unwrap();
    writer.write_all_at(&[1; 5000], 0).unwrap();
    let reader = File::open(second.path().join("file")).unwrap();
    let mut content = vec![0; 30_000];
    for size in (5000..25_000).step_by(100) {
        assert_eq!(reader.read_at(&mut content, 0).unwrap(), size);
        assert_eq!(content[size - 1], 1);
        writer.write_all_at(&[1; 100], size as u64).unwrap();
    }
    drop((reader, other));
    mounted.unmount();
}

#[test]
fn two_mounts_that_write_and_read_one_file_at_once_both_see_all_of_it() {
    const ROUNDS: u64 = 100;
    const RECORD: u64 = 100;
    let Some((mounted, second, other)) = two_mounts() else { return };
    let paths = [mounted.path("file"), second.path().join("file")];
    fs::write(&paths[0], vec![0; (2 * ROUNDS * RECORD) as usize]).unwrap();
    // Records of both lie between each other, on shared pages.
    let write = |path: PathBuf, side: u64| {
        let run = move || {
            let file = File::options().read(true).write(true).open(path).unwrap();
            for round in 0..ROUNDS {
                let at = (2 * round + side) * RECORD;
                file.write_all_at(&[side as u8 + 1; RECORD as usize], at).unwrap();
                let mut seen = vec![0; (at + RECORD) as usize];
                file.read_exact_at(&mut seen, 0).unwrap();
                let mut own = seen.chunks(RECORD as usize).skip(side as usize).step_by(2);
                assert!(own.all(|record| record == [side as u8 + 1; RECORD as usize]), "round {round} of {side}");
            }
        };
        thread::Builder::new().spawn(run).unwrap()
    };
    let sides = [write(paths[0].clone(), 0), write(paths[1].clone(), 1)];
    sides.into_iter().for_each(|side| side.join().unwrap());
    for path in &paths {
        let found = fs::read(path).unwrap();
        let other = |record: &u64| found[(record * RECORD) as usize] != (record % 2) as u8 + 1;
        assert_eq!((0..2 * ROUNDS).filter(other).collect::<Vec<_>>(), Vec::<u64>::new(), "{}", path.display());
    }
    drop(other);
    mounted.unmount();
}

/// Reads one byte of page after page until the file system is gone; how that shows.
fn read_until_gone(file: &File, first: u64) -> Option<i32> {
    (first..).find_map(|page| {
        let errno = file.read_at(&mut [0], page % PAGES * 4096).err()?.raw_os_error();
        (errno != Some(libc::EIO)).then_some(errno?)
    })
}

#[test]
fn an_unmount_frees_readers_though_a_drop_of_pages_waits_for_them() {
    const READERS: u64 = 16;
    let Some((mounted, second, other)) = two_mounts() else { return };
    let written = File::create(mounted.path("file")).unwrap();
    written.write_all_at(&vec![1; PAGES as usize * 4096], 0).unwrap();
    written.sync_all().unwrap();
    let read = Arc::new(File::open(second.path().join("file")).unwrap());
    let (tell, told) = channel();
    let start = |reader: u64| {
        let (read, tell) = (read.clone(), tell.clone());
        thread::Builder::new().spawn(move || tell.send(read_until_gone(&read, reader))).unwrap();
    };
    mounted.server.fetches.hold();
    start(0);
    while mounted.server.fetches.waiting() == 0 {
        pass(Duration::from_millis(1));
    }
    written.write_all_at(&[2; 4096], 0).unwrap();
    written.sync_all().unwrap();
    // The drop of the page that is being read is under way.
    pass(LEASE);
    other.unmounter().unmount().unwrap();
    (1..READERS).for_each(start);
    other.wait().unwrap();
    for _ in 0..READERS {
        let errno = told.recv_timeout(Duration::from_secs(10)).expect("a reader is freed").unwrap();
        assert!([libc::ENOTCONN, libc::ECONNABORTED].contains(&errno), "{errno}");
    }
    mounted.unmount();
}
