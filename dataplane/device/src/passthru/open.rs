//! Opening the character device of a namespace, and taking the block device beside it.
//!
//! The character device can be opened by anybody at any time, and what the kernel knows of users (mounts,
//! swap, volumes, another server) it knows of the block device.

use super::identify::{self, Unanswered};
use super::paths::Paths;
use crate::nvme::spec;
use crate::uring::{OpenOptions, open_block_device, queue_is_polled};
use crate::{DeviceError, DeviceGeometry, DeviceResult};
use cfs_reactor::uring::Errno;
use cfs_wire::limits::{BLOB_BYTES_MAX, PAGE};
use rustix::fs::{FileType, Mode, OFlags, fstat, major, minor, open as open_file, stat};
use std::fs::{canonicalize, read_to_string};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// The largest blob with a header of one page, where the device takes that much.
const TRANSFER_MAX: u64 = (BLOB_BYTES_MAX + PAGE) as u64;
/// What the kernel answers where it takes no commands for a file, or not from us.
pub(super) const NOT_TAKEN: [Errno; 6] =
    [Errno::OPNOTSUPP, Errno::NOTTY, Errno::ACCESS, Errno::PERM, Errno::NOSYS, Errno::INVAL];
/// Pieces of memory that one command takes, where the kernel does not say: the fewest of any version of its
/// driver.
const SEGMENTS_USUAL: u64 = 127;

/// What the kernel bounds a command by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct QueueLimits {
    pub bytes_max: Option<u64>,
    pub segments_max: Option<u64>,
}

pub(super) struct Opened {
    pub file: OwnedFd,
    pub held: Rc<OwnedFd>,
    pub number: u32,
    pub controller: spec::Controller,
    pub namespace: spec::Namespace,
    pub paths: Paths,
    block_device: PathBuf,
    /// Its major and minor number.
    block_number: (u32, u32),
    /// What writes are whole in: at least a block of the namespace.
    block: u32,
    limits: QueueLimits,
}

/// Where sysfs shows a namespace's character device, and its block device.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Found {
    pub block_name: String,
    pub block_number: (u32, u32),
    /// What both are below.
    pub paths: Paths,
}

/// Whether a path names a character device, through links too.
pub fn is_character_device(path: &Path) -> bool {
    stat(path).is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice)
}

fn refuse<T>(path: &Path, reason: impl std::fmt::Display) -> DeviceResult<T> {
    Err(DeviceError::Open(format!("cannot open {}: {reason}", path.display())))
}

pub(super) fn open(path: &Path, options: &OpenOptions) -> DeviceResult<Opened> {
    if options.create_size.is_some() {
        return refuse(path, "it is a device, whose size is not ours to choose");
    }
    let number = match stat(path) {
        Ok(found) => (major(found.st_rdev), minor(found.st_rdev)),
        Err(errno) => return refuse(path, errno),
    };
    let found = match find(Path::new("/sys"), number) {
        Ok(found) => found,
        Err(reason) => return refuse(path, reason),
    };
    let block_device = Path::new("/dev").join(&found.block_name);
    let file = open_generic(path, &block_device, options)?;
    let Identity { number, controller, namespace } = ask(path, &file, &block_device)?;
    let held = open_block_device(&block_device, options)?;
    if fstat(&held.file).map(|found| (major(found.st_rdev), minor(found.st_rdev))) != Ok(found.block_number) {
        return refuse(path, format_args!("{} is not its block device, as its name says", block_device.display()));
    }
    let size = namespace.blocks.saturating_mul(namespace.block_bytes.into());
    if size != held.size || held.block < namespace.block_bytes {
        return refuse(
            path,
            format_args!(
                "the controller speaks of {size} bytes in blocks of {}, and {} has {} in blocks of {}: it was \
                 changed, have the kernel look again (nvme ns-rescan)",
                namespace.block_bytes,
                block_device.display(),
                held.size,
                held.block
            ),
        );
    }
    let limits = queue_limits(Path::new("/sys"), found.block_number);
    let (block, held) = (held.block, Rc::new(held.file));
    let Found { block_number, paths, .. } = found;
    Ok(Opened { file, held, number, controller, namespace, paths, block_device, block_number, block, limits })
}

fn open_generic(path: &Path, block_device: &Path, options: &OpenOptions) -> DeviceResult<OwnedFd> {
    let access = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    match open_file(path, access | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => Ok(file),
        Err(errno @ (Errno::ACCESS | Errno::PERM)) => {
            let block_device = block_device.display();
            let why = format!("{errno}: run as root, give this user the file, or give {block_device} instead");
            Err(DeviceError::NotPermitted(format!("cannot open {}: {why}", path.display())))
        }
        Err(errno) => refuse(path, errno),
    }
}

/// What the controller says.
struct Identity {
    number: u32,
    controller: spec::Controller,
    namespace: spec::Namespace,
}

fn ask(path: &Path, file: &OwnedFd, block_device: &Path) -> DeviceResult<Identity> {
    let unanswered = |why: Unanswered| match why {
        Unanswered::Kernel(errno) if NOT_TAKEN.contains(&errno) => {
            DeviceError::NotPermitted(not_taken(path, block_device, errno))
        }
        Unanswered::Kernel(errno) => DeviceError::Open(format!("cannot open {}: identify: {errno}", path.display())),
        Unanswered::Controller(status) => DeviceError::Open(format!(
            "cannot open {}: the controller refuses to identify it: {status}",
            path.display()
        )),
    };
    let number = identify::namespace_number(file).map_err(|errno| unanswered(Unanswered::Kernel(errno)))?;
    let controller = identify::controller(file).map_err(unanswered)?;
    match identify::namespace(file, number).map_err(unanswered)? {
        Ok(namespace) => Ok(Identity { number, controller, namespace }),
        Err(why) => refuse(path, format_args!("namespace {number} can't be used: {why}")),
    }
}

/// Says that the kernel does not take commands, and what to do about it.
fn not_taken(path: &Path, block_device: &Path, errno: Errno) -> String {
    let why = match errno {
        Errno::ACCESS | Errno::PERM => "the kernel takes no NVMe commands from this user",
        _ => "this kernel takes no NVMe commands there (Linux 6.1 does, through io_uring)",
    };
    format!("cannot open {}: {why}: {errno}; give {} instead", path.display(), block_device.display())
}

impl Opened {
    pub fn not_taken(&self, path: &Path, errno: Errno) -> DeviceError {
        DeviceError::NotPermitted(not_taken(path, &self.block_device, errno))
    }

    pub fn geometry(&self) -> DeviceGeometry {
        DeviceGeometry {
            size: self.namespace.blocks.saturating_mul(self.namespace.block_bytes.into()),
            block: self.block,
            transfer_max: transfer_max(self.controller.transfer_max, self.limits) as u32,
            volatile_cache: self.controller.volatile_cache,
            discards: self.controller.deallocates,
        }
    }

    pub fn has_poll_queues(&self) -> Result<(), String> {
        let (major, minor) = self.block_number;
        queue_is_polled(Path::new("/sys/dev/block"), major, minor)
    }
}

/// The largest transfer, in whole pages: what the controller and the kernel both take, were every page of it
/// a piece of its own.
pub(super) fn transfer_max(controller: Option<u64>, limits: QueueLimits) -> u64 {
    let segments = limits.segments_max.unwrap_or(SEGMENTS_USUAL).saturating_mul(PAGE as u64);
    let most = [controller, limits.bytes_max, Some(segments)].into_iter().flatten().fold(TRANSFER_MAX, u64::min);
    (most / PAGE as u64).max(1) * PAGE as u64
}

/// The block device of the namespace whose character device has this number. Both are told of below the
/// controller or, behind the kernel's multipath, below the subsystem, and have the same numbers in their
/// names.
pub(super) fn find(sys: &Path, (major, minor): (u32, u32)) -> Result<Found, String> {
    const OTHER: &str = "it is no namespace of an NVMe controller (/dev/ngXnY), no block device and no regular file";
    let Ok(device) = canonicalize(sys.join(format!("dev/char/{major}:{minor}"))) else {
        return Err(OTHER.to_owned());
    };
    let class = canonicalize(device.join("subsystem")).ok();
    let is_namespace = class.is_some_and(|class| class.ends_with("nvme-generic"));
    let numbers = device.file_name().and_then(|name| name.to_str()?.strip_prefix("ng"));
    let (true, Some(numbers), Some(parent)) = (is_namespace, numbers, device.parent()) else {
        return Err(OTHER.to_owned());
    };
    let block_name = format!("nvme{numbers}");
    let number = read_to_string(parent.join(&block_name).join("dev")).ok();
    let number = number.as_deref().and_then(|text| text.trim().split_once(':'));
    match number.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?))) {
        Some(block_number) => Ok(Found { block_name, block_number, paths: Paths(parent.to_owned()) }),
        None => Err(format!(
            "its namespace has no block device {block_name}: the kernel does not know its command set or format"
        )),
    }
}

pub(super) fn queue_limits(sys: &Path, (major, minor): (u32, u32)) -> QueueLimits {
    let queue = sys.join(format!("dev/block/{major}:{minor}/queue"));
    let limit = |name: &str| read_to_string(queue.join(name)).ok()?.trim().parse::<u64>().ok().filter(|most| *most > 0);
    QueueLimits {
        bytes_max: limit("max_hw_sectors_kb").map(|most| most.saturating_mul(1024)),
        segments_max: limit("max_segments"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    /// A device below a parent, as sysfs shows it: its directory, with a number and a class.
    fn device(sys: &TempDir, kind: &str, number: &str, class: &str, below: &str, name: &str) {
        let directory = sys.path().join("devices").join(below).join(name);
        create_dir_all(&directory).unwrap();
        create_dir_all(sys.path().join("class").join(class)).unwrap();
        create_dir_all(sys.path().join("dev").join(kind)).unwrap();
        write(directory.join("dev"), format!("{number}\n")).unwrap();
        symlink(sys.path().join("class").join(class), directory.join("subsystem")).unwrap();
        symlink(&directory, sys.path().join("dev").join(kind).join(number)).unwrap();
    }

    #[test]
    fn the_block_device_of_a_namespace_is_found_behind_multipath_too_and_of_nothing_else() {
        let sys = TempDir::new().unwrap();
        device(&sys, "char", "1:3", "mem", "virtual/mem", "null");
        // One that only looks like it.
        device(&sys, "char", "240:9", "mem", "virtual/mem", "ng7n1");
        device(&sys, "char", "241:0", "nvme-generic", "pci/nvme/nvme0", "ng0n1");
        device(&sys, "block", "259:0", "block", "pci/nvme/nvme0", "nvme0n1");
        device(&sys, "char", "241:1", "nvme-generic", "virtual/nvme-subsystem/nvme-subsys3", "ng3n2");
        device(&sys, "block", "259:4", "block", "virtual/nvme-subsystem/nvme-subsys3", "nvme3n2");
        device(&sys, "char", "241:2", "nvme-generic", "pci/nvme/nvme5", "ng5n1");
        let found = |name: &str, block_number, below: &str| {
            let paths = Paths(canonicalize(sys.path().join("devices").join(below)).unwrap());
            Ok(Found { block_name: name.to_owned(), block_number, paths })
        };
        assert_eq!(find(sys.path(), (241, 0)), found("nvme0n1", (259, 0), "pci/nvme/nvme0"));
        assert_eq!(find(sys.path(), (241, 1)), found("nvme3n2", (259, 4), "virtual/nvme-subsystem/nvme-subsys3"));
        for other in [(1, 3), (240, 9), (8, 8)] {
            let why = find(sys.path(), other).unwrap_err();
            assert!(why.starts_with("it is no namespace of an NVMe controller"), "{why}");
        }
        assert!(find(sys.path(), (241, 2)).unwrap_err().starts_with("its namespace has no block device nvme5n1"));
    }

    #[test]
    fn a_transfer_is_what_the_controller_and_the_kernel_both_take_in_whole_pages() {
        let sys = TempDir::new().unwrap();
        assert_eq!(queue_limits(sys.path(), (259, 0)), QueueLimits { bytes_max: None, segments_max: None });
        let queue = sys.path().join("dev/block/259:0/queue");
        create_dir_all(&queue).unwrap();
        write(queue.join("max_hw_sectors_kb"), "130\n").unwrap();
        write(queue.join("max_segments"), "64\n").unwrap();
        let told = queue_limits(sys.path(), (259, 0));
        assert_eq!(told, QueueLimits { bytes_max: Some(130 << 10), segments_max: Some(64) });
        let limits = |bytes_max, segments_max| QueueLimits { bytes_max, segments_max };
        for (controller, limits, most) in [
            (None, told, 128 << 10),
            (Some(64 << 10), told, 64 << 10),
            (Some(1 << 30), limits(None, Some(2)), 8 << 10),
            (None, limits(None, None), 127 << 12),
            (None, limits(None, Some(u64::MAX)), TRANSFER_MAX),
            (None, limits(Some(512), Some(0)), 4096),
        ] {
            assert_eq!(transfer_max(controller, limits), most, "{controller:?} {limits:?}");
        }
    }

    #[test]
    fn what_is_no_namespace_is_refused_and_none_is_made() {
        let refused = |path: &str, create_size| {
            let options = OpenOptions { read_only: false, create_size };
            open(Path::new(path), &options).err().expect("is refused")
        };
        let null = refused("/dev/null", None);
        assert!(matches!(&null, DeviceError::Open(why) if why.contains("it is no namespace of an NVMe controller")));
        let made = refused("/dev/null", Some(1 << 30));
        assert!(matches!(&made, DeviceError::Open(why) if why.contains("whose size is not ours to choose")));
        assert!(is_character_device(Path::new("/dev/null")) && !is_character_device(Path::new("/dev")));
    }

    #[test]
    fn who_may_not_send_commands_is_told_of_the_block_device() {
        let (path, block) = (Path::new("/dev/ng0n1"), Path::new("/dev/nvme0n1"));
        for errno in NOT_TAKEN {
            let said = not_taken(path, block, errno);
            assert!(
                said.starts_with("cannot open /dev/ng0n1: ") && said.ends_with("; give /dev/nvme0n1 instead"),
                "{said}"
            );
        }
    }
}
