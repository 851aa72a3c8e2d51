//! The serving end: accepts, reads requests, runs the service, queues replies.

use super::link::Link;
use super::reader::{ReadError, Reader};
use super::tls::{self, TlsError};
use super::{BYTES_MAX, HELLO_WAIT};
use crate::identity::Identity;
use crate::sum::sum;
use crate::{Address, CALLS_MAX, Listener, Message, Peer, Service};
use bytes::Bytes;
use cfs_reactor::sync::{Permit, Semaphore};
use cfs_reactor::uring::Ring;
use cfs_reactor::{Handle, JoinHandle};
use cfs_wire::frame::{BulkSum, FEATURE_OFFERS, FEATURES, FrameError, Header, Hello, Kind, Refusal};
use futures_util::future::{Either, select};
use futures_util::pin_mut;
use std::cell::RefCell;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

/// Connections of one listener at most: each may hold [`BYTES_MAX`] and two descriptors.
const CONNECTIONS_MAX: usize = 1024;
/// After accept failed (no descriptors, most likely) it is tried again this much later.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Tells clients what else they can reach a server by.
pub(crate) trait Offering {
    /// The body of an OFFERS frame for this client, which is told in secret.
    fn offers(&self, handle: &Handle, peer: &Peer) -> Vec<u8>;
}

struct Server {
    ring: Rc<Ring>,
    handle: Handle,
    identity: Option<Arc<Identity>>,
    address: Address,
    service: Rc<dyn Service>,
    /// What tells clients what else they can reach it by.
    offering: Option<Rc<dyn Offering>>,
    links: RefCell<Vec<Weak<Link>>>,
}

struct TcpListener {
    server: Rc<Server>,
    accepting: JoinHandle<()>,
}

impl Listener for TcpListener {
    fn address(&self) -> Address {
        self.server.address.clone()
    }
}

impl Drop for TcpListener {
    fn drop(&mut self) {
        self.accepting.abort();
        for link in self.server.links.borrow().iter().filter_map(Weak::upgrade) {
            link.close("the server stopped");
        }
    }
}

/// Binds and starts to accept; the error is one line that says what to do.
pub(super) fn listen(
    ring: &Rc<Ring>,
    handle: &Handle,
    identity: Option<Arc<Identity>>,
    address: SocketAddr,
    service: Rc<dyn Service>,
    offering: Option<Rc<dyn Offering>>,
) -> Result<Box<dyn Listener>, String> {
    let socket = StdListener::bind(address).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => "the port is in use: stop the program that uses it, or choose another port".to_owned(),
        ErrorKind::PermissionDenied => "ports below 1024 need a privilege: choose a higher port".to_owned(),
        _ => error.to_string(),
    })?;
    let bound = socket.local_addr().map_err(|error| error.to_string())?;
    let server = Rc::new(Server {
        ring: ring.clone(),
        handle: handle.clone(),
        identity,
        address: Address(bound.to_string()),
        service,
        offering,
        links: RefCell::default(),
    });
    let accepting = handle.spawn(accept(server.clone(), Rc::new(OwnedFd::from(socket))));
    Ok(Box::new(TcpListener { server, accepting }))
}

async fn accept(server: Rc<Server>, socket: Rc<OwnedFd>) {
    let places = Semaphore::new(CONNECTIONS_MAX);
    loop {
        let place = places.acquire(1).await;
        match server.ring.accept(&socket).await {
            Ok(connection) => {
                let link = Link::new(server.ring.clone(), connection);
                {
                    let mut links = server.links.borrow_mut();
                    links.retain(|link| link.strong_count() > 0);
                    links.push(Rc::downgrade(&link));
                }
                server.handle.spawn(serve(server.clone(), link, place));
            }
            Err(errno) => {
                tracing::warn!(%errno, address = %server.address, "accepting a connection failed");
                server.handle.sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// One connection from HELLO to its end.
async fn serve(server: Rc<Server>, link: Rc<Link>, _place: Permit) {
    let (handle, service, identity) = (server.handle.clone(), server.service.clone(), server.identity.clone());
    let offering = server.offering.clone();
    // It stops when its listener is dropped.
    drop(server);
    let greeted = handle.timeout(HELLO_WAIT, shake_hands(&link, identity.as_deref(), offering.is_some())).await;
    let reason = match greeted {
        None => "no HELLO in 5 s".to_owned(),
        Some(Err(error)) => error.to_string(),
        Some(Ok((mut reader, peer))) => {
            let writer = link.clone();
            handle.spawn(async move { writer.write().await });
            let error = read_requests(&handle, &service, offering, &link, &peer, &mut reader).await;
            if !error.is_violation() {
                link.close(&error.to_string());
                return;
            }
            error.to_string()
        }
    };
    tracing::warn!(reason, "closing a client's connection");
    link.close(&reason);
}

#[derive(Debug, thiserror::Error)]
enum GreetError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the client speaks versions {} to {}, this server {} to {}: upgrade the older one",
        .0.version_min, .0.version_max, Hello::OURS.version_min, Hello::OURS.version_max)]
    Version(Hello),
}

/// Finds out who it is, hears HELLO and answers it, whatever the versions: the client says what it makes of it.
async fn shake_hands(
    link: &Rc<Link>,
    identity: Option<&Identity>,
    has_offers: bool,
) -> Result<(Reader, Peer), GreetError> {
    let secured = match identity {
        Some(identity) => Some(tls::accept(&link.ring, &link.socket, identity).await?),
        None => None,
    };
    let (mut reader, peer) = link.secure(secured);
    let theirs = reader.hello().await?;
    let features = if has_offers { FEATURES | FEATURE_OFFERS } else { FEATURES };
    link.enqueue_hello(Hello { features, ..Hello::OURS })?;
    link.send_queued().await;
    link.set_version(Hello::OURS.agree(theirs).ok_or(GreetError::Version(theirs))?);
    Ok((reader, peer))
}

/// Reads and starts requests until the connection ends; waits while too many run.
async fn read_requests(
    handle: &Handle,
    service: &Rc<dyn Service>,
    mut offering: Option<Rc<dyn Offering>>,
    link: &Rc<Link>,
    peer: &Peer,
    reader: &mut Reader,
) -> ReadError {
    let slots = Semaphore::new(CALLS_MAX);
    let bytes = Semaphore::new(BYTES_MAX);
    loop {
        let header = match reader.header().await {
            Ok(header) if header.kind == Kind::Request => header,
            Ok(header) if header.kind == Kind::AsksOffers && header.body_length == 0 => {
                // Each connection is told once.
                let Some(offering) = offering.take() else { return ReadError::Unexpected };
                if let Err(error) = tell_offers(handle, &*offering, link, peer, reader, &header).await {
                    return error;
                }
                continue;
            }
            Ok(_) => return ReadError::Unexpected,
            Err(error) => return error,
        };
        // Before the memory for it is taken.
        let room = async {
            let slot = slots.acquire(1).await;
            let share = bytes.acquire(header.body_length + header.bulk_length).await;
            link.until_short_queue().await;
            (slot, share)
        };
        let closed = link.until_closed();
        pin_mut!(room, closed);
        let held = match select(room, closed).await {
            Either::Left((held, _)) => held,
            Either::Right(_) => return ReadError::Ended,
        };
        let request = match reader.message(&header).await {
            Ok(request) => request,
            Err(error) => return error,
        };
        // A service may take any time, while the socket is to go with its connection.
        let (service, link, peer) = (service.clone(), Rc::downgrade(link), peer.clone());
        handle.spawn(async move {
            let reply = service.handle(peer, request).await;
            let sum = sum(&reply.bulk).await;
            if let Some(link) = link.upgrade() {
                answer(&link, header.request_id, reply, &sum);
            }
            drop(held);
        });
    }
}

/// Tells what else this server can be reached by.
async fn tell_offers(
    handle: &Handle,
    offering: &dyn Offering,
    link: &Link,
    peer: &Peer,
    reader: &mut Reader,
    header: &Header,
) -> Result<(), ReadError> {
    reader.message(header).await?;
    let body = Bytes::from(offering.offers(handle, peer));
    link.enqueue(Kind::Offers, header.request_id, Message { body, ..Message::default() }, &BulkSum::default())?;
    Ok(())
}

/// Queues the reply, or in place of one that does not fit the news of it.
fn answer(link: &Link, request_id: u64, reply: Message, sum: &BulkSum) {
    let opcode = reply.opcode;
    let (length, limit) = match link.enqueue(Kind::Reply, request_id, reply, sum) {
        Ok(()) => return,
        Err(FrameError::BodyTooLarge { length, limit } | FrameError::BulkTooLarge { length, limit }) => (length, limit),
        Err(error) => return link.close(&error.to_string()),
    };
    tracing::error!(opcode, length, limit, "a service's reply exceeds the limit");
    let refusal = Refusal { length: length as u64, limit: limit as u64 };
    let body = Bytes::copy_from_slice(&refusal.encode());
    let refusal = Message { opcode, body, bulk: Bytes::new() };
    if let Err(error) = link.enqueue(Kind::Refusal, request_id, refusal, &BulkSum::default()) {
        link.close(&error.to_string());
    }
}
