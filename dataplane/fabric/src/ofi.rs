//! Fabric over libfabric: connected endpoints of a device that reads and writes the peer's memory itself
//! (provider `verbs`), or of sockets that do as if (provider `tcp`, for tests).
//!
//! Requests and replies are [packets](cfs_wire::packet). Body and bulk bytes that do not fit one are moved by the
//! **server**: it reads a request's from the client's memory and writes a reply's there, so no client ever
//! reaches a server's memory. Who knows how much comes sends memory for it along
//! ([`call_with_room`](Connection::call_with_room)); else the server asks for memory first, a round trip more. A
//! client exposes exactly the bytes of a call, as long as that lasts, in a domain of its own for each
//! connection. The server checks a CRC32C of all it has read, the client of all that was written.
//!
//! One task per connection does all that it needs. When nothing happens it sleeps on the descriptors of the
//! connection's queues in the executor's ring. Start at [`OfiFabric`]; `unsafe` is in `info`, `domain`,
//! `endpoint` and `passive` only, one file for each kind of libfabric's objects.
//!
//! Trust: by itself this fabric does not prove who is at the other end and encrypts nothing, hence only loopback
//! addresses are served and called. In a [session](crate::network), which a TCP connection has vouched for,
//! packets are encrypted and authentic. Bytes that the server reads and writes in the client's memory are never
//! encrypted, and kept from accidents only, by a CRC32C in an authentic packet. A server that breaks the
//! protocol can, with the provider `tcp`, still read or write a call's memory shortly after its reply, since
//! that provider goes on with what it has begun when the memory is withdrawn; devices don't.

mod client;
#[allow(unsafe_code, reason = "calls libfabric")]
mod domain;
#[allow(unsafe_code, reason = "calls libfabric, with memory it keeps alive")]
mod endpoint;
#[allow(unsafe_code, reason = "calls libfabric")]
mod info;
mod link;
#[allow(unsafe_code, reason = "calls libfabric")]
mod passive;
mod server;
pub(crate) mod session;
#[cfg(test)]
mod tests;

use crate::{Address, Connection, Fabric, FabricError, Listener, Service};
use cfs_reactor::Handle;
use cfs_reactor::uring::Ring;
use cfs_wire::limits::{RPC_BODY_BYTES_MAX, RPC_BULK_BYTES_MAX};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use libfabric_sys::Functions;
use link::Access;
use session::{SessionKey, Sessions, Token};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

/// Bytes of requests that a server works on, and of replies that a client has offered memory for, on one
/// connection at most: as with TCP.
pub const BYTES_MAX: usize = crate::tcp::BYTES_MAX;
const _: () = assert!(BYTES_MAX >= RPC_BODY_BYTES_MAX + RPC_BULK_BYTES_MAX, "else the largest never goes");
/// Bytes of replies that wait for their client's memory, beyond which a server starts no more requests.
const QUEUED_BYTES_MAX: usize = 16 << 20;
/// A peer that has not said HELLO by then is none of ours.
const HELLO_WAIT: Duration = Duration::from_secs(5);

/// A process's access to a network by a provider of libfabric. All its tasks run in one domain.
pub struct OfiFabric {
    ring: Rc<Ring>,
    handle: Handle,
    provider: String,
    functions: &'static Functions,
}

impl OfiFabric {
    /// `provider` is `verbs` or `tcp`. The error is one line that says what to do: libfabric or the provider
    /// may be missing. Takes some tenths of a second.
    pub fn new(ring: Rc<Ring>, handle: &Handle, provider: &str) -> Result<Rc<OfiFabric>, String> {
        let functions = info::functions()?;
        info::Info::probe(functions, provider).map_err(|error| {
            format!("libfabric's provider {provider} is of no use here ({error}); fi_info lists those that are")
        })?;
        Ok(Rc::new(OfiFabric { ring, handle: handle.clone(), provider: provider.to_owned(), functions }))
    }

    /// Serves whoever shows a token of these sessions, from anywhere.
    pub(crate) fn listen_for_sessions(
        &self,
        address: SocketAddr,
        service: Rc<dyn Service>,
        sessions: Rc<Sessions>,
    ) -> Result<Box<dyn Listener>, String> {
        let sessions = Some(sessions);
        server::listen(&self.ring, &self.handle, self.functions, &self.provider, address, service, sessions)
            .map_err(|error| error.to_string())
    }

    /// Connects to where a session was given for; `address` is where the server gave it.
    pub(crate) async fn connect_session(
        &self,
        address: &Address,
        at: SocketAddr,
        token: Token,
        key: SessionKey,
    ) -> Result<Rc<dyn Connection>, FabricError> {
        self.connect_to(address, at, Access::Session(token, key)).await
    }

    async fn connect_to(
        &self,
        address: &Address,
        at: SocketAddr,
        access: Access,
    ) -> Result<Rc<dyn Connection>, FabricError> {
        client::connect(&self.ring, &self.handle, self.functions, &self.provider, address, at, access).await
    }
}

/// Whether libfabric can be loaded here; one line says why not. Takes some tenths of a second.
pub fn library() -> Result<(), String> {
    info::functions().map(drop)
}

/// The loopback address meant, or why there is none.
fn parse(address: &Address) -> Result<SocketAddr, String> {
    let parsed = crate::socket_address(address)?;
    if !parsed.ip().is_loopback() {
        return Err("through libfabric only loopback is served and called: use 127.0.0.1 or [::1]".to_owned());
    }
    Ok(parsed)
}

impl Fabric for OfiFabric {
    /// `host:port`; port 0 lets the system choose.
    fn listen(&self, address: &Address, service: Rc<dyn Service>) -> Result<Box<dyn Listener>, FabricError> {
        let refused = |detail| FabricError::Listen { address: address.clone(), detail };
        let at = parse(address).map_err(refused)?;
        let listener = server::listen(&self.ring, &self.handle, self.functions, &self.provider, at, service, None);
        listener.map_err(|error| refused(error.to_string()))
    }

    fn connect(&self, address: &Address) -> LocalBoxFuture<'_, Result<Rc<dyn Connection>, FabricError>> {
        let address = address.clone();
        async move {
            let at = parse(&address).map_err(|detail| FabricError::Address { address: address.clone(), detail })?;
            self.connect_to(&address, at, Access::Open).await
        }
        .boxed_local()
    }
}
