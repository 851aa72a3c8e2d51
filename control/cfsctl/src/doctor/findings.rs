//! What a machine means for ClaudeFS. Each sentence is about this version: who changes what it uses changes
//! the sentence here.

mod nvme;

use super::machine::{FuseDevice, Kernel, Limit, Machine, UNLIMITED};
use super::probed::{Instructions, NoRing, Probed};
use super::{Finding, State};
use crate::show::bytes;
use cfs_reactor::buffer::DEVICE_MEMORY_BYTES;

/// Linux 5.17: FUSE 7.36, the least that a mount talks to.
const KERNEL_MIN: (u32, u32) = (5, 17);
/// The oldest that tests run on.
const KERNEL_TESTED: (u32, u32) = (6, 1);
/// What a server drives a controller with: the buffers, and 2 MiB of queues and lists (docs/operations.md).
const CONTROLLER_LOCKS_BYTES: u64 = DEVICE_MEMORY_BYTES as u64 + (2 << 20);
/// The usual limit: 64 targets and hundreds of mounts.
const OPEN_FILES_ENOUGH: u64 = 1024;
/// A server with a million files, and as much again for a mount and its cache.
const MEMORY_ENOUGH_BYTES: u64 = 768 << 20;

pub fn of(machine: &Machine, probed: &Probed) -> Vec<Finding> {
    let mut findings = vec![
        kernel(machine),
        io_uring(machine, probed),
        fuse(machine),
        memory(machine),
        locked_memory(machine),
        open_files(machine),
        huge_pages(machine),
        erasure_coding(probed),
        checksums(probed),
        encryption(probed),
    ];
    findings.push(iommu(machine));
    findings.extend(nvme::of(machine));
    findings.push(rdma(machine, probed));
    findings
}

fn finding(subject: &str, state: State, found: impl Into<String>, used: impl Into<String>) -> Finding {
    Finding { subject: subject.to_owned(), state, found: found.into(), used: used.into(), improve: None }
}

impl Finding {
    fn improved_by(self, command: impl Into<String>) -> Finding {
        let state = if self.state == State::Prevents { State::Prevents } else { State::Improvable };
        Finding { state, improve: Some(command.into()), ..self }
    }
}

fn kernel(machine: &Machine) -> Finding {
    let needed = "Linux 6.1 or newer is needed";
    match &machine.kernel {
        Some(Kernel { name, version: Some(version) }) => {
            let found = format!("Linux {name}");
            if *version < KERNEL_MIN {
                return finding("kernel", State::Prevents, format!("{found} is too old"), needed);
            }
            let state = if *version < KERNEL_TESTED { State::Improvable } else { State::Good };
            finding("kernel", state, found, needed)
        }
        _ => finding("kernel", State::Unknown, "unknown", needed),
    }
}

fn io_uring(machine: &Machine, probed: &Probed) -> Finding {
    let used = "all files, devices and sockets of servers, mounts and cfsctl; there is no other way";
    let sysctl = "sysctl kernel.io_uring_disabled=0";
    let prevents = |found: &str| finding("io_uring", State::Prevents, found, used);
    match (&probed.ring, machine.io_uring_disabled) {
        (Ok(()), Some(1)) => {
            let found = "allowed to this user, not to all (kernel.io_uring_disabled is 1)";
            finding("io_uring", State::Improvable, found, used).improved_by(sysctl)
        }
        (Ok(()), Some(value)) => {
            finding("io_uring", State::Good, format!("allowed (kernel.io_uring_disabled is {value})"), used)
        }
        (Ok(()), None) => finding("io_uring", State::Good, "allowed", used),
        (Err(NoRing::NotAllowed), Some(value @ 1..)) => {
            prevents(&format!("not allowed (kernel.io_uring_disabled is {value})")).improved_by(sysctl)
        }
        (Err(NoRing::NotAllowed), _) => {
            prevents("not allowed: the container's seccomp profile must allow io_uring_setup")
        }
        (Err(NoRing::Failed(why)), _) => prevents(why),
    }
}

fn fuse(machine: &Machine) -> Finding {
    let used = fuse_features(machine);
    let prevents = |found: &str| finding("FUSE", State::Prevents, found, &*used);
    let rights = machine.rights;
    let mounts = rights.is_some_and(|rights| rights.mounts);
    match &machine.fuse {
        FuseDevice::Usable if mounts => finding("FUSE", State::Good, "/dev/fuse is usable, and this user mounts", used),
        FuseDevice::Usable if machine.fusermount => {
            finding("FUSE", State::Good, "/dev/fuse is usable, and fusermount3 mounts", used)
        }
        FuseDevice::Usable if rights.is_none() => {
            finding("FUSE", State::Unknown, "/dev/fuse is usable; whether this user mounts is unknown", used)
        }
        FuseDevice::Usable => {
            let found = "/dev/fuse is usable, but only root mounts: there is no fusermount3";
            finding("FUSE", State::Improvable, found, used).improved_by("apt-get install fuse3")
        }
        FuseDevice::Missing if machine.fuse_loaded == Some(true) => {
            prevents("/dev/fuse is missing; a container is given it by --device /dev/fuse")
                .improved_by("mknod /dev/fuse c 10 229")
        }
        FuseDevice::Missing => prevents("/dev/fuse is missing").improved_by("modprobe fuse"),
        FuseDevice::NotPermitted if mounts => {
            prevents("/dev/fuse is kept from this container: it is given by --device /dev/fuse --cap-add SYS_ADMIN")
        }
        FuseDevice::NotPermitted => finding("FUSE", State::Improvable, "/dev/fuse is not for this user", used)
            .improved_by("chmod 666 /dev/fuse"),
        FuseDevice::NoDriver => prevents("the kernel has no FUSE behind /dev/fuse").improved_by("modprobe fuse"),
        FuseDevice::Failed(why) => prevents(&format!("/dev/fuse cannot be opened: {why}")),
        FuseDevice::Unknown => finding("FUSE", State::Unknown, "unknown", used),
    }
}

/// What a mount gets from newer kernels. Distributions carry some of it into older ones.
fn fuse_features(machine: &Machine) -> String {
    const FEATURES: [((u32, u32), &str); 3] = [
        ((6, 1), "O_TMPFILE"),
        ((6, 6), "birth times, mappings of files opened with O_APPEND"),
        ((6, 16), "names kept by the kernel"),
    ];
    let Some(version) = machine.kernel.as_ref().and_then(|kernel| kernel.version) else {
        return "mounts; which features the kernel has is unknown".to_owned();
    };
    let named = |present: bool| {
        let features = FEATURES.iter().filter(|(since, _)| (version >= *since) == present);
        features.map(|((major, minor), name)| format!("{name} ({major}.{minor})")).collect::<Vec<_>>().join(", ")
    };
    let list = |before: &str, features: String| match features.as_str() {
        "" => String::new(),
        features => format!("{before}{features}"),
    };
    let (with, without) = (list(", with ", named(true)), list("; not before newer kernels: ", named(false)));
    format!("mounts{with}{without}")
}

fn memory(machine: &Machine) -> Finding {
    let used = "a server takes some 120 MiB without files, 380 MiB with a million (docs/operations.md, Space)";
    match machine.memory {
        Some(memory) => {
            let found = format!("{}, {} available", bytes(memory.bytes), bytes(memory.available_bytes));
            let enough = memory.available_bytes >= MEMORY_ENOUGH_BYTES;
            finding("memory", if enough { State::Good } else { State::Improvable }, found, used)
        }
        None => finding("memory", State::Unknown, "unknown", used),
    }
}

fn locked_memory(machine: &Machine) -> Finding {
    let subject = "locked memory";
    let controllers = || machine.nvme.iter().flat_map(|nvme| &nvme.list);
    let own = controllers().filter(|controller| nvme::is_ours(controller)).count() as u64;
    // A ring that polls registers the buffers once more.
    let mut disks = controllers().flat_map(|controller| controller.namespaces.iter().flatten());
    let rings = 1 + u64::from(disks.any(|disk| disk.polled == Some(true)));
    let needed = rings * DEVICE_MEMORY_BYTES as u64 + own * CONTROLLER_LOCKS_BYTES;
    let mut used = format!("{} of I/O buffers, registered by each ring of a server", bytes(DEVICE_MEMORY_BYTES as u64));
    if own > 0 {
        used += &format!("; {} for each controller at vfio-pci ({own})", bytes(CONTROLLER_LOCKS_BYTES));
    }
    if machine.rights.is_some_and(|rights| rights.locks_memory) {
        return finding(subject, State::Good, "no limit for this user (CAP_IPC_LOCK)", used);
    }
    let Some(limit) = machine.locked_memory else { return finding(subject, State::Unknown, "unknown", used) };
    let found = limit_shown(limit, bytes);
    if limit.soft > needed {
        return finding(subject, State::Good, found, used);
    }
    let effect = match own {
        0 => "beyond the limit the kernel pins pages for each operation",
        _ => "beyond the limit targets `nvme:` are refused",
    };
    let command = if limit.hard == UNLIMITED {
        "ulimit -l unlimited".to_owned()
    } else {
        "sudo prlimit --pid $$ --memlock=unlimited".to_owned()
    };
    finding(subject, State::Improvable, found, format!("{used}; {effect}. In a systemd unit: LimitMEMLOCK=infinity"))
        .improved_by(command)
}

fn open_files(machine: &Machine) -> Finding {
    let used = "a server has one open for each target and each mount";
    let Some(limit) = machine.open_files else { return finding("open files", State::Unknown, "unknown", used) };
    let found = limit_shown(limit, |count| count.to_string());
    if limit.soft >= OPEN_FILES_ENOUGH {
        return finding("open files", State::Good, found, used);
    }
    let command = if limit.hard >= OPEN_FILES_ENOUGH {
        format!("ulimit -n {OPEN_FILES_ENOUGH}")
    } else {
        format!("sudo prlimit --pid $$ --nofile={OPEN_FILES_ENOUGH}")
    };
    let used = format!("{used}. In a systemd unit: LimitNOFILE={OPEN_FILES_ENOUGH}");
    finding("open files", State::Improvable, found, used).improved_by(command)
}

fn limit_shown(limit: Limit, show: impl Fn(u64) -> String) -> String {
    let value = |value: u64| if value == UNLIMITED { "no limit".to_owned() } else { show(value) };
    match limit.soft == limit.hard {
        true => value(limit.soft),
        false => format!("{}, may be raised to: {}", value(limit.soft), value(limit.hard)),
    }
}

fn huge_pages(machine: &Machine) -> Finding {
    let used =
        "transparent ones hold a server's I/O buffers; reserved ones (vm.nr_hugepages) are not used by this build";
    let transparent = machine.transparent_huge_pages.as_deref();
    let reserved = match &machine.reserved_huge_pages {
        None => "unknown".to_owned(),
        Some(sizes) => {
            let some = sizes.iter().filter(|size| size.count > 0);
            let shown: Vec<String> = some.map(|size| format!("{} of {}", size.count, bytes(size.page_bytes))).collect();
            if shown.is_empty() { "none".to_owned() } else { shown.join(", ") }
        }
    };
    let found = format!("transparent: {}; reserved: {reserved}", transparent.unwrap_or("unknown"));
    let state = match transparent {
        Some("always" | "madvise") => State::Good,
        Some("never") => {
            return finding("huge pages", State::Improvable, found, used)
                .improved_by("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled");
        }
        _ => State::Unknown,
    };
    finding("huge pages", state, found, used)
}

fn erasure_coding(probed: &Probed) -> Finding {
    let cpu = &probed.cpu;
    let found = instructions(&cpu.coding);
    let subject = "erasure coding";
    match (cpu.vectors, cpu.codec.as_str()) {
        (Some(vectors), codec) => finding(subject, State::Good, found, format!("codec {codec}, by {vectors}")),
        (None, "isa-l") => {
            finding(subject, State::Good, found, "codec isa-l, since our own has no vectors for this CPU")
        }
        (None, codec) => {
            let used = format!("codec {codec}, byte by byte: it has no vectors for this CPU; ISA-L (libisal-dev) may");
            finding(subject, State::Improvable, found, used).improved_by("cargo build --release --features cfs/isal")
        }
    }
}

fn checksums(probed: &Probed) -> Finding {
    let used = format!("CRC32C of what is stored: {}", probed.cpu.crc32c);
    let state = if probed.cpu.crc32c.starts_with("software") { State::Improvable } else { State::Good };
    finding("checksums", state, instructions(&probed.cpu.checksums), used)
}

fn encryption(probed: &Probed) -> Finding {
    let used = "TLS 1.3 (AES-256-GCM) of servers and clients with an identity; data at rest is not encrypted yet";
    finding("encryption", State::Good, instructions(&probed.cpu.encryption), used)
}

fn instructions(list: &Instructions) -> String {
    let named = |present: bool| {
        let names = list.iter().filter(|(_, has)| *has == present).map(|(name, _)| *name);
        names.collect::<Vec<_>>().join(", ")
    };
    match (named(true).as_str(), named(false).as_str()) {
        ("", "") => "unknown".to_owned(),
        ("", lacking) => format!("none of {lacking}"),
        (present, "") => present.to_owned(),
        (present, lacking) => format!("{present}; not {lacking}"),
    }
}

fn iommu(machine: &Machine) -> Finding {
    let used = "needed for NVMe controllers that a server drives itself (targets `nvme:`)";
    let controllers = machine.nvme.as_ref().is_some_and(|nvme| !nvme.list.is_empty());
    match (machine.iommu_groups, controllers) {
        (None, _) => finding("IOMMU", State::Unknown, "unknown", used),
        (Some(0), false) => finding("IOMMU", State::Unused, "none", used),
        (Some(0), true) => {
            let none = finding("IOMMU", State::Improvable, "none", format!("{used}; switch it on in the firmware"));
            match machine.cpu_vendor.as_deref() {
                Some("GenuineIntel") => none.improved_by("kernel parameter intel_iommu=on"),
                // Others are on whenever the firmware tells of them.
                _ => none,
            }
        }
        (Some(groups), _) => {
            let driver = if machine.vfio_loaded { "vfio-pci is loaded" } else { "vfio-pci is not loaded" };
            finding("IOMMU", State::Good, format!("{groups} groups; {driver}"), used)
        }
    }
}

fn rdma(machine: &Machine, probed: &Probed) -> Finding {
    let used = "the fabric is TCP";
    let devices = match machine.rdma.as_deref() {
        None => return finding("RDMA", State::Unknown, "unknown", used),
        Some([]) => return finding("RDMA", State::Unused, "none", used),
        Some(devices) => devices.join(", "),
    };
    if !(probed.has_libfabric)() {
        let used = "the fabric is TCP; RDMA takes libfabric";
        let install = "apt-get install libfabric1 ibverbs-providers";
        return finding("RDMA", State::Improvable, devices, used).improved_by(install);
    }
    let used = "messages and file data to where there are such devices, too (fabric = \"auto\"; seen at work with a \
                software device only)";
    finding("RDMA", State::Good, devices, used)
}
