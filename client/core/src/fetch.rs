//! Calls of the data plane. Both may be repeated freely: `store` makes new garbage at worst.

use crate::Client;
use crate::calls::Backoff;
use crate::link::LinkError;
use bytes::{Bytes, BytesMut};
use cfs_wire::data::{DataError, FetchCall, OP_FETCH, OP_STORE, Piece, StoreCall, StoreReply};
use cfs_wire::limits::{FETCH_PIECES_MAX, STORE_BYTES_MAX};
use cfs_wire::{Errno, Ino, Policy, body};
use std::rc::Rc;

/// Why stored bytes did not come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FetchError {
    /// Nothing can be read where the extents point; they may point elsewhere by now.
    Moved,
    Errno(Errno),
}

impl Client {
    /// Makes bytes durable for a file; answers where they are. `kept`: they are charged for.
    pub(crate) async fn store(
        self: &Rc<Self>,
        ino: Ino,
        policy: Policy,
        bulk: Bytes,
        kept: bool,
    ) -> Result<StoreReply, Errno> {
        let mut backoff = Backoff::new(self);
        loop {
            // Anew each time: what was not answered may have taken room.
            let mut claimed = self.claim(bulk.len(), kept);
            let call = StoreCall { volume: self.volume(), ino, policy, claim: claimed.claim };
            let encoded = body::encode(&call).map_err(|_| Errno::EIO)?;
            let answer = self.data.call(OP_STORE, encoded, bulk.clone(), self.config.data_timeout).await;
            let answer = answer.map(|message| body::decode::<Result<StoreReply, DataError>>(&message.body));
            if matches!(answer, Ok(Ok(Err(_)))) {
                claimed.give_back();
            }
            drop(claimed);
            match answer {
                Ok(Ok(Ok(reply))) => return Ok(reply),
                Ok(Ok(Err(DataError::NoSpace))) => return Err(Errno::ENOSPC),
                Ok(Ok(Err(error))) if error.is_retryable() => {}
                Ok(Ok(Err(error))) => {
                    tracing::error!(%error, "bytes cannot be stored");
                    return Err(Errno::EIO);
                }
                Ok(Err(error)) => {
                    tracing::error!(%error, "the data plane's answer is malformed");
                    return Err(Errno::EIO);
                }
                Err(LinkError::Unanswered(_)) => {}
                Err(LinkError::Refused(error)) => {
                    tracing::error!(%error, "bytes cannot be sent");
                    return Err(Errno::EIO);
                }
            }
            if !backoff.wait(self).await {
                return Err(Errno::EIO);
            }
        }
    }

    /// Stored runs, one after the other.
    pub(crate) async fn fetch(self: &Rc<Self>, pieces: Vec<Piece>) -> Result<Bytes, FetchError> {
        let mut parts = Vec::new();
        let mut call: Vec<Piece> = Vec::new();
        let mut length = 0;
        for piece in pieces {
            if call.len() == FETCH_PIECES_MAX || length + piece.length as usize > STORE_BYTES_MAX {
                parts.push(self.fetch_once(std::mem::take(&mut call), length).await?);
                length = 0;
            }
            length += piece.length as usize;
            call.push(piece);
        }
        if !call.is_empty() {
            parts.push(self.fetch_once(call, length).await?);
        }
        if let [only] = &parts[..] {
            return Ok(only.clone());
        }
        let mut joined = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
        for part in &parts {
            joined.extend_from_slice(part);
        }
        Ok(joined.freeze())
    }

    async fn fetch_once(self: &Rc<Self>, pieces: Vec<Piece>, length: usize) -> Result<Bytes, FetchError> {
        let encoded = body::encode(&FetchCall { pieces }).map_err(|_| FetchError::Errno(Errno::EIO))?;
        let mut backoff = Backoff::new(self);
        loop {
            match self.data.call_for(OP_FETCH, encoded.clone(), length, self.config.data_timeout).await {
                Ok(message) => match body::decode::<Result<(), DataError>>(&message.body) {
                    Ok(Ok(())) if message.bulk.len() == length => return Ok(message.bulk),
                    Ok(Ok(())) => {
                        tracing::error!(length, got = message.bulk.len(), "the data plane sent another length");
                        return Err(FetchError::Errno(Errno::EIO));
                    }
                    Ok(Err(DataError::Gone)) => return Err(FetchError::Moved),
                    Ok(Err(error)) if error.is_retryable() => {}
                    Ok(Err(error)) => {
                        tracing::error!(%error, "bytes cannot be read");
                        let moved = matches!(error, DataError::Unreadable(_));
                        return Err(if moved { FetchError::Moved } else { FetchError::Errno(Errno::EIO) });
                    }
                    Err(error) => {
                        tracing::error!(%error, "the data plane's answer is malformed");
                        return Err(FetchError::Errno(Errno::EIO));
                    }
                },
                Err(LinkError::Unanswered(_)) => {}
                Err(LinkError::Refused(error)) => {
                    tracing::error!(%error, "a fetch cannot be sent");
                    return Err(FetchError::Errno(Errno::EIO));
                }
            }
            if !backoff.wait(self).await {
                return Err(FetchError::Errno(Errno::EIO));
            }
        }
    }
}
