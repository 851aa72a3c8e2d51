//! A history of batches with the state after each: the oracle.
#![allow(dead_code, reason = "each test file uses a part")]

use bytes::Bytes;
use cfs_kv::{Batch, BlockCache, Kv, KvConfig, KvError};
use cfs_reactor::clock::SplitMix64;
use std::collections::BTreeMap;
use std::ops::Bound;

pub const GROUP: u64 = 9;

pub type Contents = BTreeMap<Bytes, Bytes>;

/// Everything small, so that a few dozen batches make many runs, levels and merges.
pub fn config() -> KvConfig {
    KvConfig {
        memtable_bytes_max: 2500,
        block_bytes: 200,
        table_bytes_max: 900,
        recent_runs_max: 3,
        recent_runs_stop: 6,
        level_bytes: 2000,
        level_factor: 3,
        garbage_bytes_min: 400,
        cache: BlockCache::new(20_000),
        ..KvConfig::default()
    }
}

/// The same with manifests of more than a table or two in parts.
pub fn split_config() -> KvConfig {
    KvConfig { manifest_blob_bytes_max: 96, ..config() }
}

pub fn mark(number: u64) -> Bytes {
    Bytes::copy_from_slice(&number.to_be_bytes())
}

pub fn mark_number(mark: &Bytes) -> u64 {
    if mark.is_empty() { 0 } else { u64::from_be_bytes(mark[..].try_into().expect("8 bytes")) }
}

/// States after 0, 1, 2, ... batches.
pub struct History {
    random: SplitMix64,
    states: Vec<Contents>,
}

impl History {
    pub fn new(seed: u64) -> History {
        History { random: SplitMix64::new(seed), states: vec![Contents::new()] }
    }

    pub fn written(&self) -> u64 {
        self.states.len() as u64 - 1
    }

    pub fn at(&self, number: u64) -> &Contents {
        &self.states[number as usize]
    }

    pub fn now(&self) -> &Contents {
        self.states.last().expect("begins with one")
    }

    /// The node lost what came after.
    pub fn go_back_to(&mut self, number: u64) {
        self.states.truncate(number as usize + 1);
    }

    pub fn key(&mut self) -> Bytes {
        format!("key/{:03}", self.random.below(150)).into()
    }

    /// A random batch and its mark.
    pub fn step(&mut self) -> (Batch, Bytes) {
        let mut state = self.now().clone();
        let mut batch = Batch::new();
        let number = self.written() + 1;
        for change in 0..self.random.below(12) {
            let key = self.key();
            if self.random.one_in(3) {
                state.remove(&key);
                batch.delete(key);
            } else {
                let fill = self.random.below(60) as usize;
                let value = Bytes::from(format!("{number}.{change}{}", "x".repeat(fill)));
                state.insert(key.clone(), value.clone());
                batch.put(key, value);
            }
        }
        self.states.push(state);
        (batch, mark(number))
    }

    /// A wholly different state, as a snapshot from a leader far ahead would bring.
    pub fn restore_step(&mut self) -> (Bytes, Vec<(Bytes, Bytes)>) {
        let number = self.written() + 1;
        let mut state = Contents::new();
        for _ in 0..60 {
            state.insert(self.key(), format!("restored {number}").into());
        }
        self.states.push(state.clone());
        (mark(number), state.into_iter().collect())
    }
}

/// Replaces everything, as a snapshot that comes in does.
pub async fn restore(kv: &Kv, applied: Bytes, entries: Vec<(Bytes, Bytes)>) -> Result<(), KvError> {
    let mut restore = kv.begin_restore();
    for (key, value) in entries {
        restore.push(key, value).await?;
    }
    restore.finish(applied).await
}

/// Compares by scan and by point gets of present and absent keys.
pub async fn check_state(kv: &Kv, expected: &Contents) -> Result<(), String> {
    let scan = kv.scan((Bound::Unbounded, Bound::Unbounded)).collect().await.map_err(|error| error.to_string())?;
    let wanted: Vec<(Bytes, Bytes)> = expected.clone().into_iter().collect();
    if scan != wanted {
        let differs = scan.iter().zip(&wanted).find(|(found, wanted)| found != wanted);
        return Err(format!("{} entries instead of {}, first difference {differs:?}", scan.len(), wanted.len()));
    }
    for number in 0..150 {
        let key = Bytes::from(format!("key/{number:03}"));
        let found = kv.get(&key).await.map_err(|error| error.to_string())?;
        if found.as_ref() != expected.get(&key) {
            return Err(format!("{key:?} is {found:?} instead of {:?}", expected.get(&key)));
        }
    }
    Ok(())
}
