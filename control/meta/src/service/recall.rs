//! Coherence: before a change becomes visible, whoever may serve the old state from a cache has
//! dropped it, and whoever may hold newer state (a write lease) has committed it.

use super::MetaService;
use super::call::{BLOCKED_RECHECK, unreadable};
use super::leader::Fencing;
use super::names::names_of;
use super::readers::Recall;
use super::shard::Shard;
use crate::state::{self, Change, ChangeKind};
use cfs_reactor::Instant;
use cfs_wire::limits::MAPPED_PAGES_WAIT;
use cfs_wire::meta::{Event, FileWrite, MetaError, MetaOp, MetaReply, Name};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Ino, SessionId};
use std::rc::Rc;
use std::time::Duration;

/// A recall that is not acknowledged is sent once more after this: what is in the way of its
/// acknowledgement may have begun before the holder got the lease.
const RECALL_AGAIN: Duration = Duration::from_secs(10);

/// Has a session drop what it keeps of an inode.
pub(super) type Told = fn(Ino) -> Event;

/// What is told unless pages of mappings are what changes.
pub(super) const PLAINLY: Told = |ino| Event::Invalidate { ino };

impl MetaService {
    /// Recalls what an operation is about to change. `None`: nobody else talks to the shard.
    pub(super) async fn recall_for(
        &self,
        shard: &Rc<Shard>,
        session: SessionId,
        op: &MetaOp,
    ) -> Result<Option<Recall>, MetaError> {
        if shard.is_alone(session) {
            return Ok(None);
        }
        let mut inos = directly_changed(op);
        for (dir, name) in names_of(op) {
            if dir.shard() == shard.id && !matches!(op, MetaOp::Create { .. } | MetaOp::Link { .. }) {
                inos.extend(self.named(shard, session, dir, name).await?);
            }
        }
        Ok(Some(self.recall(shard, session, inos, told_of(op)).await?))
    }

    /// Recalls inodes of this shard from every other session. While the result lives, nobody
    /// gets a new lease on them.
    pub(super) async fn recall(
        &self,
        shard: &Rc<Shard>,
        session: SessionId,
        mut inos: Vec<Ino>,
        told: Told,
    ) -> Result<Recall, MetaError> {
        inos.retain(|ino| ino.shard() == shard.id);
        inos.sort();
        inos.dedup();
        let recall = shard.readers().begin_recall(session, &inos);
        for ino in &inos {
            self.recall_writer(shard, *ino, session).await?;
        }
        if !planted::is(Bug::MetaSkipInvalidate) {
            self.invalidate(shard, session, &inos, told).await;
        }
        Ok(recall)
    }

    /// Has all other readers of the inodes drop them; waits for each until it has, or until its
    /// lease is over.
    async fn invalidate(&self, shard: &Shard, session: SessionId, inos: &[Ino], told: Told) {
        let now = self.inner.handle.now();
        let mut waited_for = Vec::new();
        for ino in inos {
            for (other, until) in shard.readers().others(*ino, session, now) {
                // One that was fenced while it lived has nothing to acknowledge with.
                let known = shard.knows(other);
                let ticket = known.then(|| self.inner.events.push(other, told(*ino)));
                waited_for.push((other, *ino, until, ticket, shard.readers().begin_drop(*ino, other)));
            }
        }
        if !waited_for.is_empty() {
            // What writes back what they drop may wait for leave to pass.
            shard.applied.progress().notify_all();
        }
        for (other, ino, until, ticket, _dropping) in waited_for {
            match ticket {
                Some(ticket) => drop(ticket.acknowledged_by(&self.inner.handle, until).await),
                None => self.inner.handle.sleep(until.saturating_since(self.inner.handle.now())).await,
            }
            let now = self.inner.handle.now();
            match told(ino) {
                // It may still be writing its own back: the next change of a program waits for those.
                Event::InvalidateForPages { .. } => shard.readers().shorten(other, ino, now + MAPPED_PAGES_WAIT),
                _ => shard.readers().dropped(other, ino, now),
            }
        }
    }

    /// After a change was applied: inodes it changed that nobody foresaw (a session came in
    /// between) are recalled before the change is answered.
    pub(super) async fn recall_late(
        &self,
        shard: &Rc<Shard>,
        session: SessionId,
        changes: &[Change],
        recall: Option<&Recall>,
    ) {
        if shard.is_alone(session) {
            return;
        }
        let unforeseen: Vec<Ino> = changes
            .iter()
            .filter(|change| change.kind != ChangeKind::Created)
            .map(|change| change.ino)
            .filter(|ino| recall.is_none_or(|recall| !recall.covers(*ino)))
            .collect();
        if !unforeseen.is_empty() {
            let _recall = shard.readers().begin_recall(session, &unforeseen);
            self.invalidate(shard, session, &unforeseen, PLAINLY).await;
        }
    }

    pub(super) async fn lease_holder(&self, shard: &Shard, ino: Ino) -> Result<Option<SessionId>, MetaError> {
        state::lease_holder(&*shard.view(), shard.id, ino).await.map_err(unreadable)
    }

    /// Has another session commit what it wrote under its write lease and give the lease back;
    /// a session that does neither, although it could, is fenced. True if another session held it and lives. Ends with
    /// this node's leadership: what is recalled is the next leader's to give.
    pub(super) async fn recall_writer(
        &self,
        shard: &Rc<Shard>,
        ino: Ino,
        session: SessionId,
    ) -> Result<bool, MetaError> {
        let started = self.inner.handle.now();
        let term = self.inner.proposer.leads(shard.id);
        let mut asked: Option<(SessionId, Instant)> = None;
        let mut pushed = started;
        // Time in which nothing of what was proposed was applied: the holder could not commit either.
        let mut stood_still = Duration::ZERO;
        loop {
            if term.is_none() || self.inner.proposer.leads(shard.id) != term {
                return Err(MetaError::NotLeader { hint: self.inner.proposer.hint(shard.id) });
            }
            let progress = shard.applied.progress().notified();
            // Whoever is waited for by the one that acquires may have to write pages back before it can
            // drop them. Should its commit come behind the lease, it is refused and recalls that.
            let acquiring = shard.acquiring.borrow().get(&ino).is_some_and(|other| *other != session)
                && !shard.readers().is_dropping(ino, session);
            // Nor does the holder take the time that reading about him takes.
            let looked = self.inner.handle.now();
            let holder = self.lease_holder(shard, ino).await?.filter(|holder| *holder != session);
            stood_still += self.inner.handle.now().saturating_since(looked);
            let Some(holder) = holder else {
                if acquiring {
                    let _ = self.inner.handle.timeout(BLOCKED_RECHECK, progress).await;
                    continue;
                }
                return Ok(asked.is_some_and(|(asked, _)| shard.knows(asked)));
            };
            let now = self.inner.handle.now();
            if now.saturating_since(started) > self.inner.config.write_recall_max + stood_still {
                self.fence(holder, Fencing::Forced).await;
                let _ = self.inner.handle.timeout(BLOCKED_RECHECK, progress).await;
                continue;
            }
            // Asked again now and then: the client may have carried the event out just before
            // it got the lease.
            let due = asked.is_none_or(|(to, at)| to != holder || now.saturating_since(at) >= BLOCKED_RECHECK * 2);
            // While it is still at the last one, another would only be one more, for as long as it takes;
            // but that may be from before it got the lease, its acknowledgement held up by others.
            if due {
                let recall = Event::RecallWrite { ino };
                let again = now.saturating_since(pushed) >= RECALL_AGAIN;
                if again || !self.inner.events.is_under_way(holder, &recall) {
                    self.inner.events.push(holder, recall);
                    pushed = now;
                }
                asked = Some((holder, now));
            }
            let waits = shard.applied.is_awaited();
            if self.inner.handle.timeout(BLOCKED_RECHECK, progress).await.is_none() && waits {
                stood_still += self.inner.handle.now().saturating_since(now);
            }
        }
    }

    /// What a name stands for right now.
    async fn named(&self, shard: &Shard, session: SessionId, dir: Ino, name: Name) -> Result<Option<Ino>, MetaError> {
        Ok(match self.read_state(shard, session, &MetaOp::Lookup { dir, name }).await? {
            Ok(MetaReply::Entry(entry)) => Some(entry.attr.ino),
            Ok(MetaReply::Remote { ino, .. }) => Some(ino),
            _ => None,
        })
    }
}

/// What an operation's readers are told. A commit of nothing but bytes, which takes no capability away,
/// is of pages of mappings.
fn told_of(op: &MetaOp) -> Told {
    let is_bytes = |write: &FileWrite| matches!(write, FileWrite::Data { .. } | FileWrite::Inline { .. });
    match op {
        MetaOp::Commit(commit) if !commit.writes.is_empty() && commit.writes.iter().all(is_bytes) => {
            |ino| Event::InvalidateForPages { ino }
        }
        _ => PLAINLY,
    }
}

/// The inodes an operation names and changes.
fn directly_changed(op: &MetaOp) -> Vec<Ino> {
    match op {
        MetaOp::Create { dir, .. } | MetaOp::Unlink { dir, .. } | MetaOp::Rmdir { dir, .. } => vec![*dir],
        MetaOp::Link { ino, dir, .. } => vec![*dir, *ino],
        MetaOp::Rename { dir, to_dir, .. } => vec![*dir, *to_dir],
        MetaOp::SetAttr { ino, .. }
        | MetaOp::SetXattr { ino, .. }
        | MetaOp::RemoveXattr { ino, .. }
        | MetaOp::AcquireLease { ino } => vec![*ino],
        MetaOp::Commit(commit) => vec![commit.ino],
        _ => Vec::new(),
    }
}
