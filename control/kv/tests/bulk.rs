//! Enough keys for several levels at default-like proportions, quickly.

mod common;

use bytes::Bytes;
use cfs_kv::testing::MemMedium;
use cfs_kv::{Batch, BlockCache, Kv, KvConfig};
use cfs_reactor::Executor;
use cfs_reactor::clock::{SimClock, SplitMix64};
use common::{mark, mark_number};
use std::ops::Bound;
use std::rc::Rc;

const KEYS: u64 = 200_000;

fn key(number: u64) -> Bytes {
    // Spread as inode and entry keys are: a permutation of the numbers, 16 bytes.
    let spread = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    Bytes::from([spread.to_be_bytes(), number.to_be_bytes()].concat())
}

#[test]
fn two_hundred_thousand_keys_in_bounded_memory_with_modest_write_amplification() {
    let executor = Executor::new(Rc::new(SimClock::new(3)));
    let (outside, handle) = (executor.domain(), executor.domain());
    let main = async move {
        let medium = MemMedium::new(3);
        medium.set_latency(false);
        let cache = BlockCache::new(2 << 20);
        let config = KvConfig {
            memtable_bytes_max: 1 << 20,
            level_bytes: 4 << 20,
            table_bytes_max: 256 << 10,
            cache: cache.clone(),
            ..KvConfig::default()
        };
        let kv = Kv::open(medium.open(&handle), &handle, 1, config.clone()).await.unwrap();
        let (mut written, mut memory_max) = (0, 0);
        for number in 0..KEYS / 10 {
            let mut batch = Batch::new();
            for number in number * 10..number * 10 + 10 {
                let value = Bytes::from(vec![number as u8; 60]);
                written += 16 + value.len() as u64;
                batch.put(key(number), value);
            }
            kv.write(batch, mark(number + 1));
            if kv.should_checkpoint() {
                kv.checkpoint().await.unwrap();
            }
            kv.admit().await.unwrap();
            memory_max = memory_max.max(kv.stats().memtable_bytes);
        }
        assert_eq!(mark_number(&kv.checkpoint().await.unwrap()), KEYS / 10);
        kv.settle().await;
        let stats = kv.stats();
        assert!(memory_max < 3 << 20, "{memory_max} bytes of memtables");
        assert!(cache.bytes() <= 2 << 20);
        assert!(stats.written_bytes < written * 8, "{} written for {written}: {stats:?}", stats.written_bytes);
        assert!(stats.recent_runs < config.recent_runs_max, "{stats:?}");
        assert_eq!(stats.entries, KEYS, "every key once: {stats:?}");
        kv.close().await;

        let kv = Kv::open(medium.open(&handle), &handle, 1, config).await.unwrap();
        let mut random = SplitMix64::new(5);
        for _ in 0..2000 {
            let number = random.below(KEYS);
            assert_eq!(kv.get(&key(number)).await.unwrap(), Some(Bytes::from(vec![number as u8; 60])));
            assert_eq!(kv.get(&key(number + KEYS)).await.unwrap(), None);
        }
        let mut scan = kv.scan((Bound::Unbounded, Bound::Unbounded));
        let (mut count, mut last) = (0, Bytes::new());
        while let Some((key, _)) = scan.next().await.unwrap() {
            assert!(key > last);
            last = key;
            count += 1;
        }
        assert_eq!(count, KEYS);
    };
    executor.run_simulated(&outside, main).unwrap().unwrap();
}
