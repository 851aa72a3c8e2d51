//! What one Raft group sees of the shared log.

use super::batch::{Record, record_bytes};
use super::state::Waiter;
use super::{ENTRY_BYTES_MAX, LogError, SharedLog};
use crate::types::{Entry, LogId, Raft, Vote};
use cfs_reactor::sync::oneshot;
use cfs_wire::ShardId;
use cfs_wire::planted::{self, Bug};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{OptionalSend, RaftTypeConfig};
use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::rc::Rc;

/// Entries sent to a follower in one message at most, in bytes: an RPC body is 2 MiB, and one
/// entry may have to fit beyond this.
const READ_BYTES_MAX: u64 = 512 << 10;

/// A view of the shared log for one group. Cheap to clone.
#[derive(Clone)]
pub struct GroupLog {
    log: Rc<SharedLog>,
    group: ShardId,
}

impl GroupLog {
    pub(super) fn new(log: Rc<SharedLog>, group: ShardId) -> GroupLog {
        GroupLog { log, group }
    }

    /// Whether the group has left nothing in the log.
    pub fn is_empty(&self) -> bool {
        self.with(super::state::Group::is_empty).unwrap_or(true)
    }

    /// Index up to which the log is purged.
    pub fn purged(&self) -> Option<u64> {
        self.with(|group| group.purged()).flatten().map(|id| id.index)
    }

    fn with<T>(&self, look: impl FnOnce(&super::state::Group) -> T) -> Option<T> {
        self.log.state.borrow().groups.get(&self.group).map(look)
    }

    fn read(&self, range: impl RangeBounds<u64>, limit: u64) -> Vec<Entry> {
        let collect = |group: &super::state::Group| {
            let mut bytes = 0;
            let mut out = Vec::new();
            for (entry, length) in group.entries(range) {
                bytes += length;
                if bytes > limit && !out.is_empty() {
                    break;
                }
                out.push(entry.clone());
            }
            out
        };
        self.with(collect).unwrap_or_default()
    }
}

impl RaftLogReader<Raft> for GroupLog {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        Ok(self.read(range, u64::MAX))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.with(|group| group.vote()).flatten())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        Ok(self.read(start..end, READ_BYTES_MAX))
    }
}

impl RaftLogStorage<Raft> for GroupLog {
    type LogReader = GroupLog;

    async fn get_log_state(&mut self) -> Result<LogState<Raft>, io::Error> {
        let state = self.with(|group| LogState { last_purged_log_id: group.purged(), last_log_id: group.last() });
        Ok(state.unwrap_or(LogState { last_purged_log_id: None, last_log_id: None }))
    }

    async fn get_log_reader(&mut self) -> GroupLog {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (sender, receiver) = oneshot();
        self.log.append(self.group, vec![Record::Vote(*vote)], Some(Waiter::Signal(sender)))?;
        Ok(receiver.await.unwrap_or(Err(LogError::Closed))?)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        // A hint that spares a restarted replica from serving an older state: not waited for.
        match committed {
            Some(id) => Ok(self.log.append(self.group, vec![Record::Committed(id)], None)?),
            None => Ok(()),
        }
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        // The mark may have outrun entries that a crash tore off: then it says nothing.
        let known = |group: &super::state::Group| group.committed().filter(|id| Some(*id) <= group.last());
        Ok(self.with(known).flatten())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Raft>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = <Raft as RaftTypeConfig>::Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let records: Vec<Record> = entries.into_iter().map(Record::Entry).collect();
        if let Some(length) = records.iter().map(record_bytes).find(|length| *length > ENTRY_BYTES_MAX) {
            let error = LogError::TooLarge { length, limit: ENTRY_BYTES_MAX };
            callback.io_completed(Err(error.clone().into()));
            return Err(error.into());
        }
        Ok(self.log.append(self.group, records, Some(Waiter::Flushed(callback)))?)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        // Not waited for: whatever is appended next lies behind it in the same order.
        Ok(self.log.append(self.group, vec![Record::TruncateAfter(last)], None)?)
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let synced = self.with(|group| group.synced).flatten();
        if let Some(synced) = synced
            && !planted::is(Bug::LogCutEarly)
            && synced < Some(upto.index)
        {
            return Err(LogError::CutAboveSynced { group: self.group, index: upto.index, synced }.into());
        }
        Ok(self.log.append(self.group, vec![Record::Purge(upto)], None)?)
    }
}
