//! Every bound and interval of node and clients, drawn anew for each run: small ones bring in
//! minutes about what a large cluster does in months (merges, cuts, collections, fences).

use cfs::background::MoverIntervals;
use cfs::node::NodeConfig;
use cfs::replicas::ReplicaBounds;
use cfs_client::ClientConfig;
use cfs_consensus::LogConfig;
use cfs_device::mem::Faults;
use cfs_kv::{BlockCache, KvConfig};
use cfs_meta::service::ServiceConfig;
use cfs_reactor::clock::SplitMix64;
use cfs_store::segment::SegmentConfig;
use std::time::Duration;

/// How much slower the slow disk is: several operations of another fit into one of its own.
const SLOWER: u32 = 10;

/// Bounds of the shared log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogBounds {
    pub pipeline: usize,
    pub limit_bytes: u64,
    pub stored_bytes_max: u64,
    pub copy_bytes_max: u64,
}

/// Bounds of the ordered stores.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreBounds {
    pub memtable_bytes: usize,
    pub block_bytes: usize,
    pub table_bytes: usize,
    pub recent_runs: usize,
    pub level_bytes: u64,
    pub level_factor: u64,
    pub cache_bytes: usize,
}

/// One run's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tuning {
    pub log: Option<LogBounds>,
    pub store: Option<StoreBounds>,
    pub hot_bytes_max: usize,
    pub hot_percent_max: u64,
    pub movers: MoverIntervals,
    pub session_lease: Duration,
    pub read_lease: Duration,
    pub shared_mode: Duration,
    pub sweep: Duration,
    pub disk_latency: Duration,
    /// A disk that takes [`SLOWER`] times as long, so that what began later ends earlier elsewhere.
    pub slow_disk: Option<usize>,
    pub write_back_after: Duration,
    pub linger: Duration,
    pub dirty_bytes_max: usize,
    pub client_cache_bytes: usize,
    pub read_ahead_bytes: usize,
    pub reserved_bytes: u64,
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning {
            log: None,
            store: None,
            hot_bytes_max: SegmentConfig::default().hot_bytes_max,
            hot_percent_max: SegmentConfig::default().hot_percent_max,
            // Often, so that a run of a few virtual seconds has rounds of each.
            movers: MoverIntervals {
                collect: Duration::from_millis(500),
                pack: Duration::from_secs(1),
                orphans: Duration::from_secs(4),
                epoch: Duration::from_secs(5),
                repair: Duration::from_secs(5),
                scrub: MoverIntervals::default().scrub,
            },
            session_lease: Duration::from_secs(8),
            read_lease: Duration::from_secs(4),
            shared_mode: Duration::from_secs(1),
            sweep: Duration::from_secs(1),
            disk_latency: Duration::from_micros(20),
            slow_disk: None,
            write_back_after: Duration::from_millis(300),
            linger: Duration::from_millis(500),
            dirty_bytes_max: 24 << 20,
            client_cache_bytes: 64 << 20,
            read_ahead_bytes: 4 << 20,
            reserved_bytes: 48 << 20,
        }
    }
}

fn pick<T: Copy>(random: &mut SplitMix64, of: &[T]) -> T {
    of[random.below(of.len() as u64) as usize]
}

impl Tuning {
    pub fn draw(random: &mut SplitMix64) -> Tuning {
        let millis = |random: &mut SplitMix64, of: &[u64]| Duration::from_millis(pick(random, of));
        let log = (!random.one_in(4)).then(|| LogBounds {
            pipeline: pick(random, &[1, 2, 2, 4]),
            limit_bytes: pick(random, &[8 << 10, 64 << 10, 1 << 20]),
            stored_bytes_max: pick(random, &[256 << 10, 512 << 10, 2 << 20]),
            copy_bytes_max: pick(random, &[4 << 10, 32 << 10, 256 << 10]),
        });
        let store = (!random.one_in(4)).then(|| StoreBounds {
            memtable_bytes: pick(random, &[4 << 10, 16 << 10, 64 << 10, 256 << 10]),
            block_bytes: pick(random, &[512, 4 << 10, 16 << 10]),
            table_bytes: pick(random, &[8 << 10, 64 << 10, 1 << 20]),
            recent_runs: pick(random, &[2, 3, 8]),
            level_bytes: pick(random, &[16 << 10, 128 << 10, 1 << 20]),
            level_factor: pick(random, &[2, 4, 8]),
            cache_bytes: pick(random, &[32 << 10, 1 << 20, 32 << 20]),
        });
        let session_lease = millis(random, &[3000, 8000, 8000]);
        Tuning {
            log,
            store,
            hot_bytes_max: pick(random, &[4 << 10, 16 << 10, 64 << 10]),
            hot_percent_max: pick(random, &[0, 1, 2, 50]),
            movers: MoverIntervals {
                collect: millis(random, &[20, 100, 500, 2000]),
                pack: millis(random, &[30, 100, 1000, 4000]),
                orphans: millis(random, &[200, 1000, 4000]),
                epoch: millis(random, &[300, 1500, 5000]),
                repair: millis(random, &[500, 5000]),
                scrub: pick(random, &[Duration::from_secs(4), MoverIntervals::default().scrub]),
            },
            session_lease,
            read_lease: session_lease / pick(random, &[1, 2, 8]),
            shared_mode: millis(random, &[100, 1000, 5000]),
            sweep: millis(random, &[200, 1000]),
            disk_latency: Duration::from_micros(pick(random, &[20, 20, 200, 3000])),
            slow_disk: random.one_in(3).then(|| random.below(3) as usize),
            write_back_after: millis(random, &[20, 300, 300, 2000]),
            linger: millis(random, &[1, 500, 3000]),
            dirty_bytes_max: pick(random, &[64 << 10, 1 << 20, 24 << 20]),
            client_cache_bytes: pick(random, &[128 << 10, 64 << 20]),
            read_ahead_bytes: pick(random, &[0, 128 << 10, 4 << 20]),
            reserved_bytes: pick(random, &[128 << 10, 2 << 20, 48 << 20]),
        }
    }

    /// The disks' behaviour while nothing is wrong with them.
    pub fn disk_faults(&self, disk: usize) -> Faults {
        let slower = if self.slow_disk == Some(disk) { SLOWER } else { 1 };
        Faults { latency: Duration::ZERO..=self.disk_latency * slower, ..Faults::default() }
    }

    pub fn node(&self) -> NodeConfig {
        let meta = ServiceConfig {
            session_lease: self.session_lease,
            read_lease: self.read_lease,
            shared_mode: self.shared_mode,
            sweep: self.sweep,
            ..ServiceConfig::default()
        };
        let log = self.log.map(|log| LogConfig {
            pipeline: log.pipeline,
            limit_bytes: log.limit_bytes,
            stored_bytes_max: log.stored_bytes_max,
            copy_bytes_max: log.copy_bytes_max,
            ..LogConfig::default()
        });
        let store = self.store.map(|store| KvConfig {
            memtable_bytes_max: store.memtable_bytes,
            block_bytes: store.block_bytes,
            table_bytes_max: store.table_bytes,
            recent_runs_max: store.recent_runs,
            recent_runs_stop: store.recent_runs * 3,
            level_bytes: store.level_bytes,
            level_factor: store.level_factor,
            cache: BlockCache::new(store.cache_bytes),
            ..KvConfig::default()
        });
        let segments = SegmentConfig {
            hot_bytes_max: self.hot_bytes_max,
            hot_percent_max: self.hot_percent_max,
            reservation_lifetime: self.session_lease,
            ..SegmentConfig::default()
        };
        NodeConfig {
            meta,
            segments,
            movers: self.movers,
            replicas: ReplicaBounds { log, store },
            ..NodeConfig::default()
        }
    }

    pub fn client(&self, name: &str) -> ClientConfig {
        ClientConfig {
            name: name.to_owned(),
            dirty_bytes_max: self.dirty_bytes_max * 2,
            dirty_inode_bytes_max: self.dirty_bytes_max,
            cache_bytes_max: self.client_cache_bytes,
            read_ahead_bytes_max: self.read_ahead_bytes,
            write_back_after: self.write_back_after,
            reserved_bytes: self.reserved_bytes,
            call_timeout: Duration::from_secs(5),
            data_timeout: Duration::from_secs(5),
            retry_window: Duration::from_secs(90),
            linger: self.linger,
            ..ClientConfig::default()
        }
    }
}
