//! One storage node on given seams: opens targets, starts replicas, serves.

use crate::background::{MoverIntervals, Movers};
use crate::membership::{Membership, MembershipError};
use crate::registrar::ShardRegistrar;
use crate::replicas::{ReplicaBounds, Replicas, ReplicasError, ShardFacts};
use crate::service::Dispatch;
use crate::targets::{self, Targets};
use cfs_api::{AdminError, CheckReport, CheckState};
use cfs_device::BlockDevice;
use cfs_fabric::{Address, Fabric, FabricError, Listener};
use cfs_meta::service::{MetaService, ServiceConfig};
use cfs_movers::check::Check;
use cfs_movers::collector::Collector;
use cfs_movers::orphans::OrphanSearch;
use cfs_movers::packer::Packer;
use cfs_movers::rebuild::{Rebuild, RebuildConfig};
use cfs_movers::scrub::Scrub;
use cfs_movers::{MoverError, ShardCalls};
use cfs_reactor::{Handle, Instant};
use cfs_store::TargetStore;
use cfs_store::segment::{BlobTarget, LocalTarget, Mirror, SegmentConfig, SegmentStore, TargetPool};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::meta::{MetaError, ShardOp, ShardReply};
use cfs_wire::{ClusterId, Epoch, NodeId, ShardId, TargetId, VolumeId};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// The first and, until volumes can be created, only volume.
pub const VOLUME: VolumeId = VolumeId(1);

/// A start that takes longer than this is given up with the last answer's reason.
const TAKEN_UP_WITHIN: Duration = Duration::from_secs(60);

/// A device that should be a target of this node.
pub struct DeviceSlot {
    /// For people: the path.
    pub label: String,
    /// The device, or why it could not be opened.
    pub device: Result<Rc<dyn BlockDevice>, String>,
}

#[derive(Clone, Default)]
pub struct NodeConfig {
    pub meta: ServiceConfig,
    pub segments: SegmentConfig,
    pub movers: MoverIntervals,
    pub rebuild: RebuildConfig,
    pub replicas: ReplicaBounds,
}

/// Makes what the node works with of an opened target: the target itself, or somebody who looks
/// on at what passes.
pub type Attach = Rc<dyn Fn(Rc<TargetStore>) -> Rc<dyn BlobTarget>>;

/// The seams and settings of a node.
pub struct NodeSetup {
    pub handle: Handle,
    pub fabric: Rc<dyn Fabric>,
    pub listen: Address,
    pub devices: Vec<DeviceSlot>,
    pub config: NodeConfig,
    /// `None`: targets are worked with directly.
    pub attach: Option<Attach>,
}

/// Why a node does not start. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("no target was given")]
    NoTargets,
    #[error("none of the targets can be used: {0}")]
    NoneUsable(String),
    #[error(transparent)]
    Membership(#[from] MembershipError),
    #[error("{missing} of {total} targets are missing and redundancy bridges {tolerated}: {detail}; bring them back")]
    TooManyMissing { missing: usize, total: usize, tolerated: usize, detail: String },
    #[error(
        "{missing} of {total} targets are missing and the replacement {empty} was not refilled yet, while redundancy \
         bridges {tolerated}: {detail}; bring the missing ones back"
    )]
    NotRefilled { missing: usize, total: usize, empty: String, tolerated: usize, detail: String },
    #[error(
        "{present} of {total} targets can be used and the metadata is written to {needed}: {detail}; bring more of \
         them back"
    )]
    TooFewToWrite { present: usize, total: usize, needed: usize, detail: String },
    /// A device that only a newer program understands, or that is another one's.
    #[error("{0}")]
    NotOurs(String),
    #[error(transparent)]
    Replicas(#[from] ReplicasError),
    #[error(transparent)]
    Movers(#[from] MoverError),
    #[error(transparent)]
    Listen(#[from] FabricError),
}

/// A running node. Dropping it ends its listener; its tasks end with its domain.
pub struct Node {
    handle: Handle,
    config: NodeConfig,
    started: Instant,
    targets: Targets,
    store: Rc<SegmentStore>,
    replicas: Rc<Replicas>,
    meta: MetaService,
    movers: Rc<Movers>,
    check: Rc<Check>,
    listener: RefCell<Option<Box<dyn Listener>>>,
}

impl Node {
    /// Opens the targets, recovers the log and the shards, and serves once every shard is led.
    pub async fn start(setup: NodeSetup) -> Result<Rc<Node>, StartError> {
        let NodeSetup { handle, fabric, listen, devices, config, attach } = setup;
        let started = handle.now();
        let attach = attach.unwrap_or_else(|| Rc::new(|store| Rc::new(LocalTarget(store))));
        let targets = targets::open(&handle, devices, &attach).await?;
        let copies = usize::from(targets.parameters.tolerated) + 1;
        let mirror = Mirror::new(&handle, targets.pool.clone(), copies);
        let parameters = targets.parameters;
        let capacity = targets.pool.readable().iter().map(|target| target.space().capacity).min().unwrap_or(0);
        let bounds = config.replicas.clone().fitted_to(capacity);
        let created = targets.membership.created();
        let replicas =
            Replicas::start(&handle, targets.node, parameters, mirror, fabric.clone(), bounds, created).await?;
        if !created {
            targets.membership.record_created().await;
        }
        let space = {
            let pool = targets.pool.clone();
            Rc::new(move || pool.usable(parameters.policy))
        };
        let meta = replicas.serve(config.meta.clone(), space);
        meta.deafen();
        let calls: Rc<dyn ShardCalls> = Rc::new(LocalShards { meta: meta.clone(), shards: parameters.shards });
        let registrar = ShardRegistrar::new(calls.clone());
        let store = SegmentStore::new(&handle, targets.pool.clone(), registrar.clone(), config.segments);
        let collector = Rc::new(Collector::new(calls.clone(), store.clone()));
        let movers = Rc::new(Movers {
            calls: calls.clone(),
            orphans: OrphanSearch::new(calls.clone(), store.clone(), collector.clone()),
            packer: Packer::new(calls.clone(), store.clone(), VOLUME),
            rebuild: Rebuild::new(calls.clone(), store.clone(), targets.membership.clone(), copies, config.rebuild),
            scrub: Scrub::new(store.clone()),
            collector,
            registrar,
            store: store.clone(),
        });
        let minimum = adopt_epoch(&handle, &movers).await?;
        movers.clone().start(&handle, config.movers, minimum);
        let check = Check::new(calls, store.clone(), targets.membership.clone(), copies);
        let node = Rc::new(Node {
            handle,
            config,
            started,
            targets,
            store,
            replicas,
            meta,
            movers,
            check,
            listener: RefCell::new(None),
        });
        let listener = fabric.listen(&listen, Rc::new(Dispatch::new(&node)))?;
        *node.listener.borrow_mut() = Some(listener);
        node.meta.hear();
        Ok(node)
    }

    /// The address that was bound.
    pub fn address(&self) -> Address {
        let listener = self.listener.borrow();
        listener.as_ref().map_or_else(|| Address(String::new()), |listener| listener.address())
    }

    /// What clients are offered beside TCP.
    pub fn offers(&self) -> Vec<String> {
        self.listener.borrow().as_ref().map(|listener| listener.offers()).unwrap_or_default()
    }

    /// Stops serving and makes applied state durable, so that the next start replays little.
    pub async fn shutdown(&self) {
        drop(self.listener.borrow_mut().take());
        self.replicas.shutdown().await;
    }

    /// Checks everything and waits for the end.
    pub async fn check(&self, repair: bool, deep: bool) -> CheckReport {
        while !self.check.begin(repair, deep) {
            self.handle.sleep(Duration::from_millis(10)).await;
        }
        self.run_check().await
    }

    async fn run_check(&self) -> CheckReport {
        let report = self.check.run().await;
        if report.is_clean() {
            self.movers.rebuild.found_whole();
        }
        report
    }

    /// Starts a check in the background, or joins one that runs with the same options.
    ///
    /// # Errors
    /// One with other options runs: it says less, or does more, than what was asked for.
    pub fn start_check(self: &Rc<Self>, repair: bool, deep: bool) -> Result<CheckState, AdminError> {
        if self.check.begin(repair, deep) {
            let node = self.clone();
            self.handle.spawn(async move { node.run_check().await });
        }
        let state = self.check.state();
        match (state.repair, state.deep) == (repair, deep) {
            true => Ok(state),
            false => Err(AdminError::CheckRunning { repair: state.repair, deep: state.deep }),
        }
    }

    /// As [`Check::was_unclean`].
    pub fn was_check_unclean(&self) -> bool {
        self.check.was_unclean()
    }

    pub fn check_state(&self) -> CheckState {
        self.check.state()
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    pub fn config(&self) -> &NodeConfig {
        &self.config
    }

    pub fn id(&self) -> NodeId {
        self.targets.node
    }

    pub fn cluster(&self) -> ClusterId {
        self.targets.cluster
    }

    pub fn parameters(&self) -> &ClusterParameters {
        &self.targets.parameters
    }

    pub fn pool(&self) -> &Rc<TargetPool> {
        &self.targets.pool
    }

    /// Who takes part, and what replacements do not hold yet.
    pub fn membership(&self) -> &Rc<Membership> {
        &self.targets.membership
    }

    pub fn target_labels(&self) -> &BTreeMap<TargetId, String> {
        &self.targets.labels
    }

    pub fn store(&self) -> &Rc<SegmentStore> {
        &self.store
    }

    pub fn meta(&self) -> &MetaService {
        &self.meta
    }

    pub fn replicas(&self) -> &Rc<Replicas> {
        &self.replicas
    }

    pub fn movers(&self) -> &Rc<Movers> {
        &self.movers
    }

    pub fn sessions(&self) -> u32 {
        self.meta.session_count() as u32
    }

    pub fn shards_led(&self) -> u16 {
        (0..self.targets.parameters.shards).filter(|shard| self.replicas.leads(ShardId(*shard))).count() as u16
    }

    pub fn shard_facts(&self, shard: ShardId) -> ShardFacts {
        self.replicas.facts(shard)
    }

    pub fn uptime(&self) -> Duration {
        self.handle.now() - self.started
    }

    /// Total and free bytes as the policy leaves them.
    pub fn usable_space(&self) -> (u64, u64) {
        self.targets.pool.usable(self.targets.parameters.policy)
    }
}

/// Asks until every shard has been taken up: one with a long log takes a while.
async fn adopt_epoch(handle: &Handle, movers: &Movers) -> Result<Epoch, MoverError> {
    let deadline = handle.now() + TAKEN_UP_WITHIN;
    loop {
        match movers.adopt_epoch().await {
            Err(MoverError::Shard { error: MetaError::Unavailable(_) | MetaError::NotLeader { .. }, .. })
                if handle.now() < deadline =>
            {
                handle.sleep(Duration::from_millis(50)).await;
            }
            outcome => return outcome,
        }
    }
}

/// All shards are led here: calls go straight to the service.
struct LocalShards {
    meta: MetaService,
    shards: u16,
}

impl ShardCalls for LocalShards {
    fn shards(&self) -> u16 {
        self.shards
    }

    fn shard_call(&self, shard: ShardId, op: ShardOp) -> LocalBoxFuture<'_, Result<ShardReply, MetaError>> {
        self.meta.shard_call(shard, op).boxed_local()
    }
}
