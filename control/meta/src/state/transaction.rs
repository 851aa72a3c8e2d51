//! Two-phase commit between shards (section 8 of the design, "cross-shard").
//!
//! The source directory's shard coordinates. Every step is a log entry, and the records it
//! leaves are all that recovery needs:
//!
//! ```text
//! coordinator  Client → record (undecided), own keys locked     Decide → effects, reply, record
//! participant            Prepare → record, keys locked            Commit → effects   Forget
//! ```
//!
//! An undecided transaction may be aborted by any new leader of the coordinator; a decided one
//! must be driven on. A participant that hears nothing asks the coordinator: no record there
//! means abort. The coordinator forgets first, so a late repeat of `Prepare` finds no record
//! and is aborted; until then the participant's own record answers repeats.

use super::action::Checked;
use super::entry::{Action, Answer, FollowUp, LogEntry, Refusal, Reply, Transaction, TxnId, Verdict};
use super::namespace::reply_of;
use super::records::{Lead, TxnRecord};
use super::view::{Attempt, Fail, View};
use super::{StateError, keys};
use cfs_wire::meta::{MetaCall, MetaError, MetaResult};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{ShardId, Timestamp};
use std::collections::BTreeMap;

/// What a coordinator knows of a transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TxnStatus {
    /// Wait, or let the coordinator's driver go on.
    Undecided,
    Committed,
    /// Aborted, or forgotten after every participant had acknowledged: a participant that is
    /// still prepared aborts, one that has committed forgets.
    Unknown,
}

/// A transaction found in a shard's state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TxnState {
    /// This shard coordinates it: go on with [`Driver::resume`].
    Coordinating { transaction: Transaction, decided: bool },
    /// This shard takes part: ask the coordinator what became of it.
    Participating { txn: TxnId, committed: bool },
}

impl TxnRecord {
    pub(crate) fn state(self, txn: TxnId) -> TxnState {
        match self.lead {
            Some(lead) => {
                let transaction = Transaction { id: txn, request: lead.call.id, participants: lead.participants };
                TxnState::Coordinating { transaction, decided: self.decided }
            }
            None => TxnState::Participating { txn, committed: self.decided },
        }
    }
}

impl View<'_> {
    async fn txn(&self, txn: TxnId) -> Result<Option<TxnRecord>, StateError> {
        self.get(&keys::transaction(self.shard, txn)).await
    }

    fn put_txn(&mut self, txn: TxnId, record: &TxnRecord) {
        self.put(keys::transaction(self.shard, txn), record);
    }

    /// Checks this shard's actions, locks their keys and records them.
    async fn hold(&mut self, txn: TxnId, mut actions: Vec<Action>, lead: Option<Lead>) -> Attempt<Vec<Answer>> {
        let (mut answers, mut locks) = (Vec::new(), Vec::new());
        for action in &mut actions {
            let Checked { answer, lock } = self.check(action).await?;
            answers.push(answer);
            locks.push(lock);
        }
        if planted::is(Bug::MetaPrepareWithoutLocks) {
            locks.clear();
        }
        for lock in &locks {
            self.put(lock.clone(), &txn);
        }
        self.counters.prepared += 1;
        self.put_txn(txn, &TxnRecord { actions, answers: answers.clone(), locks, decided: false, lead });
        Ok(answers)
    }

    fn unhold(&mut self, txn: TxnId, record: &TxnRecord) {
        for lock in &record.locks {
            self.delete(lock.clone());
        }
        self.counters.prepared = self.counters.prepared.saturating_sub(1);
        self.follow_up.push(FollowUp::Unblocked { txn });
    }

    /// Begins a transaction as its coordinator.
    pub(crate) async fn begin(&mut self, call: &MetaCall, plan: Vec<(ShardId, Action)>) -> Attempt<TxnId> {
        self.counters.next_txn += 1;
        let txn = TxnId { coordinator: self.shard, number: self.counters.next_txn };
        let mut parts: BTreeMap<ShardId, Vec<Action>> = BTreeMap::new();
        for (shard, action) in plan {
            parts.entry(shard).or_default().push(action);
        }
        let own = parts.remove(&self.shard).unwrap_or_default();
        let participants: Vec<_> = parts.into_iter().collect();
        let lead = Lead { call: call.clone(), participants: participants.clone() };
        self.hold(txn, own, Some(lead)).await?;
        self.put(keys::request_txn(self.shard, call.id), &txn);
        self.follow_up.push(FollowUp::Drive(Transaction { id: txn, request: call.id, participants }));
        Ok(txn)
    }

    pub(crate) async fn prepare(&mut self, txn: TxnId, actions: &[Action]) -> Result<Reply, StateError> {
        if let Some(record) = self.txn(txn).await? {
            return Ok(Reply::Prepared(Ok(record.answers)));
        }
        let mark = self.mark();
        let refusal = match self.hold(txn, actions.to_vec(), None).await {
            Ok(answers) => return Ok(Reply::Prepared(Ok(answers))),
            Err(Fail::Storage(error)) => return Err(error),
            Err(Fail::Refused(MetaError::Errno(errno))) => Refusal::Errno(errno),
            Err(_) => Refusal::Retry,
        };
        self.back_to(mark);
        Ok(Reply::Prepared(Err(refusal)))
    }

    pub(crate) async fn decide(&mut self, txn: TxnId, verdict: &Verdict) -> Attempt<Reply> {
        let undone = Reply::Decided { committed: false, client: None };
        let Some(mut record) = self.txn(txn).await? else {
            return Ok(undone);
        };
        let Some(lead) = record.lead.clone() else {
            return Ok(undone);
        };
        let id = lead.call.id;
        if record.decided {
            return Ok(Reply::Decided { committed: true, client: self.stored_reply(id).await? });
        }
        self.unhold(txn, &record);
        self.delete(keys::request_txn(self.shard, id));
        // A session fenced since it began must not have an effect any more.
        let mut session = match self.active_session(id.session).await {
            Ok(session) => session,
            Err(Fail::Refused(error)) => {
                self.delete(keys::transaction(self.shard, txn));
                return Ok(Reply::Decided { committed: false, client: Some(Err(error)) });
            }
            Err(other) => return Err(other),
        };
        let client: Option<MetaResult> = match verdict {
            Verdict::Commit { answers } => {
                let mut all = record.answers.clone();
                all.extend(answers.iter().flat_map(|(_, answers)| answers.iter().cloned()));
                if !planted::is(Bug::MetaDecideWithoutEffects) {
                    for action in &record.actions {
                        self.carry_out(action, &all).await?;
                    }
                }
                record.decided = true;
                record.locks.clear();
                self.put_txn(txn, &record);
                Some(Ok(reply_of(&lead.call.op, &all)))
            }
            Verdict::Refuse(errno) => Some(Err(MetaError::Errno(*errno))),
            Verdict::Retry => None,
        };
        if !record.decided || planted::is(Bug::MetaForgetDecisionEarly) {
            self.delete(keys::transaction(self.shard, txn));
        }
        if let Some(result) = &client {
            self.store_reply(id, result, &mut session);
            self.put_session(id.session, &session);
        }
        Ok(Reply::Decided { committed: record.decided, client })
    }

    pub(crate) async fn commit_prepared(&mut self, txn: TxnId) -> Attempt<()> {
        let Some(mut record) = self.txn(txn).await?.filter(|record| !record.decided && record.lead.is_none()) else {
            return Ok(());
        };
        self.unhold(txn, &record);
        if !planted::is(Bug::MetaCommitWithoutEffects) {
            for action in &record.actions {
                self.carry_out(action, &record.answers).await?;
            }
        }
        record.decided = true;
        record.locks.clear();
        self.put_txn(txn, &record);
        Ok(())
    }

    pub(crate) async fn abort_prepared(&mut self, txn: TxnId) -> Attempt<()> {
        let prepared = self.txn(txn).await?.filter(|record| !record.decided && record.lead.is_none());
        if let Some(record) = prepared {
            self.unhold(txn, &record);
            self.delete(keys::transaction(self.shard, txn));
        }
        Ok(())
    }

    pub(crate) async fn forget(&mut self, txn: TxnId) -> Attempt<()> {
        if self.txn(txn).await?.is_some_and(|record| record.decided) {
            self.delete(keys::transaction(self.shard, txn));
        }
        Ok(())
    }
}

#[derive(Clone, PartialEq, Debug)]
enum Stage {
    /// The participant to prepare next.
    Prepare(usize),
    Decide(Verdict),
    /// The participant to tell next.
    Tell {
        commit: bool,
        next: usize,
    },
    /// 0: the coordinator; then the participants.
    Forget(usize),
    Over,
}

/// Drives one transaction: says which entry to propose where, and learns from the reply. It
/// keeps nothing that the shards don't know, so it may be dropped at any point and made anew.
#[derive(Clone, PartialEq, Debug)]
pub struct Driver {
    transaction: Transaction,
    stage: Stage,
    answers: Vec<(ShardId, Vec<Answer>)>,
    outcome: Option<Option<MetaResult>>,
}

impl Driver {
    /// For a transaction that has just begun.
    pub fn new(transaction: Transaction) -> Driver {
        let mut driver = Driver { transaction, stage: Stage::Prepare(0), answers: Vec::new(), outcome: None };
        driver.skip_finished();
        driver
    }

    /// For one found in the coordinator's state by a new leader: undecided ones are aborted
    /// (the client repeats its request), decided ones carried through.
    pub fn resume(transaction: Transaction, decided: bool) -> Driver {
        let commit = !planted::is(Bug::MetaAbortDecided);
        let stage = if decided { Stage::Tell { commit, next: 0 } } else { Stage::Decide(Verdict::Retry) };
        let mut driver = Driver { transaction, stage, answers: Vec::new(), outcome: None };
        driver.skip_finished();
        driver
    }

    pub fn id(&self) -> TxnId {
        self.transaction.id
    }

    pub fn request(&self) -> cfs_wire::RequestId {
        self.transaction.request
    }

    /// The next entry and the shard to propose it in; `None` when the transaction is over. Asks
    /// for the same again until [`Driver::on_reply`]: every entry may be proposed twice.
    pub fn next(&self, now: Timestamp) -> Option<(ShardId, LogEntry)> {
        let txn = self.transaction.id;
        let participant = |at: usize| self.transaction.participants.get(at);
        match &self.stage {
            Stage::Prepare(at) => participant(*at)
                .map(|(shard, actions)| (*shard, LogEntry::Prepare { txn, actions: actions.clone(), now })),
            Stage::Decide(verdict) => Some((txn.coordinator, LogEntry::Decide { txn, verdict: verdict.clone(), now })),
            Stage::Tell { commit, next } => participant(*next)
                .map(|(shard, _)| (*shard, if *commit { LogEntry::Commit { txn } } else { LogEntry::Abort { txn } })),
            Stage::Forget(0) => Some((txn.coordinator, LogEntry::Forget { txn })),
            Stage::Forget(at) => participant(at - 1).map(|(shard, _)| (*shard, LogEntry::Forget { txn })),
            Stage::Over => None,
        }
    }

    /// Takes the reply to the entry [`Driver::next`] gave.
    pub fn on_reply(&mut self, reply: &Reply) {
        match (&self.stage, reply) {
            (Stage::Prepare(at), Reply::Prepared(Ok(answers))) => {
                if let Some((shard, _)) = self.transaction.participants.get(*at) {
                    self.answers.push((*shard, answers.clone()));
                }
                self.stage = Stage::Prepare(at + 1);
            }
            (Stage::Prepare(_), Reply::Prepared(Err(Refusal::Errno(errno)))) => {
                self.stage = Stage::Decide(Verdict::Refuse(*errno));
            }
            (Stage::Prepare(_), Reply::Prepared(Err(Refusal::Retry))) => {
                self.stage = Stage::Decide(Verdict::Retry);
            }
            (Stage::Decide(_), Reply::Decided { committed, client }) => {
                self.outcome = Some(client.clone());
                self.stage = Stage::Tell { commit: *committed, next: 0 };
            }
            (Stage::Tell { commit, next }, Reply::Done) => {
                self.stage = Stage::Tell { commit: *commit, next: next + 1 };
            }
            (Stage::Forget(at), Reply::Done) => self.stage = Stage::Forget(at + 1),
            // Not an answer to what was proposed: propose it again.
            _ => {}
        }
        self.skip_finished();
    }

    /// The client's reply once decided: `Some(None)` when the operation is to be run anew.
    pub fn outcome(&self) -> Option<&Option<MetaResult>> {
        self.outcome.as_ref()
    }

    pub fn is_over(&self) -> bool {
        self.stage == Stage::Over
    }

    fn skip_finished(&mut self) {
        let count = self.transaction.participants.len();
        match self.stage {
            Stage::Prepare(at) if at >= count => {
                self.stage = Stage::Decide(Verdict::Commit { answers: self.answers.clone() });
            }
            Stage::Tell { commit, next } if next >= count => {
                self.stage = if commit { Stage::Forget(0) } else { Stage::Over };
            }
            Stage::Forget(at) if at > count => self.stage = Stage::Over,
            _ => {}
        }
    }
}
