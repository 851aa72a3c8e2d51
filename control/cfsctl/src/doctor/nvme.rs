//! The NVMe controllers of a machine, who drives each, and who uses what is on it.

use super::files;
use crate::device;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Class of bridges, which share IOMMU groups without harm.
const CLASS_BRIDGE: &str = "0x06";
/// Volumes on volumes that are followed: LUKS on LVM on RAID on a partition are four.
const HOLDERS_DEEP_MAX: usize = 6;

pub struct Controllers {
    pub list: Vec<Controller>,
    /// Whether the table of mounts, which is never empty, could be read.
    pub mounts_known: bool,
    /// Whether there are processes whose open files can't be seen.
    pub hidden_processes: bool,
}

pub struct Controller {
    pub address: String,
    pub model: Option<String>,
    pub driver: Option<String>,
    pub iommu_group: Option<String>,
    /// Other functions of its IOMMU group, which would have to be given away with it.
    pub companions: Vec<String>,
    pub namespaces: Option<Vec<Namespace>>,
    /// Whoever has it through VFIO.
    pub users: Vec<String>,
}

pub struct Namespace {
    /// Its block device, such as `nvme0n1`.
    pub name: String,
    pub bytes: Option<u64>,
    /// Whether the kernel has queues for it that are polled.
    pub polled: Option<bool>,
    pub users: Vec<String>,
}

impl Controller {
    pub fn users(&self) -> Vec<&str> {
        let namespaces = self.namespaces.iter().flatten();
        let users = namespaces.flat_map(|namespace| &namespace.users).chain(&self.users);
        users.map(String::as_str).collect()
    }
}

/// What uses block devices, as far as the kernel's tables say.
struct Uses {
    /// Device number (or source, for file systems with numbers of their own) and mount point.
    mounts: Vec<(String, String)>,
    swaps: Vec<String>,
    /// By path of the device, who has it open.
    open: BTreeMap<String, BTreeSet<String>>,
    hidden_processes: bool,
}

pub fn controllers(root: &Path) -> Option<Controllers> {
    let functions = root.join("sys/bus/pci/devices");
    let names = files::names(&root.join("sys/bus"), "pci/devices")?;
    let is_nvme =
        |name: &String| files::line(&functions.join(name).join("class")).as_deref() == Some(device::CLASS_NVME);
    let addresses: Vec<String> = names.into_iter().filter(is_nvme).collect();
    if addresses.is_empty() {
        return Some(Controllers { list: Vec::new(), mounts_known: true, hidden_processes: false });
    }
    let uses = Uses::read(root);
    let list = addresses.into_iter().map(|address| controller(root, &functions.join(&address), &address, &uses));
    Some(Controllers {
        list: list.collect(),
        mounts_known: !uses.mounts.is_empty(),
        hidden_processes: uses.hidden_processes,
    })
}

fn controller(root: &Path, function: &Path, address: &str, uses: &Uses) -> Controller {
    let iommu_group = device::link_name(&function.join("iommu_group")).map(|name| files::printable(&name));
    let users = iommu_group.iter().flat_map(|group| uses.openers(&format!("/dev/vfio/{group}"))).collect();
    let namespaces = device::namespaces(function).ok().map(|names| {
        let described = names.into_iter().map(|name| namespace(root, &name, uses));
        described.collect()
    });
    Controller {
        address: files::printable(address),
        model: model(function),
        driver: device::driver(function).map(|name| files::printable(&name)),
        companions: companions(function, address),
        iommu_group,
        namespaces,
        users,
    }
}

/// The kernel's driver asks a controller for its model; else the numbers of vendor and device are known.
fn model(function: &Path) -> Option<String> {
    let controllers = files::names(function, "nvme")?;
    let told = controllers.iter().find_map(|name| files::line(&function.join("nvme").join(name).join("model")));
    told.or_else(|| {
        let [vendor, device] = ["vendor", "device"].map(|file| files::line(&function.join(file)));
        Some(format!("PCI {}:{}", vendor?.trim_start_matches("0x"), device?.trim_start_matches("0x")))
    })
}

fn companions(function: &Path, address: &str) -> Vec<String> {
    let group = function.join("iommu_group");
    let others = files::names(&group, "devices").unwrap_or_default().into_iter().filter(|other| {
        let class = files::line(&group.join("devices").join(other).join("class")).unwrap_or_default();
        other != address && !class.starts_with(CLASS_BRIDGE)
    });
    others.map(|other| files::printable(&other)).collect()
}

fn namespace(root: &Path, name: &str, uses: &Uses) -> Namespace {
    const SECTOR_BYTES: u64 = 512;
    let block = root.join("sys/class/block").join(name);
    let mut users = Vec::new();
    uses.of_device(root, name, HOLDERS_DEEP_MAX, &mut users);
    // Mirrors and multipath show one holder more than once.
    let mut seen = BTreeSet::new();
    users.retain(|user| seen.insert(user.clone()));
    Namespace {
        name: files::printable(name),
        bytes: files::number::<u64>(&block.join("size")).and_then(|sectors| sectors.checked_mul(SECTOR_BYTES)),
        polled: files::number::<u32>(&block.join("queue/io_poll")).map(|flag| flag == 1),
        users,
    }
}

impl Uses {
    fn read(root: &Path) -> Uses {
        let swaps = files::text(&root.join("proc/swaps")).unwrap_or_default();
        let (open, hidden_processes) = open_devices(root);
        Uses {
            mounts: mounts(&files::text(&root.join("proc/self/mountinfo")).unwrap_or_default()),
            swaps: swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(String::from).collect(),
            open,
            hidden_processes,
        }
    }

    /// Adds what uses a block device, its partitions, and the volumes made of them.
    fn of_device(&self, root: &Path, name: &str, deep: usize, users: &mut Vec<String>) {
        let block = root.join("sys/class/block").join(name);
        let mapped = files::line(&block.join("dm/name"));
        let path = format!("/dev/{name}");
        // What a user knows it by.
        let shown = files::printable(mapped.as_deref().unwrap_or(name));
        let sources = [Some(path.clone()), mapped.map(|mapped| format!("/dev/mapper/{mapped}"))];
        let number = files::line(&block.join("dev"));
        for (source, point) in &self.mounts {
            if number.as_ref() == Some(source) || sources.iter().flatten().any(|known| known == source) {
                users.push(format!("{shown} mounted on {point}"));
            }
        }
        if self.swaps.contains(&path) {
            users.push(format!("{shown} is swap"));
        }
        users.extend(self.openers(&path).into_iter().map(|who| format!("{shown} {who}")));
        let Some(deeper) = deep.checked_sub(1) else { return };
        for holder in files::names(&block, "holders").unwrap_or_default() {
            let volume = files::line(&root.join("sys/class/block").join(&holder).join("dm/name"));
            users.push(format!("{shown} held by {}", files::printable(volume.as_deref().unwrap_or(&holder))));
            self.of_device(root, &holder, deeper, users);
        }
        for part in files::names(&block, "").unwrap_or_default() {
            if block.join(&part).join("partition").exists() {
                self.of_device(root, &part, deeper, users);
            }
        }
    }

    fn openers(&self, path: &str) -> Vec<String> {
        self.open.get(path).into_iter().flatten().map(|who| format!("open in {who}")).collect()
    }
}

/// proc_pid_mountinfo(5): fields 3 and 5 are device number and mount point; behind a dash are type and source.
fn mounts(table: &str) -> Vec<(String, String)> {
    let mut mounts = Vec::new();
    for line in table.lines() {
        let mut fields = line.split(' ');
        let (Some(number), Some(point)) = (fields.nth(2), fields.nth(1)) else { continue };
        if !number.contains(':') {
            continue;
        }
        let point = files::printable(point);
        mounts.push((number.to_owned(), point.clone()));
        // Btrfs mounts have numbers of no device.
        if let Some(source) = fields.skip_while(|field| *field != "-").nth(2)
            && number.starts_with("0:")
        {
            mounts.push((source.to_owned(), point));
        }
    }
    mounts
}

/// Which processes have which NVMe and VFIO devices open, and whether some could not be looked at.
fn open_devices(root: &Path) -> (BTreeMap<String, BTreeSet<String>>, bool) {
    let mut open: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut hidden = false;
    for process in files::names(root, "proc").unwrap_or_default() {
        if !process.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let process_path = root.join("proc").join(&process);
        // One that has just ended has none.
        let Some(descriptors) = files::names(&process_path, "fd") else {
            hidden |= process_path.exists();
            continue;
        };
        for descriptor in descriptors {
            let Ok(target) = fs::read_link(process_path.join("fd").join(descriptor)) else { continue };
            let target = target.to_string_lossy().into_owned();
            if target.starts_with("/dev/nvme") || target.starts_with("/dev/vfio/") {
                let name = files::line(&process_path.join("comm")).unwrap_or_else(|| "a program".to_owned());
                open.entry(target).or_default().insert(format!("{name} (PID {process})"));
            }
        }
    }
    (open, hidden)
}
