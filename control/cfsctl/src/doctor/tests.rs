//! Machines that the tests write as files, and what is found on them.

use super::machine::{FuseDevice, Limit, Machine, Rights, UNLIMITED};
use super::probed::{Cpu, NoRing, Probed};
use super::{Finding, Report, State, examine, report};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use tempfile::TempDir;

struct Fixture(TempDir);

impl Fixture {
    fn empty() -> Fixture {
        Fixture(tempfile::tempdir().unwrap())
    }

    /// A user without rights on a machine without anything special.
    fn laptop() -> Fixture {
        let fixture = Fixture::empty();
        fixture
            .file("proc/sys/kernel/osrelease", "6.12.9-amd64\n")
            .file("proc/sys/kernel/io_uring_disabled", "0\n")
            .file("proc/meminfo", "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n")
            .file("proc/filesystems", "nodev\tproc\n\text4\nnodev\tfuse\n")
            .file("proc/cpuinfo", "processor\t: 0\nvendor_id\t: GenuineIntel\n")
            .file("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
            .file("proc/self/status", "Name:\tcfsctl\nCapEff:\t0000000000000000\n")
            .limits("8388608              8388608   ", "1024                 1048576   ")
            .file("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
            .file("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0\n")
            .file("sys/bus/pci/devices/0000:00:02.0/class", "0x030000\n")
            .file("sys/class/net/lo/mtu", "65536\n")
            .file("dev/fuse", "")
            .program("usr/bin/fusermount3", 0o4755);
        fixture
    }

    /// As root, with two controllers behind an IOMMU: of the first a partition is mounted, one is swap and one
    /// holds a volume; the second is a server's.
    fn server() -> Fixture {
        let fixture = Fixture::laptop();
        fixture
            .file("proc/self/status", "CapEff:\t000001ffffffffff\n")
            .file(
                "proc/self/mountinfo",
                "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
                 30 22 259:1 / /srv\\040one rw shared:2 master:1 - xfs /dev/nvme0n1p1 rw\n\
                 31 22 0:41 /@ /data rw - btrfs /dev/mapper/vg-data rw,subvol=/@\n",
            )
            .file("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/dev/nvme0n1p2   partition 8388604 0 -2\n")
            .file("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "1024\n")
            .file("sys/class/infiniband/mlx5_0/ports/1/link_layer", "InfiniBand\n")
            .file("sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE\n")
            .controller("0000:01:00.0", "nvme", Some("7"))
            .file("sys/bus/pci/devices/0000:01:00.0/nvme/nvme0/model", "ACME Fast 2000               \n")
            .file("sys/bus/pci/devices/0000:01:00.0/nvme/nvme0/nvme0n1/size", "2097152\n")
            .file("sys/class/block/nvme0n1/size", "2097152\n")
            .file("sys/class/block/nvme0n1/dev", "259:0\n")
            .file("sys/class/block/nvme0n1/queue/io_poll", "0\n")
            .controller("0000:02:00.0", "vfio-pci", Some("8"))
            .file("sys/bus/pci/devices/0000:02:00.0/vendor", "0x144d\n")
            .file("sys/bus/pci/devices/0000:02:00.0/device", "0xa80a\n")
            .file("proc/77/comm", "cfs\n")
            .link("proc/77/fd/9", "/dev/vfio/8")
            .link("proc/77/fd/3", "/dev/null")
            .file("sys/class/block/dm-0/dm/name", "vg-data\n")
            .file("sys/class/block/dm-0/dev", "253:0\n");
        for (part, number) in [("nvme0n1p1", 1), ("nvme0n1p2", 2), ("nvme0n1p3", 3)] {
            for seen_at in [format!("sys/class/block/nvme0n1/{part}"), format!("sys/class/block/{part}")] {
                fixture
                    .file(&format!("{seen_at}/partition"), format!("{number}\n"))
                    .file(&format!("{seen_at}/dev"), format!("259:{number}\n"));
            }
        }
        fixture.file("sys/class/block/nvme0n1p3/holders/dm-0/ro", "0\n");
        fixture
    }

    fn path(&self, path: &str) -> PathBuf {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn file(&self, path: &str, bytes: impl AsRef<[u8]>) -> &Fixture {
        fs::write(self.path(path), bytes).unwrap();
        self
    }

    fn link(&self, path: &str, target: &str) -> &Fixture {
        symlink(target, self.path(path)).unwrap();
        self
    }

    fn program(&self, path: &str, mode: u32) -> &Fixture {
        self.file(path, "");
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(mode)).unwrap();
        self
    }

    fn limits(&self, locked: &str, files: &str) -> &Fixture {
        self.file(
            "proc/self/limits",
            format!(
                "Limit                     Soft Limit           Hard Limit           Units     \n\
                 Max open files            {files}           files     \n\
                 Max locked memory         {locked}           bytes     \n"
            ),
        )
    }

    fn controller(&self, address: &str, driver: &str, group: Option<&str>) -> &Fixture {
        let function = format!("sys/bus/pci/devices/{address}");
        self.file(&format!("{function}/class"), "0x010802\n");
        if !driver.is_empty() {
            self.file(&format!("sys/bus/pci/drivers/{driver}/uevent"), "");
            self.link(&format!("{function}/driver"), &format!("../../drivers/{driver}"));
        }
        if let Some(group) = group {
            self.file(&format!("sys/kernel/iommu_groups/{group}/devices/{address}/class"), "0x010802\n");
            self.link(&format!("{function}/iommu_group"), &format!("../../../../kernel/iommu_groups/{group}"));
        }
        self
    }

    fn remove(&self, path: &str) -> &Fixture {
        let path = self.path(path);
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap()
        } else {
            fs::remove_file(path).unwrap()
        }
        self
    }

    fn examine(&self) -> Report {
        examine(self.0.path(), probed())
    }
}

fn probed() -> Probed {
    let cpu = Cpu {
        coding: vec![("GFNI", false), ("AVX2", true), ("SSSE3", true)],
        checksums: vec![("PCLMULQDQ", true), ("SSE4.2", true)],
        encryption: vec![("VAES", false), ("AES-NI", false)],
        codec: "simd".to_owned(),
        vectors: Some("AVX2"),
        crc32c: "x86_64-sse-pclmulqdq".to_owned(),
    };
    Probed { ring: Ok(()), cpu, has_libfabric: || true }
}

fn about<'a>(report: &'a Report, subject: &str) -> &'a Finding {
    let mut found = report.findings.iter().filter(|finding| finding.subject == subject);
    let one = found.next().unwrap_or_else(|| panic!("nothing about {subject}: {:?}", report.findings));
    assert!(found.next().is_none(), "two findings about {subject}");
    one
}

/// What would improve a machine.
fn commands(report: &Report) -> Vec<(&str, &str)> {
    let improved = report.findings.iter().filter_map(|finding| Some((&*finding.subject, finding.improve.as_deref()?)));
    improved.collect()
}

#[test]
fn a_bare_laptop_runs_and_lacks_locked_memory_only() {
    let report = Fixture::laptop().examine();
    assert!(report.runs && report.reasons.is_empty());
    assert_eq!(commands(&report), [("locked memory", "sudo prlimit --pid $$ --memlock=unlimited")]);
    let seen = |subject| {
        let finding = about(&report, subject);
        (finding.state, finding.found.as_str())
    };
    assert_eq!(seen("kernel"), (State::Good, "Linux 6.12.9-amd64"));
    assert_eq!(seen("io_uring"), (State::Good, "allowed (kernel.io_uring_disabled is 0)"));
    assert_eq!(seen("FUSE"), (State::Good, "/dev/fuse is usable, and fusermount3 mounts"));
    assert_eq!(seen("memory"), (State::Good, "16.0 GiB, 8.0 GiB available"));
    assert_eq!(seen("locked memory"), (State::Improvable, "8.0 MiB"));
    assert_eq!(seen("open files"), (State::Good, "1024, may be raised to: 1048576"));
    assert_eq!(seen("huge pages"), (State::Good, "transparent: madvise; reserved: none"));
    assert_eq!(seen("erasure coding"), (State::Good, "AVX2, SSSE3; not GFNI"));
    assert_eq!(seen("encryption"), (State::Good, "none of VAES, AES-NI"));
    for absent in ["IOMMU", "NVMe", "RDMA"] {
        assert_eq!(seen(absent), (State::Unused, "none"), "{absent}");
    }
    assert_eq!(about(&report, "erasure coding").used, "codec simd, by AVX2");
    assert_eq!(about(&report, "checksums").used, "CRC32C of what is stored: x86_64-sse-pclmulqdq");
    assert_eq!(
        about(&report, "FUSE").used,
        "mounts, with O_TMPFILE (6.1), birth times, mappings of files opened with O_APPEND (6.6); not before newer \
         kernels: names kept by the kernel (6.16)"
    );
}

#[test]
fn a_server_is_told_who_uses_each_controller() {
    let fixture = Fixture::server();
    let report = fixture.examine();
    assert!(report.runs);
    let kernels = about(&report, "NVMe 0000:01:00.0");
    assert_eq!(
        kernels.found,
        "ACME Fast 2000, driver nvme, nvme0n1 (1.0 GiB); nvme0n1p1 mounted on /srv\\040one, nvme0n1p2 is swap, \
         nvme0n1p3 held by vg-data, vg-data mounted on /data"
    );
    assert_eq!((kernels.state, &kernels.improve), (State::Unused, &None));
    let ours = about(&report, "NVMe 0000:02:00.0");
    assert_eq!(ours.found, "PCI 144d:a80a, driver vfio-pci; open in cfs (PID 77)");
    assert_eq!((ours.state, ours.used.as_str()), (State::Good, "the target nvme:0000:02:00.0, without the kernel"));
    assert_eq!(about(&report, "IOMMU").found, "2 groups; vfio-pci is loaded");
    let huge = about(&report, "huge pages");
    assert_eq!(huge.found, "transparent: madvise; reserved: 1024 of 2.0 MiB");
    assert!(huge.used.ends_with("reserved ones (vm.nr_hugepages) are not used by this build"), "{huge:?}");
    let rdma = about(&report, "RDMA");
    assert_eq!((rdma.state, rdma.found.as_str()), (State::Good, "mlx5_0 (InfiniBand, ACTIVE)"));
    let without = examine(fixture.0.path(), Probed { has_libfabric: || false, ..probed() });
    assert_eq!(commands(&without), [("RDMA", "apt-get install libfabric1 ibverbs-providers")]);
    assert_eq!(about(&report, "locked memory").found, "no limit for this user (CAP_IPC_LOCK)");
    assert_eq!(commands(&report), []);

    // The twin: what was mounted, swapped to and held is free.
    fixture
        .file("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
        .remove("proc/swaps")
        .remove("sys/class/block/nvme0n1p3/holders");
    let bind = "cfsctl device bind 0000:01:00.0";
    let poll = "kernel parameter nvme.poll_queues=2";
    let report = fixture.examine();
    assert!(about(&report, "NVMe 0000:01:00.0").found.ends_with("nvme0n1 (1.0 GiB); no user seen"));
    let used = &about(&report, "NVMe 0000:01:00.0").used;
    assert!(used.starts_with("targets /dev/nvme0n1 (or its commands, /dev/ng0n1), through the kernel; "), "{used}");
    assert_eq!(commands(&report), [("NVMe 0000:01:00.0", bind), ("NVMe poll queues", poll)]);
    fixture.file("sys/class/block/nvme0n1/queue/io_poll", "1\n");
    assert_eq!(commands(&fixture.examine()), [("NVMe 0000:01:00.0", bind)]);
    fixture.file("sys/class/block/nvme0n1/queue/io_poll", "0\n");
    // Somebody else's program has something open, and one of ours a partition.
    fixture.file("proc/88/fd", "");
    let seen = "; no user seen (only root sees what all programs have open)";
    assert!(about(&fixture.examine(), "NVMe 0000:01:00.0").found.ends_with(seen));
    fixture.link("proc/77/fd/4", "/dev/nvme0n1p2");
    let report = fixture.examine();
    let finding = about(&report, "NVMe 0000:01:00.0");
    assert!(finding.found.contains("; nvme0n1p2 open in cfs (PID 77)"), "{finding:?}");
    assert_eq!((finding.state, finding.used.as_str()), (State::Good, "a target of a server, through the kernel"));
    assert_eq!(commands(&report), [("NVMe poll queues", poll)]);
    // What others have open is theirs.
    fixture.file("proc/77/comm", "qemu\n");
    let report = fixture.examine();
    for address in ["0000:01:00.0", "0000:02:00.0"] {
        assert_eq!(about(&report, &format!("NVMe {address}")).state, State::Unused, "{address}");
    }
    assert_eq!(commands(&report), []);
}

#[test]
fn a_free_controller_needs_an_iommu_vfio_and_a_group_of_its_own() {
    let fixture = Fixture::laptop();
    fixture.controller("0000:01:00.0", "nvme", None);
    let improved = |fixture: &Fixture| {
        let report = fixture.examine();
        let commands = commands(&report).into_iter().filter(|(subject, _)| *subject != "locked memory");
        commands.map(|(subject, command)| (subject.to_owned(), command.to_owned())).collect::<Vec<_>>()
    };
    let one = |subject: &str, command: &str| vec![(subject.to_owned(), command.to_owned())];
    assert_eq!(improved(&fixture), one("IOMMU", "kernel parameter intel_iommu=on"));
    // On by itself where the firmware tells of it.
    fixture.file("proc/cpuinfo", "vendor_id\t: AuthenticAMD\n");
    assert_eq!(improved(&fixture), []);
    assert!(about(&fixture.examine(), "IOMMU").used.ends_with("switch it on in the firmware"));

    fixture.remove("sys/bus/pci/devices/0000:01:00.0").controller("0000:01:00.0", "nvme", Some("3"));
    let bind = "modprobe vfio-pci && cfsctl device bind 0000:01:00.0";
    assert_eq!(improved(&fixture), one("NVMe 0000:01:00.0", bind));
    fixture.file("sys/bus/pci/drivers/vfio-pci/uevent", "");
    assert_eq!(improved(&fixture), one("NVMe 0000:01:00.0", "cfsctl device bind 0000:01:00.0"));
    // A bridge in its group does no harm, a network card does.
    fixture.file("sys/kernel/iommu_groups/3/devices/0000:00:1c.0/class", "0x060400\n");
    assert_eq!(improved(&fixture), one("NVMe 0000:01:00.0", "cfsctl device bind 0000:01:00.0"));
    fixture.file("sys/kernel/iommu_groups/3/devices/0000:03:00.0/class", "0x020000\n");
    assert_eq!(improved(&fixture), []);
    let report = fixture.examine();
    assert!(about(&report, "NVMe 0000:01:00.0").used.contains("shares it with 0000:03:00.0"));

    // Driven by something else, it is left alone.
    fixture.remove("sys/bus/pci/devices/0000:01:00.0").controller("0000:01:00.0", "uio_pci_generic", Some("4"));
    let report = fixture.examine();
    let finding = about(&report, "NVMe 0000:01:00.0");
    assert_eq!((finding.state, &finding.improve), (State::Unused, &None));
    assert_eq!(finding.found, "model unknown, driver uio_pci_generic; no user seen");
}

#[test]
fn without_io_uring_nothing_runs() {
    let refused = |value: &str| {
        let fixture = Fixture::laptop();
        fixture.file("proc/sys/kernel/io_uring_disabled", value);
        let report = examine(fixture.0.path(), Probed { ring: Err(NoRing::NotAllowed), ..probed() });
        assert!(!report.runs);
        let finding = about(&report, "io_uring").clone();
        assert_eq!(finding.state, State::Prevents);
        assert_eq!(report.reasons, [format!("io_uring: {}", finding.found)]);
        (finding.found, finding.improve)
    };
    let (found, improve) = refused("2\n");
    assert_eq!(found, "not allowed (kernel.io_uring_disabled is 2)");
    assert_eq!(improve.as_deref(), Some("sysctl kernel.io_uring_disabled=0"));
    let (found, improve) = refused("0\n");
    assert!(found.contains("seccomp"), "{found}");
    assert_eq!(improve, None);

    let fixture = Fixture::laptop();
    let report = examine(fixture.0.path(), Probed { ring: Err(NoRing::Failed("no memory".to_owned())), ..probed() });
    assert_eq!((report.runs, report.reasons), (false, vec!["io_uring: no memory".to_owned()]));
    // The twin: whoever may, runs, and is told that others may not.
    fixture.file("proc/sys/kernel/io_uring_disabled", "1\n");
    let report = fixture.examine();
    assert!(report.runs);
    assert!(commands(&report).contains(&("io_uring", "sysctl kernel.io_uring_disabled=0")));
}

#[test]
fn fuse_is_looked_for_as_a_mount_does() {
    let fixture = Fixture::laptop();
    let found = |fixture: &Fixture| {
        let report = fixture.examine();
        let finding = about(&report, "FUSE").clone();
        (report.runs, finding.state, finding.improve)
    };
    let command = |text: &str| Some(text.to_owned());
    // Not the set-user-id program that mounts.
    fixture.program("usr/bin/fusermount3", 0o755);
    assert_eq!(found(&fixture), (true, State::Improvable, command("apt-get install fuse3")));
    fixture.file("proc/self/status", "CapEff:\t0000000000200000\n");
    assert_eq!(found(&fixture), (true, State::Good, None));
    fixture.file("proc/self/status", "CapEff:\t0000000000100000\n");
    assert_eq!(found(&fixture), (true, State::Improvable, command("apt-get install fuse3")));
    fixture.remove("dev/fuse");
    assert_eq!(found(&fixture), (false, State::Prevents, command("mknod /dev/fuse c 10 229")));
    fixture.file("proc/filesystems", "nodev\tfusectl\n");
    assert_eq!(found(&fixture), (false, State::Prevents, command("modprobe fuse")));

    let mut machine = Machine::read(fixture.0.path());
    machine.fuse = FuseDevice::NotPermitted;
    let of = |machine: &Machine| about(&report(machine, &probed()), "FUSE").clone();
    assert_eq!((of(&machine).state, of(&machine).improve), (State::Improvable, command("chmod 666 /dev/fuse")));
    machine.rights = Some(Rights { mounts: true, locks_memory: true });
    assert_eq!((of(&machine).state, of(&machine).improve), (State::Prevents, None));
    machine.fuse = FuseDevice::NoDriver;
    assert_eq!((of(&machine).state, of(&machine).improve), (State::Prevents, command("modprobe fuse")));
}

#[test]
fn a_kernel_whose_fuse_is_too_old_prevents() {
    let fixture = Fixture::laptop();
    for (name, runs, state) in [
        ("5.16.20\n", false, State::Prevents),
        ("5.17.0-rc1\n", true, State::Improvable),
        ("6.1.0-31-amd64\n", true, State::Good),
        ("10.0\n", true, State::Good),
    ] {
        fixture.file("proc/sys/kernel/osrelease", name);
        let report = fixture.examine();
        assert_eq!((report.runs, about(&report, "kernel").state), (runs, state), "{name}");
    }
}

#[test]
fn limits_are_raised_by_whoever_can() {
    let fixture = Fixture::laptop();
    let mut machine = Machine::read(fixture.0.path());
    let mib = |count: u64| count << 20;
    let improved = |machine: &Machine, subject: &str| about(&report(machine, &probed()), subject).improve.clone();
    // The buffers are 32 MiB, and a limit of that much leaves room for nothing else.
    for (soft, hard, command) in [
        (mib(8), UNLIMITED, Some("ulimit -l unlimited")),
        (mib(32), mib(32), Some("sudo prlimit --pid $$ --memlock=unlimited")),
        (mib(33), mib(33), None),
        (UNLIMITED, UNLIMITED, None),
    ] {
        machine.locked_memory = Some(Limit { soft, hard });
        assert_eq!(improved(&machine, "locked memory").as_deref(), command, "{soft} {hard}");
    }
    for (soft, hard, command) in [
        (256, 4096, Some("ulimit -n 1024")),
        (256, 512, Some("sudo prlimit --pid $$ --nofile=1024")),
        (1024, 1024, None),
    ] {
        machine.open_files = Some(Limit { soft, hard });
        assert_eq!(improved(&machine, "open files").as_deref(), command, "{soft} {hard}");
    }
    // A controller of its own takes more than the buffers.
    fixture.controller("0000:02:00.0", "vfio-pci", Some("8"));
    let with_controller =
        Machine { locked_memory: Some(Limit { soft: mib(33), hard: UNLIMITED }), ..Machine::read(fixture.0.path()) };
    assert_eq!(improved(&with_controller, "locked memory").as_deref(), Some("ulimit -l unlimited"));
    // And so does a second ring, of disks that are polled.
    let fixture = Fixture::server();
    fixture.limits("50000000 50000000 ", "1024 1024 ").file("proc/self/status", "CapEff: 0\n");
    fixture.remove("sys/bus/pci/devices/0000:02:00.0");
    let improve = || about(&fixture.examine(), "locked memory").improve.clone();
    assert_eq!(improve(), None);
    fixture.file("sys/class/block/nvme0n1/queue/io_poll", "1\n");
    assert_eq!(improve().as_deref(), Some("sudo prlimit --pid $$ --memlock=unlimited"));
}

#[test]
fn huge_pages_that_are_switched_off_are_told_how_to_be_switched_on() {
    let fixture = Fixture::laptop();
    fixture.file("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n");
    let command = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
    assert!(commands(&fixture.examine()).contains(&("huge pages", command)));
}

#[test]
fn a_cpu_without_vectors_of_ours_is_told_of_isa_l_and_a_build_with_it_is_not() {
    let with_codec = |codec: &str| {
        let mut probed = probed();
        probed.cpu.codec = codec.to_owned();
        probed.cpu.vectors = None;
        let fixture = Fixture::laptop();
        about(&examine(fixture.0.path(), probed), "erasure coding").clone()
    };
    let plain = with_codec("simd");
    assert_eq!(plain.improve.as_deref(), Some("cargo build --release --features cfs/isal"));
    assert!(plain.used.starts_with("codec simd, byte by byte"), "{plain:?}");
    assert_eq!(with_codec("isa-l").improve, None);
}

#[test]
fn what_is_not_there_at_all_is_unknown() {
    let report = Fixture::empty().examine();
    assert!(report.runs, "{:?}", report.reasons);
    assert_eq!(commands(&report), []);
    for subject in ["kernel", "FUSE", "memory", "locked memory", "open files", "huge pages", "IOMMU", "NVMe", "RDMA"] {
        assert_eq!(about(&report, subject).state, State::Unknown, "{subject}");
    }
}

#[test]
fn garbage_is_unknown_and_fails_nothing() {
    const GARBAGE: [&[u8]; 6] = [
        b"",
        b"\n\n",
        b"\xff\xfe\0\x1b[2J",
        b"[",
        b"99999999999999999999999999 -1 kB",
        b"Max locked memory x\nMemTotal: -",
    ];
    let files = [
        "proc/sys/kernel/osrelease",
        "proc/sys/kernel/io_uring_disabled",
        "proc/meminfo",
        "proc/filesystems",
        "proc/cpuinfo",
        "proc/swaps",
        "proc/self/mountinfo",
        "proc/self/status",
        "proc/self/limits",
        "proc/77/comm",
        "sys/kernel/mm/transparent_hugepage/enabled",
        "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
        "sys/bus/pci/devices/0000:01:00.0/nvme/nvme0/model",
        "sys/class/block/nvme0n1/dev",
        "sys/class/block/nvme0n1/size",
        "sys/class/block/nvme0n1/queue/io_poll",
        "sys/class/block/dm-0/dm/name",
        "sys/class/infiniband/mlx5_0/ports/1/state",
    ];
    for garbage in GARBAGE {
        let fixture = Fixture::server();
        for file in files {
            fixture.file(file, garbage);
        }
        fixture.remove("sys/class/block/nvme0n1p3/holders");
        fixture.link("proc/77/fd/x", "/dev/nvme\u{1b}").link("sys/bus/pci/devices/0000:09:00.0", "0000:09:00.0");
        let report = fixture.examine();
        assert!(report.runs, "{garbage:?}: {:?}", report.reasons);
        for subject in ["memory", "locked memory", "open files", "huge pages", "NVMe 0000:01:00.0"] {
            assert_eq!(about(&report, subject).state, State::Unknown, "{subject}, {garbage:?}");
        }
        assert!(about(&report, "NVMe 0000:01:00.0").found.ends_with("nvme0n1 (size unknown); users unknown"));
        let shown = serde_json::to_string(&report).unwrap();
        assert!(!shown.contains("\\u001b"), "{shown}");
    }
    // Directories, and links in a circle, where files should be.
    let fixture = Fixture::server();
    for file in files {
        fixture.remove(file);
        fs::create_dir(fixture.path(file)).unwrap();
    }
    fixture.remove("sys/class/block/nvme0n1p3/holders").link("sys/class/block/nvme0n1p3/holders", "holders");
    fixture.remove("dev/fuse").link("dev/fuse", "fuse");
    let report = fixture.examine();
    assert_eq!(about(&report, "kernel").state, State::Unknown);
    assert_eq!(about(&report, "memory").state, State::Unknown);
    assert!(report.reasons[0].starts_with("FUSE: /dev/fuse cannot be opened: "), "{:?}", report.reasons);
}
