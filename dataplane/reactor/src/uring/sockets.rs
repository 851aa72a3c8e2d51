//! Operations on stream sockets.

use super::operation::{Extra, Kept};
use super::{Operation, Ring, clamp, iovecs, raw};
use crate::buffer::DmaBuf;
use bytes::Bytes;
use io_uring::opcode;
use rustix::io::Errno;
use std::future::Future;
use std::mem;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::pin::Pin;
use std::ptr;
use std::rc::Rc;
use std::task::{Context, Poll};

impl Ring {
    /// The next connection of a listening socket, close-on-exec.
    pub fn accept(self: &Rc<Self>, listener: &Rc<OwnedFd>) -> Accept {
        let entry = opcode::Accept::new(raw(listener), ptr::null_mut(), ptr::null_mut());
        let entry = entry.flags(libc::SOCK_CLOEXEC).build();
        // SAFETY: null addresses, so it refers to no memory.
        Accept(unsafe { Operation::start(self, entry, Kept::new((), listener.clone()), true) })
    }

    pub fn connect(self: &Rc<Self>, socket: &Rc<OwnedFd>, address: SocketAddr) -> Connect {
        let address = Box::new(RawAddress::from(address));
        let (pointer, length) = address.as_sockaddr();
        let entry = opcode::Connect::new(raw(socket), pointer, length).build();
        // SAFETY: the address is boxed, and the box is kept.
        Connect(unsafe {
            Operation::start(self, entry, Kept::new((), socket.clone()).with(Extra::Address(address)), false)
        })
    }

    /// Receives at least a byte, at most the buffer; 0 at the end of the stream.
    pub fn recv(self: &Rc<Self>, socket: &Rc<OwnedFd>, buffer: DmaBuf) -> Operation<DmaBuf> {
        let range = 0..buffer.len();
        self.recv_range(socket, buffer, range, false)
    }

    /// Receives into a part of the buffer. With `whole` waits until the range is full; it is
    /// short then only at the end of the stream or after an error.
    ///
    /// # Panics
    /// If `range` lies outside the buffer.
    pub fn recv_range(
        self: &Rc<Self>,
        socket: &Rc<OwnedFd>,
        mut buffer: DmaBuf,
        range: Range<usize>,
        whole: bool,
    ) -> Operation<DmaBuf> {
        let target = &mut buffer[range];
        let flags = if whole { libc::MSG_WAITALL } else { 0 };
        let entry = opcode::Recv::new(raw(socket), target.as_mut_ptr(), clamp(target.len())).flags(flags).build();
        // SAFETY: the buffer's heap memory is kept, and nothing else refers to it.
        unsafe { Operation::start(self, entry, Kept::new(buffer, socket.clone()), false) }
    }

    /// Sends `parts`, at most [`super::PARTS_MAX`], one after the other, and waits until the
    /// socket took them all; it is short only after an error. Never raises SIGPIPE.
    pub fn send(self: &Rc<Self>, socket: &Rc<OwnedFd>, parts: Vec<Bytes>) -> Operation<Vec<Bytes>> {
        let message = Box::new(Message::new(&parts));
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = opcode::SendMsg::new(raw(socket), &raw const message.header).flags(flags).build();
        // SAFETY: header and vectors are in the box, the box and the parts are kept, and `Bytes`
        // is never written through by anyone.
        unsafe { Operation::start(self, entry, Kept::new(parts, socket.clone()).with(Extra::Message(message)), false) }
    }
}

pub(super) struct Message {
    header: libc::msghdr,
    _vectors: Vec<libc::iovec>,
}

impl Message {
    fn new(parts: &[Bytes]) -> Message {
        let mut vectors = iovecs(parts);
        // SAFETY: all zeroes is a valid header: no name, no data, no control message.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = vectors.as_mut_ptr();
        header.msg_iovlen = vectors.len() as _;
        Message { header, _vectors: vectors }
    }
}

pub(super) enum RawAddress {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
}

impl From<SocketAddr> for RawAddress {
    fn from(address: SocketAddr) -> RawAddress {
        match address {
            SocketAddr::V4(address) => RawAddress::V4(libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(address) => RawAddress::V6(libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            }),
        }
    }
}

impl RawAddress {
    fn as_sockaddr(&self) -> (*const libc::sockaddr, libc::socklen_t) {
        match self {
            RawAddress::V4(address) => (ptr::from_ref(address).cast(), mem::size_of_val(address) as _),
            RawAddress::V6(address) => (ptr::from_ref(address).cast(), mem::size_of_val(address) as _),
        }
    }
}

/// A connection to come. Dropping it loses no descriptor.
#[must_use = "dropping it cancels the accept"]
pub struct Accept(Operation<()>);

impl Future for Accept {
    type Output = Result<OwnedFd, Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|(result, ())| {
            let fd = result?;
            // SAFETY: the kernel has just opened it for this operation, whose result is taken
            // once.
            Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
        })
    }
}

/// A connection being made.
#[must_use = "dropping it cancels the connection"]
pub struct Connect(Operation<()>);

impl Future for Connect {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|(result, ())| result.map(drop))
    }
}
