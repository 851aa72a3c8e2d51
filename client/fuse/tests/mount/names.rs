//! Names that change under open files and listings, and the end of a mount.

use crate::harness::{mount, skipped};
use cfs_fuse::{MountConfig, spawn_mount};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

#[test]
fn a_file_that_another_was_renamed_over_is_read_and_written_through_its_descriptor() {
    let Some(mounted) = mount() else { return };
    let (name, new) = (mounted.path("name"), mounted.path("new"));
    fs::write(&name, vec![1u8; 300_000]).unwrap();
    let old = File::options().read(true).write(true).open(&name).unwrap();
    for round in 2..5u8 {
        fs::write(&new, vec![round; 200_000]).unwrap();
        fs::rename(&new, &name).unwrap();
        assert!(fs::read(&name).unwrap() == vec![round; 200_000]);
        let mut seen = vec![0; 300_000];
        old.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == vec![1u8; 300_000], "round {round}");
    }
    old.write_all_at(b"late", 299_998).unwrap();
    old.sync_all().unwrap();
    let found = old.metadata().unwrap();
    assert_eq!((found.len(), std::os::unix::fs::MetadataExt::nlink(&found)), (300_002, 0));
    let mut seen = [0; 6];
    old.read_exact_at(&mut seen, 299_996).unwrap();
    assert_eq!(&seen, b"\x01\x01late");
    assert_eq!(fs::metadata(&name).unwrap().len(), 200_000, "the new file is another one");
    drop(old);
    mounted.unmount();
}

#[test]
fn a_listing_during_removals_has_no_name_twice_and_lacks_none_that_stayed() {
    // More than are fetched at once; the tests' server copies its state for each change.
    const NAMES: usize = 600;
    /// One of so many is removed.
    const GONE: usize = 10;
    let Some(mounted) = mount() else { return };
    let directory = mounted.path("many");
    fs::create_dir(&directory).unwrap();
    let name = |number: usize| format!("name-{number:04}");
    fs::write(mounted.path("file"), b"").unwrap();
    for number in 0..NAMES {
        fs::hard_link(mounted.path("file"), directory.join(name(number))).unwrap();
    }
    let second = tempfile::tempdir().unwrap();
    let other = spawn_mount(MountConfig::new(second.path(), mounted.server.address.clone())).unwrap();
    let removed = Arc::new(AtomicBool::new(false));
    let remove = {
        let (directory, removed) = (second.path().join("many"), removed.clone());
        move || {
            (1..NAMES).step_by(GONE).for_each(|number| fs::remove_file(directory.join(name(number))).unwrap());
            removed.store(true, Ordering::Release);
        }
    };
    let remover = thread::Builder::new().spawn(remove).unwrap();
    let stayed: BTreeSet<String> = (0..NAMES).filter(|number| number % GONE != 1).map(name).collect();
    let mut listings = 0;
    loop {
        let last = removed.load(Ordering::Acquire);
        let mut seen = BTreeSet::new();
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap().file_name().into_string().unwrap();
            assert!(seen.insert(entry.clone()), "{entry} twice in listing {listings}");
        }
        assert_eq!(stayed.difference(&seen).collect::<Vec<_>>(), Vec::<&String>::new(), "listing {listings}");
        listings += 1;
        if last {
            assert_eq!(seen, stayed);
            break;
        }
    }
    assert!(listings > 1, "it was listed while names went");
    remover.join().unwrap();
    drop(other);
    mounted.unmount();
}

#[test]
fn a_mount_ends_by_fusermount_with_everything_written() {
    let Some(mut mounted) = mount() else { return };
    fs::write(mounted.path("kept"), vec![9u8; 70_000]).unwrap();
    match Command::new("fusermount3").arg("-u").arg(mounted.directory.path()).status() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            skipped("fusermount3 is not installed");
            return mounted.unmount();
        }
        status => assert!(status.unwrap().success()),
    }
    mounted.mount.take().unwrap().wait().unwrap();
    assert_eq!(fs::read_dir(mounted.directory.path()).unwrap().count(), 0);
    let config = MountConfig::new(mounted.directory.path(), mounted.server.address.clone());
    mounted.mount = Some(spawn_mount(config).unwrap());
    assert!(fs::read(mounted.path("kept")).unwrap() == vec![9u8; 70_000]);
    mounted.unmount();
}

#[test]
fn whoever_comes_late_to_unmount_leaves_alone_what_is_mounted_there_since() {
    let Some(mut mounted) = mount() else { return };
    let first = mounted.mount.take().unwrap();
    let late = first.unmounter();
    rustix::mount::unmount(mounted.directory.path(), rustix::mount::UnmountFlags::empty()).unwrap();
    first.wait().unwrap();
    let config = MountConfig::new(mounted.directory.path(), mounted.server.address.clone());
    mounted.mount = Some(spawn_mount(config).unwrap());
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    let [here, above] = [mounted.directory.path(), mounted.directory.path().parent().unwrap()];
    assert_ne!(device(here), device(above));
    late.unmount().unwrap();
    assert_ne!(device(here), device(above), "the second mount was taken away");
    mounted.unmount();
}

#[test]
fn a_mount_that_was_aborted_while_it_was_busy_is_not_left_behind_dead() {
    let Some(mut mounted) = mount() else { return };
    fs::write(mounted.path("open"), b"open").unwrap();
    let open = File::open(mounted.path("open")).unwrap();
    let mount = mounted.mount.take().unwrap();
    let unmounter = mount.unmounter();
    let forced = rustix::mount::unmount(mounted.directory.path(), rustix::mount::UnmountFlags::FORCE);
    assert_eq!(forced, Err(rustix::io::Errno::BUSY));
    mount.wait().unwrap();
    let dead = fs::metadata(mounted.path("open")).unwrap_err();
    assert_eq!(dead.kind(), ErrorKind::NotConnected);
    unmounter.unmount().unwrap();
    assert_eq!(fs::read_dir(mounted.directory.path()).unwrap().count(), 0);
    drop(open);
}

#[test]
fn a_mount_is_found_where_it_was_moved_and_not_taken_for_what_covers_it() {
    let Some(first) = mount() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (before, after) = (directory.path().join("before"), directory.path().join("after"));
    fs::create_dir_all(before.join("mnt")).unwrap();
    let mount = spawn_mount(MountConfig::new(before.join("mnt"), first.server.address.clone())).unwrap();
    fs::rename(&before, &after).unwrap();
    fs::write(after.join("mnt/moved"), b"moved").unwrap();
    mount.unmounter().unmount().unwrap();
    mount.wait().unwrap();
    assert_eq!(fs::read_dir(after.join("mnt")).unwrap().count(), 0, "it is still mounted, or was never");
    assert_eq!(fs::read(first.path("moved")).unwrap(), b"moved");

    let mount = spawn_mount(MountConfig::new(after.join("mnt"), first.server.address.clone())).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("theirs", after.join("mnt"), "tmpfs", flags, c"").unwrap();
    fs::write(after.join("mnt/theirs"), b"theirs").unwrap();
    let refused = mount.unmounter().unmount().unwrap_err().to_string();
    assert!(refused.contains("another file system is mounted over it"), "{refused}");
    mount.wait().unwrap();
    assert_eq!(fs::read(after.join("mnt/theirs")).unwrap(), b"theirs");
    for _ in 0..2 {
        rustix::mount::unmount(after.join("mnt"), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    first.unmount();
}
