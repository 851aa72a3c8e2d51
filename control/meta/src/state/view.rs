//! The state as one entry sees it: what is stored, and over it what the entry has written.

use super::entry::{Change, ChangeKind, FollowUp, Outcome, Reply, TxnId};
use super::records::{Config, Counters, Versioned, decode, encode};
use super::{Reader, StateError, bounds, keys};
use bytes::Bytes;
use cfs_wire::data::{Location, Referent};
use cfs_wire::meta::MetaError;
use cfs_wire::{Errno, Ino, ShardId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};

/// Why an operation did nothing.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Fail {
    Refused(MetaError),
    /// A prepared transaction holds a key.
    Blocked(TxnId),
    /// What a transaction's plan assumed is no longer so.
    Changed,
    /// The leader has to find something out first.
    Need(Box<Reply>),
    Storage(StateError),
}

impl From<Errno> for Fail {
    fn from(errno: Errno) -> Fail {
        Fail::Refused(MetaError::Errno(errno))
    }
}

impl From<MetaError> for Fail {
    fn from(error: MetaError) -> Fail {
        Fail::Refused(error)
    }
}

impl From<StateError> for Fail {
    fn from(error: StateError) -> Fail {
        Fail::Storage(error)
    }
}

pub(crate) type Attempt<T> = Result<T, Fail>;

/// Rows fetched at once where a whole range is walked.
const PAGE_ROWS: usize = 256;

type Writes = BTreeMap<Vec<u8>, Option<Bytes>>;

pub(crate) struct View<'a> {
    reader: &'a dyn Reader,
    pub shard: ShardId,
    pub config: Config,
    pub counters: Counters,
    stored_counters: Counters,
    writes: Writes,
    changes: BTreeSet<Change>,
    pub follow_up: Vec<FollowUp>,
    /// Referents that lost a reference in this entry, with where they are.
    pub lost: BTreeMap<Referent, Location>,
}

/// What a refused operation is taken back to.
pub(crate) struct Mark {
    counters: Counters,
    writes: Writes,
    changes: BTreeSet<Change>,
    follow_up: usize,
    lost: BTreeMap<Referent, Location>,
}

impl<'a> View<'a> {
    pub(crate) async fn open(reader: &'a dyn Reader, shard: ShardId) -> Result<View<'a>, StateError> {
        let key = keys::table(shard, keys::CONFIG);
        let stored = reader.get(&key).await?.ok_or(StateError::Uninitialised)?;
        let config = decode(&key, &stored)?;
        let mut view = View::bare(reader, shard, config);
        let counters: Option<Counters> = view.get(&keys::table(shard, keys::COUNTERS)).await?;
        view.counters = counters.ok_or(StateError::Uninitialised)?;
        view.stored_counters = view.counters.clone();
        Ok(view)
    }

    /// Over a shard that has no counters yet.
    pub(crate) fn bare(reader: &'a dyn Reader, shard: ShardId, config: Config) -> View<'a> {
        View {
            reader,
            shard,
            config,
            counters: Counters::default(),
            stored_counters: Counters::default(),
            writes: BTreeMap::new(),
            changes: BTreeSet::new(),
            follow_up: Vec::new(),
            lost: BTreeMap::new(),
        }
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark {
            counters: self.counters.clone(),
            writes: self.writes.clone(),
            changes: self.changes.clone(),
            follow_up: self.follow_up.len(),
            lost: self.lost.clone(),
        }
    }

    pub(crate) fn back_to(&mut self, mark: Mark) {
        self.counters = mark.counters;
        self.writes = mark.writes;
        self.changes = mark.changes;
        self.follow_up.truncate(mark.follow_up);
        self.lost = mark.lost;
    }

    async fn raw(&self, key: &[u8]) -> Result<Option<Bytes>, StateError> {
        match self.writes.get(key) {
            Some(written) => Ok(written.clone()),
            None => self.reader.get(key).await,
        }
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StateError> {
        match self.raw(key).await? {
            Some(value) => Ok(Some(decode(key, &value)?)),
            None => Ok(None),
        }
    }

    pub(crate) async fn get_versioned<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StateError> {
        Ok(self.get::<Versioned<T>>(key).await?.map(|versioned| versioned.record))
    }

    pub(crate) async fn exists(&self, key: &[u8]) -> Result<bool, StateError> {
        Ok(self.raw(key).await?.is_some())
    }

    pub(crate) fn put<T: Serialize>(&mut self, key: Vec<u8>, record: &T) {
        self.writes.insert(key, Some(Bytes::from(encode(record))));
    }

    pub(crate) fn put_versioned<T: Serialize>(&mut self, key: Vec<u8>, record: &T) {
        let since = self.counters.snapshot;
        self.writes.insert(key, Some(Bytes::from(encode(&Versioned { since, record }))));
    }

    pub(crate) fn delete(&mut self, key: Vec<u8>) {
        self.writes.insert(key, None);
    }

    /// At most `max` rows from `start` up to `end`, this entry's writes included.
    pub(crate) async fn scan(
        &self,
        start: Vec<u8>,
        end: &[u8],
        max: usize,
    ) -> Result<Vec<(Vec<u8>, Bytes)>, StateError> {
        if start.as_slice() >= end {
            return Ok(Vec::new());
        }
        let written: Vec<_> = self.writes.range(start.clone()..end.to_vec()).collect();
        // Enough that `max` remain when every deletion here hits one of them.
        let wanted = max.saturating_add(written.len());
        let stored = self.reader.scan(start, end.to_vec(), wanted).await?;
        let complete = stored.len() < wanted;
        let reach = stored.last().map(|(key, _)| key.to_vec());
        let mut rows: BTreeMap<Vec<u8>, Bytes> = stored.into_iter().map(|(key, value)| (key.to_vec(), value)).collect();
        for (key, value) in written {
            if !complete && reach.as_ref().is_some_and(|reach| key > reach) {
                break;
            }
            match value {
                Some(value) => rows.insert(key.clone(), value.clone()),
                None => rows.remove(key),
            };
        }
        Ok(rows.into_iter().take(max).collect())
    }

    /// Every row that begins with `prefix`.
    pub(crate) async fn scan_all(&self, prefix: &[u8]) -> Result<Vec<(Vec<u8>, Bytes)>, StateError> {
        let end = keys::after_prefix(prefix);
        let mut rows: Vec<(Vec<u8>, Bytes)> = Vec::new();
        let mut start = prefix.to_vec();
        loop {
            let page = self.scan(start, &end, PAGE_ROWS).await?;
            let full = page.len() == PAGE_ROWS;
            rows.extend(page);
            match rows.last() {
                Some((last, _)) if full => start = [last.as_slice(), &[0]].concat(),
                _ => return Ok(rows),
            }
        }
    }

    pub(crate) async fn any(&self, prefix: &[u8]) -> Result<bool, StateError> {
        Ok(!self.scan(prefix.to_vec(), &keys::after_prefix(prefix), 1).await?.is_empty())
    }

    pub(crate) async fn first(&self, prefix: &[u8]) -> Result<Option<(Vec<u8>, Bytes)>, StateError> {
        Ok(self.scan(prefix.to_vec(), &keys::after_prefix(prefix), 1).await?.pop())
    }

    pub(crate) fn changed(&mut self, ino: Ino, kind: ChangeKind) {
        self.changes.insert(Change { ino, kind });
    }

    pub(crate) fn next_token(&mut self) -> u64 {
        self.counters.next_token += 1;
        self.counters.next_token
    }

    /// Refuses what the ordered store would not take: the entry fails, not the replica.
    pub(crate) fn check_rows(&self) -> Attempt<()> {
        for (key, value) in &self.writes {
            bounds::check_row(key, value.as_ref().map_or(0, Bytes::len))?;
        }
        Ok(())
    }

    /// What is to be written, in key order, and what changed.
    pub(crate) fn finish(mut self, reply: Reply) -> Outcome {
        if self.counters != self.stored_counters {
            let counters = self.counters.clone();
            self.put(keys::table(self.shard, keys::COUNTERS), &counters);
        }
        let batch = self.writes.into_iter().map(|(key, value)| (key, value.map(|bytes| bytes.to_vec()))).collect();
        Outcome { batch, reply, changes: self.changes.into_iter().collect(), follow_up: self.follow_up }
    }

    /// Waits (by failing) for a transaction that holds `key`.
    pub(crate) async fn unlocked(&self, key: &[u8]) -> Attempt<()> {
        if self.counters.prepared == 0 {
            return Ok(());
        }
        match self.get::<TxnId>(key).await? {
            Some(txn) => Err(Fail::Blocked(txn)),
            None => Ok(()),
        }
    }
}

/// A stored key that isn't as this code writes them.
pub(crate) fn bad_key(key: &[u8]) -> StateError {
    StateError::Corrupt { key: key.to_vec(), reason: "malformed key" }
}
