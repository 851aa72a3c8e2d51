//! What both ends of a connection share: its endpoint, the packets that wait for credits, and its end.

use super::domain::{Exposed, Remote};
use super::endpoint::{Completion, Endpoint, Event, Refused};
use super::info::OfiError;
use super::session::{Forged, Seal, SessionKey, Sessions, Side, Token};
use crate::Peer;
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::collections::HashMap;
use cfs_reactor::sync::{Notified, Notify, OneshotSender, Semaphore, oneshot};
use cfs_reactor::uring::{Command, Ring};
use cfs_wire::frame::{BulkSum, FrameError, Hello};
use cfs_wire::packet::{CREDITS_TOLD, Kind, PACKETS_MAX, Packet, PacketError, Part, Place, Region};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("the peer closed the connection")]
    Ended,
    #[error(transparent)]
    Ofi(#[from] OfiError),
    #[error("bad packet: {0}")]
    Packet(#[from] PacketError),
    #[error("bad packet: {0}")]
    Hello(#[from] FrameError),
    #[error("a packet of this kind makes no sense here")]
    Unexpected,
    #[error("the peer shows no token of a session that waits for it")]
    Token,
    #[error("a packet is not authentic")]
    Forged,
    #[error("the peer does not keep count of what may be sent")]
    Credits,
    #[error("more calls at once than may be")]
    Calls,
}

impl LinkError {
    /// Whether the peer broke the protocol, as opposed to having gone away.
    pub fn is_violation(&self) -> bool {
        !matches!(self, LinkError::Ended | LinkError::Ofi(_))
    }
}

/// The connection ended: why, [`Link::closed`] says.
#[derive(Debug)]
pub(super) struct Lost;

/// A packet that came, with the parts behind it.
pub(super) struct Incoming {
    pub packet: Packet,
    pub body: Bytes,
    /// At the start of a page.
    pub bulk: Bytes,
}

/// What an end does with packets, which are neither HELLO nor CREDIT.
pub(super) trait End {
    fn take(&self, incoming: Incoming) -> Result<(), LinkError>;
}

/// What a connection stands on.
pub(super) enum Access {
    /// Nothing: the peer is local.
    Open,
    /// The session that a server gave.
    Session(Token, SessionKey),
    /// A session of these that the client is to show the token of.
    Sessions(Rc<Sessions>),
}

struct Outgoing {
    packet: Packet,
    body: Bytes,
    bulk: Bytes,
}

/// One connection.
pub(super) struct Link {
    pub handle: Handle,
    /// `None` once the connection ended.
    endpoint: RefCell<Option<Endpoint>>,
    is_connected: Cell<bool>,
    /// The peer hung up; what it sent before is yet to be taken.
    hung_up: Cell<bool>,
    hello: Cell<Option<Hello>>,
    /// Of a session.
    seal: RefCell<Option<Seal>>,
    /// To be shown before the first packet.
    token: Cell<Option<Token>>,
    /// One of these is to be shown by the peer.
    sessions: Option<Rc<Sessions>>,
    peer: RefCell<Peer>,
    outgoing: RefCell<VecDeque<Outgoing>>,
    /// A packet that the provider did not take yet.
    unsent: RefCell<Option<Vec<u8>>>,
    /// Packets that the peer has memory for.
    credits: Cell<usize>,
    /// Packets received that the peer has not been told of.
    owed: Cell<usize>,
    transfers: RefCell<HashMap<usize, OneshotSender<Option<DmaBuf>>>>,
    places: Rc<Semaphore>,
    /// There is something to do for [`Link::drive`], or it did something.
    changed: Rc<Notify>,
    ended: Rc<Notify>,
    closed: RefCell<Option<String>>,
}

impl Link {
    pub fn new(handle: &Handle, endpoint: Endpoint, access: Access) -> Rc<Link> {
        let (token, seal, sessions) = match access {
            Access::Open => (None, None, None),
            Access::Session(token, key) => (Some(token), Some(Seal::new(&key, Side::Client)), None),
            Access::Sessions(sessions) => (None, None, Some(sessions)),
        };
        Rc::new(Link {
            handle: handle.clone(),
            endpoint: RefCell::new(Some(endpoint)),
            is_connected: Cell::new(false),
            hung_up: Cell::new(false),
            hello: Cell::new(None),
            seal: RefCell::new(seal),
            token: Cell::new(token),
            sessions,
            peer: RefCell::new(Peer::Local),
            outgoing: RefCell::default(),
            unsent: RefCell::default(),
            credits: Cell::new(PACKETS_MAX),
            owed: Cell::new(0),
            transfers: RefCell::default(),
            places: Semaphore::new(super::endpoint::TRANSFERS),
            changed: Notify::new(),
            ended: Notify::new(),
            closed: RefCell::default(),
        })
    }

    /// Ends the connection; its tasks notice. The first reason stays. All memory that the peer or the provider
    /// could reach is free afterwards.
    pub fn close(&self, reason: &str) {
        if self.closed.borrow().is_some() {
            return;
        }
        *self.closed.borrow_mut() = Some(reason.to_owned());
        let endpoint = self.endpoint.borrow_mut().take();
        drop(endpoint);
        let queued = std::mem::take(&mut *self.outgoing.borrow_mut());
        let transfers = std::mem::take(&mut *self.transfers.borrow_mut());
        drop((queued, transfers));
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

    /// Who is at the other end, as far as is known once it has said HELLO.
    pub fn peer(&self) -> Peer {
        self.peer.borrow().clone()
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

    /// What the peer said first.
    pub async fn hello(&self) -> Result<Hello, Lost> {
        loop {
            let changed = self.changed.notified();
            match self.hello.get() {
                Some(hello) => return Ok(hello),
                None if self.is_closed() => return Err(Lost),
                None => changed.await,
            }
        }
    }

    pub fn send_hello(&self) {
        let body = Bytes::copy_from_slice(&Hello::OURS.encode());
        let part = part(&body, &BulkSum::of(&body), Place::Inline);
        self.send(Packet { body: part, ..Packet::bare(Kind::Hello, 0) }, body, Bytes::new());
    }

    /// Sends a packet, once the peer has memory for it. The parts are those that lie inline.
    pub fn send(&self, packet: Packet, body: Bytes, bulk: Bytes) {
        if !self.is_closed() {
            self.outgoing.borrow_mut().push_back(Outgoing { packet, body, bulk });
            self.changed.notify_all();
        }
    }

    /// Lets the peer reach memory: what it is withdrawn by, and what to tell the peer.
    pub fn expose(&self, memory: Exposed) -> Result<(u64, Region), OfiError> {
        let mut endpoint = self.endpoint.borrow_mut();
        let closed = OfiError { call: "fi_mr_reg", code: libc::ENOTCONN };
        let (number, Remote { address, key }) =
            endpoint.as_mut().ok_or(closed)?.expose(memory, self.handle.random_u64())?;
        Ok((number, Region { address, key }))
    }

    pub fn withdraw(&self, number: u64) -> Option<Exposed> {
        self.endpoint.borrow_mut().as_mut()?.withdraw(number)
    }

    /// Reads so much of the peer's memory, into memory that begins with a page.
    pub async fn read(&self, from: Region, length: usize) -> Result<DmaBuf, Lost> {
        let _place = self.places.acquire(1).await;
        let remote = Remote { address: from.address, key: from.key };
        let mut into = Some(DmaBuf::uninitialised(length));
        let read = self.transfer(|endpoint| {
            let buffer = into.take().ok_or(Refused::Busy)?;
            endpoint.read(buffer, remote).map_err(|(refused, buffer)| {
                into = Some(buffer);
                refused
            })
        });
        read.await?.ok_or(Lost)
    }

    /// Writes these bytes to the peer's memory.
    pub async fn write(&self, from: Bytes, to: Region) -> Result<(), Lost> {
        let _place = self.places.acquire(1).await;
        let remote = Remote { address: to.address, key: to.key };
        self.transfer(|endpoint| endpoint.write(from.clone(), remote)).await.map(drop)
    }

    /// Starts a transfer as soon as the provider takes it, and waits for its end.
    async fn transfer(
        &self,
        mut start: impl FnMut(&mut Endpoint) -> Result<usize, Refused>,
    ) -> Result<Option<DmaBuf>, Lost> {
        let done = loop {
            let changed = self.changed.notified();
            let started = match self.endpoint.borrow_mut().as_mut() {
                Some(endpoint) => start(endpoint),
                None => return Err(Lost),
            };
            match started {
                Ok(transfer) => {
                    let (done, wait) = oneshot();
                    self.transfers.borrow_mut().insert(transfer, done);
                    // Some complete at once, which nothing tells of.
                    self.changed.notify_all();
                    break wait;
                }
                Err(Refused::Busy) => changed.await,
                Err(Refused::Failed(error)) => {
                    self.close(&error.to_string());
                    return Err(Lost);
                }
            }
        };
        done.await.map_err(|_| Lost)
    }

    /// Does all that the connection needs until it ends.
    pub async fn drive(self: Rc<Self>, ring: Rc<Ring>, end: Rc<dyn End>) {
        let outcome = self.run(&ring, &*end).await;
        if let Err(error) = outcome {
            if error.is_violation() {
                tracing::warn!(%error, "closing a connection");
            }
            self.close(&error.to_string());
        }
    }

    async fn run(&self, ring: &Rc<Ring>, end: &dyn End) -> Result<(), LinkError> {
        let descriptors = match self.endpoint.borrow().as_ref() {
            Some(endpoint) => endpoint.descriptors()?,
            None => return Ok(()),
        };
        let mut alarm = Alarm { ring: ring.clone(), armed: descriptors.map(|fd| (Rc::new(fd), None)) };
        let mut received = Vec::new();
        loop {
            let changed = self.changed.notified();
            let is_busy = self.turn(&mut received)?;
            for incoming in received.drain(..) {
                self.dispatch(incoming, end)?;
            }
            if self.is_closed() {
                return Ok(());
            }
            let may_sleep = !is_busy && self.endpoint.borrow().as_ref().is_some_and(Endpoint::may_sleep);
            if may_sleep {
                alarm.wait(changed).await;
            } else {
                self.handle.yield_now().await;
            }
        }
    }

    /// Takes what happened and sends what can be sent; whether there was anything.
    fn turn(&self, received: &mut Vec<Incoming>) -> Result<bool, LinkError> {
        let mut endpoint = self.endpoint.borrow_mut();
        let Some(endpoint) = endpoint.as_mut() else { return Ok(false) };
        let mut completions = Vec::new();
        endpoint.completions(&mut completions)?;
        let mut is_busy = !completions.is_empty();
        if !is_busy && self.hung_up.get() {
            return Err(LinkError::Ended);
        }
        for completion in completions {
            self.complete(endpoint, completion, received)?;
        }
        while let Some(event) = endpoint.event()? {
            is_busy = true;
            match event {
                Event::Connected => self.is_connected.set(true),
                Event::Shutdown => self.hung_up.set(true),
            }
        }
        is_busy |= self.flush(endpoint)?;
        if is_busy {
            // Who waits for the provider to take a transfer tries again.
            self.changed.notify_all();
        }
        Ok(is_busy)
    }

    fn complete(
        &self,
        endpoint: &mut Endpoint,
        completion: Completion,
        received: &mut Vec<Incoming>,
    ) -> Result<(), LinkError> {
        let (transfer, buffer) = match completion {
            Completion::Sent => return Ok(()),
            Completion::Received { slot, length } => {
                let mut bytes = endpoint.received(slot, length).to_vec();
                let (packet, body, bulk) = Packet::decode(self.open(&mut bytes)?)?;
                let body = Bytes::copy_from_slice(body);
                let bulk = if bulk.is_empty() { Bytes::new() } else { DmaBuf::copy_of(bulk).freeze() };
                received.push(Incoming { packet, body, bulk });
                return match endpoint.receive(slot) {
                    Ok(()) => {
                        self.owed.set(self.owed.get() + 1);
                        Ok(())
                    }
                    Err(Refused::Failed(error)) => Err(error.into()),
                    Err(Refused::Busy) => Err(OfiError { call: "fi_recv", code: libc::EAGAIN }.into()),
                };
            }
            Completion::Read { transfer, into } => (transfer, Some(into)),
            Completion::Written { transfer } => (transfer, None),
        };
        let waits = self.transfers.borrow_mut().remove(&transfer);
        if let Some(waits) = waits {
            // Who gave up is not told.
            let _ = waits.send(buffer);
        }
        Ok(())
    }

    /// What a packet says, of a session's once its token has been shown.
    fn open<'a>(&self, mut bytes: &'a mut [u8]) -> Result<&'a [u8], LinkError> {
        let mut seal = self.seal.borrow_mut();
        if let (None, Some(sessions)) = (&*seal, &self.sessions) {
            let (token, behind) = bytes.split_first_chunk_mut().ok_or(LinkError::Token)?;
            let (key, peer) = sessions.take(&self.handle, token).ok_or(LinkError::Token)?;
            *seal = Some(Seal::new(&key, Side::Server));
            *self.peer.borrow_mut() = peer;
            bytes = behind;
        }
        match &mut *seal {
            Some(seal) => seal.open(bytes).map_err(|Forged| LinkError::Forged),
            None => Ok(bytes),
        }
    }

    /// Sends what there are credits and places for; whether anything was sent.
    fn flush(&self, endpoint: &mut Endpoint) -> Result<bool, LinkError> {
        let mut has_sent = false;
        if !self.is_connected.get() {
            return Ok(false);
        }
        let unsent = self.unsent.borrow_mut().take();
        if let Some(packet) = unsent
            && !self.transmit(endpoint, packet)?
        {
            return Ok(false);
        }
        let mut outgoing = self.outgoing.borrow_mut();
        // The last credit is for a CREDIT.
        while self.credits.get() > 1 {
            let Some(Outgoing { packet, body, bulk }) = outgoing.front() else { break };
            let is_taken = self.send_now(endpoint, *packet, [body, bulk])?;
            outgoing.pop_front();
            if !is_taken {
                return Ok(has_sent);
            }
            has_sent = true;
        }
        drop(outgoing);
        if self.owed.get() >= CREDITS_TOLD && self.credits.get() > 0 {
            has_sent |= self.send_now(endpoint, Packet::bare(Kind::Credit, 0), [&[], &[]])?;
        }
        Ok(has_sent)
    }

    /// Sends a packet that the peer has memory for; whether the provider took it already.
    fn send_now(&self, endpoint: &mut Endpoint, packet: Packet, parts: [&[u8]; 2]) -> Result<bool, LinkError> {
        let header = Packet { credits: self.owed.get() as u16, ..packet }.encode();
        let mut bytes = [&header, parts[0], parts[1]].concat();
        if let Some(seal) = &mut *self.seal.borrow_mut() {
            seal.seal(&mut bytes);
        }
        if let Some(token) = self.token.take() {
            bytes = [&token[..], &bytes].concat();
        }
        self.credits.set(self.credits.get() - 1);
        self.owed.set(0);
        self.transmit(endpoint, bytes)
    }

    fn transmit(&self, endpoint: &mut Endpoint, packet: Vec<u8>) -> Result<bool, LinkError> {
        match endpoint.send(&packet) {
            Ok(()) => Ok(true),
            Err(Refused::Busy) => {
                *self.unsent.borrow_mut() = Some(packet);
                Ok(false)
            }
            Err(Refused::Failed(error)) => Err(error.into()),
        }
    }

    fn dispatch(&self, incoming: Incoming, end: &dyn End) -> Result<(), LinkError> {
        let credits = self.credits.get() + usize::from(incoming.packet.credits);
        if credits > PACKETS_MAX {
            return Err(LinkError::Credits);
        }
        self.credits.set(credits);
        match (incoming.packet.kind, self.hello.get()) {
            (Kind::Hello, None) => {
                self.hello.set(Some(Hello::decode(&incoming.body)?));
                self.changed.notify_all();
                Ok(())
            }
            (Kind::Hello, Some(_)) | (_, None) => Err(LinkError::Unexpected),
            (Kind::Credit, _) => Ok(()),
            _ => end.take(incoming),
        }
    }
}

/// What wakes a connection's task from outside of this program.
struct Alarm {
    ring: Rc<Ring>,
    armed: [(Rc<OwnedFd>, Option<Command>); 2],
}

impl Alarm {
    /// Waits until a descriptor is readable or this program has something to do.
    async fn wait(&mut self, mut changed: Notified) {
        poll_fn(|context| {
            let mut is_due = Pin::new(&mut changed).poll(context).is_ready();
            for (fd, armed) in &mut self.armed {
                let command = armed.get_or_insert_with(|| self.ring.poll_readable(fd));
                if Pin::new(command).poll(context).is_ready() {
                    *armed = None;
                    is_due = true;
                }
            }
            if is_due { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

/// What tells of a part.
pub(super) fn part(bytes: &Bytes, sum: &BulkSum, place: Place) -> Part {
    if bytes.is_empty() { Part::EMPTY } else { Part { length: bytes.len(), crc: sum.crc(), place } }
}
