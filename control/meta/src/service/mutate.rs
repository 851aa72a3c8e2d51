//! The way of a change: recall it from other caches, propose it, see to what it entails, answer.

use super::MetaService;
use super::applied::{Delivery, encode_entry};
use super::call::BLOCKED_RECHECK;
use super::config::with_drift;
use super::names::names_of;
use super::readers::Recall;
use super::shard::Shard;
use super::transactions::{Backoff, Conclusion, RenameLock};
use crate::state::{Facts, LogEntry, Reply};
use cfs_wire::meta::{Grant, MetaCall, MetaError, MetaOp, MetaReply, MetaResult};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Ino, SessionId};
use std::rc::Rc;

/// What one attempt at an operation came to.
enum Attempt {
    Answered(MetaResult),
    /// Nothing was done: try again with what was found out meanwhile.
    Again,
}

/// The last 256th of the space is not given to new names, attributes and inline bytes: the log
/// of the deletes that make room again needs it.
const KEPT_FREE: u64 = 256;

impl MetaService {
    pub(super) async fn mutate(&self, shard: &Rc<Shard>, call: MetaCall) -> MetaResult {
        match &call.op {
            MetaOp::Lock { ino, lock, wait: true } => {
                let (ino, lock) = (*ino, *lock);
                self.wait_for_lock(shard, call, ino, lock).await
            }
            MetaOp::CancelLock { ino, owner } => {
                let (ino, owner) = (*ino, *owner);
                self.cancel_lock(shard, call.id.session, ino, owner)
            }
            MetaOp::AcquireLease { ino } => {
                let ino = *ino;
                self.acquire_lease(shard, call, ino).await
            }
            _ => self.execute(shard, call).await,
        }
    }

    /// Proposes a call until it has an answer that is the client's.
    pub(super) async fn execute(&self, shard: &Rc<Shard>, call: MetaCall) -> MetaResult {
        let _names = shard.names.acquire(names_of(&call.op)).await;
        let mut facts = Facts::default();
        let mut rename_lock = None;
        let mut backoff = Backoff::default();
        let result = loop {
            match self.attempt(shard, &call, &mut facts, &mut rename_lock, &mut backoff).await {
                Ok(Attempt::Answered(result)) => break result,
                Ok(Attempt::Again) => {}
                Err(error) => break Err(error),
            }
        };
        if let Some(lock) = rename_lock {
            self.release_rename_lock(lock).await;
        }
        if result.is_ok() {
            self.note_session(shard, &call);
        }
        result
    }

    /// Whether so little space is left that it is kept for deleting.
    fn is_full(&self) -> bool {
        let (total, free) = (self.inner.space)();
        total > 0 && free <= total / KEPT_FREE
    }

    async fn attempt(
        &self,
        shard: &Rc<Shard>,
        call: &MetaCall,
        facts: &mut Facts,
        rename_lock: &mut Option<RenameLock>,
        backoff: &mut Backoff,
    ) -> Result<Attempt, MetaError> {
        let session = call.id.session;
        let term = shard.serving.get();
        let recall = self.recall_for(shard, session, &call.op).await?;
        if term.is_none() || shard.serving.get() != term || self.inner.proposer.leads(shard.id) != term {
            // Another leader may have given leases meanwhile that this recall knows nothing of.
            return Err(MetaError::NotLeader { hint: self.inner.proposer.hint(shard.id) });
        }
        if self.has_fenced(session) {
            return Err(MetaError::Fenced);
        }
        if let MetaOp::ReturnLease { ino } = call.op
            && self.lease_holder(shard, ino).await? == Some(session)
        {
            // What was served under the lease it drops afterwards: until it has, it is a reader.
            let until = self.inner.handle.now() + with_drift(self.inner.config.read_lease());
            shard.readers().keep(session, &[ino], until);
        }
        let unblocked = shard.applied.unblocked().notified();
        let found = Facts { full: self.is_full(), ..*facts };
        let entry = LogEntry::Client { call: call.clone(), now: self.inner.handle.wall(), facts: found };
        let delivery = self.propose(shard, &entry).await?;
        match &delivery.outcome.reply {
            // What was found out in another shard is no longer so.
            Reply::Meta(Err(MetaError::Unavailable(_))) if *facts != Facts::default() && backoff.is_hopeful() => {
                drop(recall);
                *facts = Facts::default();
                backoff.wait(&self.inner.handle).await;
                Ok(Attempt::Again)
            }
            Reply::Meta(result) => {
                let result = result.clone();
                self.recall_late(shard, session, &delivery.outcome.changes, recall.as_ref()).await;
                Ok(Attempt::Answered(self.answer(shard, call, result, &delivery, recall.as_ref())))
            }
            Reply::Unfinished => Ok(Attempt::Again),
            Reply::Blocked { .. } => {
                drop(recall);
                let _ = self.inner.handle.timeout(BLOCKED_RECHECK, unblocked).await;
                Ok(Attempt::Again)
            }
            Reply::NeedTarget { dir, name } => {
                facts.target = Some(self.lookup_anywhere(*dir, name.clone()).await?);
                Ok(Attempt::Again)
            }
            Reply::NeedRenameLock { walks } => {
                let lock = self.take_rename_lock(call.id, rename_lock.take()).await?;
                let token = lock.token;
                *rename_lock = Some(lock);
                if let Some(errno) = self.walk(walks).await? {
                    return Ok(Attempt::Answered(Err(MetaError::Errno(errno))));
                }
                facts.rename_token = Some(token);
                Ok(Attempt::Again)
            }
            Reply::Begun { txn } => {
                let concluded = self.drive_begun(shard, *txn, session, &delivery, backoff.is_hopeful()).await?;
                match concluded {
                    Conclusion::Answered(result, delivery) => {
                        self.recall_late(shard, session, &delivery.outcome.changes, recall.as_ref()).await;
                        Ok(Attempt::Answered(self.answer(shard, call, result, &delivery, recall.as_ref())))
                    }
                    Conclusion::Again => {
                        drop(recall);
                        *facts = Facts::default();
                        backoff.wait(&self.inner.handle).await;
                        Ok(Attempt::Again)
                    }
                }
            }
            other => Err(MetaError::Unavailable(format!("unexpected outcome of a client's call: {other:?}"))),
        }
    }

    fn answer(
        &self,
        shard: &Shard,
        call: &MetaCall,
        result: MetaResult,
        delivery: &Delivery,
        recall: Option<&Recall>,
    ) -> MetaResult {
        let mut reply = result?;
        let until = self.inner.handle.now() + with_drift(self.inner.config.read_lease());
        let session = call.id.session;
        self.complete(shard, &call.op, &mut reply, |ino| delivery.read.grant_within(recall, session, ino, until));
        Ok(reply)
    }

    /// Commits an entry, sees to its follow-up, and gives its outcome.
    pub(super) async fn propose(&self, shard: &Rc<Shard>, entry: &LogEntry) -> Result<Delivery, MetaError> {
        let nonce = self.inner.handle.random_u64();
        let expected = shard.applied.expect(nonce);
        self.inner.proposer.propose(shard.id, encode_entry(nonce, entry)).await?;
        let delivery = expected
            .take()
            .ok_or_else(|| MetaError::Unavailable("the entry was applied without its outcome".to_owned()))?;
        self.follow_up(shard, &delivery.outcome.follow_up);
        Ok(delivery)
    }

    /// Asks for the write lease. Two sessions that want it at the same time get it neither: both
    /// store and commit each write.
    async fn acquire_lease(&self, shard: &Rc<Shard>, call: MetaCall, ino: Ino) -> MetaResult {
        let session = call.id.session;
        if self.is_contended(shard, ino) || shard.readers().is_recalled_for_other(ino, session) {
            return self.refuse_lease(shard, session, ino).await;
        }
        let other = shard.acquiring.borrow().get(&ino).is_some_and(|other| *other != session);
        if other {
            return self.refuse_lease(shard, session, ino).await;
        }
        if !planted::is(Bug::MetaShareWriteLease) && self.recall_writer(shard, ino, session).await? {
            let until = self.inner.handle.now() + self.inner.config.shared_mode;
            shard.contended.borrow_mut().insert(ino, until);
            return self.refuse_lease(shard, session, ino).await;
        }
        if shard.readers().is_recalled_for_other(ino, session) || shard.acquiring.borrow().contains_key(&ino) {
            return self.refuse_lease(shard, session, ino).await;
        }
        shard.acquiring.borrow_mut().insert(ino, session);
        let result = self.execute(shard, call).await;
        shard.acquiring.borrow_mut().remove(&ino);
        shard.applied.progress().notify_all();
        result
    }

    fn is_contended(&self, shard: &Shard, ino: Ino) -> bool {
        shard.contended.borrow().get(&ino).is_some_and(|until| *until > self.inner.handle.now())
    }

    async fn refuse_lease(&self, shard: &Rc<Shard>, session: SessionId, ino: Ino) -> MetaResult {
        match self.read(shard, session, &MetaOp::GetAttr { ino }).await? {
            MetaReply::Attr { attr, .. } => Ok(MetaReply::Lease { granted: false, attr, grant: Grant::default() }),
            other => Err(MetaError::Unavailable(format!("unexpected answer to GetAttr: {other:?}"))),
        }
    }

    /// Keeps the table of sessions in step with the state.
    fn note_session(&self, shard: &Shard, call: &MetaCall) {
        let session = call.id.session;
        match call.op {
            MetaOp::OpenSession { .. } => {
                shard.known.borrow_mut().insert(session);
                self.heard_of(session);
            }
            MetaOp::CloseSession => self.forget_session(shard, session),
            _ => {}
        }
    }
}
