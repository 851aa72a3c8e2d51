//! The fabric of production: TCP, and where both ends have a better one, that.
//!
//! TCP is the way in. There the peers prove who they are (TLS 1.3), and there a client that has other providers
//! of libfabric asks what the server offers. The server tells where it listens by those, with a token and a key
//! made for this client: a **session**. The client connects there, shows the token, and both ends encrypt every
//! packet with the key; the TCP connection is not kept. If nothing fits or anything fails, TCP serves.
//!
//! Bulk bytes that devices read and write are not encrypted; see [`crate::ofi`]. That is why [`Transport::Auto`]
//! takes a device only where there is one at both ends, and [`Transport::Tcp`] never does.

use crate::identity::Identity;
use crate::ofi::OfiFabric;
use crate::ofi::session::Sessions;
use crate::tcp::{Offering, TcpFabric};
use crate::{Address, Connection, Fabric, FabricError, Listener, Peer, Service, socket_address};
use cfs_reactor::Handle;
use cfs_reactor::uring::Ring;
use cfs_wire::offers::{Offer, Offers};
use cfs_wire::packet::VERSION;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::OnceCell;
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::str::FromStr;
use std::sync::Arc;

/// The provider that `auto` looks for: the one that has devices of its own.
const DEVICES: &str = "verbs";
/// Where the kernel lists such devices.
const DEVICES_LISTED: &str = "/sys/class/infiniband";
/// Providers that were tried: connected message endpoints with remote memory.
const PROVIDERS: [&str; 2] = [DEVICES, "tcp"];

/// What is to carry messages.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Transport {
    /// RDMA devices where both ends have one, else TCP.
    #[default]
    Auto,
    Tcp,
    /// A provider of libfabric where both ends have it, else TCP.
    Ofi(String),
}

/// What is no [`Transport`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("fabric = {0} is not known; give auto, tcp, ofi:verbs or ofi:tcp")]
pub struct TransportError(String);

impl FromStr for Transport {
    type Err = TransportError;

    fn from_str(text: &str) -> Result<Transport, TransportError> {
        match (text, text.strip_prefix("ofi:")) {
            ("auto", _) => Ok(Transport::Auto),
            ("tcp", _) => Ok(Transport::Tcp),
            (_, Some(provider)) if PROVIDERS.contains(&provider) => Ok(Transport::Ofi(provider.to_owned())),
            _ => Err(TransportError(text.to_owned())),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Transport::Auto => f.write_str("auto"),
            Transport::Tcp => f.write_str("tcp"),
            Transport::Ofi(provider) => write!(f, "ofi:{provider}"),
        }
    }
}

/// A process's access to the network. All its tasks run in one domain.
pub struct NetworkFabric {
    tcp: Rc<TcpFabric>,
    ring: Rc<Ring>,
    handle: Handle,
    transport: Transport,
    /// Made when first needed: it takes some tenths of a second.
    ofi: OnceCell<Result<Rc<OfiFabric>, String>>,
}

impl NetworkFabric {
    /// With an identity every peer must have one of the same authority, on loopback too.
    pub fn new(
        ring: Rc<Ring>,
        handle: &Handle,
        identity: Option<Arc<Identity>>,
        transport: Transport,
    ) -> Rc<NetworkFabric> {
        let tcp = TcpFabric::new(ring.clone(), handle, identity);
        Rc::new(NetworkFabric { tcp, ring, handle: handle.clone(), transport, ofi: OnceCell::new() })
    }

    /// The provider to be used beside TCP, if there is to be one.
    fn provider(&self) -> Option<&str> {
        match &self.transport {
            Transport::Tcp => None,
            Transport::Ofi(provider) => Some(provider),
            Transport::Auto => has_entries(Path::new(DEVICES_LISTED)).then_some(DEVICES),
        }
    }

    fn ofi(&self, provider: &str) -> Result<&Rc<OfiFabric>, String> {
        self.ofi
            .get_or_init(|| OfiFabric::new(self.ring.clone(), &self.handle, provider))
            .as_ref()
            .map_err(String::clone)
    }

    /// Listens by a provider at the host that TCP is to listen at, for sessions.
    fn listen_beside(
        &self,
        provider: &str,
        address: &Address,
        service: &Rc<dyn Service>,
    ) -> Result<Rc<Beside>, String> {
        let at = SocketAddr::new(socket_address(address)?.ip(), 0);
        let sessions = Rc::new(Sessions::default());
        let listener = self.ofi(provider)?.listen_for_sessions(at, service.clone(), sessions.clone())?;
        let offer = Offer { version: VERSION, provider: provider.to_owned(), address: listener.address().0 };
        Ok(Rc::new(Beside { _listener: listener, sessions, offer }))
    }

    /// Goes over to what a server offers, if one of its offers fits.
    async fn take_offer(
        &self,
        provider: &str,
        address: &Address,
        offers: Offers,
    ) -> Result<Rc<dyn Connection>, String> {
        let fits = |offer: &&Offer| offer.provider == provider && offer.version == VERSION;
        let offer = offers.offers.iter().find(fits).ok_or("the server does not offer it")?;
        let mut at = socket_address(&Address(offer.address.clone()))?;
        if at.ip().is_unspecified() {
            at.set_ip(socket_address(address)?.ip());
        }
        let connection = self.ofi(provider)?.connect_session(address, at, offers.token, offers.key).await;
        connection.map_err(|error| error.to_string())
    }
}

fn has_entries(directory: &Path) -> bool {
    std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}

/// What listens beside TCP.
struct Beside {
    _listener: Box<dyn Listener>,
    sessions: Rc<Sessions>,
    offer: Offer,
}

impl Offering for Beside {
    fn offers(&self, handle: &Handle, peer: &Peer) -> Vec<u8> {
        let none = Offers { token: [0; 32], key: [0; 32], offers: Vec::new() };
        let offers = match self.sessions.give(handle, peer) {
            Some((token, key)) => Offers { token, key, offers: vec![self.offer.clone()] },
            None => none,
        };
        offers.encode().expect("a provider and an address are short")
    }
}

/// TCP, and what listens beside it.
struct NetworkListener {
    tcp: Box<dyn Listener>,
    beside: Option<Rc<Beside>>,
}

impl Listener for NetworkListener {
    fn address(&self) -> Address {
        self.tcp.address()
    }

    fn offers(&self) -> Vec<String> {
        self.beside.iter().map(|beside| format!("ofi:{}", beside.offer.provider)).collect()
    }
}

impl Fabric for NetworkFabric {
    /// `host:port`, for TCP; port 0 lets the system choose. A provider that was asked for by name must be there.
    fn listen(&self, address: &Address, service: Rc<dyn Service>) -> Result<Box<dyn Listener>, FabricError> {
        let beside = match self.provider().map(|provider| self.listen_beside(provider, address, &service)) {
            None => None,
            Some(Ok(beside)) => Some(beside),
            Some(Err(detail)) if self.transport == Transport::Auto => {
                tracing::warn!(detail, "RDMA devices are not used");
                None
            }
            Some(Err(detail)) => return Err(FabricError::Listen { address: address.clone(), detail }),
        };
        let tcp = match &beside {
            Some(beside) => self.tcp.listen_and_offer(address, service, beside.clone())?,
            None => self.tcp.listen(address, service)?,
        };
        Ok(Box::new(NetworkListener { tcp, beside }))
    }

    fn connect(&self, address: &Address) -> LocalBoxFuture<'_, Result<Rc<dyn Connection>, FabricError>> {
        let address = address.clone();
        async move {
            let Some(provider) = self.provider() else { return self.tcp.connect(&address).await };
            let (tcp, offers) = self.tcp.connect_and_ask(&address, true).await?;
            let Some(offers) = offers else { return Ok(tcp) };
            match self.take_offer(provider, &address, offers).await {
                Ok(connection) => Ok(connection),
                Err(detail) => {
                    tracing::warn!(%address, provider, detail, "TCP serves");
                    Ok(tcp)
                }
            }
        }
        .boxed_local()
    }
}

/// What a server offers, for tests that stand between a client and it.
#[doc(hidden)]
pub async fn offers_of(
    ring: Rc<Ring>,
    handle: &Handle,
    address: &Address,
) -> Result<(Rc<dyn Connection>, Offers), FabricError> {
    let (tcp, offers) = TcpFabric::new(ring, handle, None).connect_and_ask(address, true).await?;
    Ok((tcp, offers.expect("it has offers")))
}

/// Connects to a place with a session that was given, for tests that stand between a client and a server.
#[doc(hidden)]
pub async fn use_session(
    ring: Rc<Ring>,
    handle: &Handle,
    provider: &str,
    address: Address,
    offers: Offers,
) -> Result<Rc<dyn Connection>, FabricError> {
    let fabric = OfiFabric::new(ring, handle, provider).expect("it is there");
    let at = socket_address(&address).expect("it is one");
    fabric.connect_session(&address, at, offers.token, offers.key).await
}
