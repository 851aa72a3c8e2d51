//! One node with several shards, without Raft: entries are applied directly, in order, after a
//! random delay. The shards' states outlive the node.

use crate::service::applied::{decode_entry, encode_entry};
use crate::service::{Applied, MetaService, NoPeers, ProposeError, Proposer, ServiceConfig, ShardHandle};
use crate::state::{self, Init, LogEntry, MemoryState, Reader};
use bytes::Bytes;
use cfs_reactor::clock::SimClock;
use cfs_reactor::sync::Semaphore;
use cfs_reactor::{Executor, Handle};
use cfs_wire::{Ino, NodeId, ShardId, VolumeId};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

pub const SHARDS: u16 = 4;

/// Runs a story on virtual time; a failure names its seed.
pub fn simulate<F: Future<Output = ()> + 'static>(seed: u64, story: impl FnOnce(Rc<Cluster>) -> F) {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    let cluster = Cluster::new(&handle, seed);
    let run = story(cluster);
    executor.run_simulated(&handle, run).unwrap_or_else(|error| panic!("seed {seed}: {error}")).unwrap();
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
    delay_micros_max: Cell<u64>,
}

/// A node, restarted whenever it died.
pub struct Cluster {
    /// The clients' domain.
    pub handle: Handle,
    pub seed: u64,
    pub disk: Rc<Disk>,
    pub config: RefCell<ServiceConfig>,
    node: RefCell<Option<(Handle, MetaService)>>,
    /// Counts starts of the node.
    pub starts: Cell<u64>,
}

impl Cluster {
    fn new(handle: &Handle, seed: u64) -> Rc<Cluster> {
        let replica = |shard| (ShardId(shard), Replica { state: RefCell::default(), turn: Semaphore::new(1) });
        let disk = Disk {
            shards: (0..SHARDS).map(replica).collect(),
            entries: Cell::new(0),
            die_at: Cell::new(None),
            delay_micros_max: Cell::new(2000),
        };
        let cluster = Cluster {
            handle: handle.clone(),
            seed,
            disk: Rc::new(disk),
            config: RefCell::new(ServiceConfig::default()),
            node: RefCell::new(None),
            starts: Cell::new(0),
        };
        Rc::new(cluster)
    }

    /// Initialises the shards and starts the node.
    pub async fn start(&self) {
        let init = Init {
            shards: SHARDS,
            volume: VolumeId(1),
            root: Ino::ROOT,
            root_mode: 0o755,
            root_uid: 0,
            root_gid: 0,
            policy: cfs_wire::Policy::new(1, 0).unwrap(),
            name_key: [7; 32],
            feature_level: state::entry::FEATURE_LEVEL,
            now: self.handle.wall(),
        };
        for (id, replica) in &self.disk.shards {
            replica.apply(*id, &LogEntry::Init(init.clone())).await;
        }
        self.restart();
    }

    /// Kills the node if it lives, and starts it anew from the shards' states.
    pub fn restart(&self) {
        self.kill();
        self.starts.set(self.starts.get() + 1);
        let handle = self.handle.new_domain();
        let proposer = LocalProposer { handle: handle.clone(), disk: self.disk.clone(), applied: RefCell::default() };
        let mut shards = Vec::new();
        for shard in self.disk.shards.keys().copied() {
            let (disk, applied) = (self.disk.clone(), Applied::new());
            proposer.applied.borrow_mut().insert(shard, applied.clone());
            let view = Rc::new(move || disk.shards[&shard].state.borrow().clone() as Rc<dyn Reader>);
            shards.push(ShardHandle { shard, view, applied });
        }
        let config = self.config.borrow().clone();
        let space = Rc::new(|| (1 << 40, 1 << 39));
        let service =
            MetaService::new(&handle, NodeId(1), shards, Rc::new(proposer), Rc::new(NoPeers), config, space);
        *self.node.borrow_mut() = Some((handle, service));
    }

    pub fn kill(&self) {
        let node = self.node.borrow_mut().take();
        if let Some((handle, service)) = node {
            handle.kill();
            drop(service);
        }
    }

    /// The service, if the node lives.
    pub fn service(&self) -> Option<MetaService> {
        let node = self.node.borrow();
        node.as_ref().filter(|(handle, _)| handle.is_alive()).map(|(_, service)| service.clone())
    }

    /// The node dies at the n-th entry from now.
    pub fn die_after(&self, entries: Option<u64>) {
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
                }
            }
        });
    }

    pub fn state(&self, shard: ShardId) -> Rc<MemoryState> {
        self.disk.shards[&shard].state.borrow().clone()
    }

    /// Waits until no shard has a record of a transaction.
    pub async fn settle(&self) {
        for _ in 0..400 {
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
        let replica = self.disk.shards.get(&shard).ok_or(ProposeError::NotLeader { hint: None })?;
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
        Some(1)
    }
}
