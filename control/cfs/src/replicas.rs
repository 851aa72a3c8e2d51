//! The node's replicas: one Raft group per metadata shard, its ordered store below, the
//! metadata service above.

use crate::node::VOLUME;
use cfs_consensus::host::{HostConfig, HostError, OPCODES};
use cfs_consensus::{LogConfig, LogError, RaftHost, SharedLog};
use cfs_fabric::{Address, Fabric, Message};
use cfs_kv::{Inventory, Kv, KvConfig, KvError, KvStats};
use cfs_meta::service::applied::encode_entry;
use cfs_meta::service::peers::NoPeers;
use cfs_meta::service::{MetaService, ServiceConfig, ShardHandle, ShardMachine, Space};
use cfs_meta::state::{self, Init, LogEntry, StateError};
use cfs_reactor::Handle;
use cfs_store::segment::Mirror;
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::meta::ShardOp;
use cfs_wire::{Ino, NodeId, ShardId};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// The level `apply` starts with.
const FEATURE_LEVEL: u32 = 1;
/// A stop waits so long for checkpoints, which the next start can do without.
const CHECKPOINTS_MAX: Duration = Duration::from_secs(60);
/// Memory for all memtables of a node: with 256 shards each gets 256 KiB, with 8 the full 8 MiB.
const MEMTABLES_BYTES: usize = 64 << 20;
const MEMTABLE_BYTES_MIN: usize = 256 << 10;
const MEMTABLE_BYTES_MAX: usize = 8 << 20;

/// The part of a target that the log may take before it is cut. Targets keep at least a 64th
/// for metadata when file data has filled the rest: the log must turn over within it, beside
/// the runs that its checkpoints write, or a full cluster could not even commit a delete.
const LOG_SHARE: u64 = 128;
/// Below this, checkpoints would come every few hundred commits.
const LOG_BYTES_MIN: u64 = 4 << 20;

/// Bounds of a log whose smallest target has `capacity` bytes.
fn log_config(capacity: u64) -> LogConfig {
    let config = LogConfig::default();
    let most = config.stored_bytes_max;
    LogConfig { stored_bytes_max: (capacity / LOG_SHARE).max(LOG_BYTES_MIN).min(most), ..config }
}

/// Bounds of the shared log and of every shard's ordered store, in the place of those that the
/// targets' capacity and the number of shards ask for.
#[derive(Clone, Default)]
pub struct ReplicaBounds {
    pub log: Option<LogConfig>,
    pub store: Option<KvConfig>,
}

impl ReplicaBounds {
    /// With a log that a smallest target of `capacity` bytes has room for.
    pub fn fitted_to(self, capacity: u64) -> ReplicaBounds {
        ReplicaBounds { log: Some(self.log.unwrap_or_else(|| log_config(capacity))), ..self }
    }
}

/// Bounds of an ordered store on a node with so many.
fn store_config(shards: u16) -> KvConfig {
    let memtable = MEMTABLES_BYTES / usize::from(shards);
    KvConfig { memtable_bytes_max: memtable.clamp(MEMTABLE_BYTES_MIN, MEMTABLE_BYTES_MAX), ..KvConfig::default() }
}

/// Why the replicas could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ReplicasError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Store(#[from] KvError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(
        "the metadata of shard {shard} is lost: the file system was in use, and the targets hold neither the log nor \
         the state of it; bring back targets that do, or restore from a copy"
    )]
    Lost { shard: ShardId },
    #[error("shard {shard} cannot be initialised: {detail}")]
    Init { shard: ShardId, detail: String },
}

/// A shard's replica as an administrator sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ShardFacts {
    pub leader: Option<NodeId>,
    pub term: u64,
    pub applied: u64,
    pub checkpointed: u64,
    /// Of the ordered store.
    pub store: KvStats,
}

struct Replica {
    kv: Rc<Kv>,
    shard: ShardHandle,
}

pub struct Replicas {
    handle: Handle,
    node: NodeId,
    host: Rc<RaftHost>,
    replicas: BTreeMap<ShardId, Replica>,
}

impl Replicas {
    /// Recovers the log and the stores, starts every shard's group, and creates the shards of a
    /// new cluster: one not `created` before.
    pub async fn start(
        handle: &Handle,
        node: NodeId,
        parameters: ClusterParameters,
        mirror: Rc<Mirror>,
        fabric: Rc<dyn Fabric>,
        bounds: ReplicaBounds,
        created: bool,
    ) -> Result<Rc<Replicas>, ReplicasError> {
        let (log, report) = SharedLog::open(mirror.clone(), handle.clone(), bounds.log.unwrap_or_default()).await?;
        tracing::info!(?report, "log recovered");
        let host = RaftHost::new(node, handle.clone(), fabric, log.clone(), HostConfig::default());
        let inventory = Inventory::load(&*mirror).await?;
        let config = bounds.store.unwrap_or_else(|| store_config(parameters.shards));
        let mut replicas = BTreeMap::new();
        for shard in (0..parameters.shards).map(ShardId) {
            let kv = Kv::open_listed(mirror.clone(), handle, shard.0.into(), config.clone(), &inventory).await?;
            if created && kv.applied().is_empty() && log.group(shard).is_empty() {
                return Err(ReplicasError::Lost { shard });
            }
            let machine = ShardMachine::new(shard, kv.clone(), handle);
            let members = vec![(node, Address(String::new()))];
            replicas.insert(shard, Replica { kv, shard: machine.shard_handle() });
            host.add_group(shard, machine, members, true).await?;
        }
        let replicas = Rc::new(Replicas { handle: handle.clone(), node, host, replicas });
        for (shard, replica) in &replicas.replicas {
            replicas.initialise(*shard, replica, &parameters, created).await?;
        }
        Ok(replicas)
    }

    /// Proposes a new shard's first entry, unless it has one. A crash before is repeated here.
    async fn initialise(
        &self,
        shard: ShardId,
        replica: &Replica,
        parameters: &ClusterParameters,
        created: bool,
    ) -> Result<(), ReplicasError> {
        let failed = |detail: String| ReplicasError::Init { shard, detail };
        self.host.read_barrier(shard).await.map_err(|error| failed(error.to_string()))?;
        let view = (replica.shard.view)();
        match state::read_shard(&*view, shard, &ShardOp::GetEpoch).await {
            // An empty file system in the place of the old one would have everything deleted.
            Err(StateError::Uninitialised) if created => return Err(ReplicasError::Lost { shard }),
            Err(StateError::Uninitialised) => {}
            Err(error) => return Err(failed(error.to_string())),
            Ok(_) => return Ok(()),
        }
        let init = Init {
            shards: parameters.shards,
            volume: VOLUME,
            root: Ino::ROOT,
            root_mode: 0o755,
            root_uid: 0,
            root_gid: 0,
            policy: parameters.policy,
            tolerated: parameters.tolerated,
            targets: parameters.targets,
            name_key: parameters.name_key,
            feature_level: FEATURE_LEVEL,
            now: self.handle.wall(),
        };
        // Nobody waits for this entry's outcome: any nonce does.
        let entry = encode_entry(self.handle.random_u64(), &LogEntry::Init(init));
        self.host.propose(shard, entry).await.map(drop).map_err(|error| failed(error.to_string()))
    }

    /// The metadata service over these replicas.
    pub fn serve(&self, config: ServiceConfig, space: Space) -> MetaService {
        let shards = self.replicas.values().map(|replica| replica.shard.clone()).collect();
        MetaService::new(&self.handle, self.node, shards, self.host.clone(), Rc::new(NoPeers), config, space)
    }

    /// Whether an opcode is consensus's own.
    pub fn answers(&self, opcode: u16) -> bool {
        OPCODES.contains(&opcode)
    }

    pub async fn handle(&self, request: Message) -> Message {
        self.host.handle_rpc(request).await
    }

    pub fn leads(&self, shard: ShardId) -> bool {
        self.host.is_leader(shard)
    }

    pub fn facts(&self, shard: ShardId) -> ShardFacts {
        let Some(metrics) = self.host.metrics(shard) else { return ShardFacts::default() };
        let stats = self.replicas.get(&shard).map(|replica| replica.kv.stats());
        ShardFacts {
            leader: metrics.leader,
            term: metrics.term,
            applied: metrics.applied_index.unwrap_or(0),
            checkpointed: metrics.synced_index.unwrap_or(0),
            store: stats.unwrap_or_default(),
        }
    }

    /// Checkpoints everything and stops.
    pub async fn shutdown(&self) {
        let why = match self.handle.timeout(CHECKPOINTS_MAX, self.host.checkpoint_all()).await {
            Some(outcome) => outcome.err().map(|error| error.to_string()),
            None => Some(format!("not done after {CHECKPOINTS_MAX:?}: too few targets, or no space, to write to")),
        };
        if let Some(error) = why {
            tracing::warn!(error, "not everything was checkpointed; the next start replays more of the log");
        }
        self.host.shutdown().await;
        for replica in self.replicas.values() {
            replica.kv.close().await;
        }
    }
}
