//! Keeping the log short: checkpoint state machines, purge below what they have synced, cut.

use super::{Group, HostError, RaftHost};
use crate::types::Mark;
use cfs_wire::ShardId;
use cfs_wire::planted::{self, Bug};
use futures_util::future::select;
use openraft::async_runtime::WatchReceiver;
use openraft::metrics::WaitError;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// How long to wait for openraft to purge; a leader whose follower still reads the entries
/// does it later, and the next checkpoint finds it done.
const PURGE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long to wait for openraft to take up a checkpoint. It comes behind what is being applied, which
/// may wait for space, and that for other groups to be purged.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a round that could not bring the log under its limit.
const ROUND_PAUSE: Duration = Duration::from_millis(500);
/// A log that grows by less than a quarter of what it may keep at rest in this time is at rest.
const REST_WINDOW: Duration = Duration::from_secs(5);

impl RaftHost {
    /// Makes the group's state durable and purges its log up to there.
    pub async fn checkpoint(&self, id: ShardId) -> Result<(), HostError> {
        let group = self.group(id).ok_or(HostError::UnknownGroup(id))?;
        let _alone = group.checkpointing.lock().await;
        let Some(applied) = group.machine.applied() else { return Ok(()) };
        // Not left to openraft: a checkpoint that finds no space would stop the group.
        let synced = if planted::is(Bug::LogCutEarly) { applied } else { group.machine.checkpoint().await? };
        let synced = Mark::decode(&synced).map_err(|_| HostError::BadMark(id))?.applied;
        let Some(synced) = synced else { return Ok(()) };
        self.log.set_synced(id, Some(synced.index));
        let reached = |raft: &openraft::RaftMetrics<crate::types::Raft>| raft.snapshot >= Some(synced);
        let stopped = |reason: String| HostError::Stopped { group: id, reason };
        if !reached(&group.raft.metrics().borrow_watched()) {
            group.raft.trigger().snapshot().await.map_err(|error| stopped(error.to_string()))?;
            match group.raft.wait(Some(SNAPSHOT_TIMEOUT)).metrics(reached, "checkpoint").await {
                Ok(_) => {}
                Err(WaitError::Timeout(..)) => {
                    tracing::debug!(group = %id, "what is being applied waits for space; its log is purged later");
                    return Ok(());
                }
                Err(error) => return Err(stopped(error.to_string())),
            }
        }
        // Not what openraft calls its snapshot: at start that is the state with the committed
        // tail of the log applied again, which no checkpoint holds yet.
        group.raft.trigger().purge_log(synced.index).await.map_err(|error| stopped(error.to_string()))?;
        let wait = group.raft.wait(Some(PURGE_TIMEOUT));
        if wait.metrics(|metrics| metrics.purged >= Some(synced), "purge").await.is_err() {
            tracing::debug!(group = %id, "the log is still being read; it is purged later");
        }
        Ok(())
    }

    /// Checkpoints every group, then cuts the log: what a clean stop does. Goes on where a group
    /// fails, and answers the first failure.
    pub async fn checkpoint_all(&self) -> Result<(), HostError> {
        let mut outcome = Ok(());
        for id in self.group_ids() {
            self.try_checkpoint(id, &mut outcome).await;
        }
        let cut = self.log.cut().await;
        outcome.and(cut.map(drop).map_err(HostError::from))
    }

    /// Checkpoints one group of several: its failure is kept, if it is the first, and keeps
    /// neither the others from their checkpoints nor the log from being cut.
    async fn try_checkpoint(&self, id: ShardId, outcome: &mut Result<(), HostError>) {
        if let Err(error) = self.checkpoint(id).await {
            tracing::error!(group = %id, %error, "the group is not checkpointed; its log can't be cut");
            if outcome.is_ok() {
                *outcome = Err(error);
            }
        }
    }

    /// Runs for the life of the host; sleeps until an append finds the log over its limit, or
    /// the log rests and is worth cutting down.
    pub(super) async fn keep_log_short(self: Rc<Self>) {
        // What was left of the log when it last rested: only what comes on top can go.
        let mut left = 0;
        while !self.stopping.get() {
            left = self.log.bytes_stored().min(left);
            let outcome = if self.log.is_over_limit() {
                let outcome = self.relieve().await;
                if self.log.is_over_limit() {
                    self.handle.sleep(ROUND_PAUSE).await;
                }
                outcome
            } else if self.is_pressed_or_grows(left).await {
                Ok(())
            } else {
                let outcome = self.cut_at_rest().await;
                left = self.log.bytes_stored();
                outcome
            };
            if let Err(error) = outcome {
                tracing::error!(%error, "the Raft log can't be shortened");
            }
        }
    }

    /// Waits until there is something to decide; false: the log has outgrown what was `left` of
    /// it by what it may keep, and rests now.
    async fn is_pressed_or_grows(&self, left: u64) -> bool {
        let pressed = Box::pin(self.log.pressure().notified());
        let stored = self.log.bytes_stored();
        if stored <= left + self.log.rest_bytes() {
            let grown = Box::pin(self.log.grown().notified());
            select(pressed, grown).await;
            return true;
        }
        let pressed = self.handle.timeout(REST_WINDOW, pressed).await.is_some();
        pressed || self.log.bytes_stored() > stored + self.log.rest_bytes() / 4
    }

    /// What the groups have applied since their checkpoints becomes durable state, so that the
    /// log has next to nothing to keep.
    async fn cut_at_rest(&self) -> Result<(), HostError> {
        let mut outcome = Ok(());
        for id in self.group_ids() {
            if self.log.bytes_unpurged_of(id) > 0 {
                self.try_checkpoint(id, &mut outcome).await;
            }
        }
        let cut = self.log.cut_at_rest().await;
        outcome.and(cut.map(drop).map_err(HostError::from))
    }

    /// One round: the groups with most to purge, then whatever keeps the oldest batches.
    async fn relieve(&self) -> Result<(), HostError> {
        let mut groups: Vec<(u64, Rc<Group>)> =
            self.groups.borrow().values().map(|group| (self.log.bytes_unpurged_of(group.id), group.clone())).collect();
        groups.sort_by_key(|(bytes, group)| (std::cmp::Reverse(*bytes), group.id));
        let mut outcome = Ok(());
        for (_, group) in groups.iter().filter(|(bytes, _)| *bytes > 0) {
            if !self.log.is_starved() && self.log.bytes_unpurged() <= self.log.limit_bytes() / 2 {
                break;
            }
            self.try_checkpoint(group.id, &mut outcome).await;
        }
        self.log.cut().await?;
        // Idle groups' short tails are copied forward by the cut; longer ones need a checkpoint.
        let mut relieved = BTreeSet::new();
        while self.log.is_over_limit() {
            let pinning: Vec<ShardId> = self.log.pinning().into_iter().filter(|id| relieved.insert(*id)).collect();
            if pinning.is_empty() {
                break;
            }
            for id in pinning {
                self.try_checkpoint(id, &mut outcome).await;
            }
            self.log.cut().await?;
        }
        outcome
    }
}
