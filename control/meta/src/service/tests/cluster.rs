//! One node with several shards, without Raft: entries are applied directly, in order, after a
//! random delay. The shards' states outlive the node.

use crate::service::applied::{decode_entry, encode_entry};
use crate::service::{Applied, MetaService, NoPeers, ProposeError, Proposer, ServiceConfig, ShardHandle, ShardMachine};
use crate::state::{self, Init, LogEntry, MemoryState, Reader};
use bytes::Bytes;
use cfs_consensus::host::{HostConfig, RaftHost};
use cfs_consensus::{LogConfig, SharedLog};
use cfs_fabric::Address;
use cfs_fabric::mem::MemNetwork;
use cfs_kv::testing::MemMedium;
use cfs_kv::{Kv, KvConfig};
use cfs_reactor::clock::SimClock;
use cfs_reactor::sync::Semaphore;
use cfs_reactor::{Executor, Handle};
use cfs_wire::blobs::MirroredBlobs;
use cfs_wire::{Ino, NodeId, ShardId, Timestamp, VolumeId};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

pub const SHARDS: u16 = 4;

/// So many seeds; `CFS_SEEDS=20` makes it twenty times as many.
pub fn seeds(count: u64) -> std::ops::Range<u64> {
    let times = std::env::var("CFS_SEEDS").ok().and_then(|times| times.parse().ok()).unwrap_or(1);
    0..count * times
}

/// Runs a story on virtual time; a failure names its seed. Answers the hash of all that happened.
pub fn simulate<F: Future<Output = ()> + 'static>(seed: u64, story: impl FnOnce(Rc<Cluster>) -> F) -> u64 {
    run(seed, None, story)
}

/// The same on the real ordered store and Raft log, over blobs in memory.
pub fn simulate_on_raft<F: Future<Output = ()> + 'static>(seed: u64, story: impl FnOnce(Rc<Cluster>) -> F) {
    run(seed, Some(MemMedium::new(seed)), story);
}

fn run<F: Future<Output = ()> + 'static>(
    seed: u64,
    medium: Option<Rc<MemMedium>>,
    story: impl FnOnce(Rc<Cluster>) -> F,
) -> u64 {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    let cluster = Cluster::new(&handle, seed, medium);
    let run = story(cluster);
    executor.run_simulated(&handle, run).unwrap_or_else(|error| panic!("seed {seed}: {error}")).unwrap();
    executor.trace_hash()
}

/// A shard's first entry.
pub fn init(now: Timestamp) -> Init {
    Init {
        shards: SHARDS,
        volume: VolumeId(1),
        root: Ino::ROOT,
        root_mode: 0o755,
        root_uid: 0,
        root_gid: 0,
        policy: cfs_wire::Policy::new(1, 0).unwrap(),
        tolerated: 1,
        targets: 3,
        name_key: [7; 32],
        feature_level: state::entry::FEATURE_LEVEL,
        now,
    }
}

struct Replica {
    state: RefCell<Rc<MemoryState>>,
    turn: Rc<Semaphore>,
}

/// What survives the node: the shards' states, and which entry the node dies at.
pub struct Disk {
    shards: BTreeMap<ShardId, Replica>,
    entries: Cell<u64>,
    /// The node dies when so many entries have been applied, before anybody hears of the last.
    die_at: Cell<Option<u64>>,
    pub delay_micros_max: Cell<u64>,
    /// Another node leads all shards.
    pub deposed: Cell<bool>,
}

struct Node {
    handle: Handle,
    service: MetaService,
    shards: Vec<ShardHandle>,
}

/// A node, restarted whenever it died.
pub struct Cluster {
    /// The clients' domain.
    pub handle: Handle,
    pub seed: u64,
    pub disk: Rc<Disk>,
    pub config: RefCell<ServiceConfig>,
    node: Rc<RefCell<Option<Node>>>,
    /// Of nodes on the real store: what survives them.
    pub medium: Option<Rc<MemMedium>>,
    /// Counts starts of the node.
    pub starts: Cell<u64>,
}

impl Cluster {
    fn new(handle: &Handle, seed: u64, medium: Option<Rc<MemMedium>>) -> Rc<Cluster> {
        let replica = |shard| (ShardId(shard), Replica { state: RefCell::default(), turn: Semaphore::new(1) });
        let disk = Disk {
            shards: (0..SHARDS).map(replica).collect(),
            entries: Cell::new(0),
            die_at: Cell::new(None),
            delay_micros_max: Cell::new(2000),
            deposed: Cell::new(false),
        };
        let cluster = Cluster {
            handle: handle.clone(),
            seed,
            disk: Rc::new(disk),
            config: RefCell::new(ServiceConfig::default()),
            node: Rc::default(),
            medium,
            starts: Cell::new(0),
        };
        Rc::new(cluster)
    }

    /// Initialises the shards and starts the node.
    pub async fn start(&self) {
        self.restart();
        while self.service().is_none() {
            self.handle.sleep(Duration::from_millis(5)).await;
        }
        self.service().expect("just seen").initialise(&init(self.handle.wall())).await.unwrap();
    }

    /// Kills the node if it lives, and starts it anew from the shards' states.
    pub fn restart(&self) {
        self.kill();
        self.starts.set(self.starts.get() + 1);
        let handle = self.handle.new_domain();
        let config = self.config.borrow().clone();
        let slot = self.node.clone();
        if let Some(medium) = &self.medium {
            let (medium, domain) = (medium.clone(), handle.clone());
            handle.spawn(async move {
                let (host, shards) = start_on_raft(&medium, &domain).await;
                *slot.borrow_mut() = Some(Node::new(domain, shards, host, config));
            });
            return;
        }
        let proposer = LocalProposer { handle: handle.clone(), disk: self.disk.clone(), applied: RefCell::default() };
        let mut shards = Vec::new();
        for shard in self.disk.shards.keys().copied() {
            let (disk, applied) = (self.disk.clone(), Applied::new());
            proposer.applied.borrow_mut().insert(shard, applied.clone());
            let view = Rc::new(move || disk.shards[&shard].state.borrow().clone() as Rc<dyn Reader>);
            shards.push(ShardHandle { shard, view, applied });
        }
        *slot.borrow_mut() = Some(Node::new(handle, shards, Rc::new(proposer), config));
    }

    pub fn kill(&self) {
        let node = self.node.borrow_mut().take();
        if let Some(node) = node {
            node.handle.kill();
            drop(node);
        }
    }

    /// The service, if the node lives.
    pub fn service(&self) -> Option<MetaService> {
        let node = self.node.borrow();
        node.as_ref().filter(|node| node.handle.is_alive()).map(|node| node.service.clone())
    }

    /// The node dies at the n-th entry from now.
    pub fn die_after(&self, entries: Option<u64>) {
        if let (Some(medium), Some(entries)) = (&self.medium, entries) {
            medium.halt_after(entries);
            let (medium, node) = (medium.clone(), self.node.clone());
            self.handle.spawn(async move {
                medium.halted().await;
                if let Some(node) = node.borrow_mut().take() {
                    node.handle.kill();
                }
            });
            return;
        }
        self.disk.die_at.set(entries.map(|entries| self.disk.entries.get() + entries));
    }

    /// Entries applied so far, in all shards.
    pub fn entries(&self) -> u64 {
        self.disk.entries.get()
    }

    /// Restarts the node a while after each of its deaths.
    pub fn keep_alive(self: &Rc<Self>) {
        let cluster = self.clone();
        self.handle.spawn(async move {
            loop {
                cluster.handle.sleep(Duration::from_millis(10)).await;
                if cluster.service().is_none() {
                    cluster.die_after(None);
                    cluster.restart();
                    cluster.handle.sleep(Duration::from_secs(1)).await;
                }
            }
        });
    }

    /// A shard's state as it is now.
    pub fn state(&self, shard: ShardId) -> Rc<dyn Reader> {
        let node = self.node.borrow();
        let shards = &node.as_ref().expect("the node lives").shards;
        (shards.iter().find(|handle| handle.shard == shard).expect("a shard of the node").view)()
    }

    /// Waits until no shard has a record of a transaction.
    pub async fn settle(&self) {
        for _ in 0..400 {
            if self.service().is_none() {
                self.handle.sleep(Duration::from_millis(100)).await;
                continue;
            }
            let mut left = 0;
            for shard in self.disk.shards.keys() {
                left += state::list_transactions(&*self.state(*shard), *shard).await.unwrap().len();
            }
            if left == 0 {
                return;
            }
            self.handle.sleep(Duration::from_millis(100)).await;
        }
        panic!("seed {}: transactions are left behind", self.seed);
    }
}

impl Node {
    fn new(handle: Handle, shards: Vec<ShardHandle>, proposer: Rc<dyn Proposer>, config: ServiceConfig) -> Node {
        let space = Rc::new(|| (1 << 40, 1 << 39));
        let service = MetaService::new(&handle, NodeId(1), shards.clone(), proposer, Rc::new(NoPeers), config, space);
        Node { handle, service, shards }
    }
}

/// Opens log, stores and groups as a server does, with limits so small that everything is
/// checkpointed and cut all the time.
async fn start_on_raft(medium: &Rc<MemMedium>, handle: &Handle) -> (Rc<RaftHost>, Vec<ShardHandle>) {
    let blobs: Rc<dyn MirroredBlobs> = medium.open(handle);
    let config = LogConfig { limit_bytes: 32 << 10, ..LogConfig::default() };
    let (log, _) = SharedLog::open(blobs.clone(), handle.clone(), config).await.expect("the log opens");
    let fabric = MemNetwork::new(1).endpoint("n1", handle);
    let host = RaftHost::new(NodeId(1), handle.clone(), fabric, log, HostConfig::default());
    let mut shards = Vec::new();
    for shard in (0..SHARDS).map(ShardId) {
        let config = KvConfig { memtable_bytes_max: 8 << 10, ..KvConfig::default() };
        let kv = Kv::open(blobs.clone(), handle, shard.0.into(), config).await.expect("the store opens");
        let machine = ShardMachine::new(shard, kv, handle);
        shards.push(machine.shard_handle());
        let members = vec![(NodeId(1), Address("n1".into()))];
        host.add_group(shard, machine, members, true).await.expect("the group starts");
    }
    (host, shards)
}

impl Replica {
    async fn apply(&self, shard: ShardId, entry: &LogEntry) -> state::Outcome {
        let view = self.state.borrow().clone();
        let outcome = state::apply(&*view, shard, entry).await.expect("a sound state");
        drop(view);
        Rc::make_mut(&mut *self.state.borrow_mut()).write(&outcome);
        outcome
    }
}

struct LocalProposer {
    handle: Handle,
    disk: Rc<Disk>,
    applied: RefCell<BTreeMap<ShardId, Rc<Applied>>>,
}

impl LocalProposer {
    async fn commit(&self, shard: ShardId, bytes: Bytes) -> Result<Bytes, ProposeError> {
        let replica = self.disk.shards.get(&shard).filter(|_| !self.disk.deposed.get());
        let replica = replica.ok_or(ProposeError::NotLeader { hint: None })?;
        let _turn = replica.turn.acquire(1).await;
        let micros = self.handle.random_u64() % self.disk.delay_micros_max.get();
        self.handle.sleep(Duration::from_micros(micros)).await;
        if !self.handle.is_alive() {
            std::future::pending::<()>().await;
        }
        let (nonce, entry) = decode_entry(&bytes).expect("the service's own encoding");
        assert_eq!(encode_entry(nonce, &entry), bytes);
        let outcome = replica.apply(shard, &entry).await;
        self.disk.entries.set(self.disk.entries.get() + 1);
        if self.disk.die_at.get() == Some(self.disk.entries.get()) {
            self.handle.kill();
            std::future::pending::<()>().await;
        }
        let applied = self.applied.borrow()[&shard].clone();
        applied.publish(nonce, outcome);
        Ok(Bytes::new())
    }
}

impl Proposer for LocalProposer {
    fn propose(&self, shard: ShardId, entry: Bytes) -> LocalBoxFuture<'_, Result<Bytes, ProposeError>> {
        self.commit(shard, entry).boxed_local()
    }

    fn read_barrier(&self, _shard: ShardId) -> LocalBoxFuture<'_, Result<(), ProposeError>> {
        async move {
            if !self.handle.is_alive() {
                std::future::pending::<()>().await;
            }
            Ok(())
        }
        .boxed_local()
    }

    fn leads(&self, _shard: ShardId) -> Option<u64> {
        (!self.disk.deposed.get()).then_some(1)
    }
}
