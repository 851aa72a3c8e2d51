//! Operations that change nothing, and what the service reads for itself.

use super::apply::session_fenced;
use super::directory::check_name;
use super::entry::{ReadReply, ShardReadReply, TxnId};
use super::records::{Inode, LeaseRecord, SessionRecord, TxnRecord, decode};
use super::transaction::{TxnState, TxnStatus};
use super::view::{Attempt, Fail, View, bad_key};
use super::{Reader, StateError, keys};
use cfs_wire::limits::INLINE_BYTES_MAX;
use cfs_wire::meta::{
    Entry, ExtentsReply, FileKind, Grant, MetaError, MetaOp, MetaReply, MetaResult, Renewal, ShardOp, StatFs,
};
use cfs_wire::{Errno, Ino, SessionId, ShardId};
use std::collections::{BTreeMap, BTreeSet};

/// Answers a read. Grants come out empty but for `write`, space figures 0: they are the
/// service's to fill in.
pub async fn read(
    reader: &dyn Reader,
    shard: ShardId,
    session: SessionId,
    op: &MetaOp,
) -> Result<ReadReply, StateError> {
    let view = View::open(reader, shard).await?;
    let result = match answer(&view, session, op).await {
        Ok(reply) => Ok(reply),
        Err(Fail::Storage(error)) => return Err(error),
        Err(Fail::Blocked(txn)) => return Ok(ReadReply::Blocked { txn }),
        Err(Fail::Refused(error)) => Err(error),
        Err(Fail::Changed | Fail::Need(_)) => Err(MetaError::Malformed("not a read".to_owned())),
    };
    Ok(ReadReply::Meta(result))
}

async fn answer(view: &View<'_>, session: SessionId, op: &MetaOp) -> MetaAttempt {
    if op.home().is_some_and(|ino| ino.shard() != view.shard) {
        return Err(MetaError::Malformed("the inode lives in another shard".to_owned()).into());
    }
    Ok(match op {
        MetaOp::Lookup { dir, name } => lookup(view, session, *dir, name).await?,
        MetaOp::GetAttr { ino } => {
            let attr = view.inode(*ino).await?.attr(view.config.policy);
            MetaReply::Attr { attr, grant: grant(view, session, *ino).await? }
        }
        MetaOp::ReadLink { ino } => {
            let inode = view.inode(*ino).await?;
            if inode.kind != FileKind::Symlink {
                return Err(Errno::EINVAL.into());
            }
            MetaReply::Target(inode.inline)
        }
        MetaOp::ReadDir { dir, after, entries_max, with_attrs } => {
            list(view, *dir, *after, *entries_max, *with_attrs).await?
        }
        MetaOp::GetXattr { ino, name } => MetaReply::Value(view.get_xattr(*ino, name).await?),
        MetaOp::ListXattr { ino } => MetaReply::Names(view.list_xattrs(*ino).await?),
        MetaOp::GetExtents { ino, offset, length, extents_max } => {
            let inode = view.inode(*ino).await?;
            if inode.kind != FileKind::File {
                return Err(Errno::EINVAL.into());
            }
            let (extents, covered) = view.describe(&inode, *offset, *length, *extents_max).await?;
            let grant = grant(view, session, *ino).await?;
            let attr = inode.attr(view.config.policy);
            MetaReply::Extents(ExtentsReply { attr, grant, inline: inline(inode), extents, covered })
        }
        MetaOp::StatFs { .. } => MetaReply::StatFs(StatFs { inodes_used: view.counters.inodes, ..StatFs::default() }),
        MetaOp::TestLock { ino, lock } => view.test_lock(session, *ino, lock).await?,
        MetaOp::Renew { inos } => {
            let mut renewals = Vec::with_capacity(inos.len());
            for ino in inos {
                renewals.push(renewal(view, session, *ino).await?);
            }
            MetaReply::Renewed(renewals)
        }
        _ => return Err(MetaError::Malformed("not a read".to_owned()).into()),
    })
}

type MetaAttempt = Attempt<MetaReply>;

async fn grant(view: &View<'_>, session: SessionId, ino: Ino) -> Attempt<Grant> {
    let lease: Option<LeaseRecord> = view.get(&keys::lease(view.shard, ino)).await?;
    Ok(Grant { read_ms: 0, write: lease.is_some_and(|lease| lease.session == session) })
}

/// The version of an inode that a read lease may be given on.
async fn renewal(view: &View<'_>, session: SessionId, ino: Ino) -> Attempt<Renewal> {
    if ino.shard() != view.shard {
        return Err(MetaError::Malformed("the inodes live in different shards".to_owned()).into());
    }
    let lease: Option<LeaseRecord> = view.get(&keys::lease(view.shard, ino)).await?;
    let version = match view.inode(ino).await {
        Ok(inode) if lease.is_none_or(|lease| lease.session == session) => inode.version,
        Ok(_) | Err(Fail::Refused(_) | Fail::Blocked(_)) => 0,
        Err(other) => return Err(other),
    };
    Ok(Renewal { version, grant: Grant::default() })
}

/// The inline bytes as a client sees them: the whole content of a file that has no extents and
/// is small enough, else whatever head there is.
fn inline(mut inode: Inode) -> Option<Vec<u8>> {
    if inode.mapped == 0 && inode.size <= INLINE_BYTES_MAX as u64 {
        inode.inline.resize(inode.size as usize, 0);
        return Some(inode.inline);
    }
    (!inode.inline.is_empty()).then_some(inode.inline)
}

async fn lookup(view: &View<'_>, session: SessionId, dir: Ino, name: &[u8]) -> MetaAttempt {
    check_name(name)?;
    let directory = view.directory(dir).await?;
    let found = match name {
        b"." => Some((dir, FileKind::Directory)),
        b".." => directory.parent.map(|parent| (parent, FileKind::Directory)),
        _ => view.lookup(dir, name).await?.map(|found| (found.ino, found.kind)),
    };
    let (ino, kind) = found.ok_or(Errno::ENOENT)?;
    if ino.shard() != view.shard {
        return Ok(MetaReply::Remote { ino, kind, dir_grant: Grant::default() });
    }
    let attr = view.inode(ino).await?.attr(view.config.policy);
    Ok(MetaReply::Entry(Entry { attr, grant: grant(view, session, ino).await?, dir_grant: Grant::default() }))
}

async fn list(view: &View<'_>, dir: Ino, after: u64, entries_max: u32, with_attrs: bool) -> MetaAttempt {
    let inode = view.inode(dir).await?;
    if !inode.is_dir() {
        return Err(Errno::ENOTDIR.into());
    }
    view.names_unlocked(dir).await?;
    let (entries, end) = view.list(&inode, after, entries_max, with_attrs).await?;
    Ok(MetaReply::Entries { entries, end, parent: inode.parent.unwrap_or(dir), grant: Grant::default() })
}

/// Answers an operation of servers and movers that changes nothing; `None` for those that must
/// go through the log.
pub async fn read_shard(reader: &dyn Reader, shard: ShardId, op: &ShardOp) -> Result<ShardReadReply, StateError> {
    View::open(reader, shard).await?.shard_read(op).await
}

/// How many shards the file system has.
pub async fn shard_count(reader: &dyn Reader, shard: ShardId) -> Result<u16, StateError> {
    Ok(View::open(reader, shard).await?.config.shards)
}

/// A directory's parent, for the walk under the rename lock. `None` in the inner result: there
/// is no such directory any more.
pub async fn parent_of(
    reader: &dyn Reader,
    shard: ShardId,
    dir: Ino,
) -> Result<Result<Option<Ino>, TxnId>, StateError> {
    let view = View::open(reader, shard).await?;
    match view.directory(dir).await {
        Ok(inode) => Ok(Ok(inode.parent)),
        Err(Fail::Blocked(txn)) => Ok(Err(txn)),
        Err(Fail::Storage(error)) => Err(error),
        Err(_) => Ok(Ok(None)),
    }
}

/// What this shard, as coordinator, knows of a transaction.
pub async fn transaction_status(reader: &dyn Reader, shard: ShardId, txn: TxnId) -> Result<TxnStatus, StateError> {
    let view = View::open(reader, shard).await?;
    let record: Option<TxnRecord> = view.get(&keys::transaction(shard, txn)).await?;
    Ok(match record {
        Some(record) if record.decided => TxnStatus::Committed,
        Some(_) => TxnStatus::Undecided,
        None => TxnStatus::Unknown,
    })
}

/// Every transaction the shard has a record of: what a new leader goes on with.
pub async fn list_transactions(reader: &dyn Reader, shard: ShardId) -> Result<Vec<TxnState>, StateError> {
    let view = View::open(reader, shard).await?;
    let mut list = Vec::new();
    for (key, value) in view.scan_all(&keys::table(shard, keys::TRANSACTION)).await? {
        let coordinator = key.get(keys::FIELDS..keys::FIELDS + 2).and_then(|bytes| bytes.try_into().ok());
        let coordinator = ShardId(u16::from_be_bytes(coordinator.ok_or_else(|| bad_key(&key))?));
        let number = keys::u64_at(&key, keys::FIELDS + 2).ok_or_else(|| bad_key(&key))?;
        list.push(decode::<TxnRecord>(&key, &value)?.state(TxnId { coordinator, number }));
    }
    Ok(list)
}

/// Inodes after one that have extents to be released or a last close to wait for: orphans, with
/// whether they are held open, and truncated files. Those that are not held want reaping.
pub async fn list_orphans(
    reader: &dyn Reader,
    shard: ShardId,
    after: Option<Ino>,
    max: usize,
) -> Result<Vec<(Ino, bool)>, StateError> {
    let view = View::open(reader, shard).await?;
    let mut list = BTreeMap::new();
    for table in [keys::ORPHAN, keys::TRIMMING] {
        let prefix = keys::table(shard, table);
        let start = after.map_or(prefix.clone(), |ino| [keys::of_ino(shard, table, ino).as_slice(), &[0]].concat());
        for (key, _) in view.scan(start, &keys::after_prefix(&prefix), max).await? {
            let ino = Ino::from_u64(keys::u64_at(&key, keys::FIELDS).ok_or_else(|| bad_key(&key))?);
            list.insert(ino, table == keys::ORPHAN && view.is_held(ino).await?);
        }
    }
    Ok(list.into_iter().take(max).collect())
}

/// Sessions that are not fenced, with the name their client gave. A new leader treats each as a
/// possible holder of read leases.
pub async fn list_sessions(reader: &dyn Reader, shard: ShardId) -> Result<Vec<(SessionId, String)>, StateError> {
    let all = session_records(reader, shard).await?.into_iter();
    Ok(all.filter(|(_, record)| !record.fenced).map(|(session, record)| (session, record.client)).collect())
}

/// Sessions that are fenced.
pub async fn list_fenced(reader: &dyn Reader, shard: ShardId) -> Result<Vec<SessionId>, StateError> {
    let all = session_records(reader, shard).await?.into_iter();
    Ok(all.filter(|(_, record)| record.fenced).map(|(session, _)| session).collect())
}

async fn session_records(reader: &dyn Reader, shard: ShardId) -> Result<Vec<(SessionId, SessionRecord)>, StateError> {
    let view = View::open(reader, shard).await?;
    let mut list = Vec::new();
    for (key, value) in view.scan_all(&keys::table(shard, keys::SESSION)).await? {
        let session = SessionId(keys::u64_at(&key, keys::FIELDS).ok_or_else(|| bad_key(&key))?);
        list.push((session, decode(&key, &value)?));
    }
    Ok(list)
}

/// The inodes whose write lease a session holds.
pub async fn list_leases(reader: &dyn Reader, shard: ShardId, session: SessionId) -> Result<Vec<Ino>, StateError> {
    View::open(reader, shard).await?.session_inodes(keys::SESSION_LEASE, session, usize::MAX).await
}

/// Fenced sessions from which not everything has been taken. Costs what the sessions that have
/// anything are, not those that were ever fenced.
pub async fn list_half_fenced(reader: &dyn Reader, shard: ShardId) -> Result<Vec<SessionId>, StateError> {
    let view = View::open(reader, shard).await?;
    let mut owners = BTreeSet::new();
    for table in [keys::REPLY, keys::SESSION_LEASE, keys::SESSION_LOCK, keys::SESSION_HOLD] {
        let mut start = keys::table(shard, table);
        let end = keys::after_prefix(&start);
        while let Some((key, _)) = view.scan(start, &end, 1).await?.pop() {
            let session = SessionId(keys::u64_at(&key, keys::FIELDS).ok_or_else(|| bad_key(&key))?);
            owners.insert(session);
            start = keys::after_prefix(&keys::of_session(shard, table, session));
        }
    }
    let fenced = list_fenced(reader, shard).await?;
    Ok(fenced.into_iter().filter(|session| owners.contains(session)).collect())
}

/// The session that holds an inode's write lease.
pub async fn lease_holder(reader: &dyn Reader, shard: ShardId, ino: Ino) -> Result<Option<SessionId>, StateError> {
    let view = View::open(reader, shard).await?;
    let lease: Option<LeaseRecord> = view.get(&keys::lease(shard, ino)).await?;
    Ok(lease.map(|lease| lease.session))
}

/// For the service: whether a session may read here.
pub async fn check_session(reader: &dyn Reader, shard: ShardId, session: SessionId) -> Result<MetaResult, StateError> {
    Ok(match session_fenced(reader, shard, session).await? {
        None => Err(MetaError::SessionUnknown),
        Some(true) => Err(MetaError::Fenced),
        Some(false) => Ok(MetaReply::Done),
    })
}
