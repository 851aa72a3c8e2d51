//! The metadata service of one node: it turns calls into log entries and reads, and keeps what
//! clients cache coherent.
//!
//! It owns what the leader of a shard remembers and may forget: who reads what ([`readers`]),
//! what clients still have to be told ([`events`]), who waits for a lock (`locks`), which calls
//! run right now. Whatever must survive is in the shard's log, through [`Proposer`]; the
//! service never writes the state itself and never reads a clock but through its `Handle`.
//!
//! Start at [`MetaService::call`]; then `mutate` (the way of a change), `recall` (coherence),
//! `transactions` (what spans shards), `leader` (starting to lead, fencing, orphans), and
//! [`machine`] for the replica that applies the log. `docs/consistency.md` has the contract.

pub mod applied;
mod call;
pub mod config;
pub mod events;
mod follow_up;
mod inspect;
mod leader;
mod locking;
mod locks;
pub mod machine;
mod mutate;
mod names;
pub mod peers;
pub mod proposer;
mod raft;
pub mod readers;
mod recall;
pub mod rpc;
mod shard;
mod shard_calls;
mod snapshot;
#[cfg(test)]
mod tests;
mod transactions;

pub use applied::Applied;
pub use config::{ServiceConfig, ShardHandle, Space};
pub use machine::ShardMachine;
pub use peers::{NoPeers, OP_PEER, PeerCall, PeerReply, Peers};
pub use proposer::{ProposeError, Proposer};

use cfs_reactor::sync::{Notify, Semaphore};
use cfs_reactor::{Handle, Instant};
use cfs_wire::meta::{MetaError, MetaResult};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{NodeId, RequestId, SessionId, ShardId};
use events::Events;
use readers::LeaseTotal;
use shard::Shard;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// The metadata service of one node. Cheap to clone; all clones are one service.
#[derive(Clone)]
pub struct MetaService {
    inner: Rc<Inner>,
}

struct Inner {
    handle: Handle,
    node: NodeId,
    config: ServiceConfig,
    proposer: Rc<dyn Proposer>,
    peers: Rc<dyn Peers>,
    space: Space,
    shards: BTreeMap<ShardId, Rc<Shard>>,
    events: Events,
    /// When each session was last heard of.
    contacts: RefCell<BTreeMap<SessionId, Instant>>,
    /// Sessions fenced in any shard: what they held there may be somebody else's already.
    fenced: RefCell<BTreeSet<SessionId>>,
    /// The node does not listen yet: nobody can be heard, so nobody is silent.
    deaf: Cell<bool>,
    /// Changes that run right now: a repetition joins them.
    running: RefCell<BTreeMap<(ShardId, RequestId), Rc<Running>>>,
    /// Renames of this node that want a volume's rename lock take turns here first.
    rename_turn: Rc<Semaphore>,
}

/// A change that is being carried out, and its result for everyone who asked for it.
#[derive(Default)]
struct Running {
    result: RefCell<Option<MetaResult>>,
    done: Rc<Notify>,
}

impl Running {
    fn finish(&self, result: MetaResult) {
        *self.result.borrow_mut() = Some(result);
        self.done.notify_all();
    }

    async fn wait(&self) -> MetaResult {
        loop {
            let done = self.done.notified();
            if let Some(result) = self.result.borrow().clone() {
                return result;
            }
            done.await;
        }
    }
}

impl MetaService {
    /// Starts serving: tasks of `handle`'s domain take up each shard as soon as this node leads
    /// it. `peers` reaches shards that are led elsewhere.
    pub fn new(
        handle: &Handle,
        node: NodeId,
        shards: Vec<ShardHandle>,
        proposer: Rc<dyn Proposer>,
        peers: Rc<dyn Peers>,
        config: ServiceConfig,
        space: Space,
    ) -> MetaService {
        let leases = LeaseTotal::default();
        shards.iter().for_each(|shard| shard.applied.readers().count_in(&leases));
        let shards = shards.into_iter().map(|shard| (shard.shard, Rc::new(Shard::new(shard)))).collect();
        let inner = Inner {
            handle: handle.clone(),
            node,
            config,
            proposer,
            peers,
            space,
            shards,
            events: Events::new(handle),
            contacts: RefCell::default(),
            fenced: RefCell::default(),
            deaf: Cell::new(false),
            running: RefCell::default(),
            rename_turn: Semaphore::new(1),
        };
        let service = MetaService { inner: Rc::new(inner) };
        for shard in service.inner.shards.values() {
            handle.spawn(service.clone().lead(shard.clone()));
        }
        handle.spawn(service.clone().watch_sessions());
        service
    }

    pub fn node(&self) -> NodeId {
        self.inner.node
    }

    fn shard(&self, id: ShardId) -> Result<&Rc<Shard>, MetaError> {
        self.inner.shards.get(&id).ok_or(MetaError::NotLeader { hint: self.inner.proposer.hint(id) })
    }

    /// The shard, if this node leads it and has taken it up; waits a little for the latter.
    async fn serving(&self, id: ShardId) -> Result<Rc<Shard>, MetaError> {
        let shard = self.shard(id)?.clone();
        let deadline = self.inner.handle.now() + TAKING_UP;
        loop {
            let changed = shard.serving_changed.notified();
            let Some(term) = self.inner.proposer.leads(id) else {
                return Err(MetaError::NotLeader { hint: self.inner.proposer.hint(id) });
            };
            if shard.serving.get() == Some(term) {
                return Ok(shard);
            }
            shard.wanted.notify_all();
            let left = deadline.saturating_since(self.inner.handle.now());
            if left.is_zero() || self.inner.handle.timeout(left, changed).await.is_none() {
                return Err(MetaError::Unavailable(format!("shard {id} is being taken up")));
            }
        }
    }

    fn has_fenced(&self, session: SessionId) -> bool {
        self.inner.fenced.borrow().contains(&session) && !planted::is(Bug::MetaSkipFencing)
    }

    fn heard_of(&self, session: SessionId) {
        self.inner.contacts.borrow_mut().insert(session, self.inner.handle.now());
    }
}

/// How long a call waits for a shard that was just elected before it is told to come again:
/// well below any client's time limit for one call.
const TAKING_UP: std::time::Duration = std::time::Duration::from_secs(2);
