//! Small changes to valid bytes, drawn from a seed.

use cfs_reactor::clock::SplitMix64;
use std::ops::Range;

/// Values at which lengths, counts and offsets break.
const EDGES: [u64; 26] = [
    0,
    1,
    2,
    3,
    7,
    8,
    16,
    32,
    64,
    127,
    128,
    255,
    256,
    4095,
    4096,
    4097,
    u16::MAX as u64,
    1 << 20,
    i32::MAX as u64,
    1 << 31,
    u32::MAX as u64 - 1,
    u32::MAX as u64,
    1 << 32,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];
/// Changes to one input at most: with more, the first check refuses nearly all.
const CHANGES_MAX: u64 = 4;
const EXTENSION_MAX: u64 = 40;

/// Whether the mutated bytes may have another length than the valid ones had.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Length {
    Free,
    /// A structure that fills a place on a device.
    Fixed,
}

/// An element of a slice that is not empty.
pub fn pick<'a, T>(random: &mut SplitMix64, of: &'a [T]) -> &'a T {
    &of[random.below(of.len() as u64) as usize]
}

/// Changes `bytes` in one to a few places, splicing from other valid inputs. Half of the time all
/// changes are in the first `head` bytes, which say how the rest is to be read.
pub fn mutate(random: &mut SplitMix64, bytes: &mut Vec<u8>, head: usize, donors: &[Vec<u8>], length: Length) {
    let focused = head > 0 && random.one_in(2);
    let nothing = Vec::new();
    let donor = if donors.is_empty() { &nothing } else { pick(random, donors) };
    let whole = bytes.len();
    // Structures are padded with zeroes: most changes go to what they say.
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 9).min(whole);
    for _ in 0..=random.below(CHANGES_MAX) {
        let within = match random.below(8) {
            _ if focused => head.min(bytes.len()),
            0 => bytes.len(),
            _ => used.min(bytes.len()),
        };
        change(random, bytes, within, donor);
    }
    if length == Length::Fixed {
        bytes.resize(whole, 0);
    }
}

/// One change, which begins below `within`.
fn change(random: &mut SplitMix64, bytes: &mut Vec<u8>, within: usize, donor: &[u8]) {
    if within == 0 {
        bytes.extend((0..random.below(EXTENSION_MAX)).map(|_| random.next_u64() as u8));
        return;
    }
    let at = random.below(within as u64) as usize;
    match random.below(12) {
        0..=2 => bytes[at] ^= 1 << random.below(8),
        3..=4 => bytes[at] = *pick(random, &EDGES) as u8,
        5..=7 => set_integer(random, bytes, at),
        8 => bytes.truncate(at),
        9 => {
            let more = 1 + random.below(EXTENSION_MAX);
            let byte = random.next_u64() as u8;
            let tail = (0..more).map(|_| if byte < 128 { byte } else { random.next_u64() as u8 });
            bytes.extend(tail.collect::<Vec<u8>>());
        }
        10 => {
            let part = range(random, donor.len());
            let end = bytes.len().min(at + part.len());
            bytes[at..end].copy_from_slice(&donor[part.start..part.start + (end - at)]);
        }
        _ => {
            // Moved, and what lay there is there twice or no more.
            let part = range(random, donor.len());
            let end = (at + random.below(EXTENSION_MAX) as usize).min(bytes.len());
            drop(bytes.splice(at..end, donor[part].iter().copied()));
        }
    }
}

/// Up to 64 bytes somewhere in so many.
fn range(random: &mut SplitMix64, length: usize) -> Range<usize> {
    let start = random.below(length as u64 + 1) as usize;
    start..(start + random.below(65) as usize).min(length)
}

/// Sets a little-endian integer of 2, 4 or 8 bytes to an edge, to its neighbour, or to a length.
fn set_integer(random: &mut SplitMix64, bytes: &mut [u8], at: usize) {
    let width = *pick(random, &[2, 4, 4, 8]);
    // Fields are mostly aligned to their width.
    let at = if random.one_in(4) { at } else { at - at % width };
    let length = bytes.len() as u64;
    let Some(field) = bytes.get_mut(at..at + width) else { return };
    let mut old = [0; 8];
    old[..width].copy_from_slice(field);
    let old = u64::from_le_bytes(old);
    let new = match random.below(7) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => length - 1 + random.below(3),
        // Where one is added to it.
        3 => u64::MAX,
        _ => *pick(random, &EDGES),
    };
    field.copy_from_slice(&new.to_le_bytes()[..width]);
}

/// Bytes that owe nothing to a valid input: mostly small ones, which as numbers of variants,
/// lengths and flags lead further in.
pub fn noise(random: &mut SplitMix64) -> Vec<u8> {
    let length = random.below(120);
    let plain = random.one_in(3);
    (0..length).map(|_| if plain { random.next_u64() as u8 } else { random.below(24) as u8 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_seed_gives_the_same_input_again_and_other_seeds_give_others() {
        let donors = [(100..180).collect(), vec![9; 30]];
        let mutated = |seed| {
            let mut bytes: Vec<u8> = (0..64).collect();
            mutate(&mut SplitMix64::new(seed), &mut bytes, 16, &donors, Length::Free);
            bytes
        };
        let all: BTreeSet<Vec<u8>> = (0..1000).map(mutated).collect();
        assert_eq!(mutated(5), mutated(5));
        assert!(all.len() > 900, "{} of 1000 differ", all.len());
        let lengths: BTreeSet<usize> = all.iter().map(Vec::len).collect();
        assert!(lengths.contains(&64) && lengths.len() > 40, "{lengths:?}");
    }

    #[test]
    fn nothing_is_too_short_to_be_changed_and_a_fixed_length_stays() {
        for seed in 0..2000 {
            for length in [0, 1, 5, 4096] {
                let mut bytes = vec![0; length];
                mutate(&mut SplitMix64::new(seed), &mut bytes, 8, &[], Length::Fixed);
                assert_eq!(bytes.len(), length);
            }
        }
    }
}
