//! The calling end of a connection.

use super::link::Link;
use super::reader::{ReadError, Reader};
use super::records::RecordError;
use super::tls::{self, TlsError};
use super::{BYTES_MAX, HELLO_WAIT};
use crate::identity::Identity;
use crate::sum::sum;
use crate::{Address, CALLS_MAX, Connection, FabricError, Message};
use cfs_reactor::Handle;
use cfs_reactor::collections::HashMap;
use cfs_reactor::sync::{OneshotSender, Permit, Semaphore, oneshot};
use cfs_reactor::uring::Ring;
use cfs_wire::frame::{BulkSum, FEATURE_OFFERS, FrameError, Hello, Kind, Refusal, VERSION_MAX, VERSION_MIN};
use cfs_wire::offers::Offers;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;

/// How the answer begins of a server that expects TLS and heard a HELLO: content type 21, version 3.
const TLS_ALERT: u16 = u16::from_le_bytes([21, 3]);

/// A call whose reply is to come. It keeps its slot and bytes also if nobody waits any more,
/// for the server still works on it.
struct Pending {
    reply_to: OneshotSender<Result<Message, FabricError>>,
    _slot: Permit,
    _bytes: Permit,
}

struct Calls {
    link: Rc<Link>,
    pending: RefCell<HashMap<u64, Pending>>,
}

struct TcpConnection {
    address: Address,
    calls: Rc<Calls>,
    next_request: Cell<u64>,
    slots: Rc<Semaphore>,
    bytes: Rc<Semaphore>,
}

/// Connects and shakes hands.
pub(super) async fn connect(
    ring: &Rc<Ring>,
    handle: &Handle,
    identity: Option<&Identity>,
    address: &Address,
    socket_address: SocketAddr,
    asks_offers: bool,
) -> Result<(Rc<dyn Connection>, Option<Offers>), FabricError> {
    let failed = |detail: String| FabricError::Connect { address: address.clone(), detail };
    let family = if socket_address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(|errno| failed(format!("no socket: {errno}")))?;
    let link = Link::new(ring.clone(), socket);
    let greeting = async {
        let connected = ring.connect(&link.socket, socket_address).await;
        connected.map_err(|errno| failed(format!("{errno}: is the server running?")))?;
        let (mut reader, theirs) = shake_hands(&link, identity, address).await?;
        let offers = if asks_offers && theirs.features & FEATURE_OFFERS != 0 {
            let offers = ask_offers(&link, &mut reader).await;
            Some(offers.map_err(|error| failed(format!("no offers: {error}")))?)
        } else {
            None
        };
        Ok((reader, offers))
    };
    let greeted = handle.timeout(HELLO_WAIT, greeting).await;
    let (reader, offers) = greeted.unwrap_or_else(|| Err(failed("no answer in 5 s".to_owned())))?;

    let calls = Rc::new(Calls { link: link.clone(), pending: RefCell::default() });
    handle.spawn(read_replies(calls.clone(), reader));
    handle.spawn(async move { link.write().await });
    let connection = TcpConnection {
        address: address.clone(),
        calls,
        next_request: Cell::new(1),
        slots: Semaphore::new(CALLS_MAX),
        bytes: Semaphore::new(BYTES_MAX),
    };
    Ok((Rc::new(connection), offers))
}

/// Asks what else the server can be reached by.
async fn ask_offers(link: &Link, reader: &mut Reader) -> Result<Offers, ReadError> {
    link.enqueue(Kind::AsksOffers, 0, Message::default(), &BulkSum::default())?;
    link.send_queued().await;
    let header = reader.header().await?;
    if header.kind != Kind::Offers {
        return Err(ReadError::Unexpected);
    }
    let message = reader.message(&header).await?;
    Offers::decode(&message.body).map_err(|_| ReadError::Unexpected)
}

/// Proves who this is, says HELLO, hears one, and agrees on a version.
async fn shake_hands(
    link: &Rc<Link>,
    identity: Option<&Identity>,
    address: &Address,
) -> Result<(Reader, Hello), FabricError> {
    let failed = |detail: String| FabricError::Connect { address: address.clone(), detail };
    let secured = match identity {
        Some(identity) => Some(tls::connect(&link.ring, &link.socket, identity).await),
        None => None,
    };
    let distrusted = |detail: String| FabricError::Distrust { address: address.clone(), detail };
    let secured = secured.transpose().map_err(|error| match error {
        TlsError::Closed | TlsError::Socket(_) => failed(error.to_string()),
        error => distrusted(error.to_string()),
    })?;
    let (mut reader, _) = link.secure(secured);
    link.enqueue_hello(Hello::OURS).map_err(|error| failed(error.to_string()))?;
    link.send_queued().await;
    let theirs = reader.hello().await.map_err(|error| match error {
        ReadError::Frame(FrameError::Magic { found: TLS_ALERT }) => {
            distrusted("it speaks TLS only; give an identity with --identity".to_owned())
        }
        // A server looks at a client's certificate when that takes the handshake for over.
        ReadError::Record(error @ RecordError::Alert(_)) => distrusted(error.to_string()),
        error => failed(format!("no handshake: {error}")),
    })?;
    let Some(version) = Hello::OURS.agree(theirs) else {
        link.close("no version in common");
        let newer = theirs.version_min > VERSION_MAX;
        let (theirs, ours) = if newer { (theirs.version_min, VERSION_MAX) } else { (theirs.version_max, VERSION_MIN) };
        return Err(FabricError::Version { address: address.clone(), theirs: theirs.into(), ours: ours.into() });
    };
    link.set_version(version);
    Ok((reader, theirs))
}

/// Hands replies to their callers until the connection ends, and then ends every call.
async fn read_replies(calls: Rc<Calls>, mut reader: Reader) {
    let error = loop {
        if let Err(error) = read_reply(&calls, &mut reader).await {
            break error;
        }
    };
    if error.is_violation() {
        tracing::warn!(%error, "closing a connection to a server");
    }
    calls.link.close(&error.to_string());
    let pending = std::mem::take(&mut *calls.pending.borrow_mut());
    drop(pending);
}

async fn read_reply(calls: &Calls, reader: &mut Reader) -> Result<(), ReadError> {
    let header = reader.header().await?;
    if !matches!(header.kind, Kind::Reply | Kind::Refusal) {
        return Err(ReadError::Unexpected);
    }
    let message = reader.message(&header).await?;
    let reply = if header.kind == Kind::Refusal {
        let Refusal { length, limit } = Refusal::decode(&message.body)?;
        Err(FabricError::TooLarge { length: length as usize, limit: limit as usize })
    } else {
        Ok(message)
    };
    let pending = calls.pending.borrow_mut().remove(&header.request_id);
    let Pending { reply_to, .. } = pending.ok_or(ReadError::Unexpected)?;
    // A caller that gave up is not told.
    let _ = reply_to.send(reply);
    Ok(())
}

impl TcpConnection {
    fn lost(&self) -> FabricError {
        let detail = self.calls.link.closed().unwrap_or_else(|| "the connection closed".to_owned());
        FabricError::Lost { address: self.address.clone(), detail }
    }

    async fn exchange(&self, request: Message) -> Result<Message, FabricError> {
        request.check_length()?;
        let link = &self.calls.link;
        let slot = self.slots.acquire(1).await;
        let bytes = self.bytes.acquire(request.body.len() + request.bulk.len()).await;
        let sum = sum(&request.bulk).await;
        // Calls that end with the connection make room too.
        if link.is_closed() {
            return Err(self.lost());
        }
        let request_id = self.next_request.get();
        self.next_request.set(request_id + 1);
        let (reply_to, reply) = oneshot();
        let pending = Pending { reply_to, _slot: slot, _bytes: bytes };
        self.calls.pending.borrow_mut().insert(request_id, pending);
        if link.enqueue(Kind::Request, request_id, request, &sum).is_err() {
            // Its length was checked above, and nothing else can be wrong with it.
            self.calls.pending.borrow_mut().remove(&request_id);
            return Err(self.lost());
        }
        reply.await.unwrap_or_else(|_| Err(self.lost()))
    }
}

impl Connection for TcpConnection {
    fn call(&self, request: Message) -> LocalBoxFuture<'_, Result<Message, FabricError>> {
        self.exchange(request).boxed_local()
    }

    fn is_closed(&self) -> bool {
        self.calls.link.is_closed()
    }

    fn peer_address(&self) -> Address {
        self.address.clone()
    }

    fn carrier(&self) -> String {
        "tcp".to_owned()
    }
}

impl Drop for TcpConnection {
    fn drop(&mut self) {
        self.calls.link.close("closed by this program");
    }
}
