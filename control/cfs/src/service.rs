//! Sorts requests that arrive over the fabric by opcode.

use crate::admin;
use crate::node::Node;
use bytes::Bytes;
use cfs_api::{AdminCall, AdminError, AdminReply, OP_ADMIN};
use cfs_fabric::{Message, Peer, Service};
use cfs_meta::service::MetaService;
use cfs_store::segment::DataService;
use cfs_wire::body;
use cfs_wire::meta::{MetaError, MountCall, MountReply, MountResult, OP_MOUNT};
use cfs_wire::{Ino, SessionId};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::rc::{Rc, Weak};

/// The node's one service. It holds the node weakly: the listener that holds it is the node's.
pub struct Dispatch {
    node: Weak<Node>,
    data: DataService,
}

impl Dispatch {
    pub fn new(node: &Rc<Node>) -> Dispatch {
        Dispatch { node: Rc::downgrade(node), data: DataService::new(node.store().clone()) }
    }

    async fn answer(&self, request: Message) -> Message {
        let Some(node) = self.node.upgrade() else { return Message::default() };
        if MetaService::answers(request.opcode) {
            return node.meta().handle(request).await;
        }
        match request.opcode {
            OP_MOUNT => reply::<MountReply, MetaError>(mount(&node, &request.body)),
            OP_ADMIN => {
                let outcome = match body::decode::<AdminCall>(&request.body) {
                    Ok(call) => admin::answer(&node, call).await,
                    Err(error) => Err(AdminError::Malformed(error.to_string())),
                };
                reply::<AdminReply, AdminError>(outcome)
            }
            opcode if node.replicas().answers(opcode) => node.replicas().handle(request).await,
            opcode => match self.data.handle(request).await {
                Some(message) => message,
                None => {
                    let detail = format!("opcode {opcode:#06x} is unknown to this server");
                    reply::<(), MetaError>(Err(MetaError::Malformed(detail)))
                }
            },
        }
    }
}

impl Service for Dispatch {
    fn handle(&self, _peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        self.answer(request).boxed_local()
    }
}

/// A client's first call: the server draws its session.
fn mount(node: &Node, bytes: &[u8]) -> MountResult {
    let call: MountCall = body::decode(bytes).map_err(|error| MetaError::Malformed(error.to_string()))?;
    let session = SessionId(node.handle().random_u64());
    tracing::info!(client = %call.client, %session, "a client mounts");
    Ok(MountReply {
        volume: crate::node::VOLUME,
        root: Ino::ROOT,
        shards: node.parameters().shards,
        lease_ms: node.config().meta.session_lease.as_millis() as u32,
        session,
        policy: node.parameters().policy,
    })
}

fn reply<T: serde::Serialize, E: serde::Serialize>(outcome: Result<T, E>) -> Message {
    let body = body::encode(&outcome).unwrap_or_else(|error| {
        tracing::error!(%error, "a reply can't be sent");
        Bytes::new()
    });
    Message { opcode: 0, body, bulk: Bytes::new() }
}
