//! What libfabric's headers define inline: a call through the table of operations of its first argument.
//!
//! All of them ask the same of their callers. An object is one that libfabric made and that was not closed;
//! other pointers are as the man page of that name says (fi_domain.3, fi_endpoint.3, fi_cm.3, fi_eq.3,
//! fi_cq.3, fi_mr.3, fi_msg.3, fi_rma.3). An operation that the provider lacks gives `-FI_ENOSYS`.

use crate::bindings::*;
use std::ffi::{c_int, c_void};

/// Calls an operation of a table, which is named by way of its object.
macro_rules! operation {
    ($table:expr, $operation:ident ( $($argument:expr),* )) => {{
        // SAFETY: the object is alive, as the caller promises, and so are the tables it refers to.
        match unsafe { (*$table).$operation } {
            // SAFETY: as the caller promises of this function.
            Some(operation) => unsafe { operation($($argument),*) },
            None => -(FI_ENOSYS as i32) as _,
        }
    }};
}

/// Defines functions that call the operation of their name in a table of their first argument.
macro_rules! inline {
    ($($(#[$doc:meta])* $name:ident = $object:ident: *mut $type:ty, $($table:ident).+, $operation:ident
        ( $($argument:ident: $of:ty),* ) -> $result:ty;)*) => {
        $($(#[$doc])*
        ///
        /// # Safety
        /// As the module says.
        #[inline]
        pub unsafe fn $name($object: *mut $type, $($argument: $of),*) -> $result {
            operation!((*$object).$($table).+, $operation($object $(, $argument)*))
        })*
    };
}

inline! {
    fi_passive_ep = fabric: *mut fid_fabric, ops, passive_ep
        (info: *mut fi_info, pep: *mut *mut fid_pep, context: *mut c_void) -> c_int;
    fi_domain = fabric: *mut fid_fabric, ops, domain
        (info: *mut fi_info, domain: *mut *mut fid_domain, context: *mut c_void) -> c_int;
    fi_eq_open = fabric: *mut fid_fabric, ops, eq_open
        (attr: *mut fi_eq_attr, eq: *mut *mut fid_eq, context: *mut c_void) -> c_int;
    /// Whether one may sleep until a descriptor of these objects is readable.
    fi_trywait = fabric: *mut fid_fabric, ops, trywait (fids: *mut *mut fid, count: c_int) -> c_int;
    fi_endpoint = domain: *mut fid_domain, ops, endpoint
        (info: *mut fi_info, ep: *mut *mut fid_ep, context: *mut c_void) -> c_int;
    fi_cq_open = domain: *mut fid_domain, ops, cq_open
        (attr: *mut fi_cq_attr, cq: *mut *mut fid_cq, context: *mut c_void) -> c_int;
    fi_listen = pep: *mut fid_pep, cm, listen() -> c_int;
    fi_reject = pep: *mut fid_pep, cm, reject(handle: fid_t, param: *const c_void, length: usize) -> c_int;
    fi_connect = ep: *mut fid_ep, cm, connect(addr: *const c_void, param: *const c_void, length: usize) -> c_int;
    fi_accept = ep: *mut fid_ep, cm, accept(param: *const c_void, length: usize) -> c_int;
    fi_shutdown = ep: *mut fid_ep, cm, shutdown(flags: u64) -> c_int;
    fi_recv = ep: *mut fid_ep, msg, recv
        (buf: *mut c_void, len: usize, desc: *mut c_void, src_addr: fi_addr_t, context: *mut c_void) -> isize;
    fi_send = ep: *mut fid_ep, msg, send
        (buf: *const c_void, len: usize, desc: *mut c_void, dest_addr: fi_addr_t, context: *mut c_void) -> isize;
    fi_read = ep: *mut fid_ep, rma, read
        (buf: *mut c_void, len: usize, desc: *mut c_void, src_addr: fi_addr_t, addr: u64, key: u64,
         context: *mut c_void) -> isize;
    fi_write = ep: *mut fid_ep, rma, write
        (buf: *const c_void, len: usize, desc: *mut c_void, dest_addr: fi_addr_t, addr: u64, key: u64,
         context: *mut c_void) -> isize;
    fi_eq_read = eq: *mut fid_eq, ops, read(event: *mut u32, buf: *mut c_void, len: usize, flags: u64) -> isize;
    fi_eq_readerr = eq: *mut fid_eq, ops, readerr(buf: *mut fi_eq_err_entry, flags: u64) -> isize;
    fi_cq_read = cq: *mut fid_cq, ops, read(buf: *mut c_void, count: usize) -> isize;
    fi_cq_readerr = cq: *mut fid_cq, ops, readerr(buf: *mut fi_cq_err_entry, flags: u64) -> isize;
    fi_close = fid: *mut fid, ops, close() -> c_int;
    fi_control = fid: *mut fid, ops, control(command: c_int, argument: *mut c_void) -> c_int;
    fi_bind = fid: *mut fid, ops, bind(to: *mut fid, flags: u64) -> c_int;
}

/// The address that a listening endpoint is bound to.
///
/// # Safety
/// As the module says.
pub unsafe fn fi_getname(pep: *mut fid_pep, addr: *mut c_void, length: *mut usize) -> c_int {
    operation!((*pep).cm, getname(pep.cast(), addr, length))
}

/// Makes memory known to the device that a domain is.
///
/// # Safety
/// As the module says; the memory is valid until the registration is closed.
pub unsafe fn fi_mr_reg(
    domain: *mut fid_domain,
    buf: *const c_void,
    len: usize,
    access: u64,
    offset: u64,
    key: u64,
    flags: u64,
    mr: *mut *mut fid_mr,
    context: *mut c_void,
) -> c_int {
    operation!((*domain).mr, reg(domain.cast(), buf, len, access, offset, key, flags, mr, context))
}

/// Makes an endpoint ready, after what it needs was bound to it.
///
/// # Safety
/// As the module says.
pub unsafe fn fi_enable(ep: *mut fid_ep) -> c_int {
    // SAFETY: a pointer to an object is one to its `fid`, its first field.
    unsafe { fi_control(ep.cast(), FI_ENABLE as c_int, std::ptr::null_mut()) }
}
