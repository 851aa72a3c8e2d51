//! A device and the memory it knows: `fid_fabric`, `fid_domain`, `fid_mr`.

use super::info::{Info, OfiError, check};
use bytes::Bytes;
use cfs_reactor::buffer::{self, DmaBuf};
use libfabric_sys as sys;
use std::cell::OnceCell;
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ptr;
use std::rc::Rc;

/// A provider's access to one network.
pub(super) struct Network {
    raw: *mut sys::fid_fabric,
}

impl Network {
    pub fn open(info: &Info) -> Result<Rc<Network>, OfiError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the attributes live as long as the info.
        check("fi_fabric", unsafe { info.functions().fi_fabric(info.fabric_attr(), &mut raw, ptr::null_mut()) })?;
        Ok(Rc::new(Network { raw }))
    }

    pub fn raw(&self) -> *mut sys::fid_fabric {
        self.raw
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // SAFETY: what was made of it is closed, since that holds it.
        unsafe { close(self.raw.cast()) };
    }
}

/// Closes an object. What can't be closed is left to the process's end.
///
/// # Safety
/// It is one, and not used again.
pub(super) unsafe fn close(fid: *mut sys::fid) -> bool {
    // SAFETY: as the caller says.
    let closed = check("fi_close", unsafe { sys::fi_close(fid) });
    closed.inspect_err(|error| tracing::error!(%error, "libfabric keeps an object")).is_ok()
}

/// One device. It knows no memory but what was registered with it.
pub(super) struct Domain {
    raw: *mut sys::fid_domain,
    mode: u32,
    key_mask: u64,
    /// Registered, for this program only, when first needed. Dropped in [`Domain`]'s drop.
    device_memory: OnceCell<Option<RawRegistration>>,
    network: Rc<Network>,
}

/// What a peer needs to reach memory here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Remote {
    pub address: u64,
    pub key: u64,
}

/// What may be done with registered memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Access {
    /// By this end: it is received into, sent from, read into and written from.
    Local,
    RemoteRead,
    RemoteWrite,
}

impl Access {
    fn flags(self) -> u64 {
        u64::from(match self {
            Access::Local => sys::FI_SEND | sys::FI_RECV | sys::FI_READ | sys::FI_WRITE,
            Access::RemoteRead => sys::FI_REMOTE_READ,
            Access::RemoteWrite => sys::FI_REMOTE_WRITE,
        })
    }
}

impl Domain {
    pub fn open(network: &Rc<Network>, info: &Info) -> Result<Rc<Domain>, OfiError> {
        let mut raw = ptr::null_mut();
        // SAFETY: network and info are alive.
        check("fi_domain", unsafe { sys::fi_domain(network.raw, info.raw(), &mut raw, ptr::null_mut()) })?;
        let key_mask = match info.key_bytes() {
            bytes @ 1..8 => (1 << (8 * bytes)) - 1,
            _ => u64::MAX,
        };
        let mode = info.registration_mode();
        Ok(Rc::new(Domain { raw, mode, key_mask, device_memory: OnceCell::new(), network: network.clone() }))
    }

    pub fn raw(&self) -> *mut sys::fid_domain {
        self.raw
    }

    pub fn network(&self) -> &Rc<Network> {
        &self.network
    }

    /// # Safety
    /// The memory is valid until the registration is closed.
    unsafe fn register_raw(
        &self,
        memory: *const u8,
        length: usize,
        access: Access,
        key: u64,
    ) -> Result<RawRegistration, OfiError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the domain is alive, the memory valid.
        let result = unsafe {
            let (flags, key) = (access.flags(), key & self.key_mask);
            sys::fi_mr_reg(self.raw, memory.cast(), length, flags, 0, key, 0, &mut raw, ptr::null_mut())
        };
        check("fi_mr_reg", result)?;
        Ok(RawRegistration { raw })
    }

    /// Makes memory known until the registration is dropped, under this key if the device does not choose.
    ///
    /// # Safety
    /// The memory is valid until then.
    pub unsafe fn register(
        self: &Rc<Self>,
        memory: *const u8,
        length: usize,
        access: Access,
        key: u64,
    ) -> Result<Registration, OfiError> {
        // SAFETY: as the caller says.
        let raw = unsafe { self.register_raw(memory, length, access, key)? };
        Ok(Registration { raw, domain: self.clone(), address: memory as u64 })
    }

    /// What this end's own operations on memory need: nothing, the registration of all memory for devices, or
    /// one of its own.
    ///
    /// # Safety
    /// The memory is valid until this is dropped.
    pub unsafe fn describe(
        self: &Rc<Self>,
        memory: *const u8,
        length: usize,
        key: u64,
    ) -> Result<Description, OfiError> {
        if self.mode & sys::FI_MR_LOCAL == 0 {
            return Ok(Description::None);
        }
        if let Some((start, bytes)) = buffer::device_memory()
            && (memory as usize).checked_sub(start as usize).is_some_and(|at| at + length <= bytes)
            && let Some(registered) = self.device_memory.get_or_init(|| self.register_device_memory(key))
        {
            return Ok(Description::DeviceMemory(registered.description()));
        }
        // SAFETY: as the caller says.
        unsafe { self.register(memory, length, Access::Local, key) }.map(Description::Own)
    }

    fn register_device_memory(&self, key: u64) -> Option<RawRegistration> {
        let (start, bytes) = buffer::device_memory()?;
        // SAFETY: it is mapped for ever.
        let registered = unsafe { self.register_raw(start, bytes, Access::Local, key.rotate_left(32)) };
        registered.inspect_err(|error| tracing::warn!(%error, "buffers are registered one by one")).ok()
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        drop(self.device_memory.take());
        // SAFETY: what was made of it is closed, since that holds it.
        unsafe { close(self.raw.cast()) };
    }
}

struct RawRegistration {
    raw: *mut sys::fid_mr,
}

impl RawRegistration {
    fn description(&self) -> *mut c_void {
        // SAFETY: it is open.
        unsafe { (*self.raw).mem_desc }
    }
}

impl Drop for RawRegistration {
    fn drop(&mut self) {
        // SAFETY: it is open and not used again.
        unsafe { close(self.raw.cast()) };
    }
}

/// Memory that a device knows, until this is dropped.
pub(super) struct Registration {
    raw: RawRegistration,
    domain: Rc<Domain>,
    address: u64,
}

impl Registration {
    /// Whether the device has forgotten the memory, which it is not to be freed before.
    pub fn close(self) -> bool {
        let raw = ManuallyDrop::new(self.raw);
        // SAFETY: it is open and not used again.
        unsafe { close(raw.raw.cast()) }
    }

    /// What a peer names this memory by.
    pub fn remote(&self) -> Remote {
        let address = if self.domain.mode & sys::FI_MR_VIRT_ADDR != 0 { self.address } else { 0 };
        // SAFETY: it is open.
        Remote { address, key: unsafe { (*self.raw.raw).key } }
    }
}

/// How this end's own operations name memory to the device.
pub(super) enum Description {
    None,
    DeviceMemory(*mut c_void),
    Own(Registration),
}

impl Description {
    pub fn raw(&self) -> *mut c_void {
        match self {
            Description::None => ptr::null_mut(),
            Description::DeviceMemory(raw) => *raw,
            Description::Own(registration) => registration.raw.description(),
        }
    }
}

/// Memory that a peer may reach.
pub(super) enum Exposed {
    /// It reads.
    Read(Bytes),
    /// It writes.
    Write(DmaBuf),
}
