//! A shard's replica: applies the log to the ordered store.

use super::applied::{Applied, EntryError, decode_entry};
use super::config::ShardHandle;
use super::snapshot::{StateIn, StateOut};
use crate::state::{self, Outcome, Reader, StateError};
use bytes::Bytes;
use cfs_consensus::{self as consensus, AppliedEntry, Mark, SnapshotSink, SnapshotSource, StateMachine};
use cfs_kv::{Batch, Kv, KvError, KvSnapshot};
use cfs_reactor::Handle;
use cfs_wire::ShardId;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use std::ops::Bound;
use std::rc::Rc;
use std::time::Duration;

/// Long against a checkpoint, short against a client's patience.
const ADMIT_AGAIN: Duration = Duration::from_millis(100);

/// The state machine of one shard over its ordered store.
pub struct ShardMachine {
    shard: ShardId,
    kv: Rc<Kv>,
    applied: Rc<Applied>,
    handle: Handle,
}

impl ShardMachine {
    pub fn new(shard: ShardId, kv: Rc<Kv>, handle: &Handle) -> Rc<ShardMachine> {
        Rc::new(ShardMachine { shard, kv, applied: Applied::new(), handle: handle.clone() })
    }

    /// What the service needs of this replica.
    pub fn shard_handle(&self) -> ShardHandle {
        let kv = self.kv.clone();
        let view = Rc::new(move || Rc::new(KvView(kv.snapshot())) as Rc<dyn Reader>);
        ShardHandle { shard: self.shard, view, applied: self.applied.clone() }
    }

    /// Waits until the store takes an entry. What time can mend, as a lack of space, is waited
    /// for: an error would stop the group until the node is started again.
    async fn admit(&self) -> Result<(), consensus::StateError> {
        let mut waited = false;
        loop {
            match self.kv.admit().await {
                Err(error) if error.is_retryable() => {
                    if !std::mem::replace(&mut waited, true) {
                        tracing::warn!(shard = %self.shard, %error, "nothing is applied until the store can be written");
                    }
                    self.handle.sleep(ADMIT_AGAIN).await;
                }
                outcome => return outcome.map_err(store_error),
            }
        }
    }

    async fn apply_one(&self, entry: AppliedEntry) -> Result<Bytes, consensus::StateError> {
        self.admit().await?;
        let Some(payload) = entry.payload else {
            self.kv.write(Batch::new(), entry.mark);
            return Ok(Bytes::new());
        };
        let (nonce, decoded) = decode_entry(&payload).map_err(|error| entry_error(&error, &entry.mark))?;
        let outcome = state::apply(&KvView(self.kv.snapshot()), self.shard, &decoded).await.map_err(state_error)?;
        self.kv.write(batch_of(&outcome), entry.mark);
        self.applied.publish(nonce, outcome);
        Ok(Bytes::new())
    }

    /// Starts writing a full memtable out, so that entries need not wait for it.
    fn relieve(&self) {
        if !self.kv.should_checkpoint() {
            return;
        }
        let (kv, shard) = (self.kv.clone(), self.shard);
        self.handle.spawn(async move {
            if let Err(error) = kv.checkpoint().await {
                tracing::warn!(%shard, %error, "checkpoint failed; the next one tries again");
            }
        });
    }
}

impl StateMachine for ShardMachine {
    fn applied(&self) -> Option<Bytes> {
        Some(self.kv.applied()).filter(|mark| !mark.is_empty())
    }

    fn apply(&self, entries: Vec<AppliedEntry>) -> LocalBoxFuture<'_, Result<Vec<Bytes>, consensus::StateError>> {
        async move {
            let mut replies = Vec::with_capacity(entries.len());
            for entry in entries {
                replies.push(self.apply_one(entry).await?);
            }
            self.relieve();
            Ok(replies)
        }
        .boxed_local()
    }

    fn checkpoint(&self) -> LocalBoxFuture<'_, Result<Bytes, consensus::StateError>> {
        async move { self.kv.checkpoint().await.map_err(store_error) }.boxed_local()
    }

    fn synced(&self) -> Option<Bytes> {
        Some(self.kv.synced()).filter(|mark| !mark.is_empty())
    }

    fn snapshot(&self) -> LocalBoxFuture<'_, Result<Box<dyn SnapshotSource>, consensus::StateError>> {
        let source = StateOut::new(&self.kv);
        async move { Ok(Box::new(source) as Box<dyn SnapshotSource>) }.boxed_local()
    }

    fn restore(&self) -> LocalBoxFuture<'_, Result<Box<dyn SnapshotSink>, consensus::StateError>> {
        let sink = StateIn::new(&self.kv);
        async move { Ok(Box::new(sink) as Box<dyn SnapshotSink>) }.boxed_local()
    }
}

pub(super) fn store_error(error: KvError) -> consensus::StateError {
    match error {
        KvError::Blob(error) => consensus::StateError::Store(error),
        KvError::Closed => consensus::StateError::Closed,
        other => consensus::StateError::Corrupt { detail: other.to_string() },
    }
}

fn state_error(error: StateError) -> consensus::StateError {
    consensus::StateError::Corrupt { detail: error.to_string() }
}

fn entry_error(error: &EntryError, mark: &[u8]) -> consensus::StateError {
    match error {
        EntryError::UnknownFormat(_) => {
            let index = Mark::decode(mark).ok().and_then(|mark| mark.index()).unwrap_or(0);
            consensus::StateError::Unknown { index }
        }
        other => consensus::StateError::Corrupt { detail: other.to_string() },
    }
}

fn batch_of(outcome: &Outcome) -> Batch {
    let mut batch = Batch::new();
    for (key, value) in &outcome.batch {
        match value {
            Some(value) => batch.put(key.clone(), value.clone()),
            None => batch.delete(key.clone()),
        }
    }
    batch
}

/// The ordered store as the state machine reads it, as of one batch.
struct KvView(KvSnapshot);

fn storage(error: KvError) -> StateError {
    StateError::Storage(error.to_string())
}

impl Reader for KvView {
    fn get<'a>(&'a self, key: &'a [u8]) -> LocalBoxFuture<'a, Result<Option<Bytes>, StateError>> {
        async move { self.0.get(key).await.map_err(storage) }.boxed_local()
    }

    fn scan(
        &self,
        start: Vec<u8>,
        end: Vec<u8>,
        max: usize,
    ) -> LocalBoxFuture<'_, Result<Vec<(Bytes, Bytes)>, StateError>> {
        async move {
            let mut found = Vec::new();
            if start >= end {
                return Ok(found);
            }
            let mut scan = self.0.scan((Bound::Included(start.into()), Bound::Excluded(end.into())));
            while found.len() < max {
                match scan.next().await.map_err(storage)? {
                    Some(pair) => found.push(pair),
                    None => break,
                }
            }
            Ok(found)
        }
        .boxed_local()
    }
}
