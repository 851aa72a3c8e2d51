//! Carries one admin call over a connection.

use crate::{AdminCall, AdminError, AdminReply, OP_ADMIN};
use bytes::Bytes;
use cfs_fabric::{Connection, FabricError, Message};
use cfs_wire::body::{self, BodyError};

/// Why an admin call gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error(transparent)]
    Fabric(#[from] FabricError),
    #[error("the server's answer cannot be read: {0}")]
    Body(#[from] BodyError),
    #[error(transparent)]
    Refused(#[from] AdminError),
}

pub async fn call(connection: &dyn Connection, call: &AdminCall) -> Result<AdminReply, CallError> {
    let request = Message { opcode: OP_ADMIN, body: body::encode(call)?, bulk: Bytes::new() };
    let reply = connection.call(request).await?;
    Ok(body::decode::<Result<AdminReply, AdminError>>(&reply.body)??)
}
