//! A controller on the PCI bus through VFIO: its registers mapped, and memory that the IOMMU lets it
//! reach, and no other (Linux, Documentation/driver-api/vfio.rst; linux/vfio.h).
//!
//! The function must be bound to the driver vfio-pci, and be the only one of its IOMMU group that the
//! kernel does not leave alone. Without an IOMMU (VFIO's no-IOMMU mode) it is refused: the device
//! would reach all memory of the machine.

use super::bus::{Bus, SharedMemory};
use crate::{DeviceError, DeviceResult};
use cfs_reactor::buffer::device_memory;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, pread, pwrite, read};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_void};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

const VFIO: u8 = b';';
const GET_API_VERSION: Opcode = opcode::none(VFIO, 100);
const CHECK_EXTENSION: Opcode = opcode::none(VFIO, 101);
const SET_IOMMU: Opcode = opcode::none(VFIO, 102);
const GROUP_GET_STATUS: Opcode = opcode::none(VFIO, 103);
const GROUP_SET_CONTAINER: Opcode = opcode::none(VFIO, 104);
const GROUP_GET_DEVICE_FD: Opcode = opcode::none(VFIO, 106);
const DEVICE_GET_REGION_INFO: Opcode = opcode::none(VFIO, 108);
const DEVICE_SET_IRQS: Opcode = opcode::none(VFIO, 110);
const IOMMU_MAP_DMA: Opcode = opcode::none(VFIO, 113);
const IOMMU_UNMAP_DMA: Opcode = opcode::none(VFIO, 114);

/// VFIO_TYPE1v2_IOMMU.
const TYPE1_V2: usize = 3;
const GROUP_VIABLE: u32 = 1;
const DMA_READ_WRITE: u32 = 3;
const BAR_0: u32 = 0;
const CONFIGURATION_SPACE: u32 = 7;
/// VFIO_PCI_REQ_IRQ_INDEX: the device is wanted back.
const WANTED_BACK: u32 = 4;
/// VFIO_IRQ_SET_DATA_EVENTFD and VFIO_IRQ_SET_ACTION_TRIGGER.
const TRIGGERS_EVENT: u32 = 1 << 2 | 1 << 5;
/// The command register of the configuration space, and its bits: memory space, bus master.
const PCI_COMMAND: u64 = 4;
const PCI_MEMORY: u16 = 1 << 1;
const PCI_BUS_MASTER: u16 = 1 << 2;
/// Class code of NVM Express I/O controllers, as sysfs writes it.
const CLASS_NVME: &str = "0x010802";
/// Where the device finds the arena, and behind it what else it is given: above what 32 bits reach, where
/// platforms keep holes, and below the 39 bits that the smallest IOMMUs have.
const ARENA_AT: u64 = 4 << 30;
const OTHERS_AT: u64 = 8 << 30;
const PAGE: usize = 4096;

/// A request to the kernel with a number, or the address of what it reads and writes.
struct Request {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: the opcode says what the argument is; whoever makes one vouches for the pair (`request`).
unsafe impl Ioctl for Request {
    type Output = i32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    // SAFETY: looks at nothing behind the pointer.
    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(output)
    }
}

/// # Safety
/// `argument` is what VFIO's request takes: a number, or the address of what it wants, which is valid for
/// reads, and for writes if the request answers there.
unsafe fn request(fd: impl AsFd, opcode: Opcode, argument: *mut c_void) -> rustix::io::Result<i32> {
    // SAFETY: passed on to our caller.
    unsafe { ioctl(fd, Request { opcode, argument }) }
}

fn number(fd: impl AsFd, opcode: Opcode, argument: usize) -> rustix::io::Result<i32> {
    // SAFETY: the requests this is called for take numbers, which no memory is behind.
    unsafe { request(fd, opcode, std::ptr::without_provenance_mut(argument)) }
}

#[repr(C)]
struct GroupStatus {
    bytes: u32,
    flags: u32,
}

#[derive(Default)]
#[repr(C)]
struct RegionInfo {
    bytes: u32,
    flags: u32,
    index: u32,
    capabilities: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
struct SetIrqs {
    bytes: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    event: i32,
}

#[repr(C)]
struct MapDma {
    bytes: u32,
    flags: u32,
    memory: u64,
    device_address: u64,
    size: u64,
}

#[repr(C)]
struct UnmapDma {
    bytes: u32,
    flags: u32,
    device_address: u64,
    size: u64,
}

/// A PCI function by its domain, bus, device and function numbers: `0000:01:00.0`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PciAddress(String);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("'{0}' is no PCI address; give one such as 0000:01:00.0 (lspci -D lists them)")]
pub struct NoPciAddress(String);

impl std::str::FromStr for PciAddress {
    type Err = NoPciAddress;

    /// Without a domain it is in the first.
    fn from_str(text: &str) -> Result<PciAddress, NoPciAddress> {
        let refused = || NoPciAddress(text.to_owned());
        let full = if text.matches(':').count() == 1 { format!("0000:{text}") } else { text.to_owned() };
        let (domain, rest) = full.split_once(':').ok_or_else(refused)?;
        let (bus, rest) = rest.split_once(':').ok_or_else(refused)?;
        let (device, function) = rest.split_once('.').ok_or_else(refused)?;
        let field = |text: &str, digits: usize, most: u32| {
            let right = text.len() == digits && text.bytes().all(|digit| digit.is_ascii_hexdigit());
            u32::from_str_radix(text, 16).ok().filter(|value| right && *value <= most)
        };
        let parts = (field(domain, 4, 0xFFFF), field(bus, 2, 0xFF), field(device, 2, 0x1F), field(function, 1, 7));
        match parts {
            (Some(domain), Some(bus), Some(device), Some(function)) => {
                Ok(PciAddress(format!("{domain:04x}:{bus:02x}:{device:02x}.{function:x}")))
            }
            _ => Err(refused()),
        }
    }
}

impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The last part of what a link in sysfs leads to.
fn link_name(link: PathBuf) -> Option<String> {
    Some(std::fs::read_link(link).ok()?.file_name()?.to_string_lossy().into_owned())
}

/// The IOMMU group of a function that is bound to vfio-pci, or why it can't be driven.
fn group_of(sys: &Path, address: &PciAddress) -> DeviceResult<String> {
    let refusal = |why: &str| format!("cannot drive PCI function {address}: {why}");
    // What is there is not lost: it is not ours, or not ours yet.
    let refused = |why: &str| Err(DeviceError::NotPermitted(refusal(why)));
    let function = sys.join("bus/pci/devices").join(&address.0);
    let Ok(class) = std::fs::read_to_string(function.join("class")) else {
        return Err(DeviceError::Open(refusal("there is none; lspci -D lists what there is")));
    };
    if class.trim() != CLASS_NVME {
        return refused(&format!("it is no NVMe controller (its class is {})", class.trim()));
    }
    match link_name(function.join("driver")).as_deref() {
        Some("vfio-pci") => {}
        other => {
            let owner = other.map_or("no driver".to_owned(), |driver| format!("the driver {driver}"));
            return refused(&format!("{owner} has it; give it to vfio-pci with: cfsctl device bind {address}"));
        }
    }
    match link_name(function.join("iommu_group")) {
        Some(group) => Ok(group),
        None => refused("there is no IOMMU; switch it on in the firmware and with intel_iommu=on or amd_iommu=on"),
    }
}

/// Memory that was mapped for the device, taken back when dropped.
struct Mapping {
    container: Rc<OwnedFd>,
    start: NonNull<u8>,
    bytes: usize,
    device_address: u64,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // What the device still reaches is left to it.
        if unmap(&*self.container, self.device_address, self.bytes).is_ok() {
            // SAFETY: mapped by `allocate`, and its one owner goes.
            let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        }
    }
}

/// A controller that VFIO has given to this process.
pub struct VfioBus {
    name: String,
    /// The registers, until it was given up.
    bar: Cell<Option<NonNull<u8>>>,
    bar_bytes: usize,
    arena: (usize, usize),
    next_address: Cell<u64>,
    /// The same.
    device: RefCell<Option<OwnedFd>>,
    /// The kernel writes to it when it wants the device back.
    wanted_back: OwnedFd,
    configuration_at: u64,
    container: Rc<OwnedFd>,
    _group: OwnedFd,
}

impl VfioBus {
    /// Takes the function over from the kernel; nobody else can until this is dropped.
    pub fn open(address: &PciAddress) -> DeviceResult<VfioBus> {
        let group = group_of(Path::new("/sys"), address)?;
        let failed = |what: &str, errno: Errno| {
            DeviceError::Open(format!("cannot drive PCI function {address}: {what}: {errno}"))
        };
        // This machine is not set up for it: the device is not lost.
        let refused = |what: &str, errno: Errno| {
            DeviceError::NotPermitted(format!("cannot drive PCI function {address}: {what}: {errno}"))
        };
        let group_path = format!("/dev/vfio/{group}");
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let group = open(&group_path, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::BUSY => DeviceError::InUse(format!(
                "{address} is in use: {group_path} is open already, in another program, which has to stop, or here \
                 for another controller of its IOMMU group: such two can't be targets of one process yet"
            )),
            Errno::ACCESS | Errno::PERM => DeviceError::NotPermitted(format!(
                "cannot open {group_path}: {errno}; run as root, or give this user the file"
            )),
            errno => refused(&format!("cannot open {group_path} (without an IOMMU this is not supported)"), errno),
        })?;
        let container = open("/dev/vfio/vfio", flags, Mode::empty())
            .map_err(|errno| refused("cannot open /dev/vfio/vfio (modprobe vfio-pci)", errno))?;
        match (number(&container, GET_API_VERSION, 0), number(&container, CHECK_EXTENSION, TYPE1_V2)) {
            (Ok(0), Ok(1..)) => {}
            _ => return Err(refused("this kernel's VFIO has no IOMMU of type 1", Errno::NOTSUP)),
        }
        let mut status = GroupStatus { bytes: size_of::<GroupStatus>() as u32, flags: 0 };
        // SAFETY: the structure that the request takes.
        unsafe { request(&group, GROUP_GET_STATUS, (&raw mut status).cast()) }
            .map_err(|errno| failed("its group", errno))?;
        if status.flags & GROUP_VIABLE == 0 {
            let why = "the kernel uses others of its IOMMU group; give them to vfio-pci too";
            return Err(refused(why, Errno::BUSY));
        }
        let mut raw = container.as_raw_fd();
        // SAFETY: the request takes the address of a descriptor.
        unsafe { request(&group, GROUP_SET_CONTAINER, (&raw mut raw).cast()) }
            .map_err(|errno| refused("joining its group", errno))?;
        number(&container, SET_IOMMU, TYPE1_V2).map_err(|errno| refused("its IOMMU", errno))?;

        let Some((arena, arena_bytes)) = device_memory() else { return Err(refused("memory for I/O", Errno::NOMEM)) };
        map(&container, arena as u64, ARENA_AT, arena_bytes).map_err(|errno| locked_memory(address, errno))?;
        let name = CString::new(address.0.as_str()).expect("an address has no zero byte");
        // SAFETY: the request takes a string, which it reads.
        let device = unsafe { request(&group, GROUP_GET_DEVICE_FD, name.as_ptr().cast_mut().cast()) }
            .map_err(|errno| failed("the device", errno))?;
        // SAFETY: the kernel has just opened it for us.
        let device = unsafe { OwnedFd::from_raw_fd(device) };
        let wanted_back = wanted_back_event(&device).map_err(|errno| failed("its request event", errno))?;
        let registers = region(&device, BAR_0).map_err(|errno| failed("its registers", errno))?;
        let configuration = region(&device, CONFIGURATION_SPACE).map_err(|errno| failed("its configuration", errno))?;
        let bar_bytes = registers.size as usize;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice, of the device and of nothing of ours.
        let bar =
            unsafe { mmap(std::ptr::null_mut(), bar_bytes, protection, MapFlags::SHARED, &device, registers.offset) };
        let bar = bar.map_err(|errno| failed("mapping its registers", errno))?;
        let bar = NonNull::new(bar.cast::<u8>()).expect("a mapping is somewhere");
        let bus = VfioBus {
            name: address.0.clone(),
            bar: Cell::new(Some(bar)),
            bar_bytes,
            arena: (arena as usize, arena_bytes),
            next_address: Cell::new(OTHERS_AT),
            device: RefCell::new(Some(device)),
            wanted_back,
            configuration_at: configuration.offset,
            container: Rc::new(container),
            _group: group,
        };
        bus.command(|command| command | PCI_MEMORY | PCI_BUS_MASTER)
            .map_err(|errno| failed("its configuration", errno))?;
        Ok(bus)
    }

    /// Changes the command register; what it is then.
    fn command(&self, change: impl Fn(u16) -> u16) -> rustix::io::Result<u16> {
        let at = self.configuration_at + PCI_COMMAND;
        let device = self.device.borrow();
        let Some(device) = &*device else { return Ok(u16::MAX) };
        let mut bytes = [0; 2];
        pread(device, &mut bytes, at)?;
        pwrite(device, &change(u16::from_le_bytes(bytes)).to_le_bytes(), at)?;
        pread(device, &mut bytes, at)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn register(&self, offset: usize) -> Option<*mut u32> {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.bar_bytes, "{offset:#x} is no register");
        let bar = self.bar.get()?;
        // SAFETY: inside the mapping, as just checked.
        Some(unsafe { bar.as_ptr().add(offset).cast() })
    }

    fn unmap_registers(&self) {
        if let Some(bar) = self.bar.take() {
            // SAFETY: mapped by `open`, and not reached any more: nobody keeps what `register` gives.
            let _ = unsafe { munmap(bar.as_ptr().cast(), self.bar_bytes) };
        }
    }
}

fn locked_memory(address: &PciAddress, errno: Errno) -> DeviceError {
    let remedy = "raise the limit of locked memory (ulimit -l, LimitMEMLOCK=)";
    DeviceError::NotPermitted(format!("cannot drive PCI function {address}: giving it memory: {errno}; {remedy}"))
}

fn map(container: impl AsFd, memory: u64, device_address: u64, bytes: usize) -> rustix::io::Result<()> {
    let mut map =
        MapDma { bytes: size_of::<MapDma>() as u32, flags: DMA_READ_WRITE, memory, device_address, size: bytes as u64 };
    // SAFETY: the structure that the request takes. The memory it names is ours, mapped for as long as the
    // device may reach it.
    unsafe { request(container, IOMMU_MAP_DMA, (&raw mut map).cast()) }.map(|_| ())
}

fn unmap(container: impl AsFd, device_address: u64, bytes: usize) -> rustix::io::Result<()> {
    let mut unmap = UnmapDma { bytes: size_of::<UnmapDma>() as u32, flags: 0, device_address, size: bytes as u64 };
    // SAFETY: the structure that the request takes.
    unsafe { request(container, IOMMU_UNMAP_DMA, (&raw mut unmap).cast()) }.map(|_| ())
}

fn region(device: impl AsFd, index: u32) -> rustix::io::Result<RegionInfo> {
    let mut info = RegionInfo { bytes: size_of::<RegionInfo>() as u32, index, ..RegionInfo::default() };
    // SAFETY: the structure that the request takes.
    unsafe { request(device, DEVICE_GET_REGION_INFO, (&raw mut info).cast()) }?;
    Ok(info)
}

/// An event that is there once the kernel wants the device back.
fn wanted_back_event(device: impl AsFd) -> rustix::io::Result<OwnedFd> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let mut set = SetIrqs {
        bytes: size_of::<SetIrqs>() as u32,
        flags: TRIGGERS_EVENT,
        index: WANTED_BACK,
        start: 0,
        count: 1,
        event: event.as_raw_fd(),
    };
    // SAFETY: the structure that the request takes; the kernel keeps the event for itself.
    unsafe { request(device, DEVICE_SET_IRQS, (&raw mut set).cast()) }?;
    Ok(event)
}

impl Bus for VfioBus {
    fn name(&self) -> &str {
        &self.name
    }

    fn register_bytes(&self) -> usize {
        self.bar_bytes
    }

    fn read32(&self, offset: usize) -> u32 {
        let Some(register) = self.register(offset) else { return u32::MAX };
        // SAFETY: aligned and inside the mapping (`register`), which lasts until it is given up.
        u32::from_le(unsafe { register.read_volatile() })
    }

    fn write32(&self, offset: usize, value: u32) {
        // Entries of queues before the doorbell that speaks of them.
        fence(Ordering::SeqCst);
        let Some(register) = self.register(offset) else { return };
        // SAFETY: as above.
        unsafe { register.write_volatile(value.to_le()) }
    }

    fn allocate(&self, bytes: usize) -> DeviceResult<SharedMemory> {
        let bytes = bytes.div_ceil(PAGE) * PAGE;
        let failed = |errno| {
            let address = PciAddress(self.name.clone());
            locked_memory(&address, errno)
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping at a place of the kernel's choice.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE) };
        let start = NonNull::new(start.map_err(failed)?.cast::<u8>()).expect("a mapping is somewhere");
        let device_address = self.next_address.get();
        if let Err(errno) = map(&*self.container, start.as_ptr() as u64, device_address, bytes) {
            // SAFETY: nobody knows of it.
            let _ = unsafe { munmap(start.as_ptr().cast(), bytes) };
            return Err(failed(errno));
        }
        self.next_address.set(device_address + bytes as u64);
        let owner = Mapping { container: self.container.clone(), start, bytes, device_address };
        // SAFETY: mapped, zeroed and page-aligned; it lasts as long as the owner, and nobody else has its address
        // but the device.
        Ok(unsafe { SharedMemory::new(start, bytes, device_address, Box::new(owner)) })
    }

    fn device_address(&self, bytes: &[u8]) -> Option<u64> {
        let (start, length) = self.arena;
        let offset = (bytes.as_ptr() as usize).checked_sub(start)?;
        (offset + bytes.len() <= length).then_some(ARENA_AT + offset as u64)
    }

    fn cut_off(&self) {
        // Not by a reset, which may take a minute: the kernel does that when the device is closed.
        match self.command(|command| command & !PCI_BUS_MASTER) {
            // One that is gone from the bus reads all ones, and reaches nothing anyway.
            Ok(now) if now & PCI_BUS_MASTER == 0 || now == u16::MAX => {}
            _ => {
                tracing::error!(device = self.name, "the controller does not let go of memory: it is taken from it");
                if let Err(errno) = unmap(&*self.container, ARENA_AT, self.arena.1) {
                    tracing::error!(device = self.name, %errno, "the controller reaches memory still");
                }
            }
        }
    }

    fn is_wanted_back(&self) -> bool {
        // Eight bytes that count, or EAGAIN.
        read(&self.wanted_back, &mut [0; 8]).is_ok()
    }

    fn give_up(&self) {
        // The mapping is a reference of its own.
        self.unmap_registers();
        let device = self.device.take();
        // The kernel resets it when it is closed, which may take a minute: not on this thread.
        #[allow(clippy::disallowed_methods, reason = "closing waits for the device")]
        let closing = std::thread::Builder::new().name("cfs-vfio-close".to_owned()).spawn(move || drop(device));
        if let Err(error) = closing {
            tracing::warn!(%error, "the controller was closed by who drives others");
        }
    }
}

impl Drop for VfioBus {
    fn drop(&mut self) {
        self.unmap_registers();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn addresses_are_read_in_the_usual_ways_and_no_others() {
        let parse = |text: &str| text.parse::<PciAddress>().map(|address| address.to_string());
        for text in ["0000:01:00.0", "01:00.0"] {
            assert_eq!(parse(text), Ok("0000:01:00.0".to_owned()));
        }
        assert_eq!(parse("10AF:FF:1f.7"), Ok("10af:ff:1f.7".to_owned()));
        for text in
            ["", "01:00", "1:00.0", "0000:01:20.0", "0000:01:00.8", "0000:01:00.0/1", "+000:01:00.0", "a:0:1:00.0"]
        {
            assert_eq!(parse(text), Err(NoPciAddress(text.to_owned())));
        }
    }

    #[test]
    fn a_function_that_cannot_be_driven_is_refused_with_the_reason() {
        let sys = tempfile::tempdir().unwrap();
        let address: PciAddress = "0000:01:00.0".parse().unwrap();
        let function = sys.path().join("bus/pci/devices/0000:01:00.0");
        let refused = || group_of(sys.path(), &address).unwrap_err().to_string();
        assert!(refused().contains("there is none"));
        fs::create_dir_all(&function).unwrap();
        fs::write(function.join("class"), "0x020000\n").unwrap();
        assert!(refused().contains("no NVMe controller (its class is 0x020000)"));
        fs::write(function.join("class"), "0x010802\n").unwrap();
        assert!(refused().contains("no driver has it"));
        symlink("../../../drivers/nvme", function.join("driver")).unwrap();
        assert!(refused().contains("the driver nvme has it"));
        fs::remove_file(function.join("driver")).unwrap();
        symlink("../../../drivers/vfio-pci", function.join("driver")).unwrap();
        assert!(refused().contains("there is no IOMMU"));
        symlink("../../../kernel/iommu_groups/17", function.join("iommu_group")).unwrap();
        assert_eq!(group_of(sys.path(), &address), Ok("17".to_owned()));
    }
}
