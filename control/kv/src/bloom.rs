//! A Bloom filter per table, so that a point get reads a block only where its key is likely.

/// Ten bits and seven probes a key: under one false positive in a hundred.
const BITS_PER_KEY: usize = 10;
pub const PROBES: u32 = 7;
/// A table that asks for more is not believed: every one takes time at every get.
pub const PROBES_MAX: u32 = 64;

/// The filter's hash of a key; part of the run format. FNV-1a with a 64-bit finalizer (the
/// constants of MurmurHash3's), since FNV alone spreads the last bytes badly.
pub fn hash(key: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in key {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// The bits a key sets: its hash stepped by a second one derived from it; the high half of each
/// step scaled to the filter (a multiplication: six thousand keys' divisions would take 0.4 ms).
/// Filters are far below 2^32 bits, for a table is at most 1 MiB.
fn probes(hash: u64, bits: u64, count: u32) -> impl Iterator<Item = u64> {
    let step = hash.rotate_left(32) | 1;
    (0..u64::from(count)).map(move |probe| ((hash.wrapping_add(probe.wrapping_mul(step)) >> 32) * bits) >> 32)
}

pub fn build(hashes: &[u64]) -> Vec<u8> {
    let mut filter = vec![0u8; (hashes.len() * BITS_PER_KEY).div_ceil(8).max(8)];
    let bits = filter.len() as u64 * 8;
    for hash in hashes {
        for bit in probes(*hash, bits, PROBES) {
            filter[(bit / 8) as usize] |= 1 << (bit % 8);
        }
    }
    filter
}

/// False only if the key is certainly absent. An empty filter excludes nothing.
pub fn may_contain(filter: &[u8], count: u32, hash: u64) -> bool {
    if filter.is_empty() {
        return true;
    }
    probes(hash, filter.len() as u64 * 8, count)
        .all(|bit| filter.get((bit / 8) as usize).is_none_or(|byte| byte & (1 << (bit % 8)) != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_found_and_few_others() {
        let hashes: Vec<u64> = (0..5000u32).map(|key| hash(&key.to_be_bytes())).collect();
        let filter = build(&hashes);
        assert!(hashes.iter().all(|hash| may_contain(&filter, PROBES, *hash)));
        let strangers = (1_000_000..1_010_000u32).filter(|key| may_contain(&filter, PROBES, hash(&key.to_be_bytes())));
        let strangers = strangers.count();
        assert!(strangers < 150, "{strangers} false positives of 10000");
    }
}
