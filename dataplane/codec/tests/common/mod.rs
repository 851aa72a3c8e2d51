//! What the tests of the code share: an oracle that shares nothing with the crate, and shards.

#![allow(dead_code, reason = "each test file uses its part")]

use cfs_codec::{Backend, Erasure, Geometry};

/// Long multiplication modulo 0x11d.
fn slow_mul(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        product ^= if b & 1 != 0 { a } else { 0 };
        a = (a << 1) ^ if a & 0x80 != 0 { 0x1d } else { 0 };
        b >>= 1;
    }
    product
}

/// The parity of `data` by the definition: coefficients 1 / ((k + row) ⊕ column), inverses by trial.
pub fn slow_parity(geometry: Geometry, data: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let len = data.iter().map(Vec::len).max().unwrap();
    let coefficient = |row: usize, column: usize| {
        let divisor = ((geometry.data() + row) ^ column) as u8;
        (1..=255).find(|&inverse| slow_mul(divisor, inverse) == 1).unwrap()
    };
    let mut parity = vec![vec![0; len]; geometry.parity()];
    for (row, shard) in parity.iter_mut().enumerate() {
        for (column, source) in data.iter().enumerate() {
            let factor = coefficient(row, column);
            let products: Vec<u8> = (0..=255).map(|byte| slow_mul(factor, byte)).collect();
            for (sum, &byte) in shard.iter_mut().zip(source) {
                *sum ^= products[usize::from(byte)];
            }
        }
    }
    parity
}

/// SplitMix64: small, and the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

pub fn geometry(k: usize, m: usize) -> Geometry {
    Geometry::new(k as u8, m as u8).unwrap()
}

/// One coder per backend of this machine.
pub fn coders(geometry: Geometry) -> Vec<Erasure> {
    Backend::available().into_iter().map(|backend| Erasure::with_backend(geometry, backend).unwrap()).collect()
}

/// The parity of `data` by `coder`, into buffers that were not zero before.
pub fn encode(coder: &Erasure, data: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let len = data.iter().map(Vec::len).max().unwrap();
    let mut parity = vec![vec![0xa5; len]; coder.geometry().parity()];
    let sources: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    let mut outputs: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
    coder.encode(&sources, &mut outputs).unwrap();
    parity
}

/// A whole stripe: data, then parity by the oracle.
pub fn stripe(geometry: Geometry, data: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let parity = slow_parity(geometry, &data);
    data.into_iter().chain(parity).collect()
}

/// The stripe without the shards of `lost`.
pub fn without<'a>(stripe: &'a [Vec<u8>], lost: &[usize]) -> Vec<Option<&'a [u8]>> {
    (0..stripe.len()).map(|i| (!lost.contains(&i)).then(|| stripe[i].as_slice())).collect()
}

pub fn lens(stripe: &[Vec<u8>]) -> Vec<usize> {
    stripe.iter().map(Vec::len).collect()
}

/// All ways to lose `count` of `total` shards.
pub fn losses(total: usize, count: usize) -> Vec<Vec<usize>> {
    (0u32..1 << total)
        .filter(|set| set.count_ones() as usize == count)
        .map(|set| (0..total).filter(|i| set >> i & 1 != 0).collect())
        .collect()
}
