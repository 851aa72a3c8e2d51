//! Hash maps with a fixed hash function, so that iteration order is the same in every run.

#[allow(clippy::disallowed_types, reason = "this is where the seeded state is replaced")]
use std::collections::{HashMap as StdMap, HashSet as StdSet};
use std::hash::{BuildHasherDefault, Hasher};

/// A multiply-and-rotate hash (the construction rustc uses). Not for keys an attacker chooses
/// freely: everything hashed here is an id the server drew or checked.
#[derive(Default, Clone)]
pub struct FixedHasher(u64);

const MULTIPLIER: u64 = 0xF135_7AEA_2E62_A9C5;

impl FixedHasher {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(MULTIPLIER);
    }
}

impl Hasher for FixedHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.add(u64::from_le_bytes(word));
        }
        self.add(bytes.len() as u64);
    }

    fn write_u8(&mut self, value: u8) {
        self.add(value.into());
    }

    fn write_u16(&mut self, value: u16) {
        self.add(value.into());
    }

    fn write_u32(&mut self, value: u32) {
        self.add(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.add(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.add(value as u64);
    }

    fn write_u128(&mut self, value: u128) {
        self.add(value as u64);
        self.add((value >> 64) as u64);
    }

    fn finish(&self) -> u64 {
        self.0.rotate_left(26)
    }
}

pub type FixedState = BuildHasherDefault<FixedHasher>;
#[allow(clippy::disallowed_types, reason = "this is where the seeded state is replaced")]
pub type HashMap<K, V> = StdMap<K, V, FixedState>;
#[allow(clippy::disallowed_types, reason = "this is where the seeded state is replaced")]
pub type HashSet<K> = StdSet<K, FixedState>;
