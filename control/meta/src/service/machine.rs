//! A shard's replica: applies the log to the ordered store.

use super::applied::{Applied, EntryError, decode_entry};
use super::config::ShardHandle;
use crate::state::{self, Outcome, Reader, StateError};
use bytes::Bytes;
use cfs_kv::{Batch, Kv, KvError, KvSnapshot};
use cfs_wire::ShardId;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use std::ops::Bound;
use std::rc::Rc;

/// Why a replica can't apply an entry. It then stops: guessing would make replicas differ.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Entry(#[from] EntryError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Store(#[from] KvError),
}

/// The state machine of one shard over its ordered store.
pub struct ShardMachine {
    shard: ShardId,
    kv: Rc<Kv>,
    applied: Rc<Applied>,
}

impl ShardMachine {
    pub fn new(shard: ShardId, kv: Rc<Kv>) -> ShardMachine {
        ShardMachine { shard, kv, applied: Applied::new() }
    }

    pub fn kv(&self) -> &Rc<Kv> {
        &self.kv
    }

    /// What the service needs of this replica.
    pub fn handle(&self) -> ShardHandle {
        let kv = self.kv.clone();
        let view = Rc::new(move || Rc::new(KvView(kv.snapshot())) as Rc<dyn Reader>);
        ShardHandle { shard: self.shard, view, applied: self.applied.clone() }
    }

    /// Applies the next entry; `mark` is stored with its effects. Entries come one at a time, in
    /// log order.
    pub async fn apply_entry(&self, entry: &[u8], mark: Bytes) -> Result<(), MachineError> {
        let (nonce, entry) = decode_entry(entry)?;
        self.kv.admit().await?;
        let outcome = state::apply(&KvView(self.kv.snapshot()), self.shard, &entry).await?;
        self.kv.write(batch_of(&outcome), mark);
        self.applied.publish(nonce, outcome);
        Ok(())
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
