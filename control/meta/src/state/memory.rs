//! A shard's state in memory: for tests, and the oracle that real stores are compared with.

use super::{Outcome, Reader, StateError};
use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{LocalBoxFuture, ready};
use std::collections::BTreeMap;

#[derive(Clone, Default, PartialEq, Debug)]
pub struct MemoryState {
    pub map: BTreeMap<Vec<u8>, Bytes>,
}

impl MemoryState {
    /// Writes what applying an entry gave.
    pub fn write(&mut self, outcome: &Outcome) {
        for (key, value) in &outcome.batch {
            match value {
                Some(value) => self.map.insert(key.clone(), Bytes::copy_from_slice(value)),
                None => self.map.remove(key),
            };
        }
    }
}

impl Reader for MemoryState {
    fn get<'a>(&'a self, key: &'a [u8]) -> LocalBoxFuture<'a, Result<Option<Bytes>, StateError>> {
        ready(Ok(self.map.get(key).cloned())).boxed_local()
    }

    fn scan(
        &self,
        start: Vec<u8>,
        end: Vec<u8>,
        max: usize,
    ) -> LocalBoxFuture<'_, Result<Vec<(Bytes, Bytes)>, StateError>> {
        if start >= end {
            return ready(Ok(Vec::new())).boxed_local();
        }
        let pairs = self.map.range(start..end).take(max);
        ready(Ok(pairs.map(|(k, v)| (Bytes::copy_from_slice(k), v.clone())).collect())).boxed_local()
    }
}
