//! A real mount on a server in this process: metadata without Raft, bytes in memory. Skipped,
//! saying so, where FUSE cannot be used.
#![allow(clippy::disallowed_methods, reason = "servers and programs have threads of their own")]

#[path = "../../../core/tests/common/mod.rs"]
mod common;
mod harness;
mod locks;
mod mapped;
mod nameless;
mod names;
mod pages;
mod two_mounts;

use cfs_fabric::Address;
use cfs_fuse::{MountConfig, spawn_mount};
use harness::{Mounted, mount, start_server};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::time::Duration;

#[test]
fn files_directories_links_and_times_behave_as_on_any_file_system() {
    let Some(mounted) = mount() else { return };
    let data: Vec<u8> = (0..3_000_000u32).map(|at| (at.wrapping_mul(7919) >> 5) as u8).collect();
    fs::write(mounted.path("big"), &data).unwrap();
    assert_eq!(fs::read(mounted.path("big")).unwrap(), data);
    let file = File::open(mounted.path("big")).unwrap();
    let mut part = [0; 1000];
    file.read_exact_at(&mut part, 1_234_567).unwrap();
    assert_eq!(part[..], data[1_234_567..1_235_567]);

    fs::create_dir_all(mounted.path("a/b/c")).unwrap();
    assert_eq!(fs::remove_dir(mounted.path("a/b")).unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
    symlink("b/c", mounted.path("a/link")).unwrap();
    fs::write(mounted.path("a/link/inside"), b"x").unwrap();
    assert_eq!(fs::read(mounted.path("a/b/c/inside")).unwrap(), b"x");
    fs::hard_link(mounted.path("big"), mounted.path("a/hard")).unwrap();
    assert_eq!(fs::metadata(mounted.path("big")).unwrap().nlink(), 2);
    fs::rename(mounted.path("a/hard"), mounted.path("moved")).unwrap();
    assert_eq!(fs::read(mounted.path("moved")).unwrap(), data);
    fs::set_permissions(mounted.path("moved"), fs::Permissions::from_mode(0o4711)).unwrap();
    assert_eq!(fs::metadata(mounted.path("big")).unwrap().mode(), 0o104_711);

    let time = std::time::SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    let mut file = OpenOptions::new().append(true).open(mounted.path("moved")).unwrap();
    file.write_all(b"tail").unwrap();
    file.set_modified(time).unwrap();
    drop(file);
    let found = fs::metadata(mounted.path("moved")).unwrap();
    assert_eq!((found.modified().unwrap(), found.len()), (time, 3_000_004));

    let names: Vec<String> = (0..1500).map(|number| format!("file-{number:04}")).collect();
    fs::create_dir(mounted.path("many")).unwrap();
    for name in &names {
        File::create(mounted.path("many").join(name)).unwrap();
    }
    let mut listed: Vec<String> = fs::read_dir(mounted.path("many"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    listed.sort();
    assert_eq!(listed, names);
    fs::remove_dir_all(mounted.path("many")).unwrap();
    assert!(!mounted.path("many").exists());
    drop(file_gone(&mounted));
    mounted.unmount();
}

/// A file that is unlinked while open.
fn file_gone(mounted: &Mounted) -> File {
    let options = OpenOptions::new().read(true).write(true).create_new(true).clone();
    let mut file = options.open(mounted.path("gone")).unwrap();
    fs::remove_file(mounted.path("gone")).unwrap();
    file.write_all(b"still here").unwrap();
    file.sync_all().unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    file
}

#[test]
fn a_running_program_is_neither_written_nor_truncated() {
    let Some(mounted) = mount() else { return };
    let program = mounted.path("program");
    fs::copy("/bin/sleep", &program).unwrap();
    let size = fs::metadata("/bin/sleep").unwrap().len();
    let mut running = std::process::Command::new(&program).arg("60").spawn().unwrap();
    let for_writing = OpenOptions::new().write(true).open(&program);
    // Truncates though it opens for reading only.
    let truncating = OpenOptions::new().read(true).custom_flags(libc::O_TRUNC).open(&program);
    for opened in [for_writing, truncating] {
        assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::ETXTBSY));
    }
    assert_eq!(running.try_wait().unwrap(), None, "the program goes on");
    assert_eq!(fs::metadata(&program).unwrap().len(), size);
    running.kill().unwrap();
    running.wait().unwrap();
    OpenOptions::new().read(true).custom_flags(libc::O_TRUNC).open(&program).unwrap();
    assert_eq!(fs::metadata(&program).unwrap().len(), 0);
    mounted.unmount();
}

#[test]
fn what_was_synced_is_there_after_a_new_mount_and_direct_io_sees_what_was_buffered() {
    let Some(mut mounted) = mount() else { return };
    fs::write(mounted.path("kept"), vec![7u8; 100_000]).unwrap();
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(mounted.path("kept")).unwrap();
    let mut seen = vec![0; 100_000];
    direct.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, vec![7u8; 100_000]);
    drop(direct);
    let mount = mounted.mount.take().unwrap();
    mount.unmounter().unmount().unwrap();
    mount.wait().unwrap();
    assert!(!mounted.path("kept").exists());
    let config = MountConfig::new(mounted.directory.path(), mounted.server.address.clone());
    mounted.mount = Some(spawn_mount(config).unwrap());
    assert_eq!(fs::read(mounted.path("kept")).unwrap(), vec![7u8; 100_000]);
    mounted.unmount();
}

#[test]
fn a_missing_mount_point_and_a_missing_server_are_told_in_one_line() {
    let address = Address("127.0.0.1:1".to_owned());
    let error = spawn_mount(MountConfig::new("/no/such/place", address.clone())).err().unwrap().to_string();
    assert!(error.contains("create it first") || error.contains("/dev/fuse"), "{error}");
    let directory = tempfile::tempdir().unwrap();
    let mut config = MountConfig::new(directory.path(), address);
    config.client.retry_window = Duration::from_millis(300);
    let error = spawn_mount(config).err().unwrap().to_string();
    assert!(error.contains("is the server running") || error.contains("/dev/fuse"), "{error}");
    assert!(!error.contains('\n'));
}

/// `cargo test -p cfs-fuse --test mount -- --ignored`: a mount to try things on, until unmounted; of
/// the server at CFS_ADDRESS, or of its own.
#[test]
#[ignore = "stays until CFS_MOUNT is unmounted"]
fn a_mount_to_try_by_hand() {
    let mountpoint = std::env::var("CFS_MOUNT").expect("CFS_MOUNT names a directory");
    let running = std::env::var("CFS_ADDRESS").map(Address).map_err(|_| start_server());
    let address = running.as_ref().unwrap_or_else(|server| &server.address).clone();
    let mount = spawn_mount(MountConfig::new(mountpoint, address)).unwrap();
    println!("mounted");
    mount.wait().unwrap();
}
