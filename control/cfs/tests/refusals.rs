//! What the program refuses: each with one line that names the thing and the remedy, a non-zero
//! exit code, and nothing changed.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

mod common;

use common::{CFS, Cluster, Running, cfs, fingerprint, refused, skipped};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

#[test]
fn a_misspelt_configuration_key_is_named_with_the_nearest_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("cfs.toml");
    fs::write(&config, "listne = \"127.0.0.1:7400\"\n").unwrap();
    let line = refused(&cfs(&["server", "--config", config.to_str().unwrap()]));
    assert!(line.contains("unknown key 'listne'") && line.contains("did you mean 'listen'?"), "{line}");
}

#[test]
fn a_setting_that_no_server_can_run_with_is_refused_with_its_range() {
    let server = |settings: &[&str]| {
        let target = ["server", "--listen", "127.0.0.1:0", "--target", "/nonexistent"];
        refused(&cfs(&[&target, settings].concat()))
    };
    for (settings, says) in [
        (&["--session-lease-ms", "0"][..], "session_lease_ms = 0 is out of range; give 1000 to 600000"),
        (&["--session-lease-ms", "600001"], "session_lease_ms = 600001 is out of range; give 1000 to 600000"),
        (&["--read-lease-ms", "20001"], "read_lease_ms = 20001 is out of range; give 0 to 20000"),
        (
            &["--session-lease-ms", "5000", "--read-lease-ms", "5001"],
            "read_lease_ms = 5001 is out of range; give 0 to 5000",
        ),
        (&["--repair-mib-s", "0"], "repair_mib_s = 0 is out of range; give 1 or more"),
        // The bounds themselves are taken: what is refused then is the target.
        (&["--session-lease-ms", "1000", "--read-lease-ms", "1000", "--repair-mib-s", "1"], "/nonexistent"),
    ] {
        let line = server(settings);
        assert!(line.contains(says), "{line}");
    }
}

#[test]
fn a_data_directory_is_for_one_process_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let (data, mountpoint) = (dir.path().join("data"), dir.path().join("mnt"));
    fs::create_dir(&data).unwrap();
    fs::create_dir(&mountpoint).unwrap();
    let held = fs::File::open(&data).unwrap();
    held.lock().unwrap();
    let data = data.to_str().unwrap();
    for arguments in
        [&["dev", "--data", data, mountpoint.to_str().unwrap()][..], &["dev", "--data", data, "--replace", "1"]]
    {
        let line = refused(&cfs(arguments));
        assert!(line.contains("another cfs dev uses") && line.contains(data), "{line}");
    }
    assert_eq!(fs::read_dir(data).unwrap().count(), 0, "nothing was begun");
}

#[test]
fn a_link_to_nothing_is_not_made_a_target() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("t0");
    std::os::unix::fs::symlink(dir.path().join("nothing"), &link).unwrap();
    let line = refused(&cfs(&["format", "--ec", "1+0", "--size", "64M", link.to_str().unwrap()]));
    assert!(
        line.contains(link.to_str().unwrap()) && line.contains("symbolic link to something that does not"),
        "{line}"
    );
    assert!(link.is_symlink() && !link.exists(), "nothing was made behind it");
}

#[test]
fn a_missing_configuration_file_is_named() {
    let line = refused(&cfs(&["server", "--config", "/nonexistent/cfs.toml"]));
    assert!(line.contains("/nonexistent/cfs.toml"), "{line}");
}

#[test]
fn a_device_with_something_else_on_it_is_neither_formatted_nor_served_nor_changed() {
    let dir = tempfile::tempdir().unwrap();
    let targets: Vec<PathBuf> = (0..3).map(|index| dir.path().join(format!("t{index}"))).collect();
    for target in &targets {
        let mut bytes = vec![0u8; 64 << 20];
        bytes[..4096].fill(0xA5);
        fs::write(target, bytes).unwrap();
    }
    let before = fingerprint(&targets[0]);
    let paths: Vec<&str> = targets.iter().map(|path| path.to_str().unwrap()).collect();
    let line = refused(&cfs(&["format", paths[0], paths[1], paths[2]]));
    assert!(line.contains(paths[0]) && line.contains("--force"), "{line}");
    let line = refused(&cfs(&["server", "--listen", "127.0.0.1:0", "--target", paths[0]]));
    assert!(line.contains(paths[0]), "{line}");
    assert!(fingerprint(&targets[0]) == before, "the device was changed");
}

/// The twin of a target on which nothing is recognised: here something is, so the path is wrong.
#[test]
fn a_file_system_in_the_place_of_one_of_several_targets_is_not_taken_for_a_lost_target() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    let mut image = vec![0; 64 << 20];
    image[0x438..0x43A].copy_from_slice(&[0x53, 0xEF]);
    fs::write(&targets[1], &image).unwrap();
    let line = refused(&cluster.server("127.0.0.1:0"));
    assert!(
        line.contains(&targets[1]) && line.contains("holds an ext2, ext3 or ext4") && line.contains("check the path"),
        "{line}"
    );
    assert!(fs::read(&targets[1]).unwrap() == image, "the device was changed");
}

#[test]
fn targets_that_are_not_named_are_told_from_those_that_are_gone() {
    let cluster = Cluster::new();
    let [first, second, third] = cluster.targets().try_into().unwrap();
    let line = refused(&cfs(&["server", "--listen", "127.0.0.1:0", "--target", &first]));
    assert!(line.contains("2 of 3 targets are missing") && line.contains("no path was given for 2 of them"), "{line}");
    fs::remove_file(&second).unwrap();
    fs::remove_file(&third).unwrap();
    let line = refused(&cfs(&["server", "--listen", "127.0.0.1:0", "--target", &first, "--target", &second]));
    let gone = format!("{second}: cannot open {second}: it does not exist; no path was given for 1 of them");
    assert!(line.contains(&gone), "{line}");
}

#[test]
fn a_format_takes_up_what_one_that_was_cut_short_left_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t0");
    fs::write(&path, "").unwrap();
    let path = path.to_str().unwrap();
    let line = refused(&cfs(&["format", "--ec", "1+0", path]));
    assert!(line.contains(path) && line.contains("is empty; give --size"), "{line}");
    let formatted = cfs(&["format", "--ec", "1+0", "--size", "64M", path]);
    assert!(formatted.status.success(), "{}", String::from_utf8_lossy(&formatted.stderr));
}

#[test]
fn a_format_names_paths_given_twice_and_sizes_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (first, second) = (path("t0"), path("t1"));
    let line = refused(&cfs(&["format", "--ec", "1+0", "--size", "64M", &first, &second, &first]));
    assert!(line.contains(&first) && line.contains("is given twice"), "{line}");
    let line = refused(&cfs(&["format", "--ec", "1+0", "--size", "1M", &first]));
    assert!(line.contains("1048576 bytes") && line.contains("give a size of 51380224 or more"), "{line}");
    let line = refused(&cfs(&["format", "--ec", "1+0", "--size", "16777215T", &first]));
    assert!(line.contains("there is no room for 18446742974197923840 bytes") && line.contains("are free"), "{line}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was made");
}

#[test]
fn what_is_not_understood_is_told_in_one_line() {
    for arguments in [
        &["format", "--ec", "0+0", "t0"][..],
        &["format", "--ec", "33+1", "t0"],
        &["format", "--ec", "2++1", "t0"],
        &["format", "--size=-1", "t0"],
        &["format"],
        &["fromat"],
        &["dev", "--data", "d", "--replace", "1", "mnt"],
    ] {
        let output = cfs(arguments);
        refused(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
    let output = Command::new(CFS).args(["format", "t0"]).env("CFS_SHARD", "8").output().unwrap();
    let line = refused(&output);
    assert!(line.contains("environment variable CFS_SHARD is unknown; did you mean CFS_SHARDS?"), "{line}");
}

#[test]
fn a_formatted_target_is_not_formatted_again_without_force() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    let before = fingerprint(Path::new(&targets[0]));
    let line = refused(&cfs(&["format", &targets[0], &targets[1], &targets[2]]));
    assert!(line.contains("already belongs to") && line.contains("--force"), "{line}");
    assert!(fingerprint(Path::new(&targets[0])) == before, "the target was changed");
}

#[test]
fn one_device_in_use_keeps_all_of_them_from_being_formatted() {
    let cluster = Cluster::new();
    let dir = tempfile::tempdir().unwrap();
    let fresh: Vec<String> = (0..2).map(|index| dir.path().join(format!("t{index}")).display().to_string()).collect();
    let line = refused(&cfs(&["format", "--size", "64M", &fresh[0], &fresh[1], &cluster.targets()[0]]));
    assert!(line.contains(&cluster.targets()[0]), "{line}");
    assert!(fresh.iter().all(|target| !Path::new(target).exists()), "an unfinished target was left behind");
}

#[test]
fn a_format_that_fails_takes_its_own_files_away_and_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let targets = ["t0", "t1", "t2"].map(|name| at(name).display().to_string());
    let format = |flags: &[&str]| {
        let targets = targets.iter().map(String::as_str);
        cfs(&["format", "--shards", "2", "--size", "64M"]
            .into_iter()
            .chain(flags.iter().copied())
            .chain(targets)
            .collect::<Vec<_>>())
    };
    let left = || fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();

    // The third can't be opened.
    fs::create_dir(at("t2")).unwrap();
    let line = refused(&format(&[]));
    assert!(line.contains(&targets[2]) && line.contains("neither a regular file nor a block device"), "{line}");
    assert_eq!(left(), ["t2"]);
    fs::remove_dir(at("t2")).unwrap();

    // It can, but holds something: only looking into it tells. What was there stays as it was.
    fs::write(at("t2"), vec![0xA5; 64 << 20]).unwrap();
    let line = refused(&format(&[]));
    assert!(line.contains(&targets[2]) && line.contains("--force"), "{line}");
    assert_eq!(left(), ["t2"]);
    assert!(fingerprint(&at("t2")).iter().all(|byte| *byte == 0xA5), "the target was changed");
    fs::remove_file(at("t2")).unwrap();

    // All three are its own, and what was asked for can't be.
    let line = refused(&format(&["--ec", "4+2"]));
    assert!(line.contains("4+2"), "{line}");
    assert!(left().is_empty(), "{:?}", left());

    let output = format(&[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    drop(Running::start(&Cluster { dir }));
}

#[test]
fn a_first_start_of_dev_that_fails_leaves_an_empty_directory() {
    if !Path::new("/dev/fuse").exists() {
        skipped("/dev/fuse is missing");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (data, mountpoint) = (dir.path().join("data"), dir.path().join("mnt"));
    fs::create_dir(&mountpoint).unwrap();
    let dev = |policy: &str| {
        let (data, mountpoint) = (data.to_str().unwrap(), mountpoint.to_str().unwrap());
        // An address that is refused ends what would start.
        refused(&cfs(&[
            "dev",
            "--data",
            data,
            "--size",
            "192M",
            "--ec",
            policy,
            "--listen",
            "192.0.2.1:7400",
            mountpoint,
        ]))
    };
    let line = dev("4+2");
    assert!(line.contains("4+2") && line.contains("6 targets"), "{line}");
    assert_eq!(fs::read_dir(&data).unwrap().count(), 0);
    // The twin: with what can be it is formatted.
    let line = dev("2+1");
    assert!(line.contains("192.0.2.1"), "{line}");
    assert!(data.join("cluster.toml").exists() && data.join("target-2").exists());
}

#[test]
fn a_target_of_another_cluster_is_named() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let (ours, theirs) = (ours.targets(), theirs.targets());
    let output =
        cfs(&["server", "--listen", "127.0.0.1:0", "--target", &ours[0], "--target", &ours[1], "--target", &theirs[2]]);
    let line = refused(&output);
    assert!(line.contains(&theirs[2]) && line.contains("check the configured paths"), "{line}");
}

/// Both copies of the superblock (docs/on-disk.md).
fn change_superblocks(target: &str, change: impl Fn(&mut [u8])) {
    let mut bytes = fs::read(target).unwrap();
    for copy in [0usize, (1 << 20) - 4096] {
        change(&mut bytes[copy..copy + 4096]);
    }
    fs::write(target, bytes).unwrap();
}

/// One of three is enough: redundancy would bridge its loss, but it is not lost.
#[test]
fn a_target_of_a_newer_format_is_refused_with_the_remedy() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    change_superblocks(&targets[1], |superblock| superblock[8..12].copy_from_slice(&2u32.to_le_bytes()));
    let before: Vec<_> = targets.iter().map(|target| fingerprint(Path::new(target))).collect();
    let line = refused(&cluster.server("127.0.0.1:0"));
    assert!(line.contains(&targets[1]) && line.contains("version 2") && line.contains("use a newer cfs"), "{line}");
    // Nor is it doubt enough of what is to be replaced.
    let fresh = cluster.path("fresh");
    let others = [&targets[1], &targets[2]];
    let others = others.into_iter().flat_map(|target| ["--target", target]);
    let arguments = ["replace", "0", fresh.to_str().unwrap()].into_iter().chain(others);
    let line = refused(&cfs(&arguments.collect::<Vec<_>>()));
    assert!(line.contains(&targets[1]) && line.contains("use a newer cfs") && !fresh.exists(), "{line}");
    let after: Vec<_> = targets.iter().map(|target| fingerprint(Path::new(target))).collect();
    assert!(after == before, "a target was changed");
}

/// A target on which nothing is recognised any more is lost like one that is gone.
#[test]
fn a_target_whose_superblocks_are_damaged_is_bridged() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    change_superblocks(&targets[1], |superblock| superblock.fill(0xA5));
    drop(Running::start(&cluster));
    // The twin: two of three are too many.
    change_superblocks(&targets[2], |superblock| superblock.fill(0xA5));
    let line = refused(&cluster.server("127.0.0.1:0"));
    assert!(line.contains("2 of 3 targets are missing") && line.contains(&targets[1]), "{line}");
}

#[test]
fn targets_that_do_not_fit_the_disk_are_refused_and_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("t0");
    let line = refused(&cfs(&["format", "--ec", "1+0", "--size", "8000T", target.to_str().unwrap()]));
    assert!(line.contains(target.to_str().unwrap()) && line.contains("give a smaller size"), "{line}");
    assert!(!target.exists(), "an unfinished target was left behind");
}

/// A small disk: a file system of so many bytes, gone when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(bytes: u64) -> SmallDisk {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(dir.path()).status();
        assert!(mounted.unwrap().success());
        SmallDisk(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Takes all space that is left.
    fn fill(&self) {
        let mut file = fs::File::create(self.path("filler")).unwrap();
        let error = std::io::copy(&mut std::io::repeat(0), &mut file).expect_err("it ends");
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the kernel may not have closed yet what a process that has ended had open.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

const TARGET_BYTES: u64 = 64 << 20;

#[test]
fn a_disk_that_is_full_or_too_small_for_the_targets_is_refused_and_nothing_stays_on_it() {
    if !rustix::process::geteuid().is_root() {
        return skipped("mounting a small disk needs root");
    }
    for full in [false, true] {
        let disk = SmallDisk::new(TARGET_BYTES * 3 / 2);
        if full {
            disk.fill();
        }
        let before = names_in(disk.0.path());
        let targets = ["t0", "t1", "t2"].map(|name| disk.path(name).display().to_string());
        let line = refused(&cfs(&["format", "--size", "64M", &targets[0], &targets[1], &targets[2]]));
        assert!(line.contains(&targets[usize::from(!full)]), "{line}");
        assert!(line.contains("there is no room for") && line.contains("free some, or give a smaller size"), "{line}");
        assert_eq!(names_in(disk.0.path()), before);
    }
}

#[test]
fn dev_on_a_full_disk_says_so_and_leaves_no_file_behind() {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return skipped("mounting a small disk needs root and /dev/fuse");
    }
    const PAGE: u64 = 4096;
    let mountpoint = tempfile::tempdir().unwrap();
    let dev = |disk: &SmallDisk| {
        let (data, mountpoint) = (disk.path("data").display().to_string(), mountpoint.path().display().to_string());
        refused(&cfs(&["dev", "--data", &data, "--size", "192M", "--listen", "192.0.2.1:7400", &mountpoint]))
    };
    // Room for no file at all; for the mark and one target; for all but the layout.
    for (bytes, fill, what, remedy) in [
        (PAGE, true, "data/formatting", "; free some space, or give a --data directory"),
        (TARGET_BYTES * 3 / 2, false, "data/target-1", " are free); free some, or give a smaller size"),
        (TARGET_BYTES * 3 + PAGE, false, "data/cluster.toml", "; free some space, or give a --data directory"),
    ] {
        let disk = SmallDisk::new(bytes);
        if fill {
            disk.fill();
        }
        let line = dev(&disk);
        assert!(line.contains(disk.path(what).to_str().unwrap()), "{line}");
        assert!(line.contains("No space left") || line.contains("there is no room for"), "{line}");
        assert!(line.contains(remedy), "{line}");
        assert_eq!(names_in(&disk.path("data")), Vec::<String>::new(), "{line}");
    }
    // The twin: one page more is enough to format.
    let disk = SmallDisk::new(TARGET_BYTES * 3 + 2 * PAGE);
    let line = dev(&disk);
    assert!(line.contains("192.0.2.1"), "{line}");
    // A disk that fills up later: what it was started with before stays as it is.
    let data = disk.path("data");
    fs::write(data.join("address"), "127.0.0.1:7").unwrap();
    disk.fill();
    let (data_flag, mount_flag) = (data.display().to_string(), mountpoint.path().display().to_string());
    let line = refused(&cfs(&["dev", "--data", &data_flag, "--listen", "127.0.0.1:0", &mount_flag]));
    assert!(line.contains("data/address") && line.contains("; free some space, or give a --data directory"), "{line}");
    assert_eq!(fs::read_to_string(data.join("address")).unwrap(), "127.0.0.1:7");
    assert_eq!(names_in(&data), ["address", "cluster.toml", "target-0", "target-1", "target-2"]);
}

#[test]
fn a_read_only_disk_is_refused() {
    let cluster = Cluster::new();
    if !rustix::process::geteuid().is_root() {
        skipped("mounting read-only needs root");
        return;
    }
    let script = format!(
        "mount --bind {dir} {dir} && mount -o remount,bind,ro {dir} && exec {CFS} server --listen 127.0.0.1:0 {targets}",
        dir = cluster.dir.path().display(),
        targets = cluster.targets().map_target_flags(),
    );
    let output = Command::new("unshare").args(["-m", "sh", "-c", &script]).output().unwrap();
    let line = refused(&output);
    assert!(line.contains("is read-only; make that writable"), "{line}");
    let script = format!(
        "mount --bind {dir} {dir} && mount -o remount,bind,ro {dir} && exec {CFS} dev --data {dir}/data /mnt",
        dir = cluster.dir.path().display(),
    );
    let output = Command::new("unshare").args(["-m", "sh", "-c", &script]).output().unwrap();
    let line = refused(&output);
    assert!(line.contains("Read-only") && line.contains("give a --data directory"), "{line}");
}

/// One of three is enough: redundancy would bridge its loss, but it is not lost.
#[test]
fn a_read_only_target_is_refused_with_the_remedy() {
    let cluster = Cluster::new();
    if !rustix::process::geteuid().is_root() {
        skipped("mounting read-only needs root");
        return;
    }
    let targets = cluster.targets();
    let serve = |mounted: &str| {
        let flags = targets.map_target_flags();
        let script = format!("{mounted}exec timeout 60 {CFS} server --listen 127.0.0.1:0 {flags}");
        Command::new("unshare").args(["-m", "sh", "-c", &script]).output().unwrap()
    };
    let one = &targets[1];
    let line = refused(&serve(&format!("mount --bind {one} {one} && mount -o remount,bind,ro {one} && ")));
    assert!(
        line.contains(&format!("cannot open {one}: ")) && line.contains("is read-only; make that writable"),
        "{line}"
    );
    drop(Running::start(&cluster));
}

/// As somebody whom permissions bind, root or not.
fn serve_without_privilege(targets: &[&str]) -> Output {
    let flags = targets.iter().flat_map(|target| ["--target", target]);
    // One that is not refused would never end.
    let server = ["timeout", "60", CFS, "server", "--listen", "127.0.0.1:0"].into_iter().chain(flags);
    let powerless: &[&str] = match rustix::process::geteuid().is_root() {
        true => &["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"],
        false => &[],
    };
    Command::new("setpriv").args(powerless).args(server).output().unwrap()
}

/// One of three is enough: redundancy would bridge its loss, but it is not lost.
#[test]
fn a_target_that_may_not_be_written_to_or_reached_is_refused_with_the_remedy() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    let permit = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let [t0, t1, t2] = [&*targets[0], &targets[1], &targets[2]];
    permit(Path::new(t2), 0o444);
    let line = refused(&serve_without_privilege(&[t0, t1, t2]));
    assert!(line.contains(&format!("cannot open {t2}: permission denied")), "{line}");
    assert!(line.contains("run as its owner, or change its mode or owner"), "{line}");

    let closed = cluster.path("closed");
    let hidden = closed.join("t2").display().to_string();
    fs::create_dir(&closed).unwrap();
    fs::rename(t2, &hidden).unwrap();
    permit(&closed, 0o000);
    let output = serve_without_privilege(&[t0, t1, &hidden]);
    permit(&closed, 0o700);
    let line = refused(&output);
    assert!(line.contains(&format!("cannot open {hidden}: permission denied")), "{line}");

    // The twins: what is not there is lost, and one that may be written to again is served.
    drop(Running::start(&cluster));
    fs::rename(&hidden, t2).unwrap();
    permit(Path::new(t2), 0o600);
    drop(Running::start(&cluster));
}

#[test]
fn why_a_mount_in_the_background_failed_is_told_in_one_line() {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        skipped("needs root and /dev/fuse");
        return;
    }
    let cluster = Cluster::new();
    let server = Running::start(&cluster);
    let dir = tempfile::tempdir().unwrap();
    // Without the capability to mount: what the process that stays finds out, and not this one.
    let powerless = ["--bounding-set=-sys_admin", "--inh-caps=-sys_admin", CFS, "mount", &server.address];
    let output = Command::new("setpriv").args(powerless).arg(dir.path()).output().unwrap();
    let line = refused(&output);
    assert!(line.contains(dir.path().to_str().unwrap()), "{line}");
}

trait TargetFlags {
    fn map_target_flags(&self) -> String;
}

impl TargetFlags for Vec<String> {
    fn map_target_flags(&self) -> String {
        self.iter().map(|target| format!("--target {target}")).collect::<Vec<_>>().join(" ")
    }
}

#[test]
fn a_port_in_use_is_named() {
    let cluster = Cluster::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let line = refused(&cluster.server(&address));
    assert!(line.contains(&address) && line.contains("in use") && line.contains("choose another port"), "{line}");
    // And the targets are as good as before.
    drop(Running::start(&cluster));
}

#[test]
fn an_address_that_others_could_reach_is_refused_with_the_reason() {
    let cluster = Cluster::new();
    let line = refused(&cluster.server("0.0.0.0:7400"));
    assert!(line.contains("0.0.0.0:7400") && line.contains("loopback"), "{line}");
}

#[test]
fn two_servers_on_one_target_cannot_be() {
    let cluster = Cluster::new();
    // One of three is enough: redundancy would bridge its loss, but it is not lost.
    let one = fs::File::open(&cluster.targets()[2]).unwrap();
    rustix::fs::flock(&one, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let line = refused(&cluster.server("127.0.0.1:0"));
    assert!(line.contains(&cluster.targets()[2]) && line.contains("stop that one first"), "{line}");
    drop(one);

    let first = Running::start(&cluster);
    let line = refused(&cluster.server("127.0.0.1:0"));
    assert!(line.contains(&cluster.targets()[0]) && line.contains("stop that one first"), "{line}");
    drop(first);
    // The lock goes with the process.
    for _ in 0..50 {
        let arguments = cluster.server_arguments("127.0.0.1:0");
        let mut child = Command::new(CFS).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let _ = child.kill();
        let _ = child.wait();
        if line.starts_with("serving") {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("the targets stayed locked");
}

#[test]
fn a_missing_fuse_device_is_named_with_the_remedy() {
    if !rustix::process::geteuid().is_root() {
        skipped("hiding /dev/fuse needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mountpoint = dir.path().join("mnt");
    fs::create_dir(&mountpoint).unwrap();
    let script = format!(
        "mount -t tmpfs none /dev && exec {CFS} dev --data {}/data --listen 127.0.0.1:0 {}",
        dir.path().display(),
        mountpoint.display()
    );
    let output = Command::new("unshare").args(["-m", "sh", "-c", &script]).output().unwrap();
    let line = refused(&output);
    assert!(line.contains("/dev/fuse is missing") && line.contains("modprobe fuse"), "{line}");
    assert!(!dir.path().join("data").exists(), "nothing is created before the refusal");
}

#[test]
fn too_few_targets_for_the_policy_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("t0");
    let line = refused(&cfs(&["format", "--ec", "2+1", "--size", "64M", target.to_str().unwrap()]));
    assert!(line.contains("2+1") && line.contains("3 targets"), "{line}");
    assert!(!target.exists(), "an unfinished target was left behind");
}

#[test]
fn more_missing_targets_than_redundancy_bridges_stop_the_start() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    fs::remove_file(&targets[0]).unwrap();
    fs::remove_file(&targets[1]).unwrap();
    let line = refused(&cluster.server("127.0.0.1:0"));
    assert!(line.contains("2 of 3 targets are missing") && line.contains(&targets[0]), "{line}");
}

#[test]
fn dev_does_not_take_targets_without_a_layout_for_unfinished_ones() {
    let cluster = Cluster::new();
    let data = cluster.path("dev");
    let mountpoint = cluster.path("mnt");
    fs::create_dir(&data).unwrap();
    fs::create_dir(&mountpoint).unwrap();
    let target = data.join("target-0");
    fs::copy(&cluster.targets()[0], &target).unwrap();
    let before = fingerprint(&target);
    // An address that is refused: the start ends after the targets were prepared, before a mount.
    let (data_flag, mount_flag) = (data.display().to_string(), mountpoint.display().to_string());
    let dev =
        || refused(&cfs(&["dev", "--data", &data_flag, "--size", "192M", "--listen", "192.0.2.1:7400", &mount_flag]));

    let message = dev();
    assert!(message.contains("target-0 exists but") && message.contains("targets = N"), "{message}");
    assert!(fingerprint(&target) == before, "the target was changed");

    // The twin: a format that says it did not finish is begun anew.
    fs::write(data.join("formatting"), "").unwrap();
    let message = dev();
    assert!(message.contains("192.0.2.1"), "{message}");
    assert!(fingerprint(&target) != before, "the target was not formatted anew");
    assert!(!data.join("formatting").exists() && data.join("cluster.toml").exists());
}

#[test]
fn metadata_that_survives_less_than_the_policy_promises_is_not_formatted() {
    let dir = tempfile::tempdir().unwrap();
    let target = |index: u32| dir.path().join(format!("t{index}")).display().to_string();
    let (t0, t1, t2) = (target(0), target(1), target(2));
    let message = refused(&cfs(&["format", "--size", "64M", "--ec", "2+1", "--tolerate", "0", &t0, &t1, &t2]));
    assert!(message.contains("--tolerate 0 is less than the 1 lost targets that policy 2+1 promises"), "{message}");
    let message = refused(&cfs(&["format", "--size", "64M", "--ec", "2+1", "--tolerate", "3", &t0, &t1, &t2]));
    assert!(message.contains("needs 7 targets") && message.contains("3 were given"), "{message}");
}

/// With m targets lost, m+1 must be left to write the log to: below 2m+1 nothing would start again.
#[test]
fn too_few_targets_to_go_on_without_those_that_may_be_lost_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = |index: usize| dir.path().join(format!("t{index}")).display().to_string();
    let format = |given: usize, flags: &[&str]| {
        let targets: Vec<String> = (0..given).map(target).collect();
        let flags = ["format", "--size", "64M", "--shards", "2"].iter().chain(flags).copied();
        cfs(&flags.chain(targets.iter().map(String::as_str)).collect::<Vec<_>>())
    };
    let cases: [(usize, &[&str], &str, usize); 5] = [
        (2, &["--ec", "2x"], "2x", 3),
        (3, &["--ec", "3x"], "3x", 5),
        (4, &["--ec", "3x"], "3x", 5),
        (4, &["--ec", "2+2"], "2+2", 5),
        (4, &["--ec", "2+1", "--tolerate", "2"], "2+1", 5),
    ];
    for (given, flags, policy, needed) in cases {
        let line = refused(&format(given, flags));
        for part in [&format!("policy {policy}"), &format!("{needed} targets"), &format!("{given} were given"), "more"]
        {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{line}");
    }
    // The twin.
    for (given, flags, ..) in [(3, ["--ec", "2x"]), (5, ["--ec", "2+2"])] {
        let output = format(given, &[&flags[..], &["--force"]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_cluster_is_not_started_as_another_than_it_was_made() {
    if !Path::new("/dev/fuse").exists() {
        skipped("/dev/fuse is missing");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (data, mountpoint) = (dir.path().join("data"), dir.path().join("mnt"));
    fs::create_dir(&data).unwrap();
    fs::create_dir(&mountpoint).unwrap();
    let paths: Vec<String> = (0..3).map(|index| data.join(format!("target-{index}")).display().to_string()).collect();
    let made = cfs(&["format", "--size", "64M", "--shards", "2", &paths[0], &paths[1], &paths[2]]);
    assert!(made.status.success());
    fs::write(data.join("cluster.toml"), "targets = 3\n").unwrap();
    let data = data.to_str().unwrap();
    let flags = [
        ("--targets", "4", "3"),
        ("--size", "384M", "192M"),
        ("--ec", "3x", "2+1"),
        ("--tolerate", "2", "1"),
        ("--shards", "8", "2"),
    ];
    for (flag, asked, was) in flags {
        let line = refused(&cfs(&["dev", "--data", data, flag, asked, mountpoint.to_str().unwrap()]));
        assert!(line.contains(&format!("was made with {flag} {was}, not {asked}")), "{line}");
        assert!(line.contains(&format!("leave {flag} out, or give another --data")), "{line}");
    }
    // The twin: what it was made with is refused for nothing but its address.
    let same = ["--targets", "3", "--size", "192M", "--ec", "2+1", "--tolerate", "1", "--shards", "2"];
    let address = ["--listen", "nowhere", mountpoint.to_str().unwrap()];
    let line = refused(&cfs(&[&["dev", "--data", data][..], &same, &address].concat()));
    assert!(line.contains("nowhere"), "{line}");
}
