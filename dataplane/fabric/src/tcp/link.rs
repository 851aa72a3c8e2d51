//! What both ends of a connection share: the socket, the queue to it, and its end.

use super::reader::Reader;
use super::records::{CONTENT_BYTES_MAX, Sealer};
use super::tls::Secured;
use crate::{Message, Peer};
use bytes::{Bytes, BytesMut};
use cfs_reactor::Handle;
use cfs_reactor::sync::Notify;
use cfs_reactor::uring::{PARTS_MAX, Ring};
use cfs_wire::frame::{self, BulkSum, FrameError, Hello, Kind, PREFIX_BYTES_MAX, VERSION_MAX};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// A body up to this size is copied behind its header: cheaper than one more part to send.
const BODY_COPIED_MAX: usize = 1024;
/// One send's bytes, so that memory is released and others run while much is queued.
const SEND_BYTES_MAX: usize = 2 << 20;
/// Queued bytes beyond which a server admits no more requests: its client does not read.
const QUEUED_BYTES_MAX: usize = 16 << 20;

/// Encrypted in one go, some 20 µs, into a buffer of the size that there are most of. A multiple of a
/// record's content, so that full ones follow each other.
const SEALED_BYTES: usize = 4 * CONTENT_BYTES_MAX;

/// One connection's socket and outgoing queue.
pub(super) struct Link {
    pub ring: Rc<Ring>,
    pub socket: Rc<OwnedFd>,
    version: Cell<u8>,
    /// Of a connection with TLS, once its handshake is over.
    sealer: RefCell<Option<Sealer>>,
    queue: RefCell<VecDeque<Bytes>>,
    queued_bytes: Cell<usize>,
    /// Something was queued, much was sent, or the connection ended. Only the connection's own
    /// two tasks wait for it.
    changed: Rc<Notify>,
    closed: RefCell<Option<String>>,
    ended: Rc<Notify>,
}

impl Link {
    pub fn new(ring: Rc<Ring>, socket: OwnedFd) -> Rc<Link> {
        // A refusal costs latency only; the connection works.
        if let Err(errno) = rustix::net::sockopt::set_tcp_nodelay(&socket, true) {
            tracing::debug!(%errno, "no TCP_NODELAY");
        }
        Rc::new(Link {
            ring,
            socket: Rc::new(socket),
            version: Cell::new(VERSION_MAX),
            sealer: RefCell::default(),
            queue: RefCell::default(),
            queued_bytes: Cell::new(0),
            changed: Notify::new(),
            closed: RefCell::default(),
            ended: Notify::new(),
        })
    }

    /// What reads this connection, and who is at its other end. What is sent from now on is encrypted, if
    /// that was agreed on.
    pub fn secure(self: &Rc<Self>, secured: Option<Secured>) -> (Reader, Peer) {
        let Some(Secured { sealer, opener, peer, received }) = secured else {
            return (Reader::new(self.clone(), None), Peer::Local);
        };
        *self.sealer.borrow_mut() = Some(sealer);
        (Reader::new(self.clone(), Some((opener, received))), peer)
    }

    pub fn version(&self) -> u8 {
        self.version.get()
    }

    pub fn set_version(&self, version: u8) {
        self.version.set(version);
    }

    /// Ends the connection both ways; its tasks notice. The first reason stays.
    pub fn close(&self, reason: &str) {
        if self.closed.borrow().is_some() {
            return;
        }
        *self.closed.borrow_mut() = Some(reason.to_owned());
        self.queue.borrow_mut().clear();
        self.queued_bytes.set(0);
        // The peer may have closed before us.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
        self.changed.notify_all();
        self.ended.notify_all();
    }

    /// Why the connection ended, if it did.
    pub fn closed(&self) -> Option<String> {
        self.closed.borrow().clone()
    }

    pub fn is_closed(&self) -> bool {
        self.closed.borrow().is_some()
    }

    /// Ends with the connection.
    pub async fn until_closed(&self) {
        loop {
            let ended = self.ended.notified();
            if self.is_closed() {
                return;
            }
            ended.await;
        }
    }

    /// Waits until the queue is short, or the connection ended.
    pub async fn until_short_queue(&self) {
        loop {
            let changed = self.changed.notified();
            if self.is_closed() || self.queued_bytes.get() <= QUEUED_BYTES_MAX {
                return;
            }
            changed.await;
        }
    }

    /// Queues a frame whose bulk bytes have this sum. On a closed connection it goes nowhere.
    pub fn enqueue(&self, kind: Kind, request_id: u64, message: Message, sum: &BulkSum) -> Result<(), FrameError> {
        let Message { opcode, body, bulk } = message;
        let prefix = frame::encode(self.version(), kind, opcode, request_id, &body, sum)?;
        if self.is_closed() {
            return Ok(());
        }
        let mut head = BytesMut::with_capacity(PREFIX_BYTES_MAX + body.len().min(BODY_COPIED_MAX));
        head.extend_from_slice(prefix.as_ref());
        let body = if body.len() <= BODY_COPIED_MAX {
            head.extend_from_slice(&body);
            Bytes::new()
        } else {
            body
        };
        let was_empty = {
            let mut queue = self.queue.borrow_mut();
            let was_empty = queue.is_empty();
            for part in [head.freeze(), body, bulk] {
                if !part.is_empty() {
                    self.queued_bytes.set(self.queued_bytes.get() + part.len());
                    queue.push_back(part);
                }
            }
            was_empty
        };
        if was_empty {
            self.changed.notify_all();
        }
        Ok(())
    }

    pub fn enqueue_hello(&self, hello: Hello) -> Result<(), FrameError> {
        let body = Bytes::copy_from_slice(&hello.encode());
        self.enqueue(Kind::Hello, 0, Message { opcode: 0, body, bulk: Bytes::new() }, &BulkSum::default())
    }

    /// Sends what is queued until the connection ends.
    pub async fn write(&self) {
        while !self.is_closed() {
            let changed = self.changed.notified();
            if self.queue.borrow().is_empty() {
                changed.await;
                continue;
            }
            self.send_queued().await;
        }
    }

    /// Sends one batch.
    pub async fn send_queued(&self) {
        let (parts, length) = self.take_batch();
        let sent =
            if self.sealer.borrow().is_some() { self.send_sealed(parts).await } else { self.send(parts, length).await };
        match sent {
            Ok(()) => {
                self.queued_bytes.set(self.queued_bytes.get().saturating_sub(length));
                if self.queued_bytes.get() + length > QUEUED_BYTES_MAX {
                    self.changed.notify_all();
                }
            }
            Err(reason) => self.close(&reason),
        }
    }

    async fn send(&self, parts: Vec<Bytes>, length: usize) -> Result<(), String> {
        match self.ring.send(&self.socket, parts).await.0 {
            Ok(sent) if sent == length => Ok(()),
            Ok(_) => Err("sending stopped half-way".to_owned()),
            Err(errno) => Err(format!("sending failed: {errno}")),
        }
    }

    /// Encrypts and sends a piece at a time: the peer decrypts one while the next is encrypted.
    async fn send_sealed(&self, parts: Vec<Bytes>) -> Result<(), String> {
        let handle = Handle::current();
        let mut parts = VecDeque::from(parts);
        while let Some((piece, length)) = take_piece(&mut parts) {
            handle.work(length).await;
            let sealed = match &mut *self.sealer.borrow_mut() {
                Some(sealer) => sealer.seal(&piece).map_err(|error| error.to_string())?,
                None => return Err("there is no key to encrypt with".to_owned()),
            };
            drop(piece);
            let length = sealed.len();
            self.send(vec![sealed], length).await?;
        }
        Ok(())
    }

    fn take_batch(&self) -> (Vec<Bytes>, usize) {
        let mut queue = self.queue.borrow_mut();
        let (mut parts, mut length) = (Vec::new(), 0);
        while parts.len() < PARTS_MAX && length < SEND_BYTES_MAX {
            let Some(part) = queue.pop_front() else { break };
            length += part.len();
            parts.push(part);
        }
        (parts, length)
    }
}

/// The next [`SEALED_BYTES`] of these parts; `None` at their end.
fn take_piece(parts: &mut VecDeque<Bytes>) -> Option<(Vec<Bytes>, usize)> {
    let (mut piece, mut length) = (Vec::new(), 0);
    while length < SEALED_BYTES {
        let Some(part) = parts.front_mut() else { break };
        let taken = part.split_to(part.len().min(SEALED_BYTES - length));
        if part.is_empty() {
            parts.pop_front();
        }
        length += taken.len();
        piece.push(taken);
    }
    (length > 0).then_some((piece, length))
}
