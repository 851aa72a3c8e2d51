//! Groups of three and five replicas in one process, under leader kills, partitions and
//! restarts. Nothing acknowledged is lost, all replicas end equal, and a seed replays.

mod common;

use bytes::Bytes;
use cfs_consensus::host::{HostConfig, OPCODES, ProposeError, RaftHost};
use cfs_consensus::{LogConfig, SharedLog};
use cfs_fabric::mem::{Faults, MemNetwork};
use cfs_fabric::{Address, Fabric, Listener, Message, Peer, Service};
use cfs_reactor::Handle;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::{NodeId, ShardId};
use common::blobs::{Medium, Torn};
use common::machine::{Disk, List};
use common::simulate;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

const GROUP: ShardId = ShardId(0);

struct Server(Rc<RaftHost>);

impl Service for Server {
    fn handle(&self, _peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        assert!(OPCODES.contains(&request.opcode));
        self.0.handle_rpc(request).boxed_local()
    }
}

struct Running {
    domain: Handle,
    host: Rc<RaftHost>,
    list: Rc<List>,
    _listener: Box<dyn Listener>,
}

/// One node: its disks live on while it is down.
struct Node {
    name: String,
    log: Rc<Medium>,
    state: Rc<Disk>,
    running: RefCell<Option<Running>>,
}

struct Cluster {
    outer: Handle,
    network: Rc<MemNetwork>,
    nodes: Vec<Node>,
    log_config: LogConfig,
    acknowledged: RefCell<BTreeSet<u64>>,
    proposed: Cell<u64>,
    stop: Cell<bool>,
}

fn item(number: u64) -> Bytes {
    Bytes::copy_from_slice(&number.to_le_bytes())
}

impl Cluster {
    fn new(outer: &Handle, seed: u64, size: usize, log_config: LogConfig) -> Rc<Cluster> {
        let node = |number| Node {
            name: format!("n{number}"),
            log: Medium::new(),
            state: Rc::default(),
            running: RefCell::new(None),
        };
        Rc::new(Cluster {
            outer: outer.clone(),
            network: MemNetwork::new(seed),
            nodes: (1..=size).map(node).collect(),
            log_config,
            acknowledged: RefCell::default(),
            proposed: Cell::new(0),
            stop: Cell::new(false),
        })
    }

    async fn start(&self, which: usize) {
        let node = &self.nodes[which];
        let domain = self.outer.new_domain();
        node.log.halt_at(None, Torn::Nothing);
        let (name, log, state) = (node.name.clone(), node.log.clone(), node.state.clone());
        let fabric = self.network.endpoint(&name, &domain);
        let members: Vec<_> =
            (1..=self.nodes.len()).map(|number| (NodeId(number as u16), Address(format!("n{number}")))).collect();
        let (inner, config) = (domain.clone(), self.log_config.clone());
        let starting = domain.spawn(async move {
            let (log, _) = SharedLog::open(log.open(&inner), inner.clone(), config).await.expect("the log opens");
            let id = NodeId(which as u16 + 1);
            let host = RaftHost::new(id, inner.clone(), fabric.clone(), log, HostConfig::default());
            let listener = fabric.listen(&Address(name), Rc::new(Server(host.clone()))).expect("listens");
            let list = List::open(&state, &inner);
            host.add_group(GROUP, list.clone(), members, true).await.expect("the group starts");
            (host, list, listener)
        });
        let (host, list, listener) = starting.await.expect("not killed while starting");
        *node.running.borrow_mut() = Some(Running { domain, host, list, _listener: listener });
    }

    /// Kills a node in the middle of whatever it does; a put in flight may be torn.
    async fn kill(&self, which: usize, torn: Torn) {
        let node = &self.nodes[which];
        if node.running.borrow().is_none() {
            return;
        }
        node.log.halt_at(Some(1), torn);
        self.outer.sleep(Duration::from_micros(500)).await;
        let running = node.running.borrow_mut().take();
        if let Some(running) = running {
            running.domain.kill();
        }
    }

    fn host(&self, which: usize) -> Option<Rc<RaftHost>> {
        self.nodes[which].running.borrow().as_ref().map(|running| running.host.clone())
    }

    fn leader(&self) -> Option<usize> {
        (0..self.nodes.len()).find(|which| self.host(*which).is_some_and(|host| host.is_leader(GROUP)))
    }

    /// A client: proposes one number after the other, each until it is acknowledged.
    async fn client(self: Rc<Self>, mut random: SplitMix64) {
        while !self.stop.get() {
            let number = self.proposed.get();
            self.proposed.set(number + 1);
            loop {
                let which = random.below(self.nodes.len() as u64) as usize;
                let target = self.leader().filter(|_| random.below(4) > 0).unwrap_or(which);
                let Some(host) = self.host(target) else {
                    self.outer.sleep(Duration::from_millis(20)).await;
                    continue;
                };
                let proposing = host.propose(GROUP, item(number));
                match self.outer.timeout(Duration::from_secs(2), proposing).await {
                    Some(Ok(_)) => {
                        self.acknowledged.borrow_mut().insert(number);
                        break;
                    }
                    Some(Err(error @ ProposeError::Stopped { .. })) => {
                        tracing::debug!(%error, "asking another");
                        self.outer.sleep(Duration::from_millis(50)).await;
                    }
                    Some(Err(error)) => {
                        assert!(error.is_retryable(), "{error}");
                        self.outer.sleep(Duration::from_millis(20)).await;
                    }
                    None => {}
                }
                if self.stop.get() {
                    return;
                }
            }
            self.outer.sleep(Duration::from_millis(random.below(150))).await;
        }
    }

    async fn wait_leader(&self) -> usize {
        loop {
            if let Some(leader) = self.leader() {
                return leader;
            }
            self.outer.sleep(Duration::from_millis(50)).await;
        }
    }

    /// One thing goes wrong, and is mended a while later.
    async fn misfortune(&self, random: &mut SplitMix64) {
        let size = self.nodes.len() as u64;
        let torn = [Torn::Nothing, Torn::Damaged, Torn::Whole][random.below(3) as usize];
        match random.below(4) {
            0 | 1 => {
                let leader = self.wait_leader().await;
                self.kill(leader, torn).await;
                self.outer.sleep(Duration::from_millis(500 + random.below(4000))).await;
                self.start(leader).await;
            }
            2 => {
                let victim = random.below(size) as usize;
                self.kill(victim, torn).await;
                self.outer.sleep(Duration::from_millis(random.below(6000))).await;
                self.start(victim).await;
            }
            _ => {
                let alone = self.leader().unwrap_or(0);
                for other in (0..self.nodes.len()).filter(|other| *other != alone) {
                    self.network.partition(&self.nodes[alone].name, &self.nodes[other].name, true);
                }
                self.outer.sleep(Duration::from_millis(1000 + random.below(6000))).await;
                self.network.heal();
            }
        }
    }

    /// Waits until all replicas have applied the same, then compares.
    async fn settle(&self, seed: u64) -> Vec<Bytes> {
        let mark = loop {
            let leader = self.wait_leader().await;
            let Some(host) = self.host(leader) else { continue };
            let proposed = self.outer.timeout(Duration::from_secs(5), host.propose(GROUP, item(u64::MAX))).await;
            if matches!(proposed, Some(Ok(_))) {
                break host.metrics(GROUP).unwrap().applied_index;
            }
            self.outer.sleep(Duration::from_millis(100)).await;
        };
        // A proposal given up by its client may still be committed: wait for silence.
        let applied = || -> Vec<Option<u64>> {
            (0..self.nodes.len())
                .map(|which| self.host(which).and_then(|host| host.metrics(GROUP)?.applied_index))
                .collect()
        };
        let (mut quiet, mut waited) = (0, 0);
        while quiet < 40 {
            let before = applied();
            self.outer.sleep(Duration::from_millis(100)).await;
            let same = applied() == before && before.iter().all(|index| *index == before[0] && *index >= mark);
            quiet = if same { quiet + 1 } else { 0 };
            waited += 1;
            let all = || (0..self.nodes.len()).map(|which| self.host(which).and_then(|host| host.metrics(GROUP)));
            assert!(waited < 600, "seed {seed}: no silence: {:#?}", all().collect::<Vec<_>>());
        }
        let lists: Vec<_> = self.nodes.iter().map(|node| node.running.borrow().as_ref().unwrap().list.list()).collect();
        for (which, list) in lists.iter().enumerate() {
            let differ = list.iter().zip(&lists[0]).position(|(a, b)| a != b);
            assert!(
                *list == lists[0],
                "seed {seed}: replica {} differs from replica 1 at {differ:?}, {} and {} items",
                which + 1,
                list.len(),
                lists[0].len()
            );
        }
        let found: BTreeSet<u64> =
            lists[0].iter().map(|item| u64::from_le_bytes(item[..].try_into().unwrap())).collect();
        let acknowledged = self.acknowledged.borrow();
        let lost: Vec<_> = acknowledged.difference(&found).collect();
        assert!(lost.is_empty(), "seed {seed}: acknowledged and lost: {lost:?}");
        lists[0].clone()
    }
}

fn lossy() -> Faults {
    let delay = (Duration::from_micros(20), Duration::from_millis(3));
    Faults { delay, request_loss: 2000, reply_loss: 2000, reset: 500, ..Faults::default() }
}

/// A whole story; answers how much was acknowledged, how many snapshots travelled, and the
/// executor's trace.
fn story(seed: u64, size: usize, misfortunes: usize, log_config: LogConfig) -> (usize, u64, u64) {
    let ((acknowledged, restores), trace) = simulate(seed, |outer| async move {
        let cluster = Cluster::new(&outer, seed, size, log_config);
        for which in 0..size {
            cluster.start(which).await;
        }
        cluster.wait_leader().await;
        cluster.network.set_faults(lossy());
        let mut random = SplitMix64::new(seed);
        let clients: Vec<_> =
            (0..3).map(|_| outer.spawn(cluster.clone().client(SplitMix64::new(random.next_u64())))).collect();
        for _ in 0..misfortunes {
            cluster.misfortune(&mut random).await;
            outer.sleep(Duration::from_millis(random.below(3000))).await;
        }
        cluster.stop.set(true);
        for client in clients {
            client.await.expect("the client ends");
        }
        cluster.network.set_faults(Faults::default());
        cluster.settle(seed).await;
        let restores = cluster.nodes.iter().map(|node| node.state.restores.get()).sum::<u64>();
        let acknowledged = cluster.acknowledged.borrow().len();
        (acknowledged, restores)
    });
    (acknowledged, restores, trace)
}

#[test]
fn three_replicas_lose_nothing_when_leaders_die() {
    for seed in 1..=2 {
        let (acknowledged, ..) = story(seed, 3, 6, LogConfig::default());
        assert!(acknowledged > 60, "seed {seed}: only {acknowledged} proposals went through");
    }
}

#[test]
fn five_replicas_lose_nothing_when_leaders_die() {
    for seed in 11..=11 {
        let (acknowledged, ..) = story(seed, 5, 6, LogConfig::default());
        assert!(acknowledged > 60, "seed {seed}: only {acknowledged} proposals went through");
    }
}

/// Checkpoints, purges and cuts in the middle of everything else.
#[test]
fn three_replicas_with_a_short_log_lose_nothing() {
    for seed in 21..=21 {
        let short = LogConfig {
            limit_bytes: 120_000,
            stored_bytes_max: 120_000,
            copy_bytes_max: 16 << 10,
            ..LogConfig::default()
        };
        let (acknowledged, ..) = story(seed, 3, 6, short);
        assert!(acknowledged > 60, "seed {seed}: only {acknowledged} proposals went through");
    }
}

#[test]
fn a_replica_behind_the_purged_log_catches_up_by_snapshot() {
    simulate(42, |outer| async move {
        let cluster = Cluster::new(&outer, 42, 3, LogConfig::default());
        for which in 0..3 {
            cluster.start(which).await;
        }
        let leader = cluster.wait_leader().await;
        let (follower, absent) = ((leader + 1) % 3, (leader + 2) % 3);
        let propose = |which: usize, numbers: std::ops::Range<u64>| {
            let host = cluster.host(which).unwrap();
            async move {
                for number in numbers {
                    host.propose(GROUP, item(number)).await.unwrap();
                }
            }
        };
        propose(leader, 0..20).await;
        cluster.kill(absent, Torn::Nothing).await;
        propose(leader, 20..100).await;
        outer.sleep(Duration::from_secs(1)).await;
        // The follower forgets what the absent replica lacks, and then leads.
        let remaining = cluster.host(follower).unwrap();
        remaining.checkpoint(GROUP).await.unwrap();
        assert!(remaining.metrics(GROUP).unwrap().purged_index >= Some(99));
        cluster.kill(leader, Torn::Nothing).await;
        cluster.start(absent).await;
        let next = cluster.wait_leader().await;
        assert_eq!(next, follower, "only the follower has all that is committed");
        propose(next, 100..110).await;
        cluster.start(leader).await;
        let list = cluster.settle(42).await;
        assert_eq!(list[..110], (0..110).map(item).collect::<Vec<_>>()[..]);
        assert_eq!(cluster.nodes[absent].state.restores.get(), 1, "it came by snapshot");
        assert_eq!(cluster.nodes[leader].state.restores.get(), 0, "the restarted leader had the log itself");
    });
}

#[test]
fn a_seed_replays_to_the_same_trace_and_another_does_not() {
    let run =
        |seed| story(seed, 3, 2, LogConfig { limit_bytes: 120_000, stored_bytes_max: 120_000, ..LogConfig::default() });
    assert_eq!(run(31), run(31));
    assert_ne!(run(31).2, run(32).2);
}

#[test]
fn a_follower_names_the_leader_and_a_minority_can_neither_commit_nor_confirm() {
    simulate(41, |outer| async move {
        let cluster = Cluster::new(&outer, 41, 3, LogConfig::default());
        for which in 0..3 {
            cluster.start(which).await;
        }
        let leader = cluster.wait_leader().await;
        cluster.host(leader).unwrap().propose(GROUP, item(1)).await.unwrap();
        cluster.host(leader).unwrap().read_barrier(GROUP).await.unwrap();
        let follower = (leader + 1) % 3;
        outer.sleep(Duration::from_secs(2)).await;
        let refused = cluster.host(follower).unwrap().propose(GROUP, item(2)).await.unwrap_err();
        let hint = refused.hint().expect("a hint");
        assert_eq!(hint.address, Address(cluster.nodes[leader].name.clone()));
        assert_eq!(hint.node, NodeId(leader as u16 + 1));
        assert!(refused.is_retryable());

        for other in (0..3).filter(|other| *other != leader) {
            cluster.kill(other, Torn::Nothing).await;
        }
        let host = cluster.host(leader).unwrap();
        let unanswered = outer.timeout(Duration::from_secs(3), host.propose(GROUP, item(3))).await;
        assert_eq!(unanswered, None, "nothing is acknowledged without a quorum");
        let barrier = outer.timeout(Duration::from_secs(20), host.read_barrier(GROUP)).await;
        assert!(!matches!(barrier, Some(Ok(()))), "a leader without a quorum can't confirm a read");
    });
}

/// Many seeds, for as long as one likes: `cargo nextest run --run-ignored only soak`, with
/// SEED for where to begin and SEEDS for how many.
#[test]
#[ignore = "minutes"]
fn soak_cluster() {
    let number = |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let from: u64 = number("SEED", 1000);
    for seed in from..from + number("SEEDS", 20) {
        let size = if seed % 4 == 0 { 5 } else { 3 };
        let limit_bytes = if seed % 2 == 0 { 120_000 } else { 32 << 20 };
        let (acknowledged, restores, trace) =
            story(seed, size, 8, LogConfig { limit_bytes, stored_bytes_max: limit_bytes, ..LogConfig::default() });
        println!("seed {seed}: {acknowledged} acknowledged, {restores} snapshots, trace {trace:016x}");
    }
}
