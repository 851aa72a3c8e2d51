//! The serving end: accepts, fetches requests, runs the service, places replies.

use super::domain::{Domain, Network};
use super::endpoint::Endpoint;
use super::info::{End as Side, Info, OfiError};
use super::link::{Access, End, Incoming, Link, LinkError, Lost, part};
use super::passive::PassiveEndpoint;
use super::session::Sessions;
use super::{BYTES_MAX, HELLO_WAIT, QUEUED_BYTES_MAX};
use crate::sum::sum;
use crate::{Address, CALLS_MAX, FabricError, Listener, Message, Service};
use bytes::Bytes;
use cfs_reactor::collections::HashMap;
use cfs_reactor::sync::{Notify, OneshotSender, Permit, Semaphore, oneshot};
use cfs_reactor::uring::Ring;
use cfs_reactor::{Handle, JoinHandle};
use cfs_wire::frame::{BulkSum, Hello, Refusal};
use cfs_wire::packet::{Kind, Packet, PacketError, Part, Place, Region};
use libfabric_sys::Functions;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// Connections of one listener at most: each holds half a MiB and may hold [`BYTES_MAX`] more.
const CONNECTIONS_MAX: usize = 1024;

/// After accepting failed it is tried again this much later.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

struct Server {
    ring: Rc<Ring>,
    handle: Handle,
    address: Address,
    service: Rc<dyn Service>,
    /// Without, whoever is local is served.
    sessions: Option<Rc<Sessions>>,
    network: Rc<Network>,
    passive: RefCell<Option<PassiveEndpoint>>,
    /// By device. It reaches nothing for a peer: only this end reads and writes.
    domains: RefCell<BTreeMap<String, Rc<Domain>>>,
    links: RefCell<Vec<Weak<Link>>>,
    places: Rc<Semaphore>,
}

struct OfiListener {
    server: Rc<Server>,
    accepting: JoinHandle<()>,
}

impl Listener for OfiListener {
    fn address(&self) -> Address {
        self.server.address.clone()
    }
}

impl Drop for OfiListener {
    fn drop(&mut self) {
        self.accepting.abort();
        for link in self.server.links.borrow().iter().filter_map(Weak::upgrade) {
            link.close("the server stopped");
        }
        // Also if its tasks are kept: nobody is to be let in.
        let passive = self.server.passive.borrow_mut().take();
        drop(passive);
    }
}

/// Binds and starts to accept.
pub(super) fn listen(
    ring: &Rc<Ring>,
    handle: &Handle,
    functions: &'static Functions,
    provider: &str,
    address: SocketAddr,
    service: Rc<dyn Service>,
    sessions: Option<Rc<Sessions>>,
) -> Result<Box<dyn Listener>, OfiError> {
    let info = Info::find(functions, provider, address, Side::Listening)?;
    let network = Network::open(&info)?;
    let passive = PassiveEndpoint::listen(&network, &info)?;
    let descriptor = Rc::new(passive.descriptor()?);
    let server = Rc::new(Server {
        ring: ring.clone(),
        handle: handle.clone(),
        address: Address(passive.address()?.to_string()),
        service,
        sessions,
        network,
        passive: RefCell::new(Some(passive)),
        domains: RefCell::default(),
        links: RefCell::default(),
        places: Semaphore::new(CONNECTIONS_MAX),
    });
    let accepting = {
        let server = server.clone();
        handle.spawn(async move {
            loop {
                match server.next_request() {
                    Next::Request(info) => server.admit(&info),
                    Next::Again => server.handle.yield_now().await,
                    Next::Failed => server.handle.sleep(ACCEPT_RETRY).await,
                    Next::Sleep => {
                        if let Err(errno) = server.ring.poll_readable(&descriptor).await {
                            tracing::error!(%errno, address = %server.address, "no more connections are accepted");
                            return;
                        }
                    }
                    Next::Stopped => return,
                }
            }
        })
    };
    Ok(Box::new(OfiListener { server, accepting }))
}

enum Next {
    Request(Info),
    Again,
    Failed,
    Sleep,
    Stopped,
}

impl Server {
    fn next_request(&self) -> Next {
        let mut passive = self.passive.borrow_mut();
        let Some(passive) = passive.as_mut() else { return Next::Stopped };
        match passive.request() {
            Ok(Some(info)) => Next::Request(info),
            Ok(None) if passive.may_sleep() => Next::Sleep,
            Ok(None) => Next::Again,
            Err(error) => {
                tracing::warn!(%error, address = %self.address, "accepting a connection failed");
                Next::Failed
            }
        }
    }

    /// Lets a client in, if there is a place.
    fn admit(self: &Rc<Self>, info: &Info) {
        let Some(place) = self.places.try_acquire(1) else {
            tracing::warn!(address = %self.address, "too many connections");
            return self.reject(info);
        };
        let endpoint = self.domain(info).and_then(|domain| {
            let mut endpoint = Endpoint::open(&domain, info, self.handle.random_u64())?;
            endpoint.accept()?;
            Ok(endpoint)
        });
        let endpoint = match endpoint {
            Ok(endpoint) => endpoint,
            Err(error) => {
                tracing::warn!(%error, address = %self.address, "accepting a connection failed");
                return self.reject(info);
            }
        };
        let access = self.sessions.clone().map_or(Access::Open, Access::Sessions);
        let link = Link::new(&self.handle, endpoint, access);
        {
            let mut links = self.links.borrow_mut();
            links.retain(|link| link.strong_count() > 0);
            links.push(Rc::downgrade(&link));
        }
        self.handle.spawn(serve(self.ring.clone(), self.service.clone(), link, place));
    }

    fn reject(&self, info: &Info) {
        if let Some(passive) = &mut *self.passive.borrow_mut()
            && let Err(error) = passive.reject(info)
        {
            tracing::debug!(%error, "the client is gone");
        }
    }

    fn domain(&self, info: &Info) -> Result<Rc<Domain>, OfiError> {
        let name = info.domain_name();
        if let Some(domain) = self.domains.borrow().get(&name) {
            return Ok(domain.clone());
        }
        let domain = Domain::open(&self.network, info)?;
        self.domains.borrow_mut().insert(name, domain.clone());
        Ok(domain)
    }
}

/// One connection to its end.
async fn serve(ring: Rc<Ring>, service: Rc<dyn Service>, link: Rc<Link>, _place: Permit) {
    let requests = Rc::new_cyclic(|this| Requests {
        link: link.clone(),
        service,
        running: Cell::new(0),
        bytes: Semaphore::new(BYTES_MAX),
        offers: RefCell::default(),
        waiting_bytes: Cell::new(0),
        placed: Notify::new(),
        this: this.clone(),
    });
    let driving = link.handle.spawn(link.clone().drive(ring, requests));
    match link.handle.timeout(HELLO_WAIT, link.hello()).await {
        None => link.close("no HELLO in 5 s"),
        Some(Err(Lost)) => {}
        Some(Ok(theirs)) => {
            // Whatever the versions: the client says what it makes of it, and closes.
            link.send_hello();
            if Hello::OURS.agree(theirs).is_none() {
                let _ = link.handle.timeout(HELLO_WAIT, link.until_closed()).await;
                link.close("no version in common");
            }
        }
    }
    let _ = driving.await;
}

/// What one client asked for.
struct Requests {
    link: Rc<Link>,
    service: Rc<dyn Service>,
    running: Cell<usize>,
    /// Shares of [`BYTES_MAX`].
    bytes: Rc<Semaphore>,
    /// Replies that wait for memory, by request.
    offers: RefCell<HashMap<u64, OneshotSender<Packet>>>,
    /// Bytes of those.
    waiting_bytes: Cell<usize>,
    placed: Rc<Notify>,
    /// For tasks that go on with a packet.
    this: Weak<Requests>,
}

impl End for Requests {
    fn take(&self, incoming: Incoming) -> Result<(), LinkError> {
        match incoming.packet.kind {
            Kind::Request if self.running.get() >= CALLS_MAX => Err(LinkError::Calls),
            Kind::Request => {
                self.running.set(self.running.get() + 1);
                let requests = self.this.upgrade().ok_or(LinkError::Ended)?;
                self.link.handle.spawn(requests.execute(incoming));
                Ok(())
            }
            Kind::Offer => {
                let packet = incoming.packet;
                let waits = self.offers.borrow_mut().remove(&packet.request_id).ok_or(LinkError::Unexpected)?;
                let _ = waits.send(packet);
                Ok(())
            }
            _ => Err(LinkError::Unexpected),
        }
    }
}

/// What keeps a request from its reply.
enum Failure {
    Lost,
    Corrupt(PacketError),
}

impl From<Lost> for Failure {
    fn from(_: Lost) -> Failure {
        Failure::Lost
    }
}

impl Requests {
    async fn execute(self: Rc<Self>, incoming: Incoming) {
        let (request_id, room) = (incoming.packet.request_id, incoming.packet.room);
        let share = self.bytes.acquire(incoming.packet.body.length + incoming.packet.bulk.length).await;
        let outcome = match self.fetch(incoming).await {
            Ok(request) => {
                // A service may take any time, while all else is to go with its connection.
                let (service, peer, requests) = (self.service.clone(), self.link.peer(), Rc::downgrade(&self));
                drop(self);
                let reply = service.handle(peer, request).await;
                drop(share);
                let Some(requests) = requests.upgrade() else { return };
                let outcome = requests.answer(request_id, room, reply).await;
                outcome.map_err(|failure| (requests, failure))
            }
            Err(failure) => Err((self, failure)),
        };
        if let Err((requests, Failure::Corrupt(error))) = outcome {
            tracing::warn!(%error, "closing a client's connection: what was read is not what it meant");
            requests.link.close(&error.to_string());
        }
    }

    /// The request with the parts that lie apart, checked.
    async fn fetch(&self, Incoming { packet, body, bulk }: Incoming) -> Result<Message, Failure> {
        self.until_few_wait().await?;
        let body = self.fetch_part(&packet.body).await?.unwrap_or(body);
        let bulk = self.fetch_part(&packet.bulk).await?.unwrap_or(bulk);
        Ok(Message { opcode: packet.opcode, body, bulk })
    }

    async fn fetch_part(&self, part: &Part) -> Result<Option<Bytes>, Failure> {
        let Some((region, length)) = part.apart() else { return Ok(None) };
        let bytes = self.link.read(region, length).await?.freeze();
        part.verify(&sum(&bytes).await).map_err(Failure::Corrupt)?;
        Ok(Some(bytes))
    }

    /// Waits until few bytes of replies wait for their client.
    async fn until_few_wait(&self) -> Result<(), Lost> {
        loop {
            let placed = self.placed.notified();
            if self.link.is_closed() {
                return Err(Lost);
            }
            if self.waiting_bytes.get() <= QUEUED_BYTES_MAX {
                return Ok(());
            }
            placed.await;
        }
    }

    async fn answer(&self, request_id: u64, room: Option<(Region, usize)>, reply: Message) -> Result<(), Failure> {
        if let Err(FabricError::TooLarge { length, limit }) = reply.check_length() {
            tracing::error!(opcode = reply.opcode, length, limit, "a service's reply exceeds the limit");
            let refusal = Refusal { length: length as u64, limit: limit as u64 };
            let body = Bytes::copy_from_slice(&refusal.encode());
            let told = part(&body, &BulkSum::of(&body), Place::Inline);
            self.running.set(self.running.get() - 1);
            self.link.send(Packet { body: told, ..Packet::bare(Kind::Refusal, request_id) }, body, Bytes::new());
            return Ok(());
        }
        let Message { opcode, body, bulk } = reply;
        let (body_sum, bulk_sum) = (sum(&body).await, sum(&bulk).await);
        let (body_apart, bulk_apart) = Packet::parts_apart(body.len(), bulk.len());
        let place = |is_apart| if is_apart { Place::Apart(Region::default()) } else { Place::Inline };
        let reply = Packet {
            opcode,
            body: part(&body, &body_sum, place(body_apart)),
            bulk: part(&bulk, &bulk_sum, place(bulk_apart)),
            ..Packet::bare(Kind::Reply, request_id)
        };
        if body_apart || bulk_apart {
            let waiting =
                reply.body.apart().map_or(0, |(_, length)| length) + reply.bulk.apart().map_or(0, |(_, length)| length);
            self.waiting_bytes.set(self.waiting_bytes.get() + waiting);
            let placed = match room {
                // What the client has offered already will do.
                Some((region, length)) if !body_apart && bulk.len() <= length => {
                    self.link.write(bulk.clone(), region).await.map_err(Failure::from)
                }
                _ => self.place(&reply, &body, &bulk).await,
            };
            self.waiting_bytes.set(self.waiting_bytes.get() - waiting);
            self.placed.notify_all();
            placed?;
        }
        let inline = |is_apart, bytes| if is_apart { Bytes::new() } else { bytes };
        // Before the client hears of it and asks for more.
        self.running.set(self.running.get() - 1);
        self.link.send(reply, inline(body_apart, body), inline(bulk_apart, bulk));
        Ok(())
    }

    /// Asks for memory and writes the parts there that lie apart.
    async fn place(&self, reply: &Packet, body: &Bytes, bulk: &Bytes) -> Result<(), Failure> {
        let (offered, offer) = oneshot();
        self.offers.borrow_mut().insert(reply.request_id, offered);
        let asked = |part: &Part| if part.apart().is_some() { *part } else { Part::EMPTY };
        let waits = Packet { kind: Kind::Waits, body: asked(&reply.body), bulk: asked(&reply.bulk), ..*reply };
        self.link.send(waits, Bytes::new(), Bytes::new());
        let offer = offer.await.map_err(|_| Failure::Lost)?;
        for (part, offered, bytes) in [(&reply.body, &offer.body, body), (&reply.bulk, &offer.bulk, bulk)] {
            match (part.apart(), offered.apart()) {
                (None, None) => {}
                (Some((_, length)), Some((region, room))) if room == length => {
                    self.link.write(bytes.clone(), region).await?;
                }
                (wanted, room) => {
                    let length = |part: Option<(Region, usize)>| part.map_or(0, |(_, length)| length);
                    let (found, expected) = (length(room), length(wanted));
                    return Err(Failure::Corrupt(PacketError::Length { found, expected }));
                }
            }
        }
        Ok(())
    }
}
