//! Who drives an NVMe controller of this machine: the kernel, or vfio-pci, and through it a server that
//! is given the target `nvme:PCI-ADDRESS`.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Class code of NVM Express I/O controllers.
pub const CLASS_NVME: &str = "0x010802";
/// O_EXCL on a block device: refused while it, or a part of it, is mounted or otherwise claimed.
const EXCLUSIVELY: i32 = 0o200;

/// What a controller is after it was given to somebody.
#[derive(Serialize)]
pub struct Bound {
    pub address: String,
    pub driver: String,
    /// What a server is told to use it.
    pub target: Option<String>,
}

/// Gives the controller to vfio-pci. `root`: where /sys and /dev are.
pub fn bind(root: &Path, address: &str) -> Result<Bound> {
    let (function, address) = controller(root, address)?;
    if driver(&function).as_deref() != Some("vfio-pci") {
        if !function.join("iommu_group").exists() {
            bail!(
                "there is no IOMMU before {address}: switch it on in the firmware and with intel_iommu=on or amd_iommu=on"
            );
        }
        if !root.join("sys/bus/pci/drivers/vfio-pci").exists() {
            bail!("the kernel has no driver vfio-pci yet: load it with modprobe vfio-pci");
        }
        let unused = open_exclusively(root, &function)?;
        give(root, &function, &address, "vfio-pci")?;
        drop(unused);
    }
    let driver = driver(&function).unwrap_or_default();
    if driver != "vfio-pci" {
        give(root, &function, &address, "")?;
        bail!("vfio-pci did not take {address}, and it was given back: see dmesg");
    }
    Ok(Bound { target: Some(format!("nvme:{address}")), address, driver })
}

/// Gives the controller back to the kernel's driver.
pub fn unbind(root: &Path, address: &str) -> Result<Bound> {
    let (function, address) = controller(root, address)?;
    // Without a driver it was left so, and may be tied to vfio-pci.
    if matches!(driver(&function).as_deref(), None | Some("vfio-pci")) {
        check_not_driven(root, &function, &address)?;
        give(root, &function, &address, "")?;
    }
    match driver(&function) {
        Some(driver) if driver != "vfio-pci" => Ok(Bound { address, driver, target: None }),
        _ => bail!("no driver of the kernel took {address}: load it with modprobe nvme, and see dmesg"),
    }
}

fn controller(root: &Path, address: &str) -> Result<(PathBuf, String)> {
    let full = if address.matches(':').count() == 1 { format!("0000:{address}") } else { address.to_owned() };
    let known = full.bytes().all(|byte| byte.is_ascii_hexdigit() || b":.".contains(&byte)) && full.contains(':');
    let function = root.join("sys/bus/pci/devices").join(&full);
    let class = if known { fs::read_to_string(function.join("class")).ok() } else { None };
    match class.as_deref().map(str::trim) {
        None => bail!("there is no PCI function '{address}'; lspci -D lists them, such as 0000:01:00.0"),
        Some(CLASS_NVME) => Ok((function, full)),
        Some(class) => bail!("{address} is no NVMe controller: its class is {class}"),
    }
}

/// The driver that has a PCI function.
pub fn driver(function: &Path) -> Option<String> {
    link_name(&function.join("driver"))
}

/// The last part of what a link in sysfs leads to.
pub fn link_name(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_string_lossy().into_owned())
}

/// The block devices of a controller's namespaces, such as `nvme0n1`: none unless the kernel drives it.
pub fn namespaces(function: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for controller in directories(&function.join("nvme"))? {
        for namespace in directories(&controller)?.into_iter().filter(|path| path.join("size").exists()) {
            names.push(block_device(&namespace.file_name().unwrap_or_default().to_string_lossy()));
        }
    }
    Ok(names)
}

/// Refuses a controller that a server drives: taking it away would wait for that server, and could not be
/// given up.
fn check_not_driven(root: &Path, function: &Path, address: &str) -> Result<()> {
    let Some(group) = link_name(&function.join("iommu_group")) else { return Ok(()) };
    match fs::OpenOptions::new().read(true).write(true).open(root.join("dev/vfio").join(group)) {
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
            bail!("{address} is in use: a server drives it, or another controller of its IOMMU group; stop it first")
        }
        _ => Ok(()),
    }
}

/// All namespaces of a controller, so that nobody else begins to use one; refused if anything does.
fn open_exclusively(root: &Path, function: &Path) -> Result<Vec<fs::File>> {
    let mut opened = Vec::new();
    for name in namespaces(function)? {
        let device = root.join("dev").join(name);
        match fs::OpenOptions::new().read(true).custom_flags(EXCLUSIVELY).open(&device) {
            Ok(file) => opened.push(file),
            Err(error) => bail!(
                "{} is in use ({error}): unmount it, or stop what uses it (lsblk {0}, swapon --show), first",
                device.display()
            ),
        }
    }
    Ok(opened)
}

/// The block device of a namespace as its controller names it: behind the kernel's multipath (`nvme0c1n1`)
/// that of all its controllers (`nvme0n1`).
fn block_device(namespace: &str) -> String {
    let parts = namespace.strip_prefix("nvme").and_then(|rest| rest.split_once('c'));
    match parts.and_then(|(subsystem, rest)| Some((subsystem, rest.split_once('n')?.1))) {
        Some((subsystem, number)) => format!("nvme{subsystem}n{number}"),
        None => namespace.to_owned(),
    }
}

fn directories(path: &Path) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(path) else { return Ok(Vec::new()) };
    let entries = entries.collect::<Result<Vec<_>, _>>().with_context(|| format!("cannot read {}", path.display()))?;
    Ok(entries.into_iter().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
}

/// Takes the function from whoever has it, and has the kernel look for its driver again; a name binds it to that
/// one only.
fn give(root: &Path, function: &Path, address: &str, driver: &str) -> Result<()> {
    let write = |path: &Path, text: &str| {
        let written = fs::write(path, text);
        written.with_context(|| format!("cannot write to {} (run as root)", path.display()))
    };
    write(&function.join("driver_override"), &format!("{driver}\n"))?;
    if function.join("driver").exists() {
        write(&function.join("driver/unbind"), address)?;
    }
    write(&root.join("sys/bus/pci/drivers_probe"), address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A machine with one controller that the kernel drives. Nobody acts on what is written there.
    fn machine() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let function = root.path().join("sys/bus/pci/devices/0000:01:00.0");
        let kernel = root.path().join("sys/bus/pci/drivers/nvme");
        fs::create_dir_all(&kernel).unwrap();
        fs::create_dir_all(function.join("iommu_group")).unwrap();
        fs::write(function.join("class"), "0x010802\n").unwrap();
        symlink(&kernel, function.join("driver")).unwrap();
        (root, function)
    }

    #[test]
    fn what_is_no_controller_or_in_use_or_without_an_iommu_is_refused() {
        let (root, function) = machine();
        let refused = |address: &str| format!("{:#}", bind(root.path(), address).err().expect("is refused"));
        for wrong in ["0000:02:00.0", "../..", "x"] {
            assert!(refused(wrong).contains("there is no PCI function"), "{wrong}");
        }
        fs::create_dir(root.path().join("sys/bus/pci/drivers/vfio-pci")).unwrap();
        // Of a namespace that can't be opened alone.
        fs::create_dir_all(function.join("nvme/nvme0/nvme0n1")).unwrap();
        fs::write(function.join("nvme/nvme0/nvme0n1/size"), "1").unwrap();
        assert!(refused("01:00.0").contains("nvme0n1 is in use"));
        fs::remove_dir_all(function.join("nvme")).unwrap();
        fs::remove_dir(function.join("iommu_group")).unwrap();
        assert!(refused("01:00.0").contains("there is no IOMMU"));
        fs::write(function.join("class"), "0x020000\n").unwrap();
        assert!(refused("01:00.0").contains("no NVMe controller: its class is 0x020000"));
    }

    #[test]
    fn a_namespace_behind_multipath_has_one_block_device() {
        assert_eq!(["nvme0n1", "nvme12c3n4"].map(block_device), ["nvme0n1", "nvme12n4"]);
    }

    #[test]
    fn the_kernel_is_told_and_believed_only_if_it_did_it() {
        let (root, function) = machine();
        let refused = || format!("{:#}", bind(root.path(), "01:00.0").err().expect("nobody took it"));
        assert!(refused().contains("modprobe vfio-pci"));
        assert!(!function.join("driver_override").exists());
        fs::create_dir(root.path().join("sys/bus/pci/drivers/vfio-pci")).unwrap();
        let why = refused();
        assert!(why.contains("vfio-pci did not take 0000:01:00.0, and it was given back"), "{why}");
        let read = |path: PathBuf| fs::read_to_string(path).unwrap();
        assert_eq!(read(function.join("driver_override")), "\n");
        assert_eq!(read(function.join("driver/unbind")), "0000:01:00.0");
        assert_eq!(read(root.path().join("sys/bus/pci/drivers_probe")), "0000:01:00.0");
        fs::remove_file(function.join("driver")).unwrap();
        symlink(root.path().join("sys/bus/pci/drivers/vfio-pci"), function.join("driver")).unwrap();
        let bound = bind(root.path(), "0000:01:00.0").unwrap();
        assert_eq!((bound.driver.as_str(), bound.target.as_deref()), ("vfio-pci", Some("nvme:0000:01:00.0")));
        assert!(unbind(root.path(), "01:00.0").is_err(), "vfio-pci has it still");
    }
}
