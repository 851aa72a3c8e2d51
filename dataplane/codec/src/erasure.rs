//! Encoding and reconstruction of the shards of one segment.

use std::ops::Range;

use smallvec::SmallVec;

use crate::backend::Backend;
use crate::geometry::{Geometry, MAX_DATA, MAX_PARITY};
use crate::matrix::{decode_matrix, parity_matrix};
use crate::plan::Plan;

/// What a call was refused for. Only [`CodecError::TooManyLost`] speaks of the data; the others
/// are the caller's mistakes, or shards that do not fit each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("{missing} shards are lost, {parity} parity shards make up for no more than {parity}")]
    TooManyLost { missing: usize, parity: usize },
    #[error("the {backend} backend is not part of this build")]
    BackendUnavailable { backend: Backend },
    #[error("{actual} shards or lengths given, the geometry has {expected}")]
    WrongCount { expected: usize, actual: usize },
    #[error("shard {shard} has {actual} bytes instead of {expected}")]
    WrongLength { shard: usize, expected: usize, actual: usize },
    #[error("there is no shard {shard} among {total}")]
    NoSuchShard { shard: usize, total: usize },
    #[error("shard {shard} is wanted but not missing")]
    NotMissing { shard: usize },
}

impl CodecError {
    /// Whether the shards at hand do not determine the data: more of them must be found.
    pub fn is_data_loss(&self) -> bool {
        matches!(self, CodecError::TooManyLost { .. })
    }
}

/// The code of one geometry, with its tables. Cheap to keep, a few microseconds to make.
#[derive(Clone, Debug)]
pub struct Erasure {
    geometry: Geometry,
    backend: Backend,
    encode: Plan,
}

impl Erasure {
    /// With the fastest backend of this machine.
    pub fn new(geometry: Geometry) -> Erasure {
        Erasure::with_backend(geometry, Backend::fastest()).expect("the fastest is available")
    }

    /// Fails with [`CodecError::BackendUnavailable`] if this build lacks the backend.
    pub fn with_backend(geometry: Geometry, backend: Backend) -> Result<Erasure, CodecError> {
        let encode = Plan::new(backend, parity_matrix(geometry))?;
        Ok(Erasure { geometry, backend, encode })
    }

    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Fills `parity` from `data`.
    ///
    /// Data shards may differ in length and be empty; a short one reads as padded with zeros. Each
    /// parity shard is as long as the longest data shard.
    pub fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) -> Result<(), CodecError> {
        check_count(self.geometry.data(), data.len())?;
        check_count(self.geometry.parity(), parity.len())?;
        let expected = data.iter().map(|shard| shard.len()).max().unwrap_or(0);
        for (i, shard) in parity.iter().enumerate() {
            check_length(self.geometry.data() + i, expected, shard.len())?;
        }
        self.encode.apply(data, parity);
        Ok(())
    }

    /// The missing shards `want`, in that order.
    ///
    /// `shards` and `lens` go over data, then parity: what is at hand, and the true length of every
    /// shard, missing or not; parity shards are as long as the longest data shard. A data shard of
    /// length zero is known without being at hand (it is not stored) and never counts as lost.
    /// Fails with [`CodecError::TooManyLost`] if more than m others are missing, even if they are
    /// not wanted.
    pub fn reconstruct(
        &self,
        shards: &[Option<&[u8]>],
        lens: &[usize],
        want: &[usize],
    ) -> Result<Vec<Vec<u8>>, CodecError> {
        let shard_len = self.check_shards(shards, lens)?;
        for &shard in want {
            match shards.get(shard) {
                None => return Err(CodecError::NoSuchShard { shard, total: shards.len() }),
                Some(Some(_)) => return Err(CodecError::NotMissing { shard }),
                Some(None) => {}
            }
        }
        let missing = (0..shards.len()).filter(|&shard| shards[shard].is_none() && lens[shard] > 0);
        let lost: SmallVec<[usize; MAX_PARITY]> =
            missing.clone().filter(|&shard| shard < self.geometry.data()).collect();
        let (missing, parity) = (missing.count(), self.geometry.parity());
        if missing > parity {
            return Err(CodecError::TooManyLost { missing, parity });
        }
        let sources = self.choose_sources(shards, lost.len());
        let numbers: SmallVec<[usize; MAX_DATA]> = sources.iter().map(|&(shard, _)| shard).collect();
        let bytes: SmallVec<[&[u8]; MAX_DATA]> = sources.iter().map(|&(_, bytes)| bytes).collect();
        let matrix = decode_matrix(self.geometry, &lost, &numbers, want);
        let mut rebuilt: Vec<Vec<u8>> = want.iter().map(|_| vec![0; shard_len]).collect();
        let mut outputs: Vec<&mut [u8]> = rebuilt.iter_mut().map(Vec::as_mut_slice).collect();
        Plan::new(self.backend, matrix)?.apply(&bytes, &mut outputs);
        for (shard, &number) in rebuilt.iter_mut().zip(want) {
            shard.truncate(lens[number]);
        }
        Ok(rebuilt)
    }

    /// Checks counts and lengths; returns the length of the parity shards.
    fn check_shards(&self, shards: &[Option<&[u8]>], lens: &[usize]) -> Result<usize, CodecError> {
        check_count(self.geometry.total(), shards.len())?;
        check_count(self.geometry.total(), lens.len())?;
        let (data_lens, parity_lens) = lens.split_at(self.geometry.data());
        let shard_len = data_lens.iter().copied().max().unwrap_or(0);
        for (i, &len) in parity_lens.iter().enumerate() {
            check_length(self.geometry.data() + i, shard_len, len)?;
        }
        for (shard, (bytes, &len)) in shards.iter().zip(lens).enumerate() {
            if let Some(bytes) = bytes {
                check_length(shard, len, bytes.len())?;
            }
        }
        Ok(shard_len)
    }

    /// All data at hand that is not empty, then one parity shard for each lost data shard. There
    /// are enough, and at most k in all, once no more than m shards are missing.
    fn choose_sources<'a>(&self, shards: &[Option<&'a [u8]>], lost: usize) -> SmallVec<[(usize, &'a [u8]); MAX_DATA]> {
        let at_hand = |range: Range<usize>| range.filter_map(|shard| Some((shard, shards[shard]?)));
        let data = at_hand(0..self.geometry.data()).filter(|(_, bytes)| !bytes.is_empty());
        let parity = at_hand(self.geometry.data()..self.geometry.total());
        data.chain(parity.take(lost)).collect()
    }
}

fn check_count(expected: usize, actual: usize) -> Result<(), CodecError> {
    if expected == actual { Ok(()) } else { Err(CodecError::WrongCount { expected, actual }) }
}

fn check_length(shard: usize, expected: usize, actual: usize) -> Result<(), CodecError> {
    if expected == actual { Ok(()) } else { Err(CodecError::WrongLength { shard, expected, actual }) }
}
