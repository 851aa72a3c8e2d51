//! What listens: `fid_pep` with its queue.

use super::domain::{Network, close};
use super::endpoint::{descriptor, next_event, open_events};
use super::info::{Info, OfiError, check, socket_address};
use libfabric_sys as sys;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::ptr;
use std::rc::Rc;

/// An endpoint that connections are asked for at.
pub(super) struct PassiveEndpoint {
    pep: *mut sys::fid_pep,
    eq: *mut sys::fid_eq,
    network: Rc<Network>,
    functions: &'static sys::Functions,
}

impl PassiveEndpoint {
    pub fn listen(network: &Rc<Network>, info: &Info) -> Result<PassiveEndpoint, OfiError> {
        let eq = open_events(network.raw())?;
        let mut pep = ptr::null_mut();
        // SAFETY: network and info are alive.
        let made = unsafe { sys::fi_passive_ep(network.raw(), info.raw(), &mut pep, ptr::null_mut()) };
        if let Err(error) = check("fi_passive_ep", made) {
            // SAFETY: it is open, and nobody else has it.
            unsafe { close(eq.cast()) };
            return Err(error);
        }
        // From here on drop closes both.
        let passive = PassiveEndpoint { pep, eq, network: network.clone(), functions: info.functions() };
        // SAFETY: both are open.
        unsafe {
            check("fi_pep_bind", sys::fi_bind(pep.cast(), eq.cast(), 0))?;
            check("fi_listen", sys::fi_listen(pep))?;
        }
        Ok(passive)
    }

    /// Where it listens, with the port the system chose.
    pub fn address(&self) -> Result<SocketAddr, OfiError> {
        let mut bytes = [0u64; 16];
        let mut length = size_of_val(&bytes);
        // SAFETY: it is open, and there is room for as much.
        check("fi_getname", unsafe { sys::fi_getname(self.pep, bytes.as_mut_ptr().cast(), &mut length) })?;
        let bytes: Vec<u8> = bytes.iter().flat_map(|word| word.to_ne_bytes()).take(length).collect();
        socket_address(&bytes).ok_or(OfiError { call: "fi_getname", code: libc::EAFNOSUPPORT })
    }

    pub fn descriptor(&self) -> Result<OwnedFd, OfiError> {
        // SAFETY: it is open and was asked to have one.
        unsafe { descriptor(self.eq.cast()) }
    }

    /// Whether there is nothing to be taken, so that the descriptor becomes readable when there is.
    pub fn may_sleep(&self) -> bool {
        let mut fids = [self.eq.cast()];
        // SAFETY: it is open and of this network.
        unsafe { sys::fi_trywait(self.network.raw(), fids.as_mut_ptr(), 1) == 0 }
    }

    /// Who asked for a connection, if anybody did.
    pub fn request(&mut self) -> Result<Option<Info>, OfiError> {
        Ok(next_event(self.eq, self.functions)?.and_then(|(_, info)| info))
    }

    /// Sends away who asked.
    pub fn reject(&mut self, info: &Info) -> Result<(), OfiError> {
        // SAFETY: the endpoint is open, and the request one of its own that nobody has accepted.
        check("fi_reject", unsafe { sys::fi_reject(self.pep, info.request(), ptr::null(), 0) })
    }
}

impl Drop for PassiveEndpoint {
    fn drop(&mut self) {
        // SAFETY: both are open and not used again; what uses the queue goes first.
        unsafe {
            close(self.pep.cast());
            close(self.eq.cast());
        }
    }
}
