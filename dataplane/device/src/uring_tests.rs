use super::*;
use crate::conformance::{self, pattern};
use cfs_reactor::Executor;
use cfs_reactor::clock::KernelClock;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use tempfile::TempDir;

const SIZE: u64 = 16 << 20;

fn run<T: 'static, F: Future<Output = T> + 'static>(body: impl FnOnce(Rc<Ring>, Handle) -> F) -> T {
    let ring = Ring::new(64).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let body = body(ring.clone(), handle.clone());
    executor.run(&mut ring.driver(), Duration::ZERO, &handle, body).unwrap()
}

/// A directory on a disk's file system and one in memory: both take O_DIRECT here.
fn directories() -> Vec<TempDir> {
    let roots = [std::env::temp_dir(), PathBuf::from("/dev/shm")];
    roots.iter().filter(|root| root.is_dir()).map(|root| TempDir::new_in(root).unwrap()).collect()
}

fn created(size: u64) -> OpenOptions {
    OpenOptions { create_size: Some(size), ..OpenOptions::default() }
}

/// Opens on an executor of its own and gives the refusal.
fn refusal(path: &Path, options: OpenOptions) -> String {
    let path = path.to_owned();
    run(async move |ring, handle| match UringDevice::open(&path, &ring, &handle, options) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(error) => error.to_string(),
    })
}

#[test]
fn files_conform() {
    for directory in directories() {
        let path = directory.path().join("target");
        run(async move |ring, handle| {
            let device = UringDevice::open(&path, &ring, &handle, created(SIZE)).unwrap();
            assert_eq!(device.geometry().size, SIZE);
            conformance::all(device, 1).await;
        });
    }
}

/// A device opened with a way through the polled ring whatever its queue says.
fn polled_all_the_same(path: &Path, ring: &Rc<Ring>, handle: &Handle) -> Rc<UringDevice> {
    let options = created(SIZE);
    let opened = open::open(path, &options).unwrap();
    let polled = polled::open(ring, &opened.file).unwrap();
    UringDevice::assemble(path, ring, handle, options, opened, Some(polled))
}

#[test]
fn a_device_that_refuses_polled_transfers_conforms_without_them() {
    for directory in directories() {
        let path = directory.path().join("target");
        run(async move |ring, handle| {
            let device = polled_all_the_same(&path, &ring, &handle);
            assert!(device.polled.borrow().is_some());
            conformance::all(device.clone(), 1).await;
            // Only where the queue is polled did the transfers go that way to the end.
            let really = polled::probe(&ring, &std::fs::File::open(&path).unwrap().into()).is_ok();
            assert_eq!(device.polled.borrow().is_some(), really);
        });
    }
}

#[test]
fn files_of_every_kind_fall_back_to_announced_completions() {
    for directory in directories() {
        let path = directory.path().join("target");
        run(async move |ring, handle| {
            let device = UringDevice::open(&path, &ring, &handle, created(SIZE)).unwrap();
            let polls = std::fs::read_dir("/sys/block").unwrap().any(|disk| {
                let flag = disk.unwrap().path().join("queue/io_poll");
                std::fs::read_to_string(flag).is_ok_and(|flag| flag.trim() == "1")
            });
            assert!(polls || device.polled.borrow().is_none());
            device.write(0, vec![pattern(1, 4096)], Placement::Data, false).await.unwrap();
            assert_eq!(device.read(0, 4096).await.unwrap()[..], pattern(1, 4096)[..]);
        });
    }
}

#[test]
fn settling_writes_the_blocks_that_were_only_allocated_and_no_others() {
    for directory in directories() {
        let path = directory.path().join("target");
        run(async move |ring, handle| {
            let device = UringDevice::open(&path, &ring, &handle, created(SIZE)).unwrap();
            let kept = pattern(5, 8192);
            device.write(300 << 10, vec![kept.clone()], Placement::Log, false).await.unwrap();
            device.settle(64 << 10, 1 << 20).await.unwrap();
            assert_eq!(device.read(300 << 10, 8192).await.unwrap()[..], kept[..]);
            if !device.unwritten_extents {
                return;
            }
            let file = std::fs::File::open(&path).unwrap();
            let next = |from| rustix::fs::seek(&file, from).unwrap();
            assert_eq!(next(rustix::fs::SeekFrom::Data(0)), 64 << 10);
            assert_eq!(next(rustix::fs::SeekFrom::Hole(64 << 10)), (64 << 10) + (1 << 20));
        });
    }
}

#[test]
#[ignore = "overwrites the block device named by CFS_TEST_BLOCK_DEVICE, and needs the right to"]
fn a_block_device_conforms() {
    let path = PathBuf::from(std::env::var_os("CFS_TEST_BLOCK_DEVICE").expect("CFS_TEST_BLOCK_DEVICE names a device"));
    let created = refusal(&path, created(SIZE));
    assert!(created.contains("it is a block device"), "{created}");
    run(async move |ring, handle| {
        let device = UringDevice::open(&path, &ring, &handle, OpenOptions::default()).unwrap();
        let second = UringDevice::open(&path, &ring, &handle, OpenOptions::default()).map(|_| ());
        assert!(matches!(&second, Err(DeviceError::InUse(reason)) if reason.contains("in use")), "{second:?}");
        conformance::all(device, 1).await;
    });
}

#[test]
fn what_was_written_is_there_after_reopening() {
    for directory in directories() {
        let path = directory.path().join("target");
        let (writer, reader) = (path.clone(), path);
        run(async move |ring, handle| {
            let device = UringDevice::open(&writer, &ring, &handle, created(SIZE)).unwrap();
            device.write(8192, vec![pattern(3, 8192)], Placement::Data, false).await.unwrap();
            device.flush().await.unwrap();
        });
        run(async move |ring, handle| {
            let options = OpenOptions { read_only: true, create_size: None };
            let device = UringDevice::open(&reader, &ring, &handle, options).unwrap();
            assert_eq!(device.read(8192, 8192).await.unwrap()[..], pattern(3, 8192)[..]);
            let refused = device.write(0, vec![pattern(4, 4096)], Placement::Data, false).await;
            assert!(matches!(refused, Err(DeviceError::Unsupported { .. })), "{refused:?}");
            let refused = device.discard(0, 4096).await;
            assert!(matches!(refused, Err(DeviceError::Unsupported { .. })), "{refused:?}");
        });
    }
}

#[test]
fn a_second_server_is_refused_until_the_first_is_gone() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("target");
    run(async move |ring, handle| {
        let first = UringDevice::open(&path, &ring, &handle, created(SIZE)).unwrap();
        let other = path.clone();
        // Another executor, as another process would have: the lock is the open file's.
        #[allow(clippy::disallowed_methods, reason = "stands for another process")]
        let second = std::thread::spawn(move || refusal(&other, OpenOptions::default()));
        let message = second.join().unwrap();
        assert_eq!(
            message,
            format!(
                "cannot open {}: another server uses it (it holds the file's lock); stop that one first, or give another file",
                path.display()
            )
        );
        let reader = OpenOptions { read_only: true, create_size: None };
        assert!(UringDevice::open(&path, &ring, &handle, reader).is_err());
        drop(first);
        let readers = [(); 2].map(|()| UringDevice::open(&path, &ring, &handle, reader).unwrap());
        assert!(UringDevice::open(&path, &ring, &handle, OpenOptions::default()).is_err());
        drop(readers);
        assert!(UringDevice::open(&path, &ring, &handle, OpenOptions::default()).is_ok());
    });
}

#[test]
fn a_new_file_has_all_its_blocks() {
    use std::os::unix::fs::MetadataExt;
    for directory in directories() {
        let path = directory.path().join("target");
        let opened = path.clone();
        run(async move |ring, handle| drop(UringDevice::open(&opened, &ring, &handle, created(SIZE)).unwrap()));
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!(found.len(), SIZE);
        assert!(found.blocks() * 512 >= SIZE, "{} blocks", found.blocks());
        assert_eq!(found.permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn each_refusal_says_what_is_wrong() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    let expect = |path: PathBuf, options, part: &str| {
        let message = refusal(&path, options);
        assert!(message.contains(part) && message.contains(&path.display().to_string()), "{message}");
    };
    expect(at("absent"), OpenOptions::default(), "does not exist");
    assert!(!at("absent").exists());
    expect(at("no/directory"), created(SIZE), "No such file");
    expect(directory.path().to_owned(), OpenOptions::default(), "neither a regular file nor a block device");
    expect(at("odd"), created(SIZE + 512), "multiple of 4096");
    expect(at("none"), created(0), "multiple of 4096");
    std::fs::write(at("empty"), b"").unwrap();
    expect(at("empty"), OpenOptions::default(), "0 bytes, is not a positive multiple");
    std::fs::write(at("ragged"), vec![0; 5000]).unwrap();
    expect(at("ragged"), OpenOptions::default(), "5000 bytes, is not a positive multiple");
    std::fs::write(at("small"), vec![0; 8192]).unwrap();
    expect(at("small"), created(SIZE), "exists with 8192 bytes");
    expect(at("huge"), created(1 << 50), "no room");
    assert!(!at("huge").exists());
    // A file system without direct I/O.
    expect(PathBuf::from("/proc/version"), OpenOptions { read_only: true, create_size: None }, "O_DIRECT");
}

#[test]
fn a_file_cut_short_under_us_is_an_error_and_not_zeroes() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("target");
    run(async move |ring, handle| {
        let device = UringDevice::open(&path, &ring, &handle, created(SIZE)).unwrap();
        assert_eq!(device.attached(), Ok(()));
        std::fs::File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
        let detached = device.attached().unwrap_err().to_string();
        assert!(detached.contains(&format!("was cut off at 8192 of {SIZE} bytes")), "{detached}");
        let read = device.read(4096, 8192).await.map(|read| read.len());
        assert!(matches!(read, Err(DeviceError::Io { operation: "read", offset: 4096, length: 8192, .. })), "{read:?}");
    });
}

#[test]
fn a_file_deleted_under_us_is_noticed() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("target");
    run(async move |ring, handle| {
        let device = UringDevice::open(&path, &ring, &handle, created(SIZE)).unwrap();
        // Moved it is still there.
        let elsewhere = path.with_extension("moved");
        std::fs::rename(&path, &elsewhere).unwrap();
        assert_eq!(device.attached(), Ok(()));
        std::fs::remove_file(&elsewhere).unwrap();
        let detached = device.attached().unwrap_err().to_string();
        assert!(detached.contains("was deleted: let the others take over"), "{detached}");
    });
}

#[test]
fn many_writes_in_flight_with_an_executor_dropped_leave_a_usable_file() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("target");
    for round in 0..5 {
        let path = path.clone();
        run(async move |ring, handle| {
            let device = UringDevice::open(&path, &ring, &handle, created(SIZE)).unwrap();
            for index in 0..64 {
                let device = device.clone();
                handle.spawn(async move {
                    let bytes = pattern(round, 64 << 10);
                    device.write(index * (64 << 10), vec![bytes], Placement::Data, true).await.unwrap();
                });
            }
            // Ends with them under way.
            handle.yield_now().await;
        });
    }
    run(async move |ring, handle| {
        let device = UringDevice::open(&path, &ring, &handle, created(SIZE)).unwrap();
        conformance::both_edges_read_back(&*device, 1).await;
    });
}

#[test]
fn parts_are_dropped_from_the_front() {
    let parts = [&b"abc"[..], b"de", b"fgh"].map(Bytes::from_static);
    for count in 0..=8 {
        let mut left = parts.to_vec();
        advance(&mut left, count);
        assert_eq!(left.concat(), b"abcdefgh"[count..], "{count}");
        assert!(left.iter().all(|part| !part.is_empty()), "{count}");
    }
}
