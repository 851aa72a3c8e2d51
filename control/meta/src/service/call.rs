//! The way in: routing, who may speak, reads with their leases, and repetitions joining the call
//! that already runs.

use super::config::with_drift;
use super::shard::Shard;
use super::{MetaService, Running};
use crate::state::{self, ReadReply, StateError};
use cfs_wire::meta::{Entry, Grant, MetaCall, MetaError, MetaOp, MetaReply, MetaResult, XATTR_CAPABILITY};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino, SessionId};
use std::rc::Rc;
use std::time::Duration;

/// A call blocked by a transaction looks again after this even if nobody wakes it: the
/// transaction may have ended in a way this node did not see.
pub(super) const BLOCKED_RECHECK: Duration = Duration::from_millis(500);

impl MetaService {
    /// Carries one client call out. Dropping the future abandons the reply, not the execution
    /// of a change.
    pub async fn call(&self, call: MetaCall) -> MetaResult {
        let shard = self.serving(call.shard).await?;
        if call.op.home().is_some_and(|home| home.shard() != call.shard) {
            return Err(MetaError::Malformed(format!("the operation does not belong to shard {}", call.shard)));
        }
        state::check_op(&call.op)?;
        let session = call.id.session;
        // Also where this shard does not know yet, or does not know the session at all.
        if self.has_fenced(session) {
            return Err(MetaError::Fenced);
        }
        self.heard_of(session);
        if call.op.is_read() {
            return self.read(&shard, session, &call.op).await;
        }
        let opens = matches!(call.op, MetaOp::OpenSession { .. });
        if !opens {
            self.check_known(&shard, session).await?;
        }
        self.join_or_run(shard, call).await
    }

    /// Whether a session may speak in a shard.
    async fn check_known(&self, shard: &Shard, session: SessionId) -> Result<(), MetaError> {
        if shard.knows(session) {
            return Ok(());
        }
        state::check_session(&*shard.view(), shard.id, session).await.map_err(unreadable)??;
        // It has a record, and this leader does not know of it: it is just being opened.
        Err(MetaError::Unavailable("the session is being opened".to_owned()))
    }

    /// One execution per request id, however often it is asked for.
    async fn join_or_run(&self, shard: Rc<Shard>, call: MetaCall) -> MetaResult {
        let key = (shard.id, call.id);
        let waits = matches!(call.op, MetaOp::Lock { wait: true, .. });
        let found = self.inner.running.borrow().get(&key).cloned();
        let running = found.unwrap_or_else(|| self.run(shard, call));
        if !waits {
            return running.wait().await;
        }
        // As long as it takes: but nobody can tell a client that waits from one that is gone.
        let answered = self.inner.handle.timeout(self.inner.config.session_lease * 2, running.wait()).await;
        answered.unwrap_or_else(|| Err(MetaError::Busy("another holds the lock".to_owned())))
    }

    fn run(&self, shard: Rc<Shard>, call: MetaCall) -> Rc<Running> {
        let key = (shard.id, call.id);
        let running = Rc::new(Running::default());
        self.inner.running.borrow_mut().insert(key, running.clone());
        let (service, ours) = (self.clone(), running.clone());
        self.inner.handle.spawn(async move {
            let result = service.mutate(&shard, call).await;
            service.inner.running.borrow_mut().remove(&key);
            ours.finish(result);
        });
        running
    }

    /// Answers a read from the applied state, with the leases it carries.
    pub(super) async fn read(&self, shard: &Rc<Shard>, session: SessionId, op: &MetaOp) -> MetaResult {
        self.check_known(shard, session).await?;
        self.inner.proposer.read_barrier(shard.id).await?;
        if let Some(ino) = asks_for_capability(op) {
            // Whoever asks is about to give a program what it was allowed before the writer came.
            self.recall_writer(shard, ino, session).await?;
        }
        // Before the read: nothing may be awaited after it.
        let inodes_elsewhere = match op {
            MetaOp::StatFs { count_inodes: true } => self.inodes_elsewhere(shard).await?,
            _ => 0,
        };
        loop {
            let reading = shard.readers().begin_read();
            let mut reply = self.read_state(shard, session, op).await??;
            if let Some(ino) = self.written_elsewhere(shard, session, &mut reply).await? {
                // It is read anew afterwards; until then it need not be told of every change.
                drop(reading);
                self.recall_writer(shard, ino, session).await?;
                continue;
            }
            // Nothing is awaited from here to the answer: the session can't be fenced between.
            if !shard.knows(session) {
                return Err(MetaError::Fenced);
            }
            let until = self.inner.handle.now() + with_drift(self.inner.config.read_lease());
            self.complete(shard, op, &mut reply, |ino| reading.grant(session, ino, until));
            if let MetaReply::StatFs(stat) = &mut reply {
                stat.inodes_used = stat.inodes_used.saturating_add(inodes_elsewhere);
            }
            return Ok(reply);
        }
    }

    /// Reads the applied state, waiting while a prepared transaction holds what is asked for.
    pub(super) async fn read_state(
        &self,
        shard: &Shard,
        session: SessionId,
        op: &MetaOp,
    ) -> Result<MetaResult, MetaError> {
        loop {
            let progress = shard.applied.unblocked().notified();
            match state::read(&*shard.view(), shard.id, session, op).await.map_err(unreadable)? {
                ReadReply::Meta(result) => return Ok(result),
                ReadReply::Blocked { .. } => {
                    let _ = self.inner.handle.timeout(BLOCKED_RECHECK, progress).await;
                }
            }
        }
    }

    /// The inode that a reply tells of and that others have write leases on.
    async fn written_elsewhere(
        &self,
        shard: &Rc<Shard>,
        session: SessionId,
        reply: &mut MetaReply,
    ) -> Result<Option<Ino>, MetaError> {
        if let MetaReply::Entries { entries, .. } = reply {
            if shard.is_alone(session) {
                return Ok(None);
            }
            // One slow writer must not hold up a whole directory: its attributes are left out.
            for entry in entries.iter_mut().filter(|entry| entry.attr.is_some()) {
                let holder = self.lease_holder(shard, entry.ino).await?;
                if holder.is_some_and(|holder| holder != session) {
                    entry.attr = None;
                }
            }
            return Ok(None);
        }
        let Some((ino, grant)) = seen(reply) else { return Ok(None) };
        if grant.write {
            return Ok(None);
        }
        let holder = self.lease_holder(shard, ino).await?;
        Ok(holder.filter(|holder| *holder != session).map(|_| ino))
    }

    /// Fills in what the state does not know: leases, the session's lease time, free space.
    pub(super) fn complete(
        &self,
        shard: &Shard,
        op: &MetaOp,
        reply: &mut MetaReply,
        mut granted: impl FnMut(Ino) -> bool,
    ) {
        let read_ms = u32::try_from(self.inner.config.read_lease().as_millis()).unwrap_or(u32::MAX);
        // A lease on an inode is its own shard's to give.
        let mut fill = |grant: &mut Grant, ino: Ino| {
            grant.read_ms = if ino.shard() == shard.id && granted(ino) { read_ms } else { 0 };
        };
        let directory = match op {
            MetaOp::Lookup { dir, .. }
            | MetaOp::ReadDir { dir, .. }
            | MetaOp::Create { dir, .. }
            | MetaOp::Tmpfile { dir, .. }
            | MetaOp::Link { dir, .. } => Some(*dir),
            _ => None,
        };
        match (reply, directory) {
            (MetaReply::Entry(Entry { attr, grant, dir_grant }), directory) => {
                fill(grant, attr.ino);
                if let Some(dir) = directory {
                    fill(dir_grant, dir);
                }
            }
            (MetaReply::Remote { dir_grant, .. }, Some(dir)) => fill(dir_grant, dir),
            (MetaReply::Entries { grant, .. }, Some(dir)) => fill(grant, dir),
            // Opening recalls nothing: another session may hold newer state under its write lease.
            (MetaReply::Attr { .. }, _) if matches!(op, MetaOp::Open { .. }) => {}
            (MetaReply::Attr { attr, grant } | MetaReply::Lease { attr, grant, .. }, _) => fill(grant, attr.ino),
            (MetaReply::Extents(extents), _) => fill(&mut extents.grant, extents.attr.ino),
            (MetaReply::Renewed(renewals), _) => {
                let MetaOp::Renew { inos } = op else { return };
                for (renewal, ino) in renewals.iter_mut().zip(inos).filter(|(renewal, _)| renewal.version != 0) {
                    fill(&mut renewal.grant, *ino);
                }
            }
            (MetaReply::Session { lease_ms }, _) => {
                *lease_ms = u32::try_from(self.inner.config.session_lease.as_millis()).unwrap_or(u32::MAX);
            }
            (MetaReply::StatFs(stat), _) => {
                let (total, free) = (self.inner.space)();
                stat.bytes_total = total;
                stat.bytes_free = free;
            }
            _ => {}
        }
    }
}

/// The inode of which a read asks for the attribute that a commit can take away.
fn asks_for_capability(op: &MetaOp) -> Option<Ino> {
    match op {
        MetaOp::GetXattr { ino, name } if name.as_slice() == XATTR_CAPABILITY => Some(*ino),
        MetaOp::ListXattr { ino } => Some(*ino),
        _ => None,
    }
}

/// The inode whose attributes a read's reply shows.
fn seen(reply: &mut MetaReply) -> Option<(Ino, &mut Grant)> {
    match reply {
        MetaReply::Entry(entry) => Some((entry.attr.ino, &mut entry.grant)),
        MetaReply::Attr { .. } if planted::is(Bug::MetaSkipRecall) => None,
        MetaReply::Attr { attr, grant } => Some((attr.ino, grant)),
        MetaReply::Extents(extents) => Some((extents.attr.ino, &mut extents.grant)),
        _ => None,
    }
}

/// A stored record that can't be read fails the operation, not the client's session.
pub(super) fn unreadable(error: StateError) -> MetaError {
    tracing::error!(%error, "metadata can't be read");
    if error.is_corruption() { MetaError::Errno(Errno::EIO) } else { MetaError::Unavailable(error.to_string()) }
}
