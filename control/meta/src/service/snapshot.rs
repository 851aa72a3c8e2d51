//! A shard's whole state on its way to another replica: chunks of key-value pairs in key order.
//!
//! A chunk is a format byte, then pairs: length of key (u16), length of value (u32), both
//! little-endian, key, value. No pair spans chunks.

use super::machine::store_error;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use cfs_consensus::host::SNAPSHOT_CHUNK_BYTES_MAX;
use cfs_consensus::{SnapshotSink, SnapshotSource, StateError};
use cfs_kv::{KEY_BYTES_MAX, Kv, Restore, Scan, VALUE_BYTES_MAX};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use std::ops::Bound;

const FORMAT: u8 = 1;
const PAIR_HEADER_BYTES: usize = 6;
/// Chunks are cut when they reach this, so that the last pair still fits.
const CHUNK_BYTES: usize = SNAPSHOT_CHUNK_BYTES_MAX - (PAIR_HEADER_BYTES + KEY_BYTES_MAX + VALUE_BYTES_MAX);

const _: () = assert!(KEY_BYTES_MAX <= u16::MAX as usize && VALUE_BYTES_MAX <= u32::MAX as usize);

pub(super) struct StateOut {
    mark: Bytes,
    scan: Scan,
}

impl StateOut {
    pub fn new(kv: &Kv) -> StateOut {
        let snapshot = kv.snapshot();
        StateOut { mark: snapshot.applied(), scan: snapshot.scan((Bound::Unbounded, Bound::Unbounded)) }
    }

    async fn chunk(&mut self) -> Result<Option<Bytes>, StateError> {
        let mut chunk = BytesMut::new();
        while chunk.len() < CHUNK_BYTES {
            let Some((key, value)) = self.scan.next().await.map_err(store_error)? else { break };
            if chunk.is_empty() {
                chunk.put_u8(FORMAT);
            }
            chunk.put_u16_le(key.len() as u16);
            chunk.put_u32_le(value.len() as u32);
            chunk.put_slice(&key);
            chunk.put_slice(&value);
        }
        Ok((!chunk.is_empty()).then(|| chunk.freeze()))
    }
}

impl SnapshotSource for StateOut {
    fn mark(&self) -> Bytes {
        self.mark.clone()
    }

    fn next(&mut self) -> LocalBoxFuture<'_, Result<Option<Bytes>, StateError>> {
        self.chunk().boxed_local()
    }
}

pub(super) struct StateIn {
    restore: Restore,
}

impl StateIn {
    pub fn new(kv: &Kv) -> StateIn {
        StateIn { restore: kv.begin_restore() }
    }

    async fn take(&mut self, chunk: Bytes) -> Result<(), StateError> {
        for (key, value) in parse(chunk)? {
            self.restore.push(key, value).await.map_err(store_error)?;
        }
        Ok(())
    }
}

impl SnapshotSink for StateIn {
    fn push(&mut self, chunk: Bytes) -> LocalBoxFuture<'_, Result<(), StateError>> {
        self.take(chunk).boxed_local()
    }

    fn finish(self: Box<Self>, mark: Bytes) -> LocalBoxFuture<'static, Result<(), StateError>> {
        async move { self.restore.finish(mark).await.map_err(store_error) }.boxed_local()
    }
}

fn parse(mut chunk: Bytes) -> Result<Vec<(Bytes, Bytes)>, StateError> {
    let bad = |detail: &str| StateError::BadSnapshot { detail: detail.to_owned() };
    if !chunk.has_remaining() || chunk.get_u8() != FORMAT {
        return Err(bad("a chunk of unknown format"));
    }
    let mut pairs = Vec::new();
    while chunk.has_remaining() {
        if chunk.len() < PAIR_HEADER_BYTES {
            return Err(bad("a pair is cut off"));
        }
        let (key, value) = (usize::from(chunk.get_u16_le()), chunk.get_u32_le() as usize);
        if key > KEY_BYTES_MAX || value > VALUE_BYTES_MAX || chunk.len() < key + value {
            return Err(bad("a pair is too long or cut off"));
        }
        pairs.push((chunk.split_to(key), chunk.split_to(value)));
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_comes_apart_again_and_damaged_ones_are_refused() {
        let chunk = Bytes::from_static(&[FORMAT, 1, 0, 2, 0, 0, 0, b'k', b'v', b'w', 0, 0, 0, 0, 0, 0]);
        let pairs = parse(chunk.clone()).unwrap();
        assert_eq!(pairs, [(Bytes::from("k"), Bytes::from("vw")), (Bytes::new(), Bytes::new())]);
        for length in [0, 3, 8, 9, 12] {
            assert!(matches!(parse(chunk.slice(..length)), Err(StateError::BadSnapshot { .. })), "cut to {length}");
        }
        let mut newer = chunk.to_vec();
        newer[0] = 2;
        assert!(matches!(parse(newer.into()), Err(StateError::BadSnapshot { .. })));
    }
}
