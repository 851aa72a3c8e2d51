//! Fabric over TCP sockets on io_uring.
//!
//! Each connection has two tasks: a reader that parses frames and a writer that sends all
//! frames queued meanwhile with one vectored call. Bulk bytes and large bodies are received
//! straight into page-aligned memory of their size; what is sent is never copied.
//!
//! Everything is bounded: a client waits for one of [`CALLS_MAX`](crate::CALLS_MAX) slots and for its share of
//! [`BYTES_MAX`]; a server that has as much under way stops reading. Start at [`TcpFabric`].
//!
//! With an [`Identity`] peers prove by TLS 1.3 who they are, and all bytes are encrypted. Without one nothing
//! is, and only loopback addresses are served and called.

mod client;
mod link;
mod reader;
mod records;
mod server;
mod tls;

use crate::identity::Identity;
use crate::{Address, Connection, Fabric, FabricError, Listener, Service};
use cfs_reactor::Handle;
use cfs_reactor::uring::Ring;
use cfs_wire::limits::{RPC_BODY_BYTES_MAX, RPC_BULK_BYTES_MAX};
use cfs_wire::offers::Offers;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
pub(crate) use server::Offering;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Message bytes under way on one connection at most, per direction: seven of the largest
/// messages, several times what a loopback or 100 Gbit/s link holds in flight.
pub const BYTES_MAX: usize = 48 << 20;
const _: () = assert!(BYTES_MAX >= RPC_BODY_BYTES_MAX + RPC_BULK_BYTES_MAX, "else the largest never goes");
/// A peer that has not said HELLO by then is none of ours.
const HELLO_WAIT: Duration = Duration::from_secs(5);

/// A process's access to the network. All its tasks run in one domain.
pub struct TcpFabric {
    ring: Rc<Ring>,
    handle: Handle,
    identity: Option<Arc<Identity>>,
}

impl TcpFabric {
    /// With an identity every peer must have one of the same authority, on loopback too.
    pub fn new(ring: Rc<Ring>, handle: &Handle, identity: Option<Arc<Identity>>) -> Rc<TcpFabric> {
        Rc::new(TcpFabric { ring, handle: handle.clone(), identity })
    }

    /// As `listen`; clients may ask for offers.
    pub(crate) fn listen_and_offer(
        &self,
        address: &Address,
        service: Rc<dyn Service>,
        offering: Rc<dyn Offering>,
    ) -> Result<Box<dyn Listener>, FabricError> {
        let refused = |detail| FabricError::Listen { address: address.clone(), detail };
        let (at, identity) = (self.parse(address).map_err(refused)?, self.identity.clone());
        server::listen(&self.ring, &self.handle, identity, at, service, Some(offering)).map_err(refused)
    }

    /// As `connect`, with the server's offers if it has any and they are asked for.
    pub(crate) async fn connect_and_ask(
        &self,
        address: &Address,
        asks_offers: bool,
    ) -> Result<(Rc<dyn Connection>, Option<Offers>), FabricError> {
        let at = self.parse(address).map_err(|detail| FabricError::Address { address: address.clone(), detail })?;
        client::connect(&self.ring, &self.handle, self.identity.as_deref(), address, at, asks_offers).await
    }

    /// The socket address meant, or why there is none.
    fn parse(&self, address: &Address) -> Result<SocketAddr, String> {
        let parsed = crate::socket_address(address)?;
        if !parsed.ip().is_loopback() && self.identity.is_none() {
            let detail = "without an identity only loopback is allowed: use 127.0.0.1 or [::1], or make \
                          identities with cfs authority and give one with --identity";
            return Err(detail.to_owned());
        }
        Ok(parsed)
    }
}

impl Fabric for TcpFabric {
    /// `host:port`; port 0 lets the system choose. Without an identity the host is a loopback address.
    fn listen(&self, address: &Address, service: Rc<dyn Service>) -> Result<Box<dyn Listener>, FabricError> {
        let refused = |detail| FabricError::Listen { address: address.clone(), detail };
        let socket_address = self.parse(address).map_err(refused)?;
        let identity = self.identity.clone();
        server::listen(&self.ring, &self.handle, identity, socket_address, service, None).map_err(refused)
    }

    fn connect(&self, address: &Address) -> LocalBoxFuture<'_, Result<Rc<dyn Connection>, FabricError>> {
        let address = address.clone();
        async move { Ok(self.connect_and_ask(&address, false).await?.0) }.boxed_local()
    }
}
