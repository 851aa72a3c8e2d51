//! Where applying an entry meets the call that proposed it.
//!
//! Every proposal carries a nonce. The replica that applies the entry on the proposer's node
//! leaves the outcome here under that nonce; entries replayed after a restart, or proposed by
//! others, find nobody waiting. So outcomes never travel, and the log holds no replies.

use super::readers::{Read, Readers};
use crate::state::{FollowUp, LogEntry, Outcome};
use bytes::{BufMut, Bytes, BytesMut};
use cfs_reactor::sync::Notify;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// First byte of every entry of a metadata shard's log; an unknown one is refused.
const FORMAT: u8 = 1;
/// Format and nonce.
const HEADER_BYTES: usize = 9;

/// Why a log entry can't be understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EntryError {
    #[error("log entry of {0} bytes is too short")]
    Short(usize),
    #[error("log entry has format {0}, which this version does not know")]
    UnknownFormat(u8),
    #[error("log entry does not decode")]
    Malformed,
}

/// An entry as it stands in the log: format (1 byte), nonce (8, little-endian), postcard.
pub fn encode_entry(nonce: u64, entry: &LogEntry) -> Bytes {
    let mut bytes = BytesMut::with_capacity(256);
    bytes.put_u8(FORMAT);
    bytes.put_u64_le(nonce);
    let bytes = postcard::to_extend(entry, Vec::from(bytes)).expect("entries have no unserialisable parts");
    Bytes::from(bytes)
}

pub fn decode_entry(bytes: &[u8]) -> Result<(u64, LogEntry), EntryError> {
    let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or(EntryError::Short(bytes.len()))?;
    let (format, nonce) = header.split_first().ok_or(EntryError::Short(0))?;
    if *format != FORMAT {
        return Err(EntryError::UnknownFormat(*format));
    }
    let nonce = u64::from_le_bytes(nonce.try_into().map_err(|_| EntryError::Short(bytes.len()))?);
    let entry = cfs_wire::body::decode_stored(body).map_err(|_| EntryError::Malformed)?;
    Ok((nonce, entry))
}

/// An applied entry, for the call that proposed it.
pub struct Delivery {
    pub outcome: Outcome,
    /// Begun when the entry was applied: says whether anybody changed the same inodes since.
    pub read: Read,
}

/// Shared by a shard's replica and the service on the same node.
pub struct Applied {
    waiting: RefCell<BTreeMap<u64, Option<Delivery>>>,
    readers: Readers,
    /// Notified at every applied entry.
    progress: Rc<Notify>,
    /// Notified when a transaction no longer holds keys.
    unblocked: Rc<Notify>,
}

impl Applied {
    pub fn new() -> Rc<Applied> {
        let readers = Readers::default();
        Rc::new(Applied {
            waiting: RefCell::new(BTreeMap::new()),
            readers,
            progress: Notify::new(),
            unblocked: Notify::new(),
        })
    }

    pub fn readers(&self) -> &Readers {
        &self.readers
    }

    pub fn progress(&self) -> &Rc<Notify> {
        &self.progress
    }

    pub fn unblocked(&self) -> &Rc<Notify> {
        &self.unblocked
    }

    /// Called by the replica once the outcome's batch is visible to readers.
    pub fn publish(&self, nonce: u64, outcome: Outcome) {
        self.readers.changed(outcome.changes.iter().map(|change| change.ino));
        self.progress.notify_all();
        if outcome.follow_up.iter().any(|next| matches!(next, FollowUp::Unblocked { .. })) {
            self.unblocked.notify_all();
        }
        if let Some(slot) = self.waiting.borrow_mut().get_mut(&nonce) {
            *slot = Some(Delivery { outcome, read: self.readers.begin_read() });
        }
    }

    /// Announces a proposal; the slot goes when the [`Expected`] is dropped.
    pub(super) fn expect(self: &Rc<Self>, nonce: u64) -> Expected {
        self.waiting.borrow_mut().insert(nonce, None);
        Expected { applied: self.clone(), nonce }
    }

    /// Whether something was proposed that is not applied yet.
    pub(super) fn is_awaited(&self) -> bool {
        self.waiting.borrow().values().any(Option::is_none)
    }
}

pub(super) struct Expected {
    applied: Rc<Applied>,
    nonce: u64,
}

impl Expected {
    pub fn take(&self) -> Option<Delivery> {
        self.applied.waiting.borrow_mut().get_mut(&self.nonce).and_then(Option::take)
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let slot = self.applied.waiting.borrow_mut().remove(&self.nonce);
        drop(slot);
    }
}
