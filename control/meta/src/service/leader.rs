//! Beginning to lead a shard, the regular sweep, and fencing.
//!
//! A new leader knows nothing of read leases: until the longest its predecessor can have given
//! is over, every session of the shard counts as a reader of everything. What was begun is
//! brought to its end before clients are served: transactions are driven, orphans reaped.

use super::MetaService;
use super::call::unreadable;
use super::config::with_drift;
use super::shard::Shard;
use super::transactions::Left;
use crate::state::{self, Init, LogEntry, Reply};
use cfs_wire::SessionId;
use cfs_wire::meta::{MetaError, MetaResult};
use cfs_wire::planted::{self, Bug};
use std::rc::Rc;
use std::time::Duration;

/// How often each shard's leadership is looked at when no call asks for it.
const LEADERSHIP_POLL: Duration = Duration::from_secs(1);
const TAKE_UP_AGAIN: Duration = Duration::from_millis(50);

/// Orphans looked at in one go: bounds how long the task holds the core.
const ORPHANS_PER_SCAN: usize = 256;

/// Why a session is fenced; says what it may still serve from its caches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fencing {
    /// It was silent for a whole lease, or is dead: all that it was given is over.
    Silent,
    /// It may live, and serves what it has cached until it hears of it or its leases end.
    Forced,
}

impl MetaService {
    /// Takes the shard up whenever this node leads it; runs as long as the node.
    pub(super) async fn lead(self, shard: Rc<Shard>) {
        loop {
            let wanted = shard.wanted.notified();
            match self.inner.proposer.leads(shard.id) {
                Some(term) if shard.serving.get() != Some(term) => {
                    self.dismiss(&shard);
                    match self.take_up(&shard).await {
                        Ok(()) => {
                            shard.serving.set(Some(term));
                            shard.serving_changed.notify_all();
                        }
                        Err(error) => {
                            tracing::warn!(shard = %shard.id, %error, "the shard can't be taken up yet");
                            self.inner.handle.sleep(TAKE_UP_AGAIN).await;
                        }
                    }
                    continue;
                }
                Some(_) => self.sweep(&shard).await,
                None if shard.serving.get().is_some() => self.dismiss(&shard),
                None => {}
            }
            let _ = self.inner.handle.timeout(LEADERSHIP_POLL, wanted).await;
        }
    }

    /// Writes the first entry of every shard that this node leads; once is enough, more do no
    /// harm. Refused if a shard was initialised otherwise.
    pub async fn initialise(&self, init: &Init) -> Result<(), MetaError> {
        for shard in self.inner.shards.values() {
            if let Reply::Meta(result) = self.propose(shard, &LogEntry::Init(init.clone())).await?.outcome.reply {
                result?;
            }
            shard.wanted.notify_all();
        }
        Ok(())
    }

    /// Forgets what only a leader knows.
    fn dismiss(&self, shard: &Shard) {
        shard.serving.set(None);
        shard.known.borrow_mut().clear();
        shard.fenced.borrow_mut().clear();
        shard.dispossessing.borrow_mut().clear();
        let elsewhere = MetaError::NotLeader { hint: self.inner.proposer.hint(shard.id) };
        shard.locks.answer_all(|_| true, &MetaResult::Err(elsewhere));
        shard.contended.borrow_mut().clear();
        shard.prepared.borrow_mut().clear();
    }

    async fn take_up(&self, shard: &Rc<Shard>) -> Result<(), MetaError> {
        self.inner.proposer.read_barrier(shard.id).await?;
        let now = self.inner.handle.now();
        let sessions = state::list_sessions(&*shard.view(), shard.id).await.map_err(unreadable)?;
        *shard.known.borrow_mut() = sessions.into_iter().map(|(session, _client)| session).collect();
        *shard.dispossessing.borrow_mut() =
            state::list_half_fenced(&*shard.view(), shard.id).await.map_err(unreadable)?.into_iter().collect();
        *shard.fenced.borrow_mut() =
            state::list_fenced(&*shard.view(), shard.id).await.map_err(unreadable)?.into_iter().collect();
        self.inner.fenced.borrow_mut().extend(&*shard.fenced.borrow());
        let known = &*shard.known.borrow() | &*shard.dispossessing.borrow();
        // Nobody could be heard before there was anybody to hear: all get a full lease to show up.
        for session in &known {
            self.inner.contacts.borrow_mut().insert(*session, now);
        }
        if !planted::is(Bug::MetaForgetReaders) {
            shard.readers().restart(known, now + with_drift(self.inner.config.read_lease()));
        }
        self.finish_fencing(shard).await?;
        self.finish_transactions(shard, Left::All).await?;
        self.reap_orphans(shard).await
    }

    /// A node that died while it fenced a session left it fenced in some shards and alive in
    /// others, or with what it held. Whichever of two such shards is taken up last finds it.
    async fn finish_fencing(&self, shard: &Shard) -> Result<(), MetaError> {
        let mut halfway = shard.dispossessing.borrow().clone();
        for other in self.inner.shards.values() {
            halfway.extend(shard.known.borrow().intersection(&other.fenced.borrow()));
            halfway.extend(other.known.borrow().intersection(&shard.fenced.borrow()));
        }
        for session in &halfway {
            self.fence(*session, Fencing::Forced).await;
        }
        let left = &*shard.known.borrow() | &*shard.dispossessing.borrow();
        match halfway.intersection(&left).next() {
            Some(session) => Err(MetaError::Unavailable(format!("{session} can't be fenced yet"))),
            None => Ok(()),
        }
    }

    async fn reap_orphans(&self, shard: &Rc<Shard>) -> Result<(), MetaError> {
        let mut after = None;
        loop {
            let list =
                state::list_orphans(&*shard.view(), shard.id, after, ORPHANS_PER_SCAN).await.map_err(unreadable)?;
            for (ino, held) in &list {
                if !held {
                    self.reap(shard, *ino);
                }
            }
            match list.last() {
                Some((last, _)) if list.len() == ORPHANS_PER_SCAN => after = Some(*last),
                _ => return Ok(()),
            }
        }
    }

    /// What is due from time to time.
    async fn sweep(&self, shard: &Rc<Shard>) {
        let now = self.inner.handle.now();
        if now < shard.swept.get() + self.inner.config.sweep {
            return;
        }
        shard.swept.set(now);
        shard.readers().expire(now);
        shard.contended.borrow_mut().retain(|_, until| *until > now);
        let work = async {
            self.reap_orphans(shard).await?;
            self.finish_transactions(shard, Left::Decided).await?;
            self.resolve_participations(shard).await
        };
        if let Err(error) = work.await {
            tracing::debug!(shard = %shard.id, %error, "sweep cut short");
        }
    }

    /// Fences sessions that were silent for a whole lease; runs as long as the node.
    pub(super) async fn watch_sessions(self) {
        let lease = with_drift(self.inner.config.session_lease);
        let every = lease / 8;
        loop {
            let before = self.inner.handle.now();
            self.inner.handle.sleep(every).await;
            let now = self.inner.handle.now();
            if self.inner.deaf.get() || now.saturating_since(before) > every * 3 {
                // This node itself stood still or does not listen yet: it can't have heard anybody.
                for contact in self.inner.contacts.borrow_mut().values_mut() {
                    *contact = now;
                }
                continue;
            }
            let concerns = |session: SessionId| self.inner.shards.values().any(|shard| shard.is_concerned(session));
            let silent: Vec<SessionId> = {
                let contacts = self.inner.contacts.borrow();
                contacts.iter().filter(|(_, at)| **at + lease <= now).map(|(session, _)| *session).collect()
            };
            for session in silent {
                if concerns(session) {
                    // The one before may have taken long.
                    let heard = self.inner.contacts.borrow().get(&session).copied();
                    if heard.is_none_or(|at| at + lease <= self.inner.handle.now()) {
                        self.fence(session, Fencing::Silent).await;
                    }
                } else {
                    self.forget_contact(session);
                }
            }
        }
    }

    /// Until [`Self::hear`] no session is taken for silent: what was begun before a restart is
    /// finished before clients are served, and may wait for what they have cached to run out.
    pub fn deafen(&self) {
        self.inner.deaf.set(true);
    }

    /// The node listens: from now on every session has a full lease to show up.
    pub fn hear(&self) {
        self.inner.deaf.set(false);
        let now = self.inner.handle.now();
        self.inner.contacts.borrow_mut().values_mut().for_each(|contact| *contact = now);
    }

    /// Fences a session in every shard of this node that knows it. What fails is tried again by
    /// the next watch.
    pub(super) async fn fence(&self, session: SessionId, fencing: Fencing) {
        let concerned = || self.inner.shards.values().filter(|shard| shard.is_concerned(session)).cloned();
        let shards: Vec<Rc<Shard>> = concerned().collect();
        let mut missed = false;
        for shard in &shards {
            missed |= self.fence_in(shard, session, fencing).await.is_err();
        }
        // Nothing is taken from it while it might act upon that in another shard.
        if !missed {
            for shard in &shards {
                missed |= self.dispossess_in(shard, session, fencing).await.is_err();
            }
        }
        // It may have come to a shard meanwhile.
        if !missed && fencing == Fencing::Silent && concerned().next().is_none() {
            self.forget_contact(session);
        }
        self.inner.events.wake(session);
    }

    /// From now on it can do nothing in the shard. What it has there is still its own.
    async fn fence_in(&self, shard: &Rc<Shard>, session: SessionId, fencing: Fencing) -> Result<(), MetaError> {
        self.propose(shard, &LogEntry::Fence { session }).await?;
        shard.fenced.borrow_mut().insert(session);
        self.inner.fenced.borrow_mut().insert(session);
        shard.dispossessing.borrow_mut().insert(session);
        match fencing {
            Fencing::Silent => shard.forget(session),
            Fencing::Forced => shard.shut_out(session),
        }
        self.inner.events.wake(session);
        if fencing == Fencing::Forced {
            // It is given nothing any more: what it has to lose now is all that it may serve. All of
            // it is kept before any is taken, for another task may be taking it too.
            let heard = self.inner.contacts.borrow().get(&session).copied();
            let heard = heard.unwrap_or_else(|| self.inner.handle.now());
            let written = state::list_leases(&*shard.view(), shard.id, session).await.map_err(unreadable)?;
            shard.readers().keep(session, &written, heard + with_drift(self.inner.config.session_lease));
        }
        Ok(())
    }

    async fn dispossess_in(&self, shard: &Rc<Shard>, session: SessionId, fencing: Fencing) -> Result<(), MetaError> {
        while self.propose(shard, &LogEntry::Dispossess { session }).await?.outcome.reply == Reply::Unfinished {
            shard.applied.progress().notify_all();
        }
        shard.dispossessing.borrow_mut().remove(&session);
        shard.applied.progress().notify_all();
        tracing::info!(shard = %shard.id, %session, ?fencing, "session fenced");
        Ok(())
    }

    fn forget_contact(&self, session: SessionId) {
        self.inner.contacts.borrow_mut().remove(&session);
        self.inner.events.forget(session);
    }

    /// Fences the sessions of a client that is known to be dead, so that nobody waits for what it
    /// held. In shards that this node serves.
    pub async fn fence_client(&self, client: &str) -> Result<(), MetaError> {
        for shard in self.inner.shards.values() {
            let sessions = state::list_sessions(&*shard.view(), shard.id).await.map_err(unreadable)?;
            for (session, _) in sessions.into_iter().filter(|(_, name)| name == client) {
                self.fence(session, Fencing::Silent).await;
            }
        }
        Ok(())
    }

    /// A session has closed itself in one shard.
    pub(super) fn forget_session(&self, shard: &Shard, session: SessionId) {
        shard.forget(session);
        if !self.inner.shards.values().any(|shard| shard.knows(session)) {
            self.forget_contact(session);
        }
    }
}
