//! A machine as its files describe it. `None` is what can't be known.

use super::files;
use super::nvme::{self, Controllers};
use cfs_reactor::uring::Errno;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Of a limit: there is none.
pub const UNLIMITED: u64 = u64::MAX;

/// Numbers of capabilities (linux/capability.h).
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;

/// Where packages put fusermount3.
const PROGRAMS: [&str; 3] = ["usr/bin", "bin", "usr/local/bin"];

pub struct Machine {
    pub kernel: Option<Kernel>,
    /// The sysctl kernel.io_uring_disabled, from Linux 6.6 on.
    pub io_uring_disabled: Option<u32>,
    pub locked_memory: Option<Limit>,
    pub open_files: Option<Limit>,
    pub rights: Option<Rights>,
    pub memory: Option<Memory>,
    /// When the kernel gives transparent huge pages: always, madvise or never.
    pub transparent_huge_pages: Option<String>,
    pub reserved_huge_pages: Option<Vec<HugePages>>,
    pub fuse: FuseDevice,
    /// Whether the kernel has FUSE, or its module is loaded.
    pub fuse_loaded: Option<bool>,
    pub fusermount: bool,
    /// Who made the CPU, as /proc/cpuinfo names them.
    pub cpu_vendor: Option<String>,
    pub iommu_groups: Option<usize>,
    pub vfio_loaded: bool,
    pub nvme: Option<Controllers>,
    /// RDMA devices, with what is known of their first port.
    pub rdma: Option<Vec<String>>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kernel {
    pub name: String,
    /// Major and minor number.
    pub version: Option<(u32, u32)>,
}

/// What this process may have, and what it may raise that to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limit {
    pub soft: u64,
    pub hard: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rights {
    pub mounts: bool,
    pub locks_memory: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memory {
    pub bytes: u64,
    pub available_bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HugePages {
    pub page_bytes: u64,
    pub count: u64,
}

/// What came of opening /dev/fuse, as a mount does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FuseDevice {
    Usable,
    Missing,
    /// The file is there, what answers it in the kernel is not.
    NoDriver,
    NotPermitted,
    Failed(String),
    Unknown,
}

impl Machine {
    /// `root`: where /proc, /sys and /dev are.
    pub fn read(root: &Path) -> Machine {
        let proc = root.join("proc");
        let limits = files::text(&proc.join("self/limits")).unwrap_or_default();
        let status = files::text(&proc.join("self/status")).unwrap_or_default();
        Machine {
            kernel: files::line(&proc.join("sys/kernel/osrelease")).map(kernel),
            io_uring_disabled: files::number(&proc.join("sys/kernel/io_uring_disabled")),
            locked_memory: files::behind(&limits, "Max locked memory").and_then(limit),
            open_files: files::behind(&limits, "Max open files").and_then(limit),
            rights: files::behind(&status, "CapEff:").and_then(rights),
            memory: files::text(&proc.join("meminfo")).and_then(|text| memory(&text)),
            transparent_huge_pages: files::line(&root.join("sys/kernel/mm/transparent_hugepage/enabled"))
                .and_then(|line| chosen(&line)),
            reserved_huge_pages: reserved_huge_pages(root),
            fuse: fuse_device(root),
            fuse_loaded: files::text(&proc.join("filesystems"))
                .map(|text| text.lines().any(|line| line.split_whitespace().last() == Some("fuse"))),
            fusermount: PROGRAMS.iter().any(|directory| is_set_user_id(&root.join(directory).join("fusermount3"))),
            cpu_vendor: files::text(&proc.join("cpuinfo")).and_then(|text| cpu_vendor(&text)),
            iommu_groups: files::names(&root.join("sys/kernel"), "iommu_groups").map(|groups| groups.len()),
            vfio_loaded: root.join("sys/bus/pci/drivers/vfio-pci").exists(),
            nvme: nvme::controllers(root),
            rdma: rdma(root),
        }
    }
}

fn kernel(name: String) -> Kernel {
    let mut numbers = name.split(|character: char| !character.is_ascii_digit()).map(str::parse);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    };
    Kernel { name, version }
}

/// `8388608 unlimited bytes`.
fn limit(text: &str) -> Option<Limit> {
    let value = |word: &str| if word == "unlimited" { Some(UNLIMITED) } else { word.parse().ok() };
    let mut words = text.split_whitespace();
    Some(Limit { soft: value(words.next()?)?, hard: value(words.next()?)? })
}

fn rights(text: &str) -> Option<Rights> {
    let capabilities = u64::from_str_radix(text, 16).ok()?;
    let has = |capability: u32| capabilities >> capability & 1 == 1;
    Some(Rights { mounts: has(CAP_SYS_ADMIN), locks_memory: has(CAP_IPC_LOCK) })
}

fn memory(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        let kib: u64 = files::behind(text, name)?.strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(Memory { bytes: field("MemTotal:")?, available_bytes: field("MemAvailable:")? })
}

/// The word in brackets: `always [madvise] never`.
fn chosen(line: &str) -> Option<String> {
    let (_, rest) = line.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

fn reserved_huge_pages(root: &Path) -> Option<Vec<HugePages>> {
    let base = root.join("sys/kernel/mm");
    let sizes = files::names(&base, "hugepages")?.into_iter().map(|name| {
        let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let count = files::number(&base.join("hugepages").join(&name).join("nr_hugepages"))?;
        Some(HugePages { page_bytes: kib.checked_mul(1024)?, count })
    });
    sizes.collect()
}

fn fuse_device(root: &Path) -> FuseDevice {
    match OpenOptions::new().read(true).write(true).open(root.join("dev/fuse")) {
        Ok(_) => FuseDevice::Usable,
        Err(_) if !root.join("dev").is_dir() => FuseDevice::Unknown,
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT) => FuseDevice::Missing,
            Some(Errno::NODEV | Errno::NXIO) => FuseDevice::NoDriver,
            Some(Errno::ACCESS | Errno::PERM) => FuseDevice::NotPermitted,
            _ => FuseDevice::Failed(error.to_string()),
        },
    }
}

fn is_set_user_id(program: &Path) -> bool {
    const SET_USER_ID: u32 = 0o4000;
    fs::metadata(program).is_ok_and(|found| found.is_file() && found.permissions().mode() & SET_USER_ID != 0)
}

fn cpu_vendor(text: &str) -> Option<String> {
    let value = files::behind(text, "vendor_id")?.strip_prefix(':')?;
    Some(files::printable(value)).filter(|vendor| !vendor.is_empty())
}

fn rdma(root: &Path) -> Option<Vec<String>> {
    let class = root.join("sys/class");
    let devices = files::names(&class, "infiniband")?.into_iter().map(|name| {
        let port = class.join("infiniband").join(&name).join("ports/1");
        let link = files::line(&port.join("link_layer")).unwrap_or_else(|| "unknown link".to_owned());
        // `4: ACTIVE`.
        let state = files::line(&port.join("state")).unwrap_or_else(|| "state unknown".to_owned());
        let state = state.split_once(": ").map_or(state.as_str(), |(_, word)| word).to_owned();
        format!("{} ({link}, {state})", files::printable(&name))
    });
    Some(devices.collect())
}
