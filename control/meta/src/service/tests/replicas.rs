//! Three replicas of a shard on what a server runs: Raft over a fabric, log and ordered store over
//! blobs. All end with the rows that the same entries give in memory.

use super::client::{name, node};
use super::cluster::{init, seeds};
use crate::service::ShardMachine;
use crate::service::applied::encode_entry;
use crate::state::{self, Facts, LogEntry, MemoryState, Reply};
use cfs_consensus::host::{HostConfig, RaftHost, SNAPSHOT_CHUNK_BYTES_MAX};
use cfs_consensus::{LogConfig, SharedLog, StateMachine as _};
use cfs_fabric::mem::MemNetwork;
use cfs_fabric::{Address, Fabric, Listener, Message, Peer, Service};
use cfs_kv::testing::MemMedium;
use cfs_kv::{Kv, KvConfig};
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_reactor::{Executor, Handle};
use cfs_wire::meta::{FileKind, MetaCall, MetaOp, MetaReply};
use cfs_wire::{Ino, NodeId, RequestId, SessionId, ShardId, Timestamp};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::rc::Rc;
use std::time::Duration;

/// The one of the volume's root.
const SHARD: ShardId = ShardId(0);
const REPLICAS: usize = 3;

struct Server(Rc<RaftHost>);

impl Service for Server {
    fn handle(&self, _peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        self.0.handle_rpc(request).boxed_local()
    }
}

struct Replica {
    domain: Handle,
    host: Rc<RaftHost>,
    machine: Rc<ShardMachine>,
    kv: Rc<Kv>,
    _listener: Box<dyn Listener>,
}

impl Replica {
    async fn start(outer: &Handle, network: &Rc<MemNetwork>, medium: &Rc<MemMedium>, which: usize) -> Replica {
        let domain = outer.new_domain();
        let address = |which: usize| Address(format!("n{which}"));
        let fabric = network.endpoint(&address(which).0, &domain);
        let (inner, blobs) = (domain.clone(), medium.open(&domain));
        let starting = domain.spawn(async move {
            let (log, _) = SharedLog::open(blobs.clone(), inner.clone(), LogConfig::default()).await.unwrap();
            let host = RaftHost::new(NodeId(which as u16), inner.clone(), fabric.clone(), log, HostConfig::default());
            let listener = fabric.listen(&address(which), Rc::new(Server(host.clone()))).unwrap();
            let config = KvConfig { memtable_bytes_max: 256 << 10, ..KvConfig::default() };
            let kv = Kv::open(blobs, &inner, SHARD.0.into(), config).await.unwrap();
            let machine = ShardMachine::new(SHARD, kv.clone(), &inner);
            let members = (0..REPLICAS).map(|which| (NodeId(which as u16), address(which))).collect();
            host.add_group(SHARD, machine.clone(), members, true).await.unwrap();
            (host, machine, kv, listener)
        });
        let (host, machine, kv, listener) = starting.await.unwrap();
        Replica { domain, host, machine, kv, _listener: listener }
    }

    async fn rows(&self) -> BTreeMap<Vec<u8>, bytes::Bytes> {
        let mut rows = BTreeMap::new();
        let mut scan = self.kv.scan((Bound::Unbounded, Bound::Unbounded));
        while let Some((key, value)) = scan.next().await.unwrap() {
            rows.insert(key.to_vec(), value);
        }
        rows
    }
}

/// A client's calls, and what they come to.
struct Work {
    random: SplitMix64,
    sequence: u64,
    files: Vec<(String, Ino)>,
    expected: MemoryState,
}

impl Work {
    fn apply(&mut self, entry: &LogEntry) -> Reply {
        let outcome = state::apply(&self.expected, SHARD, entry).now_or_never().unwrap().unwrap();
        self.expected.write(&outcome);
        outcome.reply
    }

    fn call(&mut self, op: MetaOp) -> (LogEntry, Reply) {
        self.sequence += 1;
        let id = RequestId { session: SessionId(1), sequence: self.sequence };
        // A few replies are kept.
        let lowest_unacknowledged = self.sequence.saturating_sub(5);
        let call = MetaCall { id, lowest_unacknowledged, shard: SHARD, op };
        let now = Timestamp { secs: self.sequence as i64, nanos: 0 };
        let entry = LogEntry::Client { call, now, facts: Facts::default() };
        let reply = self.apply(&entry);
        (entry, reply)
    }

    /// The next of many entries: files come, go and change, some by attributes that fill snapshots.
    fn next(&mut self) -> LogEntry {
        let chosen = self.random.below(self.files.len().max(1) as u64) as usize;
        match self.random.below(4) {
            0 if self.files.len() > 20 => {
                let (gone, _) = self.files.swap_remove(chosen);
                self.call(MetaOp::Unlink { dir: Ino::ROOT, name: name(&gone) }).0
            }
            1 if !self.files.is_empty() => {
                let value = vec![self.random.below(256) as u8; 60_000];
                let named = name(&format!("user.{}", self.random.below(3)));
                self.call(MetaOp::SetXattr { ino: self.files[chosen].1, name: named, value, flags: 0 }).0
            }
            _ => {
                let called = format!("f{}", self.sequence);
                let create =
                    MetaOp::Create { dir: Ino::ROOT, name: name(&called), node: node(FileKind::File), hold: false };
                let (entry, reply) = self.call(create);
                let Reply::Meta(Ok(MetaReply::Entry(made))) = reply else { panic!("{reply:?}") };
                self.files.push((called, made.attr.ino));
                entry
            }
        }
    }
}

async fn wait_leader(outer: &Handle, replicas: &[Option<Replica>]) -> usize {
    loop {
        let leads = |replica: &Option<Replica>| replica.as_ref().is_some_and(|replica| replica.host.is_leader(SHARD));
        match replicas.iter().position(leads) {
            Some(leader) => return leader,
            None => outer.sleep(Duration::from_millis(50)).await,
        }
    }
}

fn kill(replicas: &mut [Option<Replica>], which: usize) {
    if let Some(replica) = replicas[which].take() {
        replica.domain.kill();
    }
}

async fn propose(leader: &Replica, work: &mut Work, count: usize) {
    for _ in 0..count {
        leader.host.propose(SHARD, encode_entry(work.sequence, &work.next())).await.unwrap();
    }
}

#[test]
fn a_replica_that_came_by_snapshot_has_every_row_and_leads_from_there() {
    for seed in seeds(2) {
        let executor = Executor::new(Rc::new(SimClock::new(seed)));
        let outer = executor.domain();
        executor.run_simulated(&outer, story(seed, outer.clone())).unwrap().unwrap();
    }
}

async fn story(seed: u64, outer: Handle) {
    let network = MemNetwork::new(seed);
    let media: Vec<_> = (0..REPLICAS as u64).map(|which| MemMedium::new(seed * 10 + which)).collect();
    let mut replicas = Vec::new();
    for (which, medium) in media.iter().enumerate() {
        replicas.push(Some(Replica::start(&outer, &network, medium, which).await));
    }
    let mut work =
        Work { random: SplitMix64::new(seed), sequence: 0, files: Vec::new(), expected: MemoryState::default() };

    let leader = wait_leader(&outer, &replicas).await;
    let first = LogEntry::Init(init(Timestamp::default()));
    work.apply(&first);
    let (open, _) = work.call(MetaOp::OpenSession { client: "client".into() });
    for entry in [first, open] {
        replicas[leader].as_ref().unwrap().host.propose(SHARD, encode_entry(1, &entry)).await.unwrap();
    }
    propose(replicas[leader].as_ref().unwrap(), &mut work, 20).await;

    // What the absent one lacks is cut from the logs of the others.
    let absent = (leader + 1) % REPLICAS;
    kill(&mut replicas, absent);
    propose(replicas[leader].as_ref().unwrap(), &mut work, 600).await;
    outer.sleep(Duration::from_secs(1)).await;
    let size: usize = work.expected.map.iter().map(|(key, value)| key.len() + value.len()).sum();
    assert!(size > 2 * SNAPSHOT_CHUNK_BYTES_MAX, "{size} bytes are no snapshot of several chunks");
    for replica in replicas.iter().flatten() {
        replica.host.checkpoint(SHARD).await.unwrap();
        let kept = replica.host.metrics(SHARD).unwrap().purged_index;
        assert!(kept > Some(600), "{kept:?}");
    }
    replicas[absent] = Some(Replica::start(&outer, &network, &media[absent], absent).await);
    propose(replicas[leader].as_ref().unwrap(), &mut work, 20).await;
    outer.sleep(Duration::from_secs(5)).await;
    assert_eq!(replicas[absent].as_ref().unwrap().rows().await, work.expected.map);

    // From here on it is needed, and its state survives it.
    kill(&mut replicas, absent);
    replicas[absent] = Some(Replica::start(&outer, &network, &media[absent], absent).await);
    kill(&mut replicas, leader);
    let next = wait_leader(&outer, &replicas).await;
    replicas[next].as_ref().unwrap().host.read_barrier(SHARD).await.unwrap();
    propose(replicas[next].as_ref().unwrap(), &mut work, 50).await;
    replicas[leader] = Some(Replica::start(&outer, &network, &media[leader], leader).await);
    outer.sleep(Duration::from_secs(5)).await;
    let marks: Vec<_> = replicas.iter().flatten().map(|replica| replica.machine.applied()).collect();
    assert!(marks.iter().all(|mark| *mark == marks[0]), "seed {seed}: {marks:?}");
    for (which, replica) in replicas.iter().flatten().enumerate() {
        assert!(replica.rows().await == work.expected.map, "seed {seed}: replica {which} has other rows");
    }
}
