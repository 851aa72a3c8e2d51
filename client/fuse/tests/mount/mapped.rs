//! Files that are mapped shared on one mount and written on another. The mappings are another
//! program's: one of this program, which serves the mount, could wait for itself.

use crate::harness::{Mounted, mount_on, start_server_with};
use cfs_fuse::{MountConfig, MountHandle, spawn_mount};
use cfs_meta::service::ServiceConfig;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

const LEASE: Duration = Duration::from_millis(600);
const PAGE: usize = 4096;

const PROGRAM: &str = "
import mmap, sys
with open(sys.argv[1], 'r+b') as file:
    mapping = mmap.mmap(file.fileno(), 0)
for line in sys.stdin:
    verb, at, *byte = line.split()
    if verb == 'store':
        mapping[int(at)] = int(byte[0])
    if verb == 'sync':
        mapping.flush()
    print(mapping[int(at)], flush=True)
";

/// Another program's shared mapping of a whole file.
struct Mapping {
    program: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Mapping {
    fn of(path: &Path) -> Mapping {
        let mut command = Command::new("python3");
        command.arg("-c").arg(PROGRAM).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut program = command.spawn().expect("python3 is installed by scripts/setup");
        let (orders, answers) = (program.stdin.take().unwrap(), program.stdout.take().unwrap());
        let mut mapping = Mapping { program, orders, answers: BufReader::new(answers) };
        // It is mapped once it answers.
        mapping.load(0);
        mapping
    }

    fn order(&mut self, order: &str) -> u8 {
        writeln!(self.orders, "{order}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().parse().unwrap()
    }

    fn load(&mut self, at: usize) -> u8 {
        self.order(&format!("load {at}"))
    }

    fn store(&mut self, at: usize, byte: u8) {
        self.order(&format!("store {at} {byte}"));
    }

    fn end(self) {
        let Mapping { mut program, orders, .. } = self;
        drop(orders);
        assert!(program.wait().unwrap().success());
    }
}

fn story() -> Option<(Mounted, tempfile::TempDir, MountHandle, [PathBuf; 2])> {
    let config = ServiceConfig { read_lease: LEASE, ..ServiceConfig::default() };
    let mounted = mount_on(start_server_with(config))?;
    let second = tempfile::tempdir().unwrap();
    let other = spawn_mount(MountConfig::new(second.path(), mounted.server.address.clone())).unwrap();
    let paths = [mounted.path("file"), second.path().join("file")];
    fs::write(&paths[0], vec![0; 8 * PAGE]).unwrap();
    File::open(&paths[0]).unwrap().sync_all().unwrap();
    Some((mounted, second, other, paths))
}

fn pass(time: Duration) {
    let (_kept, never) = channel::<()>();
    never.recv_timeout(time).unwrap_err();
}

fn byte_of(path: &Path, at: usize) -> u8 {
    let mut byte = [0];
    File::open(path).unwrap().read_exact_at(&mut byte, at as u64).unwrap();
    byte[0]
}

#[test]
fn what_is_stored_to_a_mapping_and_written_beside_it_by_another_mount_is_both_there() {
    let Some((mounted, _second, other, [here, there])) = story() else { return };
    let mut mapping = Mapping::of(&here);
    let writer = File::options().read(true).write(true).open(&there).unwrap();
    for round in 1..=60u8 {
        mapping.store(0, round);
        writer.write_all_at(&[round], 100).unwrap();
        // In turn at once, while the other has not read, and while a write lease may have been given back.
        if round % 3 == 0 {
            writer.sync_all().unwrap();
            assert_eq!(byte_of(&there, 0), round);
        }
        assert_eq!((mapping.load(0), mapping.load(100)), (round, round));
    }
    mapping.end();
    for path in [&here, &there] {
        assert_eq!((byte_of(path, 0), byte_of(path, 100)), (60, 60), "{}", path.display());
    }
    drop((writer, other));
    mounted.unmount();
}

#[test]
fn a_mapping_that_a_writer_has_beside_its_write_lease_is_written_back_before_the_lease_goes() {
    let Some((mounted, _second, other, [here, there])) = story() else { return };
    let mut mapping = Mapping::of(&here);
    let own = File::options().write(true).open(&here).unwrap();
    let writer = File::options().read(true).write(true).open(&there).unwrap();
    for round in 1..=3u8 {
        // Longer than two writers at once are refused a lease.
        pass(Duration::from_millis(5500));
        own.write_all_at(&[round], 50).unwrap();
        mapping.store(0, round);
        assert_eq!(byte_of(&there, 0), round, "a reader asks whoever has the write lease");
        pass(Duration::from_millis(5500));
        own.write_all_at(&[round], 50).unwrap();
        mapping.store(1, round);
        writer.write_all_at(&[round], 100).unwrap();
        for path in [&here, &there] {
            let seen = [0, 1, 50, 100].map(|at| byte_of(path, at));
            assert_eq!(seen, [round; 4], "{} in round {round}", path.display());
        }
    }
    mapping.end();
    drop((own, writer, other));
    mounted.unmount();
}

#[test]
fn a_mapping_that_is_used_alone_for_longer_than_a_lease_shows_what_another_mount_writes() {
    let Some((mounted, _second, other, [here, there])) = story() else { return };
    let mut mapping = Mapping::of(&here);
    let writer = File::options().read(true).write(true).open(&there).unwrap();
    for round in 1..=4u8 {
        mapping.store(1, round);
        assert_eq!(mapping.load(100), round - 1);
        pass(LEASE * 3);
        writer.write_all_at(&[round], 100).unwrap();
        assert_eq!((mapping.load(1), mapping.load(100)), (round, round));
        assert_eq!((byte_of(&there, 1), byte_of(&there, 100)), (round, round));
    }
    mapping.end();
    drop((writer, other));
    mounted.unmount();
}
