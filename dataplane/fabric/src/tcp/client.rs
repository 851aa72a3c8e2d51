//! The calling end of a connection.

use super::link::{Link, sum};
use super::reader::{ReadError, Reader};
use super::{BYTES_MAX, HELLO_WAIT};
use crate::{Address, CALLS_MAX, Connection, FabricError, Message};
use cfs_reactor::Handle;
use cfs_reactor::collections::HashMap;
use cfs_reactor::sync::{OneshotSender, Permit, Semaphore, oneshot};
use cfs_reactor::uring::Ring;
use cfs_wire::frame::{Hello, Kind, Refusal, VERSION_MAX, VERSION_MIN};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;

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
    address: &Address,
    socket_address: SocketAddr,
) -> Result<Rc<dyn Connection>, FabricError> {
    let failed = |detail: String| FabricError::Connect { address: address.clone(), detail };
    let family = if socket_address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(|errno| failed(format!("no socket: {errno}")))?;
    let link = Link::new(ring.clone(), socket);
    let greeting = async {
        let connected = ring.connect(&link.socket, socket_address).await;
        connected.map_err(|errno| failed(format!("{errno}: is the server running?")))?;
        shake_hands(&link, address).await
    };
    let greeted = handle.timeout(HELLO_WAIT, greeting).await;
    let reader = greeted.unwrap_or_else(|| Err(failed("no answer in 5 s".to_owned())))?;

    let calls = Rc::new(Calls { link: link.clone(), pending: RefCell::default() });
    handle.spawn(read_replies(calls.clone(), reader));
    handle.spawn(async move { link.write().await });
    Ok(Rc::new(TcpConnection {
        address: address.clone(),
        calls,
        next_request: Cell::new(1),
        slots: Semaphore::new(CALLS_MAX),
        bytes: Semaphore::new(BYTES_MAX),
    }))
}

/// Says HELLO, hears one, and agrees on a version.
async fn shake_hands(link: &Rc<Link>, address: &Address) -> Result<Reader, FabricError> {
    let failed = |detail: String| FabricError::Connect { address: address.clone(), detail };
    link.enqueue_hello().map_err(|error| failed(error.to_string()))?;
    link.send_queued().await;
    let mut reader = Reader::new(link.clone());
    let theirs = reader.hello().await.map_err(|error| failed(format!("no handshake: {error}")))?;
    let Some(version) = Hello::OURS.agree(theirs) else {
        link.close("no version in common");
        let newer = theirs.version_min > VERSION_MAX;
        let (theirs, ours) = if newer { (theirs.version_min, VERSION_MAX) } else { (theirs.version_max, VERSION_MIN) };
        return Err(FabricError::Version { address: address.clone(), theirs: theirs.into(), ours: ours.into() });
    };
    link.set_version(version);
    Ok(reader)
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
}

impl Drop for TcpConnection {
    fn drop(&mut self) {
        self.calls.link.close("closed by this program");
    }
}
