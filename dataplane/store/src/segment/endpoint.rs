//! The data-plane endpoint: `store`, `fetch` and `reserve` as they arrive over a fabric.

use super::SegmentStore;
use bytes::Bytes;
use cfs_fabric::Message;
use cfs_wire::body;
use cfs_wire::data::{
    DataError, FetchCall, OP_FETCH, OP_RESERVE, OP_STORE, ReserveCall, ReserveReply, StoreCall, StoreReply,
};
use std::rc::Rc;

/// Decodes requests for [`SegmentStore`] and encodes its answers. The reply body is always
/// `Result<_, DataError>`.
pub struct DataService {
    store: Rc<SegmentStore>,
}

impl DataService {
    pub fn new(store: Rc<SegmentStore>) -> DataService {
        DataService { store }
    }

    /// Answers one request; `None` when the opcode is not one of this service's.
    pub async fn handle(&self, request: Message) -> Option<Message> {
        match request.opcode {
            OP_STORE => {
                let outcome = match body::decode::<StoreCall>(&request.body) {
                    Ok(call) => self.store.store(&call, request.bulk).await,
                    Err(error) => Err(DataError::Malformed(error.to_string())),
                };
                Some(reply::<StoreReply>(OP_STORE, outcome, Bytes::new()))
            }
            OP_FETCH => {
                let outcome = match body::decode::<FetchCall>(&request.body) {
                    Ok(call) => self.store.fetch(&call).await,
                    Err(error) => Err(DataError::Malformed(error.to_string())),
                };
                let (outcome, bulk) = match outcome {
                    Ok(bulk) => (Ok(()), bulk),
                    Err(error) => (Err(error), Bytes::new()),
                };
                Some(reply::<()>(OP_FETCH, outcome, bulk))
            }
            OP_RESERVE => {
                let outcome = match body::decode::<ReserveCall>(&request.body) {
                    Ok(call) => Ok(self.store.reserve(&call)),
                    Err(error) => Err(DataError::Malformed(error.to_string())),
                };
                Some(reply::<ReserveReply>(OP_RESERVE, outcome, Bytes::new()))
            }
            _ => None,
        }
    }
}

fn reply<T: serde::Serialize>(opcode: u16, outcome: Result<T, DataError>, bulk: Bytes) -> Message {
    let body = body::encode(&outcome).unwrap_or_else(|error| {
        let refusal: Result<T, DataError> = Err(DataError::Malformed(error.to_string()));
        body::encode(&refusal).unwrap_or_default()
    });
    Message { opcode, body, bulk }
}
