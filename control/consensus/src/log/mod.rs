//! The node's shared Raft log: one sequence of batches for all groups, each batch one blob on
//! m+1 of the node's targets.
//!
//! What the groups append while a put is in flight goes into the next batch. A batch is
//! acknowledged only when it and all earlier ones are durable. The log is cut from its old end
//! only, below what every group's state machine has synced; the few records alive there (votes,
//! marks, short tails of idle groups) are copied forward first.
//!
//! Start at [`SharedLog::open`]; [`GroupLog`] is what one Raft group sees.

mod batch;
mod cut;
mod error;
mod group;
mod recovery;
mod state;

pub use batch::BadBatch;
pub use error::LogError;
pub use group::GroupLog;
pub use recovery::RecoveryReport;

use batch::Record;
pub(crate) use batch::entry_bytes;
use cfs_reactor::Handle;
use cfs_reactor::sync::{Notify, oneshot};
use cfs_wire::ShardId;
use cfs_wire::blobs::{BlobError, BlobKind, MirroredBlobs, Owner};
use cfs_wire::ids::BlobId;
use cfs_wire::planted::{self, Bug};
use state::{Formed, State, Waiter};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Largest encoded entry, so that a batch always has room for one beside its header and the
/// marks of all groups.
pub const ENTRY_BYTES_MAX: usize = 900 << 10;

/// How long to wait before a put that found no space or too few targets is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// How long to wait before copies that found no room are made: checkpoints and cuts make some.
const HEAL_AGAIN: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Batches being put at once. Two keep the device busy while the next one fills.
    pub pipeline: usize,
    /// Bytes of entries above the purge marks at which the host is asked to checkpoint. They
    /// are kept in memory, so this bounds that too.
    pub limit_bytes: u64,
    /// Bytes the batches may take on each of their targets before the host is asked. A batch of
    /// one small commit takes 8 KiB, so this is 16,000 of them: a second of reading at start.
    pub stored_bytes_max: u64,
    /// A log that hardly grows any more is checkpointed and cut down when it takes more than this
    /// on each target: what it held, and what its entries deleted, is free again.
    pub rest_bytes: u64,
    /// Live bytes copied forward by one cut at most.
    pub copy_bytes_max: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig {
            pipeline: 2,
            limit_bytes: 32 << 20,
            stored_bytes_max: 128 << 20,
            rest_bytes: 256 << 10,
            copy_bytes_max: 256 << 10,
        }
    }
}

pub struct SharedLog {
    blobs: Rc<dyn MirroredBlobs>,
    handle: Handle,
    config: LogConfig,
    state: RefCell<State>,
    /// Something waits to be written, or a put has ended.
    work: Rc<Notify>,
    /// The log has grown over its limit.
    pressure: Rc<Notify>,
    /// The log is larger than what it may keep at rest.
    grown: Rc<Notify>,
    /// One cut at a time. Blobs that were cut off and could not be deleted.
    cutting: cfs_reactor::sync::Mutex<Vec<BlobId>>,
    closed: Cell<bool>,
    /// The store had no space for the last put.
    starved: Cell<bool>,
}

impl SharedLog {
    /// Recovers the log from its blobs, discards a torn tail, and starts its writer in the
    /// handle's domain.
    ///
    /// # Errors
    /// [`LogError::Corrupt`] when a batch that was durable is lost; [`LogError::Format`] for a
    /// batch of a newer program; [`LogError::Store`] when the store can't be reached.
    pub async fn open(
        blobs: Rc<dyn MirroredBlobs>,
        handle: Handle,
        config: LogConfig,
    ) -> Result<(Rc<SharedLog>, RecoveryReport), LogError> {
        let (state, report) = recovery::recover(blobs.as_ref(), &handle).await?;
        let log = Rc::new(SharedLog {
            blobs,
            handle: handle.clone(),
            config,
            state: RefCell::new(state),
            work: Notify::new(),
            pressure: Notify::new(),
            grown: Notify::new(),
            cutting: cfs_reactor::sync::Mutex::new(Vec::new()),
            closed: Cell::new(false),
            starved: Cell::new(false),
        });
        handle.spawn(log.clone().write_batches());
        if !report.unhealed.is_empty() {
            handle.spawn(log.clone().heal(report.unhealed.clone()));
        }
        // The opening batch carries the new incarnation: from here on a batch left over from
        // before, on a target that was away, is known as such.
        log.flush_marker().await?;
        Ok((log, report))
    }

    /// The log of one group.
    pub fn group(self: &Rc<Self>, group: ShardId) -> GroupLog {
        GroupLog::new(self.clone(), group)
    }

    /// Bytes of entries above the purge marks of all groups.
    pub fn bytes_unpurged(&self) -> u64 {
        self.state.borrow().unpurged()
    }

    /// Bytes of entries above the purge mark of one group.
    pub fn bytes_unpurged_of(&self, group: ShardId) -> u64 {
        self.state.borrow().groups.get(&group).map_or(0, |group| group.unpurged)
    }

    /// Bytes the batches take on each of their targets, about.
    pub fn bytes_stored(&self) -> u64 {
        self.state.borrow().stored
    }

    pub fn limit_bytes(&self) -> u64 {
        self.config.limit_bytes
    }

    /// Whether the owner should checkpoint state machines, purge and cut.
    pub fn is_over_limit(&self) -> bool {
        let state = self.state.borrow();
        self.is_over(&state)
    }

    fn is_over(&self, state: &State) -> bool {
        self.starved.get() || state.unpurged() > self.config.limit_bytes || state.stored > self.config.stored_bytes_max
    }

    /// Whether a batch waits for space.
    pub fn is_starved(&self) -> bool {
        self.starved.get()
    }

    /// Woken whenever an append finds the log over its limit.
    pub fn pressure(&self) -> Rc<Notify> {
        self.pressure.clone()
    }

    /// Woken whenever a batch leaves the log larger than what it may keep at rest.
    pub fn grown(&self) -> Rc<Notify> {
        self.grown.clone()
    }

    pub fn rest_bytes(&self) -> u64 {
        self.config.rest_bytes
    }

    /// Groups whose entries keep the oldest batches from being cut.
    pub fn pinning(&self) -> Vec<ShardId> {
        self.state.borrow().pinning()
    }

    /// The blobs of the log, oldest first, for healing after a target was lost.
    pub fn blob_ids(&self) -> Vec<BlobId> {
        self.state.borrow().batches.values().filter_map(|batch| batch.id).collect()
    }

    /// The highest batch known durable.
    pub fn durable(&self) -> u64 {
        self.state.borrow().durable
    }

    /// Groups that have left anything in the log.
    pub fn groups(&self) -> Vec<ShardId> {
        self.state.borrow().groups.iter().filter(|(_, group)| !group.is_empty()).map(|(id, _)| *id).collect()
    }

    /// Says how far a group's state machine is synced. From the first call on, a purge above it
    /// is refused.
    pub fn set_synced(&self, group: ShardId, synced: Option<u64>) {
        self.state.borrow_mut().groups.entry(group).or_default().synced = Some(synced);
    }

    /// Waits until everything appended so far is durable.
    pub async fn flush(&self) -> Result<(), LogError> {
        if self.state.borrow().is_idle() {
            return self.check();
        }
        self.flush_marker().await
    }

    /// Stops the writer. What was not acknowledged may or may not be in the log.
    pub fn close(&self) {
        self.closed.set(true);
        let told = self.state.borrow_mut().fail(LogError::Closed);
        told.into_iter().for_each(|waiter| waiter.complete(Err(LogError::Closed)));
        self.work.notify_all();
    }

    fn check(&self) -> Result<(), LogError> {
        self.state.borrow().failed.clone().map_or(Ok(()), Err)
    }

    /// Takes records in order; `waiter` is told when the last is durable.
    fn append(&self, group: ShardId, records: Vec<Record>, waiter: Option<Waiter>) -> Result<(), LogError> {
        if let Err(error) = self.check() {
            if let Some(waiter) = waiter {
                waiter.complete(Err(error.clone()));
            }
            return Err(error);
        }
        let over = {
            let mut state = self.state.borrow_mut();
            let last = records.len().saturating_sub(1);
            let mut waiter = waiter;
            for (at, record) in records.into_iter().enumerate() {
                let waiter = if at == last { waiter.take() } else { None };
                state.push(group, record, waiter);
            }
            if let Some(waiter) = waiter {
                state.push_marker(waiter);
            }
            self.is_over(&state)
        };
        self.work.notify_all();
        if over {
            self.pressure.notify_all();
        }
        Ok(())
    }

    /// Writes a batch even if nothing waits, and waits for it.
    async fn flush_marker(&self) -> Result<(), LogError> {
        self.check()?;
        let (sender, receiver) = oneshot();
        self.state.borrow_mut().push_marker(Waiter::Signal(sender));
        self.work.notify_all();
        receiver.await.unwrap_or(Err(LogError::Closed))
    }

    /// Gives batches the copies that recovery found no room for.
    async fn heal(self: Rc<Self>, mut batches: Vec<BlobId>) {
        while !batches.is_empty() && !self.closed.get() {
            self.handle.sleep(HEAL_AGAIN).await;
            let mut left = Vec::new();
            for id in batches {
                match self.blobs.heal(id).await {
                    Err(error) if error.is_retryable() => left.push(id),
                    // Cut off meanwhile.
                    Ok(()) | Err(BlobError::NotFound(_)) => {}
                    Err(error) => tracing::error!(%error, "a batch of the Raft log lacks a copy"),
                }
            }
            batches = left;
        }
    }

    async fn write_batches(self: Rc<Self>) {
        loop {
            let work = self.work.notified();
            if self.closed.get() {
                return;
            }
            let formed = {
                let mut state = self.state.borrow_mut();
                if state.in_flight < self.config.pipeline && state.has_pending() { state.form() } else { None }
            };
            match formed {
                Some(formed) => drop(self.handle.spawn(self.clone().put_batch(formed))),
                None => work.await,
            }
        }
    }

    async fn put_batch(self: Rc<Self>, formed: Formed) {
        if planted::is(Bug::LogAckEarly) {
            let told = self.state.borrow_mut().waiters_of(formed.sequence);
            told.into_iter().for_each(|waiter| waiter.complete(Ok(())));
        }
        match self.put_until_stored(&formed).await {
            Ok(id) => {
                let told = self.state.borrow_mut().completed(formed.sequence, id);
                told.into_iter().for_each(|waiter| waiter.complete(Ok(())));
                if self.bytes_stored() > self.config.rest_bytes {
                    self.grown.notify_all();
                }
            }
            Err(error) => {
                tracing::error!(batch = formed.sequence, %error, "the Raft log can't be written any more");
                let error = LogError::Store(error);
                let told = self.state.borrow_mut().fail(error.clone());
                told.into_iter().for_each(|waiter| waiter.complete(Err(error.clone())));
            }
        }
        self.work.notify_all();
    }

    /// Below the needed number of targets writes wait; so they do without space.
    async fn put_until_stored(&self, formed: &Formed) -> Result<BlobId, BlobError> {
        let owner = Owner { high: 0, low: formed.sequence };
        loop {
            match self.blobs.put(BlobKind::Log, owner, formed.bytes.clone()).await {
                Err(error) if error.is_retryable() && !self.closed.get() => {
                    if matches!(error, BlobError::NoSpace { .. }) {
                        // Only a shorter log makes room for the log.
                        self.starved.set(true);
                        self.pressure.notify_all();
                    }
                    tracing::warn!(batch = formed.sequence, %error, "the Raft log waits");
                    self.handle.sleep(RETRY_AFTER).await;
                }
                other => {
                    self.starved.set(false);
                    return other;
                }
            }
        }
    }
}
