//! The service behind the fabric: bodies in, bodies out.

use super::MetaService;
use super::peers::{OP_PEER, PeerCall};
use crate::state;
use bytes::Bytes;
use cfs_fabric::{Message, Peer, Service};
use cfs_wire::body;
use cfs_wire::meta::{
    EventsCall, EventsReply, MetaCall, MetaError, MetaResult, OP_EVENTS, OP_META, OP_SHARD, ShardOp, ShardReply,
};
use cfs_wire::{SessionId, ShardId};
use futures_util::future::LocalBoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// The status of every reply: failures are in the body, where their type says what they are.
const STATUS_ANSWERED: u16 = 0;
/// How long a session that no shard here knows is held: it may be about to open itself.
const UNKNOWN_HOLD: Duration = Duration::from_millis(200);

impl MetaService {
    /// The opcodes this service answers.
    pub fn answers(opcode: u16) -> bool {
        matches!(opcode, OP_META | OP_EVENTS | OP_SHARD | OP_PEER)
    }

    /// Answers one request. The reply's body is, by opcode, a [`MetaResult`], a
    /// `Result<EventsReply, MetaError>`, a `Result<ShardReply, MetaError>` or a
    /// `Result<PeerReply, MetaError>`.
    pub async fn handle(&self, request: Message) -> Message {
        match request.opcode {
            OP_META => {
                let result: MetaResult = match decode::<MetaCall>(&request.body) {
                    Ok(call) => self.call(call).await,
                    Err(error) => Err(error),
                };
                reply(&result)
            }
            OP_EVENTS => {
                let result = match decode::<EventsCall>(&request.body) {
                    Ok(call) => Ok(self.events(call).await),
                    Err(error) => Err(error),
                };
                reply(&result)
            }
            OP_SHARD => {
                let result: Result<ShardReply, MetaError> = match decode::<(ShardId, ShardOp)>(&request.body) {
                    Ok((shard, op)) => self.shard_call(shard, op).await,
                    Err(error) => Err(error),
                };
                reply(&result)
            }
            OP_PEER => {
                let result = match decode::<(ShardId, PeerCall)>(&request.body) {
                    Ok((shard, call)) => self.peer_call(shard, call).await,
                    Err(error) => Err(error),
                };
                reply(&result)
            }
            other => reply(&MetaResult::Err(MetaError::Malformed(format!(
                "opcode {other:#06x} is not the metadata service's"
            )))),
        }
    }

    /// Answers a client's long poll; it also says that the client lives.
    pub async fn events(&self, call: EventsCall) -> EventsReply {
        let session = call.session;
        let hold = Duration::from_millis(call.hold_ms.into()).min(self.inner.config.hold_max());
        let shards = || self.inner.shards.values();
        if self.has_fenced(session) {
            // Also where another shard does not know yet: its fencing is under way.
            return EventsReply { events: Vec::new(), alive: false };
        }
        if !shards().any(|shard| shard.knows(session)) {
            // Fenced before this node started, or not opened yet: there is nothing to wait for.
            let alive = !self.is_fenced(session).await;
            self.inner.handle.sleep(if alive { hold.min(UNKNOWN_HOLD) } else { Duration::ZERO }).await;
            return EventsReply { events: Vec::new(), alive };
        }
        self.heard_of(session);
        self.inner.events.poll(&call, hold, || !self.has_fenced(session)).await
    }

    async fn is_fenced(&self, session: SessionId) -> bool {
        for shard in self.inner.shards.values() {
            if matches!(state::check_session(&*shard.view(), shard.id, session).await, Ok(Err(MetaError::Fenced))) {
                return true;
            }
        }
        false
    }
}

impl Service for MetaService {
    fn handle(&self, _peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        Box::pin(MetaService::handle(self, request))
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, MetaError> {
    body::decode(bytes).map_err(|error| MetaError::Malformed(error.to_string()))
}

fn reply<T: Serialize>(result: &Result<T, MetaError>) -> Message {
    let encoded = body::encode(result).or_else(|error| {
        // A reply too large to send: the caller asks for less at a time.
        tracing::error!(%error, "a metadata reply can't be sent");
        body::encode(&Err::<(), MetaError>(MetaError::Malformed(error.to_string())))
    });
    Message { opcode: STATUS_ANSWERED, body: encoded.unwrap_or_default(), bulk: Bytes::new() }
}
