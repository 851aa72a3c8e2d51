//! The fabric seam: requests and replies between peers whose identity is known, with bulk
//! bytes beside the body so that a back end may move them one-sided and without copies.
//!
//! Back ends: [`tcp`] (io_uring sockets), [`ofi`] (libfabric: devices that reach memory themselves;
//! [`network`] chooses) and [`mem`] (in process, seeded: delay, loss, reordering, resets, partition). A
//! fabric belongs to one executor. Start at [`Fabric`].
//!
//! A call may be lost after it was executed: whoever calls retries under a request id that
//! the service recognises. The fabric itself never retries. Calls on one connection have no
//! order among each other. Bulk bytes arrive at the start of a page, so that they can go to a
//! device as they are.

pub mod identity;
pub mod mem;
pub mod network;
pub mod ofi;
mod sum;
pub mod tcp;

use bytes::Bytes;
use cfs_wire::limits::{RPC_BODY_BYTES_MAX, RPC_BULK_BYTES_MAX};
use futures_util::future::LocalBoxFuture;
use std::fmt;
use std::net::SocketAddr;
use std::rc::Rc;

/// Where a peer listens: `host:port` for TCP, a name for `mem`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Address(pub String);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The socket address meant by `host:port`, or why there is none.
fn socket_address(address: &Address) -> Result<SocketAddr, String> {
    let text = match address.0.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => address.0.clone(),
    };
    text.parse().map_err(|_| "expected an IP address and a port, such as 127.0.0.1:7400".to_owned())
}

/// Who is at the other end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peer {
    /// A process on this machine, known only to be local.
    Local,
    /// Whom the cluster's authority issued a certificate for, by name.
    Certified(String),
    /// A simulated node, by name.
    Simulated(String),
}

/// One request or reply: an opcode (requests) or status (replies), a body in the wire's
/// serialisation, and bulk bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Message {
    pub opcode: u16,
    pub body: Bytes,
    pub bulk: Bytes,
}

impl Message {
    /// Whether both parts are within the wire's limits.
    fn check_length(&self) -> Result<(), FabricError> {
        for (part, limit) in [(&self.body, RPC_BODY_BYTES_MAX), (&self.bulk, RPC_BULK_BYTES_MAX)] {
            if part.len() > limit {
                return Err(FabricError::TooLarge { length: part.len(), limit });
            }
        }
        Ok(())
    }
}

/// Calls under way on one connection at most; the next waits for a reply. Deep enough to keep
/// a device's queue full from one client.
pub const CALLS_MAX: usize = 256;

/// Why a call gave no reply.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FabricError {
    #[error("cannot connect to {address}: {detail}")]
    Connect { address: Address, detail: String },
    #[error("cannot listen on {address}: {detail}")]
    Listen { address: Address, detail: String },
    #[error("the connection to {address} was lost: {detail}")]
    Lost { address: Address, detail: String },
    #[error("{address} speaks version {theirs}, this program speaks {ours}: upgrade the older one")]
    Version { address: Address, theirs: u16, ours: u16 },
    #[error("message of {length} bytes exceeds the limit of {limit}")]
    TooLarge { length: usize, limit: usize },
    #[error("{address} and this program do not trust each other: {detail}")]
    Distrust { address: Address, detail: String },
    #[error("{address} is no address to connect to: {detail}")]
    Address { address: Address, detail: String },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Local => f.write_str("a local process"),
            Peer::Certified(name) | Peer::Simulated(name) => f.write_str(name),
        }
    }
}

impl FabricError {
    /// Whether the same call may succeed later, perhaps over a new connection. The call may
    /// have been executed.
    pub fn is_retryable(&self) -> bool {
        matches!(self, FabricError::Connect { .. } | FabricError::Lost { .. })
    }
}

/// Answers requests. Each runs as its own task; the fabric bounds how many run at once.
pub trait Service: 'static {
    fn handle(&self, peer: Peer, request: Message) -> LocalBoxFuture<'_, Message>;
}

/// A connection: many calls at once, answered in any order. Dropping the call's future
/// abandons the reply, not the execution.
pub trait Connection: 'static {
    fn call(&self, request: Message) -> LocalBoxFuture<'_, Result<Message, FabricError>>;

    /// A call whose reply has at most so many bulk bytes, as far as the caller knows: where bulk bytes are moved
    /// one-sided, memory for them goes along. More may come all the same.
    fn call_with_room(&self, request: Message, _room: usize) -> LocalBoxFuture<'_, Result<Message, FabricError>> {
        self.call(request)
    }

    /// True once the connection is lost; a new one must be made.
    fn is_closed(&self) -> bool;

    fn peer_address(&self) -> Address;

    /// What carries it: `tcp`, `mem`, or `ofi:` and a provider of libfabric.
    fn carrier(&self) -> String;
}

/// A listener: stops when dropped.
pub trait Listener: 'static {
    /// The address bound, with the port the system chose.
    fn address(&self) -> Address;

    /// What clients are offered beside what this fabric is by itself, as [`Connection::carrier`] has it.
    fn offers(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Connects and listens.
pub trait Fabric: 'static {
    fn listen(&self, address: &Address, service: Rc<dyn Service>) -> Result<Box<dyn Listener>, FabricError>;

    fn connect(&self, address: &Address) -> LocalBoxFuture<'_, Result<Rc<dyn Connection>, FabricError>>;
}
