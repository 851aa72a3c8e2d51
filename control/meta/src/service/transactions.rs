//! Driving what spans shards: two-phase commit, and the rename lock of a volume.
//!
//! [`Driver`](crate::state::transaction::Driver) says what comes next; this file carries it
//! there. A call is answered once the decision is applied in every shard, so that whoever
//! reads afterwards, anywhere, sees all of it. Whatever a crash leaves is finished by the next
//! leader of the coordinating shard before it serves clients.

use super::MetaService;
use super::applied::Delivery;
use super::call::{BLOCKED_RECHECK, unreadable};
use super::peers::{PeerCall, PeerReply};
use super::shard::Shard;
use crate::state::entry::AncestorWalk;
use crate::state::transaction::{Driver, TxnState};
use crate::state::{self, Action, FollowUp, LogEntry, Refusal, Reply, TxnId};
use cfs_reactor::Handle;
use cfs_reactor::sync::Permit;
use cfs_wire::meta::{FileKind, MetaError, MetaResult, Name};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino, RequestId, SessionId, ShardId};
use std::rc::Rc;
use std::time::Duration;

/// Times a participant is asked before an undecided transaction is given up.
const PREPARE_ATTEMPTS_MAX: u32 = 8;
/// No directory is deeper: a walk that goes on for longer has met a cycle.
const ANCESTORS_MAX: usize = 1 << 20;

/// Which transactions to bring to an end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Those of an earlier leader.
    All,
    /// Those whose driver may still be at work, to which another driver does no harm.
    Decided,
}

/// How a transaction ended for the call that began it.
pub(super) enum Conclusion {
    Answered(MetaResult, Box<Delivery>),
    /// It was in conflict with another and left no trace.
    Again,
}

/// The volume's rename lock, held.
pub(super) struct RenameLock {
    pub token: u64,
    _turn: Permit,
}

/// Waits of random length, doubling at most up to [`Backoff::MILLIS_MAX`].
#[derive(Default)]
pub(super) struct Backoff {
    attempt: u32,
}

impl Backoff {
    /// Longer than any transaction between live nodes takes.
    const MILLIS_MAX: u64 = 128;

    /// Whether it was waited so often that bad luck is no explanation any more.
    pub fn is_hopeful(&self) -> bool {
        self.attempt < 16
    }

    pub async fn wait(&mut self, handle: &Handle) {
        let bound = (1u64 << self.attempt.min(10)).min(Self::MILLIS_MAX);
        self.attempt += 1;
        let micros = handle.random_u64() % (bound * 1000);
        handle.sleep(Duration::from_micros(micros)).await;
    }
}

impl MetaService {
    /// Drives the transaction that a call has just begun. `lenient`: an inode that a participant
    /// misses means that what the leader had looked up is out of date, and is looked up again.
    pub(super) async fn drive_begun(
        &self,
        shard: &Rc<Shard>,
        txn: TxnId,
        session: SessionId,
        begun: &Delivery,
        lenient: bool,
    ) -> Result<Conclusion, MetaError> {
        let drive = begun.outcome.follow_up.iter().find_map(|next| match next {
            FollowUp::Drive(transaction) if transaction.id == txn => Some(transaction.clone()),
            _ => None,
        });
        let Some(transaction) = drive else {
            // Begun earlier by the same request, and driven by whoever took the shard up.
            let unblocked = shard.applied.unblocked().notified();
            let _ = self.inner.handle.timeout(BLOCKED_RECHECK, unblocked).await;
            return Ok(Conclusion::Again);
        };
        let (client, delivery) = self.drive(shard, Driver::new(transaction), session, lenient).await?;
        match (client, delivery) {
            (Some(result), Some(delivery)) => Ok(Conclusion::Answered(result, Box::new(delivery))),
            _ => Ok(Conclusion::Again),
        }
    }

    /// Drives a transaction until its outcome is applied everywhere; forgetting goes on behind.
    async fn drive(
        &self,
        shard: &Rc<Shard>,
        mut driver: Driver,
        session: SessionId,
        lenient: bool,
    ) -> Result<(Option<MetaResult>, Option<Delivery>), MetaError> {
        let mut decided = None;
        let mut attempts = 0;
        let mut backoff = Backoff::default();
        while let Some((target, entry)) = driver.next(self.inner.handle.wall()) {
            if matches!(entry, LogEntry::Forget { .. }) {
                break;
            }
            if target == shard.id {
                let delivery = self.propose(shard, &entry).await?;
                driver.on_reply(&delivery.outcome.reply);
                if matches!(delivery.outcome.reply, Reply::Decided { .. }) {
                    decided = Some(delivery);
                }
                continue;
            }
            let preparing = matches!(entry, LogEntry::Prepare { .. });
            let may_miss = lenient && !names_inode_itself(&entry);
            match self.tell(target, entry, session).await {
                Ok(Reply::Prepared(Err(Refusal::Errno(Errno::ESTALE)))) if may_miss => {
                    driver.on_reply(&Reply::Prepared(Err(Refusal::Retry)));
                }
                Ok(reply) => driver.on_reply(&reply),
                Err(error) => {
                    attempts += 1;
                    if preparing && attempts > PREPARE_ATTEMPTS_MAX {
                        self.give_up(shard, &driver, session);
                        return Err(error);
                    }
                    if self.inner.proposer.leads(shard.id).is_none() {
                        if matches!(driver.outcome(), Some(Some(_))) {
                            // It is carried out, by whoever leads now: not to be done again.
                            return Err(MetaError::Unavailable("the change is decided and under way".to_owned()));
                        }
                        return Err(MetaError::NotLeader { hint: self.inner.proposer.hint(shard.id) });
                    }
                    backoff.wait(&self.inner.handle).await;
                }
            }
        }
        let client = driver.outcome().cloned().flatten();
        self.forget(shard, driver, session);
        Ok((client, decided))
    }

    /// Carries a driver's entry to another shard.
    async fn tell(&self, target: ShardId, entry: LogEntry, session: SessionId) -> Result<Reply, MetaError> {
        let call = match entry {
            LogEntry::Prepare { txn, actions, now } => PeerCall::Prepare { txn, session, actions, now },
            LogEntry::Commit { txn } => PeerCall::Commit { txn, session },
            LogEntry::Abort { txn } => PeerCall::Abort { txn },
            LogEntry::Forget { txn } => PeerCall::Forget { txn },
            other => return Err(MetaError::Malformed(format!("a driver's entry for another shard: {other:?}"))),
        };
        match self.ask(target, call).await? {
            PeerReply::Prepared(answer) => Ok(Reply::Prepared(answer)),
            PeerReply::Done => Ok(Reply::Done),
            other => Err(MetaError::Unavailable(format!("unexpected answer of shard {target}: {other:?}"))),
        }
    }

    /// Forgets a finished transaction, in the background: nobody waits for it.
    fn forget(&self, shard: &Rc<Shard>, mut driver: Driver, session: SessionId) {
        let (service, shard) = (self.clone(), shard.clone());
        self.inner.handle.spawn(async move {
            while let Some((target, entry)) = driver.next(service.inner.handle.wall()) {
                let reply = match target == shard.id {
                    true => service.propose(&shard, &entry).await.map(|delivery| delivery.outcome.reply),
                    false => service.tell(target, entry, session).await,
                };
                // What is left is found again by the sweep.
                let Ok(reply) = reply else { return };
                driver.on_reply(&reply);
            }
        });
    }

    /// Aborts an undecided transaction, in the background: a participant can't be reached.
    fn give_up(&self, shard: &Rc<Shard>, driver: &Driver, session: SessionId) {
        let txn = driver.id();
        let (service, shard) = (self.clone(), shard.clone());
        self.inner.handle.spawn(async move {
            if let Err(error) = service.finish(&shard, txn, session).await {
                tracing::warn!(%txn, %error, "an abandoned transaction waits for the next leader");
            }
        });
    }

    async fn finish(&self, shard: &Rc<Shard>, txn: TxnId, session: SessionId) -> Result<(), MetaError> {
        for found in self.transactions(shard).await? {
            if let TxnState::Coordinating { transaction, decided } = found
                && transaction.id == txn
            {
                self.drive(shard, Driver::resume(transaction, decided), session, false).await?;
            }
        }
        Ok(())
    }

    async fn transactions(&self, shard: &Shard) -> Result<Vec<TxnState>, MetaError> {
        state::list_transactions(&*shard.view(), shard.id).await.map_err(unreadable)
    }

    /// Brings transactions that this shard coordinates to their end: decided ones are carried
    /// through, undecided ones aborted (the client repeats its request).
    pub(super) async fn finish_transactions(&self, shard: &Rc<Shard>, left: Left) -> Result<(), MetaError> {
        for found in self.transactions(shard).await? {
            if let TxnState::Coordinating { transaction, decided } = found
                && (decided || left == Left::All)
            {
                let session = transaction.request.session;
                self.drive(shard, Driver::resume(transaction, decided), session, false).await?;
            }
        }
        Ok(())
    }

    /// Asks coordinators what became of the transactions that this shard still takes part in.
    pub(super) async fn resolve_participations(&self, shard: &Rc<Shard>) -> Result<(), MetaError> {
        for found in self.transactions(shard).await? {
            let TxnState::Participating { txn, committed } = found else { continue };
            let PeerReply::Known(false) = self.ask(txn.coordinator, PeerCall::Status { txn }).await? else {
                continue;
            };
            let entry = if committed { LogEntry::Forget { txn } } else { LogEntry::Abort { txn } };
            self.propose(shard, &entry).await?;
            shard.prepared.borrow_mut().remove(&txn);
        }
        Ok(())
    }

    /// What a name of any shard stands for.
    pub(super) async fn lookup_anywhere(&self, dir: Ino, name: Name) -> Result<Option<(Ino, FileKind)>, MetaError> {
        match self.ask(dir.shard(), PeerCall::Lookup { dir, name }).await? {
            PeerReply::Named(named) => Ok(named),
            other => Err(MetaError::Unavailable(format!("unexpected answer to a look-up: {other:?}"))),
        }
    }

    /// Takes the volume's rename lock for a request, or makes sure that it still has it.
    pub(super) async fn take_rename_lock(
        &self,
        holder: RequestId,
        held: Option<RenameLock>,
    ) -> Result<RenameLock, MetaError> {
        let turn = match held {
            Some(RenameLock { _turn: turn, .. }) => turn,
            None => self.inner.rename_turn.acquire(1).await,
        };
        let started = self.inner.handle.now();
        let mut backoff = Backoff::default();
        loop {
            // Whoever holds it is not of this node, or no longer runs.
            let steal = self.inner.handle.now().saturating_since(started) > self.inner.config.rename_lock_max;
            match self.ask(Ino::ROOT.shard(), PeerCall::TakeRenameLock { holder, steal }).await? {
                PeerReply::RenameLock(Some(token)) => return Ok(RenameLock { token, _turn: turn }),
                PeerReply::RenameLock(None) => backoff.wait(&self.inner.handle).await,
                other => return Err(MetaError::Unavailable(format!("unexpected answer: {other:?}"))),
            }
        }
    }

    pub(super) async fn release_rename_lock(&self, lock: RenameLock) {
        let release = PeerCall::ReleaseRenameLock { token: lock.token };
        if let Err(error) = self.ask(Ino::ROOT.shard(), release).await {
            // The next one waits for `rename_lock_max` and takes it over.
            tracing::warn!(%error, "the rename lock could not be released");
        }
    }

    /// Walks up from each directory; the errno of the first walk that meets what it must avoid.
    pub(super) async fn walk(&self, walks: &[AncestorWalk]) -> Result<Option<Errno>, MetaError> {
        if planted::is(Bug::MetaSkipAncestors) {
            return Ok(None);
        }
        for walk in walks {
            let mut at = walk.from;
            let mut steps = 0;
            loop {
                if at == walk.avoid {
                    return Ok(Some(walk.errno));
                }
                steps += 1;
                if steps > ANCESTORS_MAX {
                    return Ok(Some(Errno::ELOOP));
                }
                let parent = match self.ask(at.shard(), PeerCall::ParentOf { dir: at }).await? {
                    PeerReply::Parent(Ok(parent)) => parent,
                    PeerReply::Parent(Err(errno)) => return Ok(Some(errno)),
                    other => return Err(MetaError::Unavailable(format!("unexpected answer: {other:?}"))),
                };
                if parent == at {
                    break;
                }
                at = parent;
            }
        }
        Ok(None)
    }
}

/// Whether the client itself said which inode a part is about: then a missing one is an answer.
fn names_inode_itself(entry: &LogEntry) -> bool {
    match entry {
        LogEntry::Prepare { actions, .. } => actions.iter().any(|action| matches!(action, Action::AddLink { .. })),
        _ => false,
    }
}
