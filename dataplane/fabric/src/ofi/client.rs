//! The calling end of a connection.

use super::domain::{Domain, Exposed, Network};
use super::endpoint::Endpoint;
use super::info::{End as Side, Info, OfiError};
use super::link::{Access, End, Incoming, Link, LinkError, Lost, part};
use super::{BYTES_MAX, HELLO_WAIT};
use crate::sum::sum;
use crate::{Address, CALLS_MAX, Connection, FabricError, Message};
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::collections::HashMap;
use cfs_reactor::sync::{OneshotSender, Permit, Semaphore, oneshot};
use cfs_reactor::uring::Ring;
use cfs_wire::frame::{BulkSum, Hello, Refusal, VERSION_MAX, VERSION_MIN};
use cfs_wire::limits::RPC_BULK_BYTES_MAX;
use cfs_wire::packet::{INLINE_BYTES_MAX, Kind, Packet, Part, Place, Region};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use libfabric_sys::Functions;
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::{Rc, Weak};

/// A call whose reply is to come. It keeps its slot and its memory also if nobody waits any more, for the server
/// still works on it.
struct Pending {
    reply_to: OneshotSender<Result<Message, FabricError>>,
    _slot: Permit,
    /// What the server reads of the request.
    exposed: Vec<u64>,
    /// Memory for bulk bytes that went along with the request.
    ahead: Option<Ahead>,
    answer: Answer,
}

struct Ahead {
    room: Room,
    _share: Permit,
}

/// Memory for a reply that does not fit a packet.
enum Answer {
    NotAsked,
    /// The server asked for it, and there are too many bytes under way.
    Waiting,
    Offered {
        body: Option<Room>,
        bulk: Option<Room>,
        _share: Permit,
    },
}

/// Memory that the server may write to.
#[derive(Clone, Copy)]
struct Room {
    number: u64,
    length: usize,
    /// It was offered before it was known how much comes.
    is_ahead: bool,
}

impl Room {
    fn holds(self, length: usize) -> bool {
        length == self.length || self.is_ahead && length < self.length
    }
}

struct Calls {
    address: Address,
    carrier: String,
    link: Rc<Link>,
    pending: RefCell<HashMap<u64, Pending>>,
    bytes: Rc<Semaphore>,
    /// For tasks that go on with a packet.
    this: Weak<Calls>,
}

struct OfiConnection {
    calls: Rc<Calls>,
    next_request: Cell<u64>,
    slots: Rc<Semaphore>,
}

/// Connects and shakes hands.
pub(super) async fn connect(
    ring: &Rc<Ring>,
    handle: &Handle,
    functions: &'static Functions,
    provider: &str,
    address: &Address,
    socket_address: SocketAddr,
    access: Access,
) -> Result<Rc<dyn Connection>, FabricError> {
    let failed = |detail: String| FabricError::Connect { address: address.clone(), detail };
    let open = || -> Result<Endpoint, OfiError> {
        let info = Info::find(functions, provider, socket_address, Side::Connecting)?;
        // Of its own for each connection: what one server may reach, another can't name.
        let domain = Domain::open(&Network::open(&info)?, &info)?;
        let mut endpoint = Endpoint::open(&domain, &info, handle.random_u64())?;
        endpoint.connect(&info)?;
        Ok(endpoint)
    };
    let endpoint = open().map_err(|error| failed(error.to_string()))?;
    let link = Link::new(handle, endpoint, access);
    let calls = Rc::new_cyclic(|this| Calls {
        address: address.clone(),
        carrier: format!("ofi:{provider}"),
        link: link.clone(),
        pending: RefCell::default(),
        bytes: Semaphore::new(BYTES_MAX),
        this: this.clone(),
    });
    let connection =
        OfiConnection { calls: calls.clone(), next_request: Cell::new(1), slots: Semaphore::new(CALLS_MAX) };
    handle.spawn(drive(calls, ring.clone()));
    link.send_hello();
    match handle.timeout(HELLO_WAIT, link.hello()).await {
        Some(Ok(theirs)) => agree(&link, address, theirs)?,
        Some(Err(Lost)) => {
            let detail = link.closed().unwrap_or_default();
            return Err(failed(format!("{detail}: is the server running?")));
        }
        None => {
            link.close("no HELLO in time");
            return Err(failed("no answer in 5 s".to_owned()));
        }
    }
    Ok(Rc::new(connection))
}

fn agree(link: &Link, address: &Address, theirs: Hello) -> Result<(), FabricError> {
    if Hello::OURS.agree(theirs).is_some() {
        return Ok(());
    }
    link.close("no version in common");
    let newer = theirs.version_min > VERSION_MAX;
    let (theirs, ours) = if newer { (theirs.version_min, VERSION_MAX) } else { (theirs.version_max, VERSION_MIN) };
    Err(FabricError::Version { address: address.clone(), theirs: theirs.into(), ours: ours.into() })
}

/// Drives the connection to its end, and then ends every call.
async fn drive(calls: Rc<Calls>, ring: Rc<Ring>) {
    calls.link.clone().drive(ring, calls.clone()).await;
    let pending = std::mem::take(&mut *calls.pending.borrow_mut());
    drop(pending);
}

impl End for Calls {
    fn take(&self, Incoming { packet, body, bulk }: Incoming) -> Result<(), LinkError> {
        match packet.kind {
            Kind::Waits => self.make_room(&packet),
            Kind::Reply | Kind::Refusal => self.finish(&packet, body, bulk),
            _ => Err(LinkError::Unexpected),
        }
    }
}

impl Calls {
    /// Offers memory for the parts of a reply that lie apart.
    fn make_room(&self, packet: &Packet) -> Result<(), LinkError> {
        {
            let mut pending = self.pending.borrow_mut();
            let pending = pending.get_mut(&packet.request_id).ok_or(LinkError::Unexpected)?;
            if !matches!(pending.answer, Answer::NotAsked) {
                return Err(LinkError::Unexpected);
            }
            pending.answer = Answer::Waiting;
            // It does not do.
            if let Some(ahead) = pending.ahead.take() {
                self.link.withdraw(ahead.room.number);
            }
        }
        let calls = self.this.upgrade().ok_or(LinkError::Ended)?;
        let packet = *packet;
        self.link.handle.spawn(async move {
            let share = calls.bytes.acquire(packet.body.length + packet.bulk.length).await;
            if let Err(error) = calls.offer(&packet, share) {
                calls.link.close(&error.to_string());
            }
        });
        Ok(())
    }

    fn offer(&self, packet: &Packet, share: Permit) -> Result<(), OfiError> {
        let (body, body_room) = self.room(&packet.body)?;
        let (bulk, bulk_room) = self.room(&packet.bulk)?;
        // The call is over if the connection is.
        if let Some(pending) = self.pending.borrow_mut().get_mut(&packet.request_id) {
            pending.answer = Answer::Offered { body: body_room, bulk: bulk_room, _share: share };
        }
        let offer = Packet { body, bulk, ..Packet::bare(Kind::Offer, packet.request_id) };
        self.link.send(offer, Bytes::new(), Bytes::new());
        Ok(())
    }

    fn room(&self, part: &Part) -> Result<(Part, Option<Room>), OfiError> {
        if part.apart().is_none() {
            return Ok((Part::EMPTY, None));
        }
        let (number, region) = self.link.expose(Exposed::Write(DmaBuf::uninitialised(part.length)))?;
        let room = Room { number, length: part.length, is_ahead: false };
        Ok((Part { place: Place::Apart(region), crc: 0, ..*part }, Some(room)))
    }

    /// Ends a call.
    fn finish(&self, packet: &Packet, body: Bytes, bulk: Bytes) -> Result<(), LinkError> {
        let pending = self.pending.borrow_mut().remove(&packet.request_id).ok_or(LinkError::Unexpected)?;
        let Pending { reply_to, _slot: slot, exposed, ahead, answer } = pending;
        for number in exposed {
            self.link.withdraw(number);
        }
        let ahead_room = ahead.as_ref().map(|ahead| ahead.room);
        if let Some(room) = ahead_room
            && packet.bulk.apart().is_none()
        {
            self.link.withdraw(room.number);
        }
        if packet.kind == Kind::Refusal {
            let Refusal { length, limit } = Refusal::decode(&body)?;
            let refused = FabricError::TooLarge { length: length as usize, limit: limit as usize };
            let _ = reply_to.send(Err(refused));
            return Ok(());
        }
        let (body_room, bulk_room) = match &answer {
            Answer::NotAsked => (None, ahead_room.filter(|_| packet.bulk.apart().is_some())),
            Answer::Waiting => return Err(LinkError::Unexpected),
            Answer::Offered { body, bulk, .. } => (*body, *bulk),
        };
        let body = self.written(&packet.body, body_room)?.unwrap_or(body);
        let bulk = self.written(&packet.bulk, bulk_room)?.unwrap_or(bulk);
        let message = Message { opcode: packet.opcode, body, bulk };
        let calls = self.this.upgrade().ok_or(LinkError::Ended)?;
        let packet = *packet;
        let deliver = async move {
            let checked =
                packet.body.verify(&sum(&message.body).await).and(packet.bulk.verify(&sum(&message.bulk).await));
            drop((slot, ahead, answer));
            match checked {
                // A caller that gave up is not told.
                Ok(()) => drop(reply_to.send(Ok(message))),
                Err(error) => {
                    tracing::warn!(%error, "closing a connection to a server: what it wrote is not what it meant");
                    calls.link.close(&error.to_string());
                }
            }
        };
        if packet.body.apart().is_none() && packet.bulk.apart().is_none() {
            // It was checked as it came; summing so little again takes no time, and no turn of the executor.
            let _ = deliver.now_or_never();
        } else {
            self.link.handle.spawn(deliver);
        }
        Ok(())
    }

    /// What the server wrote to the room for a part, if it lies apart.
    fn written(&self, part: &Part, room: Option<Room>) -> Result<Option<Bytes>, LinkError> {
        match (part.apart(), room) {
            (None, None) => Ok(None),
            (Some((_, length)), Some(room)) if room.holds(length) => match self.link.withdraw(room.number) {
                Some(Exposed::Write(mut buffer)) => {
                    buffer.truncate(length);
                    Ok(Some(buffer.freeze()))
                }
                _ => Err(LinkError::Ended),
            },
            _ => Err(LinkError::Unexpected),
        }
    }
}

impl OfiConnection {
    fn lost(&self) -> FabricError {
        let detail = self.calls.link.closed().unwrap_or_else(|| "the connection closed".to_owned());
        FabricError::Lost { address: self.calls.address.clone(), detail }
    }

    /// Memory for so many bulk bytes of a reply, if they won't fit a packet, and what to tell of it.
    async fn make_ahead(&self, room: usize) -> Result<Option<(Ahead, Region)>, FabricError> {
        let length = room.min(RPC_BULK_BYTES_MAX);
        if length <= INLINE_BYTES_MAX {
            return Ok(None);
        }
        let share = self.calls.bytes.acquire(length).await;
        let exposed = self.calls.link.expose(Exposed::Write(DmaBuf::uninitialised(length)));
        let (number, region) = exposed.map_err(|error| self.failed(&error))?;
        Ok(Some((Ahead { room: Room { number, length, is_ahead: true }, _share: share }, region)))
    }

    fn failed(&self, error: &OfiError) -> FabricError {
        FabricError::Lost { address: self.calls.address.clone(), detail: error.to_string() }
    }

    async fn exchange(&self, request: Message, room: usize) -> Result<Message, FabricError> {
        request.check_length()?;
        let link = &self.calls.link;
        let slot = self.slots.acquire(1).await;
        let sums = [sum(&request.body).await, sum(&request.bulk).await];
        // Calls that end with the connection make room too.
        if link.is_closed() {
            return Err(self.lost());
        }
        let (ahead, room) = self.make_ahead(room).await?.unzip();
        if link.is_closed() {
            return Err(self.lost());
        }
        let request_id = self.next_request.get();
        self.next_request.set(request_id + 1);
        let (body_apart, bulk_apart) = Packet::parts_apart(request.body.len(), request.bulk.len());
        let mut exposed = Vec::new();
        let mut place = |bytes: Bytes, sum: &BulkSum, is_apart: bool| -> Result<(Part, Bytes), FabricError> {
            if !is_apart {
                return Ok((part(&bytes, sum, Place::Inline), bytes));
            }
            let reached = link.expose(Exposed::Read(bytes.clone()));
            let (number, region) = reached.map_err(|error| self.failed(&error))?;
            exposed.push(number);
            Ok((part(&bytes, sum, Place::Apart(region)), Bytes::new()))
        };
        let placed = place(request.body, &sums[0], body_apart)
            .and_then(|body| Ok((body, place(request.bulk, &sums[1], bulk_apart)?)));
        let ((body, body_inline), (bulk, bulk_inline)) = match placed {
            Ok(placed) => placed,
            Err(error) => {
                for number in exposed.into_iter().chain(ahead.map(|ahead| ahead.room.number)) {
                    link.withdraw(number);
                }
                return Err(error);
            }
        };
        let ahead_length = ahead.as_ref().map_or(0, |ahead| ahead.room.length);
        let (reply_to, reply) = oneshot();
        let pending = Pending { reply_to, _slot: slot, exposed, ahead, answer: Answer::NotAsked };
        self.calls.pending.borrow_mut().insert(request_id, pending);
        let room = room.map(|region| (region, ahead_length));
        let packet = Packet { opcode: request.opcode, body, bulk, room, ..Packet::bare(Kind::Request, request_id) };
        link.send(packet, body_inline, bulk_inline);
        reply.await.unwrap_or_else(|_| Err(self.lost()))
    }
}

impl Connection for OfiConnection {
    fn call(&self, request: Message) -> LocalBoxFuture<'_, Result<Message, FabricError>> {
        self.exchange(request, 0).boxed_local()
    }

    fn call_with_room(&self, request: Message, room: usize) -> LocalBoxFuture<'_, Result<Message, FabricError>> {
        self.exchange(request, room).boxed_local()
    }

    fn is_closed(&self) -> bool {
        self.calls.link.is_closed()
    }

    fn peer_address(&self) -> Address {
        self.calls.address.clone()
    }

    fn carrier(&self) -> String {
        self.calls.carrier.clone()
    }
}

impl Drop for OfiConnection {
    fn drop(&mut self) {
        self.calls.link.close("closed by this program");
    }
}
