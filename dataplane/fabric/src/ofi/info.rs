//! What a provider can do: `fi_info`, and the errors of libfabric.

use super::endpoint::{RECEIVES, TRANSMITS};
use libfabric_sys::{self as sys, Functions};
use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

/// A call of libfabric that failed, by its error number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct OfiError {
    pub call: &'static str,
    /// Positive.
    pub code: i32,
}

impl fmt::Display for OfiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ok(functions) = sys::functions() else { return write!(f, "{}: error {}", self.call, self.code) };
        // SAFETY: it gives a string that is never freed, for every number.
        let text = unsafe { CStr::from_ptr(functions.fi_strerror(self.code)) };
        write!(f, "{}: {}", self.call, text.to_string_lossy())
    }
}

impl std::error::Error for OfiError {}

/// Whether a call that gives 0 or a negative error number was successful.
pub(super) fn check(call: &'static str, result: i32) -> Result<(), OfiError> {
    if result == 0 { Ok(()) } else { Err(OfiError { call, code: result.saturating_neg() }) }
}

/// The functions of libfabric, which is loaded and has looked for its providers.
///
/// # Errors
/// It is not installed, or too old: a line that says what to do.
pub(super) fn functions() -> Result<&'static Functions, String> {
    static INITIALISED: OnceLock<()> = OnceLock::new();
    INITIALISED.get_or_init(|| {
        // What is loaded with it (libpsm2 in 1.17, and its provider shm) takes SIGINT, SIGTERM, SIGSEGV and others
        // for itself, and ends the process at them without a word. Signals remain whose they were.
        let dispositions = Dispositions::of_now();
        if let Ok(functions) = sys::functions() {
            // Which provider is asked for does not matter: it makes all of them ready. If it fails, it will again.
            let _ = Info::probe(functions, "tcp");
        }
        dispositions.restore();
    });
    sys::functions().map_err(|error| error.to_string())
}

/// What the process does at each signal.
struct Dispositions(Vec<(i32, libc::sigaction)>);

impl Dispositions {
    fn of_now() -> Dispositions {
        let of = |signal| {
            // SAFETY: plain data.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: it only asks, and there is room for the answer.
            let asked = unsafe { libc::sigaction(signal, ptr::null(), &mut action) };
            (asked == 0).then_some((signal, action))
        };
        Dispositions((1..32).filter_map(of).collect())
    }

    fn restore(&self) {
        for (signal, action) in &self.0 {
            // SAFETY: this was in force before. SIGKILL and SIGSTOP are refused, and can't have changed.
            unsafe { libc::sigaction(*signal, action, ptr::null_mut()) };
        }
    }
}

/// One way to reach a peer or to be reached.
pub(super) struct Info {
    functions: &'static Functions,
    raw: NonNull<sys::fi_info>,
}

/// Who gives an [`Info`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// It listens at the address.
    Listening,
    /// It connects to the address.
    Connecting,
}

impl Info {
    /// How a provider reaches this address, or listens there.
    pub fn find(
        functions: &'static Functions,
        provider: &str,
        address: SocketAddr,
        end: End,
    ) -> Result<Info, OfiError> {
        let hints = Info::hints(functions, provider)?;
        let texts = [address.ip().to_string(), address.port().to_string()];
        let [node, service] = texts.map(|text| CString::new(text).expect("an address has no NUL"));
        let flags = sys::FI_NUMERICHOST | if end == End::Listening { sys::FI_SOURCE } else { 0 };
        let mut found = ptr::null_mut();
        // SAFETY: strings and hints live during the call, which gives a list of its own.
        let result = unsafe {
            let (node, service) = (node.as_ptr(), service.as_ptr());
            functions.fi_getinfo(sys::API_VERSION, node, service, flags, hints.raw.as_ptr(), &mut found)
        };
        check("fi_getinfo", result)?;
        // SAFETY: a list is given to who asked.
        unsafe { Info::owned(functions, found) }.ok_or(OfiError { call: "fi_getinfo", code: sys::FI_ENODATA as i32 })
    }

    /// Whether there is such a provider here. The first look takes some tenths of a second: libfabric loads all
    /// of its providers.
    pub fn probe(functions: &'static Functions, provider: &str) -> Result<(), OfiError> {
        let hints = Info::hints(functions, provider)?;
        let mut found = ptr::null_mut();
        // SAFETY: the hints live during the call, which gives a list of its own.
        let result = unsafe {
            let (anywhere, hints) = (ptr::null(), hints.raw.as_ptr());
            functions.fi_getinfo(sys::API_VERSION, anywhere, anywhere, 0, hints, &mut found)
        };
        check("fi_getinfo", result)?;
        // SAFETY: a list is given to who asked.
        drop(unsafe { Info::owned(functions, found) });
        Ok(())
    }

    /// What is asked of every provider: connected endpoints that send messages, and read and write each
    /// other's memory.
    fn hints(functions: &'static Functions, provider: &str) -> Result<Info, OfiError> {
        let none = OfiError { call: "fi_dupinfo", code: sys::FI_ENODATA as i32 };
        let name = CString::new(provider).map_err(|_| none)?;
        // SAFETY: nothing to copy means a new, empty one, with all of its parts.
        let hints = unsafe { Info::owned(functions, functions.fi_dupinfo(ptr::null())) }.ok_or(none)?;
        // SAFETY: it is new, and all parts that are set were allocated with it. The name is allocated as
        // fi_freeinfo frees it.
        unsafe {
            let info = &mut *hints.raw.as_ptr();
            info.caps = u64::from(sys::FI_MSG | sys::FI_RMA);
            info.mode = sys::FI_CONTEXT | sys::FI_CONTEXT2;
            (*info.ep_attr).type_ = sys::FI_EP_MSG;
            let domain = &mut *info.domain_attr;
            domain.mr_mode =
                (sys::FI_MR_LOCAL | sys::FI_MR_VIRT_ADDR | sys::FI_MR_ALLOCATED | sys::FI_MR_PROV_KEY) as i32;
            domain.threading = sys::FI_THREAD_DOMAIN;
            domain.control_progress = sys::FI_PROGRESS_MANUAL;
            domain.data_progress = sys::FI_PROGRESS_MANUAL;
            // What a peer finds once it has a message was written before that was sent.
            (*info.tx_attr).msg_order = u64::from(sys::FI_ORDER_SAS | sys::FI_ORDER_SAW);
            (*info.rx_attr).msg_order = u64::from(sys::FI_ORDER_SAS | sys::FI_ORDER_SAW);
            (*info.tx_attr).size = TRANSMITS;
            (*info.rx_attr).size = RECEIVES;
            (*info.fabric_attr).prov_name = libc::strdup(name.as_ptr());
        }
        Ok(hints)
    }

    /// # Safety
    /// Null, or what libfabric gave away.
    pub unsafe fn owned(functions: &'static Functions, raw: *mut sys::fi_info) -> Option<Info> {
        Some(Info { functions, raw: NonNull::new(raw)? })
    }

    pub fn functions(&self) -> &'static Functions {
        self.functions
    }

    pub fn raw(&self) -> *mut sys::fi_info {
        self.raw.as_ptr()
    }

    fn get(&self) -> &sys::fi_info {
        // SAFETY: it is ours, and nothing changes it.
        unsafe { self.raw.as_ref() }
    }

    pub fn domain_name(&self) -> String {
        // SAFETY: its parts live as long as itself.
        unsafe { text((*self.get().domain_attr).name) }
    }

    /// The ways in which memory must be registered (`FI_MR_*`).
    pub fn registration_mode(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.get().domain_attr).mr_mode as u32 }
    }

    /// Length of a key to registered memory, in bytes.
    pub fn key_bytes(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.get().domain_attr).mr_key_size }
    }

    pub fn fabric_attr(&self) -> *mut sys::fi_fabric_attr {
        self.get().fabric_attr
    }

    /// The request that it came with, if it did.
    pub fn request(&self) -> sys::fid_t {
        self.get().handle
    }

    pub fn destination(&self) -> *const std::ffi::c_void {
        self.get().dest_addr
    }
}

impl Drop for Info {
    fn drop(&mut self) {
        // SAFETY: it is ours and is not used again.
        unsafe { self.functions.fi_freeinfo(self.raw.as_ptr()) }
    }
}

/// # Safety
/// Null or a string.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: as the caller says.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

/// An IP address as the kernel writes it (`sockaddr_in`, `sockaddr_in6`).
pub(super) fn socket_address(bytes: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(*bytes.first_chunk()?);
    let port = u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?);
    let ip = match i32::from(family) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::from(*bytes.get(4..)?.first_chunk::<4>()?)),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(*bytes.get(8..)?.first_chunk::<16>()?)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}
