//! A million inodes, as some three million keys of 40 bytes with values of 120, written in
//! batches with random updates, then read back through a small cache; prints sizes and memory.
//!
//! cargo run --release -p cfs-kv --example million [keys]
//!
//! The medium is memory too; with MALLOC_MMAP_THRESHOLD_=131072 glibc gives back what it deletes,
//! and what is left of the resident set is the store's own.

use bytes::Bytes;
use cfs_kv::testing::MemMedium;
use cfs_kv::{Batch, BlockCache, Kv, KvConfig};
use cfs_reactor::clock::{Clock, KernelClock, SimClock, SplitMix64};
use cfs_reactor::{Executor, Handle};
use std::ops::Bound;
use std::rc::Rc;

const BATCH: u64 = 30;

fn key(number: u64) -> Bytes {
    let spread = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut key = Vec::with_capacity(40);
    key.extend_from_slice(b"inode-or-entry/");
    key.push((spread >> 62) as u8);
    key.extend_from_slice(&spread.to_be_bytes());
    key.extend_from_slice(&number.to_be_bytes());
    key.resize(40, 7);
    key.into()
}

fn value(number: u64, version: u8) -> Bytes {
    let mut value = vec![version; 120];
    value[..8].copy_from_slice(&number.to_le_bytes());
    value.into()
}

/// Resident memory of this process.
fn resident_mib() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    (pages * 4096) >> 20
}

fn report(step: &str, since: u64, medium: &MemMedium, kv: &Kv, cache: &BlockCache) {
    let seconds = (KernelClock::new().now().as_nanos() - since) as f64 / 1e9;
    let (resident, stored) = (resident_mib(), medium.bytes() >> 20);
    println!(
        "{step}: {seconds:.1} s; resident {resident} MiB of which the medium {stored}, cache {} KiB",
        cache.bytes() >> 10
    );
    println!("    {:?}", kv.stats());
}

async fn run(handle: Handle, keys: u64) {
    let now = || KernelClock::new().now().as_nanos();
    let medium = MemMedium::new(1);
    medium.set_latency(false);
    let cache = BlockCache::new(16 << 20);
    let config = KvConfig { cache: cache.clone(), ..KvConfig::default() };
    let kv = Kv::open(medium.open(&handle), &handle, 1, config.clone()).await.expect("opens");
    let start = now();
    let (mut user_bytes, mut beside_max, mut random) = (0u64, 0, SplitMix64::new(1));
    for first in (0..keys).step_by(BATCH as usize) {
        let mut batch = Batch::new();
        for number in first..(first + BATCH).min(keys) {
            batch.put(key(number), value(number, 0));
            user_bytes += 160;
        }
        if random.one_in(4) {
            let number = random.below(first + 1);
            batch.put(key(number), value(number, 0));
            user_bytes += 160;
        }
        kv.write(batch, Bytes::copy_from_slice(&first.to_be_bytes()));
        if kv.should_checkpoint() {
            let kv = kv.clone();
            handle.spawn(async move { kv.checkpoint().await });
        }
        kv.admit().await.expect("admits");
        if first.is_multiple_of(BATCH * 256) {
            beside_max = beside_max.max(resident_mib().saturating_sub(medium.bytes() >> 20));
        }
        handle.yield_now().await;
    }
    kv.checkpoint().await.expect("checkpoints");
    kv.settle().await;
    report("written", start, &medium, &kv, &cache);
    println!("    at most {beside_max} MiB resident beside the medium");
    println!("    write amplification {:.2}", kv.stats().written_bytes as f64 / user_bytes as f64);
    kv.close().await;
    drop(kv);

    let start = now();
    let kv = Kv::open(medium.open(&handle), &handle, 1, config).await.expect("opens");
    report("reopened", start, &medium, &kv, &cache);
    let start = now();
    for _ in 0..100_000 {
        let number = random.below(keys);
        assert_eq!(kv.get(&key(number)).await.expect("reads"), Some(value(number, 0)));
    }
    report("100000 random gets", start, &medium, &kv, &cache);
    let start = now();
    for _ in 0..100_000 {
        assert_eq!(kv.get(&key(keys + random.below(keys))).await.expect("reads"), None);
    }
    report("100000 gets of absent keys", start, &medium, &kv, &cache);
    let start = now();
    let mut scan = kv.scan((Bound::Unbounded, Bound::Unbounded));
    let mut count = 0;
    while scan.next().await.expect("scans").is_some() {
        count += 1;
    }
    assert_eq!(count, keys);
    report("full scan", start, &medium, &kv, &cache);
}

fn main() {
    let keys = std::env::args().nth(1).and_then(|keys| keys.parse().ok()).unwrap_or(3_000_000);
    let executor = Executor::new(Rc::new(SimClock::new(1)));
    let handle = executor.domain();
    executor.run_simulated(&handle, run(handle.clone(), keys)).expect("does not stall").expect("is not cancelled");
}
