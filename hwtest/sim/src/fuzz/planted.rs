//! Decoders that fail in every way a decoder can: the fuzzer must find them, or its silence about
//! others means nothing. None is fuzzed unasked.

use super::mutate::{Length, mutate};
use super::{Build, Fed, Target, Trial, u32_at};
use cfs_reactor::clock::SplitMix64;
use std::hint::black_box;

pub const TARGETS: [(&str, Build); 5] = [
    ("planted-panic", || Box::new(Planted(panics))),
    ("planted-hang", || Box::new(Planted(hangs))),
    ("planted-memory", || Box::new(Planted(takes_memory))),
    ("planted-stack", || Box::new(Planted(takes_stack))),
    ("planted-meaning", || Box::new(Planted(changes_meaning))),
];

/// A list as all of them take it: how many bytes, then these bytes, none of them 0.
const LIST: [u8; 12] = [8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
const COUNT_BYTES: usize = 4;

struct Planted(fn(&[u8]) -> Result<Fed, String>);

impl Target for Planted {
    fn round(&self, random: &mut SplitMix64, trial: &mut Trial) {
        let mut input = LIST.to_vec();
        mutate(random, &mut input, COUNT_BYTES, &[], Length::Free);
        trial.feed("list", &input, self.0);
    }
}

/// Reads as many as are announced.
fn panics(input: &[u8]) -> Result<Fed, String> {
    let count = u32_at(input, 0) as usize;
    black_box((0..count).fold(0, |sum, at| sum ^ input[COUNT_BYTES + at]));
    Ok(Fed::Taken)
}

/// Goes on by what it reads.
fn hangs(input: &[u8]) -> Result<Fed, String> {
    let mut at = COUNT_BYTES;
    while let Some(step) = input.get(at) {
        at += usize::from(*black_box(step));
    }
    Ok(Fed::Taken)
}

/// Makes room for as many as are announced.
fn takes_memory(input: &[u8]) -> Result<Fed, String> {
    black_box(Vec::<u64>::with_capacity(u32_at(input, 0) as usize));
    Ok(Fed::Taken)
}

/// Descends as deep as is announced.
fn takes_stack(input: &[u8]) -> Result<Fed, String> {
    fn descend(depth: u32) -> u64 {
        let frame = black_box([u64::from(depth); 16]);
        if depth == 0 { 0 } else { frame[0] ^ descend(depth - 1) }
    }
    black_box(descend(u32_at(input, 0)));
    Ok(Fed::Taken)
}

/// Keeps half of the count.
fn changes_meaning(input: &[u8]) -> Result<Fed, String> {
    let count = u32_at(input, 0);
    let kept = u32::from(count as u16);
    if kept == count { Ok(Fed::Taken) } else { Err(format!("{count} is written as {kept}")) }
}
