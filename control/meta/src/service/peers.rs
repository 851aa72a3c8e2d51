//! What leaders of shards ask of each other: the entries of a transaction that go to its
//! participants, and what a coordinator has to find out in other shards.

use super::MetaService;
use super::call::{BLOCKED_RECHECK, unreadable};
use super::recall::PLAINLY;
use super::shard::Shard;
use crate::state::transaction::TxnStatus;
use crate::state::{self, Action, Answer, LogEntry, Refusal, Reply, TxnId};
use cfs_wire::meta::{FileKind, MetaError, MetaOp, MetaReply, Name};
use cfs_wire::{Errno, Ino, RequestId, SessionId, ShardId, Timestamp};
use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};
use std::rc::Rc;

/// Whom a server reads for when it reads for itself; no client draws it.
const NO_SESSION: SessionId = SessionId(0);

/// Shards of which inodes are counted until others get their turn: each takes a few microseconds here.
const COUNTED_AT_ONCE: u16 = 16;

/// One ([`ShardId`], [`PeerCall`]) in, one `Result<PeerReply, MetaError>` out; between servers.
pub const OP_PEER: u16 = 0x0304;

/// A call to the leader of another shard. All are idempotent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum PeerCall {
    /// `session`: whose request it is; it needs no recall of its own caches.
    Prepare {
        txn: TxnId,
        session: SessionId,
        actions: Vec<Action>,
        now: Timestamp,
    },
    Commit {
        txn: TxnId,
        session: SessionId,
    },
    Abort {
        txn: TxnId,
    },
    Forget {
        txn: TxnId,
    },
    /// What a name stands for.
    Lookup {
        dir: Ino,
        name: Name,
    },
    ParentOf {
        dir: Ino,
    },
    TakeRenameLock {
        holder: RequestId,
        steal: bool,
    },
    ReleaseRenameLock {
        token: u64,
    },
    /// Asked of a coordinator: is it still driving this transaction?
    Status {
        txn: TxnId,
    },
    /// How many inodes of the shard are in use, within the last few entries.
    CountInodes,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum PeerReply {
    Done,
    Prepared(Result<Vec<Answer>, Refusal>),
    Named(Option<(Ino, FileKind)>),
    Parent(Result<Ino, Errno>),
    RenameLock(Option<u64>),
    /// Whether the coordinator has a record of the transaction.
    Known(bool),
    Inodes(u64),
}

/// Reaches the leaders of shards that this node does not lead.
pub trait Peers: 'static {
    fn call(&self, shard: ShardId, call: PeerCall) -> LocalBoxFuture<'_, Result<PeerReply, MetaError>>;
}

/// For a cluster of one node: there is nobody else.
pub struct NoPeers;

impl Peers for NoPeers {
    fn call(&self, shard: ShardId, _call: PeerCall) -> LocalBoxFuture<'_, Result<PeerReply, MetaError>> {
        let error = MetaError::Unavailable(format!("shard {shard} is not on this node, and there is no other"));
        Box::pin(std::future::ready(Err(error)))
    }
}

impl MetaService {
    /// Calls a shard's leader, which may be this node.
    pub(super) async fn ask(&self, shard: ShardId, call: PeerCall) -> Result<PeerReply, MetaError> {
        match self.inner.shards.get(&shard) {
            Some(ours) if self.inner.proposer.leads(shard).is_some() => self.serve_peer(&ours.clone(), call).await,
            _ => self.inner.peers.call(shard, call).await,
        }
    }

    /// Serves another leader. It needs leadership, not that the shard is taken up: taking up a
    /// shard drives its transactions, which ask others.
    pub async fn peer_call(&self, shard: ShardId, call: PeerCall) -> Result<PeerReply, MetaError> {
        let ours = self.shard(shard)?.clone();
        if self.inner.proposer.leads(shard).is_none() {
            return Err(MetaError::NotLeader { hint: self.inner.proposer.hint(shard) });
        }
        self.serve_peer(&ours, call).await
    }

    async fn serve_peer(&self, shard: &Rc<Shard>, call: PeerCall) -> Result<PeerReply, MetaError> {
        match call {
            PeerCall::Prepare { txn, session, actions, now } => {
                self.serve_prepare(shard, txn, session, actions, now).await
            }
            PeerCall::Commit { txn, session } => {
                let delivery = self.propose(shard, &LogEntry::Commit { txn }).await?;
                let recall = shard.prepared.borrow_mut().remove(&txn);
                self.recall_late(shard, session, &delivery.outcome.changes, recall.as_ref()).await;
                Ok(PeerReply::Done)
            }
            PeerCall::Abort { txn } => {
                self.propose(shard, &LogEntry::Abort { txn }).await?;
                shard.prepared.borrow_mut().remove(&txn);
                Ok(PeerReply::Done)
            }
            PeerCall::Forget { txn } => {
                self.propose(shard, &LogEntry::Forget { txn }).await?;
                Ok(PeerReply::Done)
            }
            PeerCall::Lookup { dir, name } => {
                self.inner.proposer.read_barrier(shard.id).await?;
                match self.read_state(shard, NO_SESSION, &MetaOp::Lookup { dir, name }).await? {
                    Ok(MetaReply::Entry(entry)) => Ok(PeerReply::Named(Some((entry.attr.ino, entry.attr.kind)))),
                    Ok(MetaReply::Remote { ino, kind, .. }) => Ok(PeerReply::Named(Some((ino, kind)))),
                    Err(MetaError::Errno(Errno::ENOENT)) => Ok(PeerReply::Named(None)),
                    Err(error) => Err(error),
                    Ok(other) => Err(MetaError::Unavailable(format!("unexpected answer to Lookup: {other:?}"))),
                }
            }
            PeerCall::ParentOf { dir } => {
                self.inner.proposer.read_barrier(shard.id).await?;
                self.serve_parent_of(shard, dir).await
            }
            PeerCall::TakeRenameLock { holder, steal } => {
                match self.propose(shard, &LogEntry::TakeRenameLock { holder, steal }).await?.outcome.reply {
                    Reply::RenameLock { token } => Ok(PeerReply::RenameLock(token)),
                    other => Err(unexpected(&other)),
                }
            }
            PeerCall::ReleaseRenameLock { token } => {
                match self.propose(shard, &LogEntry::ReleaseRenameLock { token }).await?.outcome.reply {
                    Reply::Done => Ok(PeerReply::Done),
                    Reply::Blocked { txn } => {
                        Err(MetaError::Unavailable(format!("transaction {txn} still relies on the rename lock")))
                    }
                    other => Err(unexpected(&other)),
                }
            }
            PeerCall::Status { txn } => self.serve_status(shard, txn).await,
            PeerCall::CountInodes => {
                match self.read_state(shard, NO_SESSION, &MetaOp::StatFs { count_inodes: false }).await?? {
                    MetaReply::StatFs(stat) => Ok(PeerReply::Inodes(stat.inodes_used)),
                    other => Err(MetaError::Unavailable(format!("unexpected answer to StatFs: {other:?}"))),
                }
            }
        }
    }

    /// The inodes in use in all shards but this one, each asked where it is led.
    pub(super) async fn inodes_elsewhere(&self, shard: &Shard) -> Result<u64, MetaError> {
        let shards = state::shard_count(&*shard.view(), shard.id).await.map_err(unreadable)?;
        let mut inodes = 0u64;
        for other in (0..shards).map(ShardId).filter(|other| *other != shard.id) {
            if other.0.is_multiple_of(COUNTED_AT_ONCE) {
                self.inner.handle.yield_now().await;
            }
            match self.ask(other, PeerCall::CountInodes).await? {
                PeerReply::Inodes(used) => inodes = inodes.saturating_add(used),
                other => return Err(MetaError::Unavailable(format!("unexpected answer to CountInodes: {other:?}"))),
            }
        }
        Ok(inodes)
    }

    /// Recalls what the actions change, then checks and locks it. The recall lasts until the
    /// transaction has ended here.
    async fn serve_prepare(
        &self,
        shard: &Rc<Shard>,
        txn: TxnId,
        session: SessionId,
        actions: Vec<Action>,
        now: Timestamp,
    ) -> Result<PeerReply, MetaError> {
        let recall = match shard.is_alone(session) {
            true => None,
            false => Some(self.recall(shard, session, changed_by(&actions), PLAINLY).await?),
        };
        let delivery = self.propose(shard, &LogEntry::Prepare { txn, actions, now }).await?;
        let Reply::Prepared(answer) = delivery.outcome.reply else { return Err(unexpected(&delivery.outcome.reply)) };
        if let (Ok(_), Some(recall)) = (&answer, recall) {
            shard.prepared.borrow_mut().insert(txn, recall);
        }
        Ok(PeerReply::Prepared(answer))
    }

    async fn serve_parent_of(&self, shard: &Shard, dir: Ino) -> Result<PeerReply, MetaError> {
        loop {
            let unblocked = shard.applied.unblocked().notified();
            match state::parent_of(&*shard.view(), shard.id, dir).await.map_err(unreadable)? {
                Ok(parent) => return Ok(PeerReply::Parent(parent.ok_or(Errno::ENOENT))),
                Err(_prepared) => {
                    let _ = self.inner.handle.timeout(BLOCKED_RECHECK, unblocked).await;
                }
            }
        }
    }

    async fn serve_status(&self, shard: &Shard, txn: TxnId) -> Result<PeerReply, MetaError> {
        self.inner.proposer.read_barrier(shard.id).await?;
        let status = state::transaction_status(&*shard.view(), shard.id, txn).await.map_err(unreadable)?;
        Ok(PeerReply::Known(status != TxnStatus::Unknown))
    }
}

/// The inodes that a transaction's part changes.
fn changed_by(actions: &[Action]) -> Vec<Ino> {
    let mut inos = Vec::new();
    for action in actions {
        match action {
            Action::Insert { dir, replaces, .. } => {
                inos.push(*dir);
                inos.extend(replaces.map(|(ino, _)| ino));
            }
            Action::Remove { dir, ino, .. } => inos.extend([*dir, *ino]),
            Action::AddLink { ino, .. } | Action::DropLink { ino, .. } | Action::Moved { ino, .. } => inos.push(*ino),
            Action::MakeDir { .. } | Action::HoldRenameLock { .. } => {}
        }
    }
    inos
}

pub(super) fn unexpected(reply: &Reply) -> MetaError {
    MetaError::Unavailable(format!("unexpected outcome of an entry: {reply:?}"))
}
