//! Whether a device's completions can be polled for (IORING_SETUP_IOPOLL).
//!
//! That takes hardware queues without interrupts, which the administrator gives the driver (the
//! kernel parameter `nvme.poll_queues=N`): where they are, they are used; elsewhere polling would
//! only burn a core until the interrupt.

use cfs_reactor::uring::{Ring, RingFile};
use rustix::fs::{FileType, fstat, major, minor};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;

/// A device's way in through a polled ring.
pub(super) struct Polled {
    pub ring: Rc<Ring>,
    pub file: Rc<RingFile>,
}

/// Opens the way in, or says why there is none.
pub(super) fn probe(ring: &Rc<Ring>, file: &OwnedFd) -> Result<Polled, String> {
    let found = fstat(file).map_err(|errno| format!("finding its device failed: {errno}"))?;
    let device = match FileType::from_raw_mode(found.st_mode) {
        FileType::BlockDevice => found.st_rdev,
        _ => found.st_dev,
    };
    queue_is_polled(Path::new("/sys/dev/block"), major(device), minor(device))?;
    open(ring, file)
}

/// Whether the queue of a block device, or of the disk a partition is on, has poll queues.
pub(crate) fn queue_is_polled(sys: &Path, major: u32, minor: u32) -> Result<(), String> {
    let device = sys.join(format!("{major}:{minor}"));
    let flags = ["queue/io_poll", "../queue/io_poll"].map(|flag| std::fs::read_to_string(device.join(flag)));
    match flags.into_iter().find_map(Result::ok) {
        None => Err("there is no block device below it".to_owned()),
        Some(flag) if flag.trim() == "1" => Ok(()),
        Some(_) => Err("its device has no poll queues".to_owned()),
    }
}

pub(super) fn open(ring: &Rc<Ring>, file: &OwnedFd) -> Result<Polled, String> {
    let ring = ring.polled().map_err(|error| error.to_string())?;
    let own = file.try_clone().map_err(|error| error.to_string())?;
    let file = ring.file(own);
    Ok(Polled { ring, file })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::fs;
    use tempfile::TempDir;

    /// A disk, a partition of it and a disk without poll queues, as sysfs shows them.
    fn sysfs() -> TempDir {
        let sys = TempDir::new().unwrap();
        for (disk, flag) in [("nvme0n1", "1\n"), ("vda", "0\n")] {
            let disk = sys.path().join("devices").join(disk);
            fs::create_dir_all(disk.join("queue")).unwrap();
            fs::create_dir(disk.join("part1")).unwrap();
            fs::write(disk.join("queue/io_poll"), flag).unwrap();
        }
        let links = [("259:0", "nvme0n1"), ("259:1", "nvme0n1/part1"), ("254:0", "vda"), ("254:1", "vda/part1")];
        for (number, device) in links {
            std::os::unix::fs::symlink(sys.path().join("devices").join(device), sys.path().join(number)).unwrap();
        }
        sys
    }

    #[test]
    fn only_a_disk_with_poll_queues_is_polled_and_its_partitions_with_it() {
        let sys = sysfs();
        let polled = |major, minor| queue_is_polled(sys.path(), major, minor);
        assert_eq!([polled(259, 0), polled(259, 1)], [Ok(()), Ok(())]);
        let without = Err("its device has no poll queues".to_owned());
        assert_eq!([polled(254, 0), polled(254, 1)], [without.clone(), without]);
        assert_eq!(polled(0, 35), Err("there is no block device below it".to_owned()));
    }

    #[test]
    fn a_file_in_memory_is_not_polled() {
        let ring = Ring::new(8).unwrap();
        let file = memfd_create("polled", MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(probe(&ring, &file).map(|_| ()), Err("there is no block device below it".to_owned()));
    }
}
