//! The host of a node's Raft groups.
//!
//! One [`RaftHost`] runs all groups of its node over one [`SharedLog`]. A group with one voter
//! never ticks and never sends: an idle node sleeps. Proposals are pipelined: whatever arrives
//! while a batch of the log is in flight shares the next one.

mod applier;
mod checkpoint;
mod config;
mod error;
mod machine;
mod network;
mod possible;
#[doc(hidden)]
pub mod rpc;
mod serve;

pub use applier::{Applier, SnapshotData};
pub use config::HostConfig;
pub use error::{HostError, LeaderHint, ProposeError};
pub use machine::{AppliedEntry, SNAPSHOT_CHUNK_BYTES_MAX, SnapshotSink, SnapshotSource, StateError, StateMachine};
pub use rpc::{OPCODES, Status};

use crate::log::{ENTRY_BYTES_MAX, SharedLog};
use crate::types::{Command, Mark, Member, Raft};
use bytes::Bytes;
use cfs_fabric::{Address, Fabric};
use cfs_reactor::Handle;
use cfs_wire::{NodeId, ShardId};
use network::{GroupNetwork, Peers};
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{InitializeError, RaftError};
use openraft::{ReadPolicy, ServerState};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Room for an entry's fixed fields beside the proposal.
const ENTRY_OVERHEAD: usize = 64;
/// Largest proposal.
pub const PROPOSAL_BYTES_MAX: usize = ENTRY_BYTES_MAX - ENTRY_OVERHEAD;

/// A node's Raft groups.
pub struct RaftHost {
    node: NodeId,
    handle: Handle,
    log: Rc<SharedLog>,
    peers: Rc<Peers>,
    config: HostConfig,
    groups: RefCell<BTreeMap<ShardId, Rc<Group>>>,
    stopping: Cell<bool>,
}

struct Group {
    id: ShardId,
    raft: openraft::Raft<Raft, Applier>,
    machine: Rc<dyn StateMachine>,
    receiving: RefCell<Option<serve::Receiving>>,
    checkpointing: cfs_reactor::sync::Mutex<()>,
    /// The term in which this replica, as leader, is known to have applied all of its past.
    settled_term: Cell<Option<u64>>,
}

/// A group as an administrator sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupMetrics {
    pub group: ShardId,
    pub leader: Option<NodeId>,
    pub is_leader: bool,
    pub term: u64,
    pub voters: Vec<NodeId>,
    pub last_log_index: Option<u64>,
    pub applied_index: Option<u64>,
    /// The last checkpoint.
    pub synced_index: Option<u64>,
    pub purged_index: Option<u64>,
    pub unpurged_bytes: u64,
    /// False once the group has stopped on this node.
    pub running: bool,
}

fn node_id(raw: u64) -> Option<NodeId> {
    u16::try_from(raw).ok().map(NodeId)
}

impl RaftHost {
    /// A host without groups, in the handle's domain.
    pub fn new(
        node: NodeId,
        handle: Handle,
        fabric: Rc<dyn Fabric>,
        log: Rc<SharedLog>,
        config: HostConfig,
    ) -> Rc<RaftHost> {
        let host = Rc::new(RaftHost {
            node,
            peers: Peers::new(fabric, handle.clone()),
            handle: handle.clone(),
            log,
            config,
            groups: RefCell::new(BTreeMap::new()),
            stopping: Cell::new(false),
        });
        handle.spawn(host.clone().keep_log_short());
        host
    }

    /// Starts a group. `bootstrap` creates it if this node has never seen it: all initial
    /// members may do so with the same list. A group of one leads before this returns.
    pub async fn add_group(
        &self,
        id: ShardId,
        machine: Rc<dyn StateMachine>,
        initial_members: Vec<(NodeId, Address)>,
        bootstrap: bool,
    ) -> Result<(), HostError> {
        if self.group(id).is_some() {
            return Err(HostError::DuplicateGroup(id));
        }
        let synced = decode_mark(id, machine.synced())?;
        let applied = decode_mark(id, machine.applied())?;
        let group_log = self.log.group(id);
        if applied.applied.is_some() && group_log.is_empty() {
            return Err(HostError::LogLost(id));
        }
        if let Some(purged) = group_log.purged().filter(|purged| Some(*purged) > applied.index()) {
            return Err(HostError::StateBehindLog { group: id, applied: applied.index(), purged });
        }
        self.log.set_synced(id, synced.index());
        let stopped = |reason: String| HostError::Stopped { group: id, reason };
        let network = GroupNetwork { peers: self.peers.clone(), group: id, node: self.node.0.into() };
        let applier = Applier::new(id, machine.clone(), self.log.clone()).checkpointed_by_host();
        let raft = openraft::Raft::new(self.node.0.into(), self.config.raft(false), network, group_log, applier)
            .await
            .map_err(|error| stopped(error.to_string()))?;
        let group = Rc::new(Group {
            id,
            raft,
            machine,
            receiving: RefCell::new(None),
            checkpointing: cfs_reactor::sync::Mutex::new(()),
            settled_term: Cell::new(None),
        });
        // From here on peers reach it: those that bootstrap at once need each other's votes.
        self.groups.borrow_mut().insert(id, group.clone());
        let members = bootstrap.then_some(initial_members);
        let begun = self.begin_leading(&group, members).await;
        if begun.is_err() {
            self.groups.borrow_mut().remove(&id);
        }
        begun
    }

    async fn begin_leading(
        &self,
        group: &Rc<Group>,
        bootstrap: Option<Vec<(NodeId, Address)>>,
    ) -> Result<(), HostError> {
        if let Some(members) = bootstrap {
            self.bootstrap(group, members).await?;
        }
        self.handle.spawn(group.clone().keep_ticking());
        group.lead_if_alone(self.node).await
    }

    async fn bootstrap(&self, group: &Group, members: Vec<(NodeId, Address)>) -> Result<(), HostError> {
        let stopped = |reason: String| HostError::Stopped { group: group.id, reason };
        let initialized = group.raft.is_initialized().await.map_err(|error| stopped(error.to_string()))?;
        if initialized {
            return Ok(());
        }
        let members: BTreeMap<u64, Member> =
            members.into_iter().map(|(node, address)| (node.0.into(), Member { address: address.0 })).collect();
        match group.raft.initialize(members).await {
            // A peer that was faster has already sent the first entry.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(stopped(error.to_string())),
        }
    }

    /// Commits a proposal and answers what `apply` replied.
    pub async fn propose(&self, id: ShardId, proposal: Bytes) -> Result<Bytes, ProposeError> {
        if proposal.len() > PROPOSAL_BYTES_MAX {
            return Err(ProposeError::TooLarge { length: proposal.len(), limit: PROPOSAL_BYTES_MAX });
        }
        let group = self.group(id).ok_or(ProposeError::UnknownGroup(id))?;
        let written = group.raft.client_write(Command(proposal)).await?;
        Ok(written.data)
    }

    /// After this, a read of the local state sees every proposal acknowledged before the call.
    ///
    /// A group of one answers at once, without touching the log. Others confirm with a quorum
    /// that this replica still leads: a lease would not survive a follower's restart, which
    /// forgets what it promised.
    pub async fn read_barrier(&self, id: ShardId) -> Result<(), ProposeError> {
        let group = self.group(id).ok_or(ProposeError::UnknownGroup(id))?;
        let term = {
            let metrics = group.raft.metrics();
            let metrics = metrics.borrow_watched();
            let alone = metrics.membership_config.voter_ids().eq([u64::from(self.node.0)]);
            let leads = metrics.state == ServerState::Leader && metrics.running_state.is_ok();
            if alone && leads && group.settled_term.get() == Some(metrics.current_term) {
                return Ok(());
            }
            metrics.current_term
        };
        group.raft.ensure_linearizable(ReadPolicy::ReadIndex).await?;
        group.settled_term.set(Some(term));
        Ok(())
    }

    pub fn is_leader(&self, id: ShardId) -> bool {
        self.group(id).is_some_and(|group| group.raft.is_leader())
    }

    /// The leader as far as this replica knows.
    pub fn leader(&self, id: ShardId) -> Option<NodeId> {
        let group = self.group(id)?;
        let leader = group.raft.metrics().borrow_watched().current_leader;
        leader.and_then(node_id)
    }

    pub fn metrics(&self, id: ShardId) -> Option<GroupMetrics> {
        let group = self.group(id)?;
        let receiver = group.raft.metrics();
        let metrics = receiver.borrow_watched();
        let synced = group.machine.synced().and_then(|mark| Mark::decode(&mark).ok());
        Some(GroupMetrics {
            group: id,
            leader: metrics.current_leader.and_then(node_id),
            is_leader: metrics.state == ServerState::Leader,
            term: metrics.current_term,
            voters: metrics.membership_config.voter_ids().filter_map(node_id).collect(),
            last_log_index: metrics.last_log_index,
            applied_index: metrics.last_applied.map(|id| id.index),
            synced_index: synced.and_then(|mark| mark.index()),
            purged_index: metrics.purged.map(|id| id.index),
            unpurged_bytes: self.log.bytes_unpurged_of(id),
            running: metrics.running_state.is_ok(),
        })
    }

    pub fn group_ids(&self) -> Vec<ShardId> {
        self.groups.borrow().keys().copied().collect()
    }

    /// Stops every group and the log. What was not acknowledged may or may not survive.
    pub async fn shutdown(&self) {
        self.stopping.set(true);
        self.log.pressure().notify_all();
        // First the log, so that no group waits for a put that never ends.
        self.log.close();
        let groups = std::mem::take(&mut *self.groups.borrow_mut());
        for group in groups.into_values() {
            // A group that had stopped by itself has nothing more to say.
            let _ = group.raft.shutdown().await;
        }
    }

    fn group(&self, id: ShardId) -> Option<Rc<Group>> {
        self.groups.borrow().get(&id).cloned()
    }
}

fn decode_mark(group: ShardId, bytes: Option<Bytes>) -> Result<Mark, HostError> {
    match bytes {
        Some(bytes) => Mark::decode(&bytes).map_err(|_| HostError::BadMark(group)),
        None => Ok(Mark::default()),
    }
}

impl Group {
    /// Ticks and heartbeats run only while there is somebody to hear them.
    async fn keep_ticking(self: Rc<Self>) {
        let mut metrics = self.raft.server_metrics();
        loop {
            let alone = metrics.borrow_and_update().membership_config.voter_ids().take(2).count() < 2;
            let runtime = self.raft.runtime_config();
            runtime.tick(!alone);
            runtime.heartbeat(!alone);
            runtime.elect(!alone);
            if metrics.changed().await.is_err() {
                return;
            }
        }
    }

    /// Elects a group's only voter without waiting for a timer that does not run.
    async fn lead_if_alone(&self, node: NodeId) -> Result<(), HostError> {
        let stopped = |reason: String| HostError::Stopped { group: self.id, reason };
        let me = u64::from(node.0);
        // Asked of Raft's task itself: the metrics may lag behind it.
        let look = move |state: &openraft::RaftState<Raft>| {
            (state.membership_state.effective().voter_ids().eq([me]), state.server_state)
        };
        let (alone, state) = self.raft.with_raft_state(look).await.map_err(|error| stopped(error.to_string()))?;
        if !alone {
            return Ok(());
        }
        // A candidate is being elected already; electing again would unseat it.
        if !matches!(state, ServerState::Leader | ServerState::Candidate) {
            self.raft.trigger().elect(false).await.map_err(|error| stopped(error.to_string()))?;
        }
        let wait = self.raft.wait(None);
        let led = wait.metrics(|metrics| metrics.state == ServerState::Leader, "the only voter leads").await;
        led.map(drop).map_err(|error| stopped(error.to_string()))
    }
}
