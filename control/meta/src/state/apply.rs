//! The way of one entry through the state machine.

use super::entry::{FEATURE_LEVEL, Facts, Init, LogEntry, Outcome, Refusal, Reply};
use super::inode::S_ISGID;
use super::namespace::Ran;
use super::records::{Config, Counters, Inode};
use super::view::{Attempt, Fail, View};
use super::{Reader, StateError, bounds, keys};
use cfs_wire::meta::{FileKind, FileWrite, MetaCall, MetaError, MetaOp, MetaReply, MetaResult, ShardOp, ShardReply};
use cfs_wire::{Errno, SessionId, ShardId, Timestamp};

/// Applies one entry: a function of the state and the entry alone. Fails only when the state
/// can't be read or understood; an operation that fails does so in its reply.
pub async fn apply(reader: &dyn Reader, shard: ShardId, entry: &LogEntry) -> Result<Outcome, StateError> {
    if let LogEntry::Init(init) = entry {
        return initialise(reader, shard, init).await;
    }
    let mut view = View::open(reader, shard).await?;
    let mark = view.mark();
    let reply = match run_whole(&mut view, entry).await {
        Ok(reply) => reply,
        Err(Fail::Storage(error)) => return Err(error),
        Err(fail) => {
            // Nothing was done, and nothing is stored of the request.
            view.back_to(mark);
            refusal(fail, entry)?
        }
    };
    Ok(view.finish(reply))
}

fn refusal(fail: Fail, entry: &LogEntry) -> Result<Reply, StateError> {
    Ok(match (fail, entry) {
        (Fail::Need(reply), _) => *reply,
        (Fail::Blocked(txn), _) => Reply::Blocked { txn },
        (Fail::Refused(error), LogEntry::Client { .. } | LogEntry::Shard { .. }) => Reply::Meta(Err(error)),
        (Fail::Refused(_), LogEntry::Prepare { .. }) => Reply::Prepared(Err(Refusal::Errno(Errno::E2BIG))),
        (Fail::Changed, LogEntry::Client { .. }) => {
            Reply::Meta(Err(MetaError::Unavailable("the names changed meanwhile".to_owned())))
        }
        // Fencing and reaping refuse nothing, and what was prepared can be carried out.
        (fail, _) => {
            tracing::error!(?fail, ?entry, "an entry that must apply does not");
            return Err(StateError::Corrupt { key: Vec::new(), reason: "the state does not fit the entry" });
        }
    })
}

/// Carries an entry out, to the last of its writes.
async fn run_whole(view: &mut View<'_>, entry: &LogEntry) -> Attempt<Reply> {
    bounds::check_entry(entry)?;
    let reply = run(view, entry).await?;
    view.settle_released().await?;
    view.check_rows()?;
    Ok(reply)
}

async fn run(view: &mut View<'_>, entry: &LogEntry) -> Attempt<Reply> {
    match entry {
        // Handled by the caller.
        LogEntry::Init(_) => {}
        LogEntry::Client { call, now, facts } => return client(view, call, *now, facts).await,
        LogEntry::Shard { op: ShardOp::SetPolicy { ino, policy }, now } => {
            view.set_policy(*ino, *policy, *now).await?;
            return Ok(Reply::Shard(ShardReply::Done));
        }
        LogEntry::Shard { op, .. } => return Ok(Reply::Shard(view.shard_op(op).await?)),
        LogEntry::Prepare { txn, actions, .. } => return Ok(view.prepare(*txn, actions).await?),
        LogEntry::Decide { txn, verdict, .. } => return view.decide(*txn, verdict).await,
        LogEntry::Commit { txn } => view.commit_prepared(*txn).await?,
        LogEntry::Abort { txn } => view.abort_prepared(*txn).await?,
        LogEntry::Forget { txn } => view.forget(*txn).await?,
        LogEntry::Fence { session } => view.fence(*session).await?,
        LogEntry::Dispossess { session } => return view.dispossess(*session).await,
        LogEntry::Reap { ino, .. } => view.reap_orphan(*ino).await?,
        LogEntry::TakeRenameLock { holder, steal } => {
            return Ok(Reply::RenameLock { token: view.take_rename_lock(*holder, *steal).await? });
        }
        LogEntry::ReleaseRenameLock { token } => view.release_rename_lock(*token).await?,
    }
    Ok(Reply::Done)
}

/// A client's request: run once, answered from the stored reply when it is repeated.
async fn client(view: &mut View<'_>, call: &MetaCall, now: Timestamp, facts: &Facts) -> Attempt<Reply> {
    let id = call.id;
    match &call.op {
        MetaOp::OpenSession { client } => return Ok(Reply::meta(view.open_session(id.session, client, now).await?)),
        MetaOp::CloseSession => return view.close_session(id.session).await,
        op if op.is_read() => {
            return Err(MetaError::Malformed("a read does not belong in the log".to_owned()).into());
        }
        _ => {}
    }
    let mut session = view.active_session(id.session).await?;
    if id.sequence < session.lowest {
        return Err(MetaError::Malformed("the request was acknowledged before".to_owned()).into());
    }
    if let Some(result) = view.stored_reply(id).await? {
        return Ok(Reply::Meta(result));
    }
    // The request is under way in a transaction.
    view.unlocked(&keys::request_txn(view.shard, id)).await?;
    view.acknowledge(call, &mut session).await?;
    if !View::has_room_for_reply(&session) {
        return Err(MetaError::Unavailable("too many unacknowledged requests".to_owned()).into());
    }
    let mark = view.mark();
    let result: MetaResult = match operation(view, call, now, facts).await {
        Ok(Ran::Reply(reply)) => Ok(reply),
        Ok(Ran::Begun(txn)) => {
            view.put_session(id.session, &session);
            return Ok(Reply::Begun { txn });
        }
        // The inode that the leader found in another shard is gone since: look again.
        Err(Fail::Refused(MetaError::Errno(Errno::ESTALE))) if facts.target.is_some() => return Err(Fail::Changed),
        Err(Fail::Refused(error @ MetaError::Errno(_))) => {
            view.back_to(mark);
            Err(error)
        }
        // Not final: the same request may be repeated and run.
        Err(other) => return Err(other),
    };
    // A lock that has to wait is asked for again by the same request.
    let waiting = matches!((&call.op, &result), (MetaOp::Lock { .. }, Ok(MetaReply::Conflict(_))));
    if !waiting {
        view.store_reply(id, &result, &mut session);
    }
    view.put_session(id.session, &session);
    Ok(Reply::Meta(result))
}

/// Whether an operation adds to the metadata beyond the few bytes of any change. Commits of bytes
/// that are stored already go through: their space is taken.
fn grows(op: &MetaOp) -> bool {
    match op {
        MetaOp::Create { .. } | MetaOp::Tmpfile { .. } | MetaOp::Link { .. } | MetaOp::SetXattr { .. } => true,
        MetaOp::Commit(commit) => {
            let inline = |write: &FileWrite| matches!(write, FileWrite::Inline { .. } | FileWrite::AppendInline { .. });
            commit.writes.iter().any(inline)
        }
        _ => false,
    }
}

async fn operation(view: &mut View<'_>, call: &MetaCall, now: Timestamp, facts: &Facts) -> Attempt<Ran> {
    if facts.full && grows(&call.op) {
        return Err(MetaError::Errno(Errno::ENOSPC).into());
    }
    let session = call.id.session;
    let home = call.op.home();
    if home.is_some_and(|ino| ino.shard() != view.shard) {
        return Err(MetaError::Malformed("the inode lives in another shard".to_owned()).into());
    }
    let reply = match &call.op {
        MetaOp::SetAttr { ino, changes } => view.set_attr(session, *ino, changes, now).await?,
        MetaOp::SetXattr { ino, name, value, flags } => view.set_xattr(*ino, name, value, *flags, now).await?,
        MetaOp::RemoveXattr { ino, name } => view.remove_xattr(*ino, name, now).await?,
        MetaOp::Commit(commit) => view.commit(session, commit, now).await?,
        MetaOp::Open { ino } => view.open_file(session, *ino).await?,
        MetaOp::Release { inos } => view.release(session, inos).await?,
        MetaOp::AcquireLease { ino } => view.acquire_lease(session, *ino).await?,
        MetaOp::ReturnLease { ino } => view.return_lease(session, *ino).await?,
        MetaOp::Lock { ino, lock, .. } => view.lock(session, *ino, lock).await?,
        MetaOp::Unlock { ino, lock } => view.unlock(session, *ino, lock).await?,
        MetaOp::UnlockOwner { ino, family, owner } => view.unlock_owner(session, *ino, *family, *owner).await?,
        // Waiting calls are the service's; there is nothing of them in the state.
        MetaOp::CancelLock { .. } => MetaReply::Done,
        _ => return view.namespace(call, now, facts).await,
    };
    Ok(Ran::Reply(reply))
}

/// The first entry of a shard. A repeat changes nothing; one that differs is refused.
async fn initialise(reader: &dyn Reader, shard: ShardId, init: &Init) -> Result<Outcome, StateError> {
    let Init { shards, volume, root, policy, tolerated, targets, name_key, feature_level, .. } = *init;
    let config = Config { shards, volume, root, policy, tolerated, targets, name_key, feature_level };
    let mut view = View::bare(reader, shard, config.clone());
    let key = keys::table(shard, keys::CONFIG);
    let stored: Option<Config> = view.get(&key).await?;
    let refused = match &stored {
        Some(stored) if *stored != config => Some("the shard was initialised otherwise"),
        None if feature_level != FEATURE_LEVEL => Some("unknown feature level"),
        None if shards == 0 || shard.0 >= shards => Some("no such shard"),
        _ => None,
    };
    let nothing = |reply| Outcome { batch: Vec::new(), reply, changes: Vec::new(), follow_up: Vec::new() };
    if let Some(reason) = refused {
        return Ok(nothing(Reply::Meta(Err(MetaError::Malformed(reason.to_owned())))));
    }
    if stored.is_some() {
        return Ok(nothing(Reply::Done));
    }
    view.put(key, &config);
    view.counters = Counters { next_ino: root.counter() + 1, ..Counters::default() };
    if root.shard() == shard {
        view.add_inode(&root_inode(init), &Vec::new());
    }
    Ok(view.finish(Reply::Done))
}

fn root_inode(init: &Init) -> Inode {
    let now = init.now;
    Inode {
        ino: init.root,
        kind: FileKind::Directory,
        mode: init.root_mode & (0o1777 | S_ISGID),
        nlink: 2,
        uid: init.root_uid,
        gid: init.root_gid,
        rdev: 0,
        size: 0,
        mapped: 0,
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        version: 1,
        inline: Vec::new(),
        parent: Some(init.root),
        entries: 0,
        xattrs: 0,
        xattr_list_bytes: 0,
        access_acl: false,
        default_acl: false,
        tmpfile: false,
        commits: Vec::new(),
        trim: None,
        commits_forgotten: false,
        policy: None,
    }
}

/// Whether a session is fenced in this shard; `None`: unknown here.
pub async fn session_fenced(
    reader: &dyn Reader,
    shard: ShardId,
    session: SessionId,
) -> Result<Option<bool>, StateError> {
    let view = View::open(reader, shard).await?;
    let record: Option<super::records::SessionRecord> = view.get(&keys::session(shard, session)).await?;
    Ok(record.map(|record| record.is_fenced()))
}
