//! Sessions, the replies kept for them, and what a session holds: open-file holds, write leases.
//! Fencing shuts a session out in one entry; what it holds is taken by further, bounded ones.

use super::entry::{FollowUp, Reply};
use super::inode::Unheld;
use super::records::{LeaseRecord, SessionRecord};
use super::view::{Attempt, View, bad_key};
use super::{StateError, keys};
use cfs_wire::limits::{RELEASES_MAX, SESSION_REPLIES_MAX};
use cfs_wire::meta::{FileKind, Grant, MetaCall, MetaError, MetaReply, MetaResult};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino, RequestId, SessionId, Timestamp};

/// Rows of a session's that one entry takes, give or take the locks of one inode: the shard does
/// nothing else meanwhile. Part of what an entry in the log means.
const BELONGINGS_AT_ONCE: usize = 1024;

impl View<'_> {
    async fn session_record(&self, session: SessionId) -> Result<Option<SessionRecord>, StateError> {
        self.get(&keys::session(self.shard, session)).await
    }

    pub(crate) async fn open_session(
        &mut self,
        session: SessionId,
        client: &str,
        now: Timestamp,
    ) -> Attempt<MetaReply> {
        match self.session_record(session).await? {
            Some(record) if record.is_fenced() => return Err(MetaError::Fenced.into()),
            Some(_) => {}
            None => {
                let client = client.to_owned();
                let record = SessionRecord { client, opened: now, fenced: false, lowest: 0, replies: 0 };
                self.put(keys::session(self.shard, session), &record);
            }
        }
        // The lease's length is the service's to say.
        Ok(MetaReply::Session { lease_ms: 0 })
    }

    /// The record of a session that may act.
    pub(crate) async fn active_session(&self, session: SessionId) -> Attempt<SessionRecord> {
        let record = self.session_record(session).await?.ok_or(MetaError::SessionUnknown)?;
        if record.is_fenced() {
            return Err(MetaError::Fenced.into());
        }
        Ok(record)
    }

    pub(crate) async fn stored_reply(&self, id: RequestId) -> Result<Option<MetaResult>, StateError> {
        if planted::is(Bug::MetaRerunRequest) {
            return Ok(None);
        }
        self.get(&keys::reply(self.shard, id)).await
    }

    /// Drops the replies a client has acknowledged. The record is the caller's to store.
    pub(crate) async fn acknowledge(&mut self, call: &MetaCall, record: &mut SessionRecord) -> Result<(), StateError> {
        if call.lowest_unacknowledged <= record.lowest {
            return Ok(());
        }
        let session = call.id.session;
        let start = keys::reply(self.shard, RequestId { session, sequence: record.lowest });
        let sequence = call.lowest_unacknowledged + u64::from(planted::is(Bug::MetaForgetReplyEarly));
        let end = keys::reply(self.shard, RequestId { session, sequence });
        for (key, _) in self.scan(start, &end, SESSION_REPLIES_MAX * 2).await? {
            self.delete(key);
            record.replies = record.replies.saturating_sub(1);
        }
        record.lowest = call.lowest_unacknowledged;
        Ok(())
    }

    pub(crate) fn has_room_for_reply(record: &SessionRecord) -> bool {
        (record.replies as usize) < SESSION_REPLIES_MAX
    }

    /// Stores a final reply beside its effects: a repeat of the request is answered from it.
    pub(crate) fn store_reply(&mut self, id: RequestId, result: &MetaResult, record: &mut SessionRecord) {
        if planted::is(Bug::MetaForgetReply) {
            return;
        }
        self.put(keys::reply(self.shard, id), result);
        record.replies += 1;
    }

    pub(crate) fn put_session(&mut self, session: SessionId, record: &SessionRecord) {
        self.put(keys::session(self.shard, session), record);
    }

    pub(crate) async fn close_session(&mut self, session: SessionId) -> Attempt<Reply> {
        match self.session_record(session).await? {
            Some(record) if record.is_fenced() => return Err(MetaError::Fenced.into()),
            Some(_) => {
                let mut room = BELONGINGS_AT_ONCE;
                self.drop_possessions(session, &mut room).await?;
                if room == 0 {
                    return Ok(Reply::Unfinished);
                }
                // Not before the session ends: until then requests may be repeated. All of them:
                // transactions that were under way may have left more than SESSION_REPLIES_MAX.
                self.drop_replies(session, &mut { usize::MAX }).await?;
                self.delete(keys::session(self.shard, session));
            }
            None => {}
        }
        Ok(Reply::meta(MetaReply::Done))
    }

    /// Fences a session. The record stays for good: nothing of that session is ever accepted.
    pub(crate) async fn fence(&mut self, session: SessionId) -> Attempt<()> {
        let unseen =
            SessionRecord { client: String::new(), opened: Timestamp::default(), fenced: false, lowest: 0, replies: 0 };
        let stored = self.session_record(session).await?.unwrap_or(unseen);
        if !stored.fenced {
            self.put_session(session, &SessionRecord { fenced: true, ..stored });
        }
        Ok(())
    }

    pub(crate) async fn dispossess(&mut self, session: SessionId) -> Attempt<Reply> {
        let mut room = BELONGINGS_AT_ONCE;
        if self.session_record(session).await?.is_some_and(|record| record.fenced) {
            self.drop_replies(session, &mut room).await?;
            self.drop_possessions(session, &mut room).await?;
        }
        Ok(if room == 0 { Reply::Unfinished } else { Reply::Done })
    }

    async fn drop_replies(&mut self, session: SessionId, room: &mut usize) -> Attempt<()> {
        let replies = keys::of_session(self.shard, keys::REPLY, session);
        for (key, _) in self.scan(replies.clone(), &keys::after_prefix(&replies), *room).await? {
            self.delete(key);
            *room -= 1;
        }
        Ok(())
    }

    /// Takes leases, locks and holds, until all are gone or there is no room for more.
    async fn drop_possessions(&mut self, session: SessionId, room: &mut usize) -> Attempt<()> {
        for ino in self.session_inodes(keys::SESSION_LEASE, session, *room).await? {
            self.drop_lease_of_inode(ino).await?;
            *room -= 1;
        }
        for ino in self.session_inodes(keys::SESSION_LOCK, session, *room).await? {
            if *room == 0 {
                break;
            }
            let locks = self.drop_locks_of_session(ino, session).await?;
            *room = room.saturating_sub(locks.max(1));
        }
        for ino in self.session_inodes(keys::SESSION_HOLD, session, *room).await? {
            self.drop_hold(ino, session, Unheld::GoesLater).await?;
            *room -= 1;
        }
        Ok(())
    }

    /// The first inodes of one of a session's tables.
    pub(crate) async fn session_inodes(
        &self,
        table: u8,
        session: SessionId,
        max: usize,
    ) -> Result<Vec<Ino>, StateError> {
        let prefix = keys::of_session(self.shard, table, session);
        let rows = self.scan(prefix.clone(), &keys::after_prefix(&prefix), max).await?;
        let ino = |key: &[u8]| keys::u64_at(key, keys::FIELDS + 8).map(Ino::from_u64).ok_or_else(|| bad_key(key));
        rows.iter().map(|(key, _)| ino(key)).collect()
    }

    pub(crate) async fn open_file(&mut self, session: SessionId, ino: Ino) -> Attempt<MetaReply> {
        let inode = self.live_inode(ino).await?;
        self.add_hold(ino, session);
        Ok(MetaReply::Attr { attr: inode.attr(self.config.policy), grant: Grant::default() })
    }

    /// All of them or, while a transaction holds one, none.
    pub(crate) async fn release(&mut self, session: SessionId, inos: &[Ino]) -> Attempt<MetaReply> {
        if inos.len() > RELEASES_MAX || inos.iter().any(|ino| ino.shard() != self.shard) {
            let detail =
                format!("{} inodes to release, not all of {}, or more than {RELEASES_MAX}", inos.len(), self.shard);
            return Err(MetaError::Malformed(detail).into());
        }
        for ino in inos {
            self.unlocked(&keys::locked_inode(self.shard, *ino)).await?;
        }
        for ino in inos {
            self.drop_lease_of_session(session, *ino).await?;
            self.drop_hold(*ino, session, Unheld::Goes).await?;
        }
        Ok(MetaReply::Done)
    }

    pub(crate) async fn acquire_lease(&mut self, session: SessionId, ino: Ino) -> Attempt<MetaReply> {
        let inode = self.live_inode(ino).await?;
        if inode.kind != FileKind::File {
            return Err(Errno::EINVAL.into());
        }
        let key = keys::lease(self.shard, ino);
        let granted = match self.get::<LeaseRecord>(&key).await? {
            Some(lease) if lease.session == session => true,
            Some(_) if !planted::is(Bug::MetaShareWriteLease) => false,
            _ => {
                self.add_lease(ino, session);
                true
            }
        };
        let grant = Grant { read_ms: 0, write: granted };
        Ok(MetaReply::Lease { granted, attr: inode.attr(self.config.policy), grant })
    }

    pub(crate) async fn return_lease(&mut self, session: SessionId, ino: Ino) -> Attempt<MetaReply> {
        self.drop_lease_of_session(session, ino).await?;
        Ok(MetaReply::Done)
    }

    /// The caller knows that nobody has it.
    pub(crate) fn add_lease(&mut self, ino: Ino, session: SessionId) {
        let token = self.next_token();
        self.put(keys::lease(self.shard, ino), &LeaseRecord { session, token });
        self.put(keys::session_ino(self.shard, keys::SESSION_LEASE, session, ino), &());
    }

    async fn drop_lease_of_session(&mut self, session: SessionId, ino: Ino) -> Attempt<()> {
        let lease: Option<LeaseRecord> = self.get(&keys::lease(self.shard, ino)).await?;
        if lease.is_some_and(|lease| lease.session == session) {
            self.drop_lease_of_inode(ino).await?;
        }
        Ok(())
    }

    pub(crate) async fn drop_lease_of_inode(&mut self, ino: Ino) -> Attempt<()> {
        let key = keys::lease(self.shard, ino);
        if let Some(lease) = self.get::<LeaseRecord>(&key).await? {
            self.delete(key);
            self.delete(keys::session_ino(self.shard, keys::SESSION_LEASE, lease.session, ino));
        }
        Ok(())
    }

    /// Tells the service that waiting lock calls may go on.
    pub(crate) fn locks_freed(&mut self, ino: Ino) {
        let freed = FollowUp::LocksFreed { ino };
        // An inode's locks go one after the other; told twice would do no harm.
        if self.follow_up.last() != Some(&freed) {
            self.follow_up.push(freed);
        }
    }
}
