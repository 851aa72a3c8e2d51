//! What an operator may set, and what a node brings along.

use super::applied::Applied;
use crate::state::Reader;
use cfs_wire::ShardId;
use std::rc::Rc;
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct ServiceConfig {
    /// A session silent for longer is fenced. A client that loses its server for this long has
    /// lost its write leases, locks and dirty data.
    pub session_lease: Duration,
    /// How long a client may serve an inode from its cache. A change waits at most this long for
    /// a reader that does not answer. Never longer than the session's lease.
    pub read_lease: Duration,
    /// A client that is alive and yet keeps a recalled write lease for longer is fenced; time in which
    /// the shard applies nothing of what is proposed does not count. More than a client tries one call
    /// before it gives it up and says so itself.
    pub write_recall_max: Duration,
    /// For so long after two sessions wanted to write one inode, neither gets a write lease:
    /// every write is stored and committed through.
    pub shared_mode: Duration,
    /// A rename lock kept for longer by a request that no longer runs is taken over. The taking
    /// is fenced, so too short costs a repeated walk, never a loop.
    pub rename_lock_max: Duration,
    /// How often orphans, lost transactions and leases that are over are looked for.
    pub sweep: Duration,
}

impl Default for ServiceConfig {
    fn default() -> ServiceConfig {
        ServiceConfig {
            session_lease: Duration::from_secs(20),
            read_lease: Duration::from_secs(10),
            write_recall_max: Duration::from_secs(90),
            shared_mode: Duration::from_secs(5),
            rename_lock_max: Duration::from_secs(2),
            sweep: Duration::from_secs(5),
        }
    }
}

impl ServiceConfig {
    /// How long a client may use a read lease.
    pub(super) fn read_lease(&self) -> Duration {
        self.read_lease.min(self.session_lease)
    }

    /// A long poll is held so long at most: a client must come back several times per lease.
    pub(super) fn hold_max(&self) -> Duration {
        self.session_lease / 4
    }
}

/// A lease as the server counts it: the client's clock may run slower than this one. Crystals
/// are within 0.01 %; a sixty-fourth leaves room for a clock that is being slewed.
pub(super) fn with_drift(lease: Duration) -> Duration {
    lease + lease / 64
}

/// Bytes in all and free bytes, redundancy taken off.
pub type Space = Rc<dyn Fn() -> (u64, u64)>;

/// A shard whose replica is on this node.
#[derive(Clone)]
pub struct ShardHandle {
    pub shard: ShardId,
    /// A consistent view of the applied state as of the call.
    pub view: Rc<dyn Fn() -> Rc<dyn Reader>>,
    /// The same that the replica publishes to.
    pub applied: Rc<Applied>,
}
