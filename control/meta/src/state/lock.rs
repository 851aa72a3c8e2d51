//! Advisory locks: POSIX byte ranges (split and merged per owner, fcntl(2)) and whole-file
//! flock(2). A conflict is a reply; waiting is the service's.

use super::records::{LockRecord, decode};
use super::view::{Attempt, View, bad_key};
use super::{StateError, keys};
use cfs_wire::meta::{LockFamily, LockKind, LockRange, MetaReply};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino, SessionId};

/// Locks of one family on one inode, all owners together: every request looks through them.
const LOCKS_PER_INODE_MAX: usize = 8192;
/// Linux's ENOLCK; not in the wire's table of names.
const ENOLCK: Errno = Errno(37);

/// A stored lock.
#[derive(Clone, PartialEq, Debug)]
struct Held {
    session: SessionId,
    range: LockRange,
    token: u64,
}

impl Held {
    fn overlaps(&self, range: &LockRange) -> bool {
        self.range.start <= range.end && range.start <= self.range.end
    }

    fn conflicts(&self, session: SessionId, range: &LockRange) -> bool {
        let own = self.session == session && self.range.owner == range.owner;
        let excludes = self.range.kind == LockKind::Write || range.kind == LockKind::Write;
        !own && excludes && self.overlaps(range)
    }
}

fn held_of(key: &[u8], value: &[u8], family: LockFamily) -> Result<Held, StateError> {
    let at = keys::FIELDS + 9;
    let field = |index: usize| keys::u64_at(key, at + index * 8).ok_or_else(|| bad_key(key));
    let record: LockRecord = decode(key, value)?;
    let range =
        LockRange { family, kind: record.kind, start: field(2)?, end: record.end, owner: field(1)?, pid: record.pid };
    Ok(Held { session: SessionId(field(0)?), range, token: record.token })
}

/// flock knows no ranges.
fn normal(lock: &LockRange) -> Result<LockRange, Errno> {
    let whole = lock.family == LockFamily::Flock;
    let (start, end) = if whole { (0, u64::MAX) } else { (lock.start, lock.end) };
    if start > end { Err(Errno::EINVAL) } else { Ok(LockRange { start, end, ..*lock }) }
}

impl View<'_> {
    async fn held(&self, ino: Ino, family: LockFamily) -> Result<Vec<Held>, StateError> {
        let rows = self.scan_all(&keys::locks(self.shard, ino, family)).await?;
        rows.iter().map(|(key, value)| held_of(key, value, family)).collect()
    }

    async fn held_by(
        &self,
        ino: Ino,
        family: LockFamily,
        session: SessionId,
        owner: u64,
    ) -> Result<Vec<Held>, StateError> {
        let rows = self.scan_all(&keys::owner_locks(self.shard, ino, family, session, owner)).await?;
        rows.iter().map(|(key, value)| held_of(key, value, family)).collect()
    }

    pub(crate) async fn test_lock(&self, session: SessionId, ino: Ino, lock: &LockRange) -> Attempt<MetaReply> {
        self.inode(ino).await?;
        let lock = normal(lock)?;
        let held = self.held(ino, lock.family).await?;
        let first = held.into_iter().filter(|held| held.conflicts(session, &lock)).min_by_key(|held| held.range.start);
        Ok(MetaReply::Conflict(first.map(|held| held.range)))
    }

    /// `Done` when granted, else the conflict. A conflicting request leaves POSIX locks as they
    /// were; flock gives the old lock up only with the new one.
    pub(crate) async fn lock(&mut self, session: SessionId, ino: Ino, lock: &LockRange) -> Attempt<MetaReply> {
        self.live_inode(ino).await?;
        let lock = normal(lock)?;
        let held = self.held(ino, lock.family).await?;
        let conflict = held.iter().filter(|held| held.conflicts(session, &lock)).min_by_key(|held| held.range.start);
        if let Some(conflict) = conflict.filter(|_| !planted::is(Bug::MetaIgnoreLocks)) {
            return Ok(MetaReply::Conflict(Some(conflict.range)));
        }
        // Cutting a range out of the middle of one lock leaves two beside the new one.
        if held.len() + 2 > LOCKS_PER_INODE_MAX {
            return Err(ENOLCK.into());
        }
        self.cut_out(session, ino, &lock).await?;
        self.insert_merged(session, ino, lock).await?;
        self.put(keys::session_ino(self.shard, keys::SESSION_LOCK, session, ino), &());
        Ok(MetaReply::Done)
    }

    fn put_lock(&mut self, session: SessionId, ino: Ino, range: &LockRange, token: u64) {
        let key = keys::lock(self.shard, ino, range.family, session, range.owner, range.start);
        self.put(key, &LockRecord { end: range.end, kind: range.kind, pid: range.pid, token });
    }

    fn delete_lock(&mut self, session: SessionId, ino: Ino, range: &LockRange) {
        self.delete(keys::lock(self.shard, ino, range.family, session, range.owner, range.start));
    }

    /// Takes a range away from what an owner holds; true when it held any of it.
    async fn cut_out(&mut self, session: SessionId, ino: Ino, range: &LockRange) -> Attempt<bool> {
        let mut freed = false;
        for held in self.held_by(ino, range.family, session, range.owner).await? {
            if !held.overlaps(range) {
                continue;
            }
            freed = true;
            self.delete_lock(session, ino, &held.range);
            if held.range.start < range.start {
                self.put_lock(session, ino, &LockRange { end: range.start - 1, ..held.range }, held.token);
            }
            if held.range.end > range.end {
                self.put_lock(session, ino, &LockRange { start: range.end + 1, ..held.range }, held.token);
            }
        }
        if freed {
            // Also when a lock is converted: a reader may get in where a writer was.
            self.locks_freed(ino);
        }
        Ok(freed)
    }

    /// Stores a lock, grown over its owner's adjacent ones of the same kind.
    async fn insert_merged(&mut self, session: SessionId, ino: Ino, mut lock: LockRange) -> Attempt<()> {
        for held in self.held_by(ino, lock.family, session, lock.owner).await? {
            let same = held.range.kind == lock.kind && held.range.pid == lock.pid;
            let before = held.range.end.checked_add(1) == Some(lock.start);
            let behind = lock.end.checked_add(1) == Some(held.range.start);
            if same && (before || behind) {
                self.delete_lock(session, ino, &held.range);
                lock.start = lock.start.min(held.range.start);
                lock.end = lock.end.max(held.range.end);
            }
        }
        let token = self.next_token();
        self.put_lock(session, ino, &lock, token);
        Ok(())
    }

    pub(crate) async fn unlock(&mut self, session: SessionId, ino: Ino, lock: &LockRange) -> Attempt<MetaReply> {
        let range = normal(lock)?;
        self.cut_out(session, ino, &range).await?;
        self.forget_if_lockless(ino, session).await?;
        Ok(MetaReply::Done)
    }

    pub(crate) async fn unlock_owner(
        &mut self,
        session: SessionId,
        ino: Ino,
        family: LockFamily,
        owner: u64,
    ) -> Attempt<MetaReply> {
        let all = LockRange { family, kind: LockKind::Read, start: 0, end: u64::MAX, owner, pid: 0 };
        self.unlock(session, ino, &all).await
    }

    async fn forget_if_lockless(&mut self, ino: Ino, session: SessionId) -> Attempt<()> {
        for family in [LockFamily::Posix, LockFamily::Flock] {
            if self.held(ino, family).await?.iter().any(|held| held.session == session) {
                return Ok(());
            }
        }
        self.delete(keys::session_ino(self.shard, keys::SESSION_LOCK, session, ino));
        Ok(())
    }

    /// Gives how many there were.
    pub(crate) async fn drop_locks_of_session(&mut self, ino: Ino, session: SessionId) -> Attempt<usize> {
        let mut dropped = 0;
        for family in [LockFamily::Posix, LockFamily::Flock] {
            for held in self.held(ino, family).await?.iter().filter(|held| held.session == session) {
                self.delete_lock(session, ino, &held.range);
                self.locks_freed(ino);
                dropped += 1;
            }
        }
        self.delete(keys::session_ino(self.shard, keys::SESSION_LOCK, session, ino));
        Ok(dropped)
    }

    pub(crate) async fn drop_locks_of_inode(&mut self, ino: Ino) -> Attempt<()> {
        for family in [LockFamily::Posix, LockFamily::Flock] {
            for held in self.held(ino, family).await? {
                self.delete_lock(held.session, ino, &held.range);
                self.delete(keys::session_ino(self.shard, keys::SESSION_LOCK, held.session, ino));
                self.locks_freed(ino);
            }
        }
        Ok(())
    }
}
