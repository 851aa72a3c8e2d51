//! Rows of metadata shards that their own program never wrote, decoded one by one, then met by what
//! reads the shard and by what changes it.

use super::corpus::{self, Step};
use super::mutate::{Length, mutate, pick};
use super::{Fed, Target, Trial};
use bytes::Bytes;
use cfs_meta::state::records::rewritten;
use cfs_meta::state::{self, LogEntry, MemoryState, Outcome, StateError};
use cfs_reactor::clock::SplitMix64;
use cfs_wire::meta::{LockFamily, LockKind, LockRange, MetaOp, ShardOp, ShardReply};
use cfs_wire::{Ino, SessionId, ShardId};
use futures_util::FutureExt as _;
use std::collections::BTreeSet;

const INPUTS_PER_ROUND: usize = 4;
/// Entries applied to a shard with a changed row: those that followed, and some out of order.
const NEXT_ENTRIES: usize = 6;
const OTHER_ENTRIES: usize = 3;
/// Shard and table; what follows are the table's own fields.
const KEY_HEAD_BYTES: usize = 3;
const TABLE_AT: usize = 2;
/// Of 25: what is missing takes files of thousands of extents.
const TABLES_MIN: usize = 24;

pub struct Rows {
    steps: Vec<Step>,
    keys: Vec<Vec<u8>>,
    values: Vec<Vec<u8>>,
}

impl Rows {
    pub fn new() -> Rows {
        let steps = corpus::steps();
        let rows: BTreeSet<(Vec<u8>, Vec<u8>)> = steps
            .iter()
            .flat_map(|step| step.state.map.iter().map(|(key, value)| (key.clone(), value.to_vec())))
            .collect();
        let tables: BTreeSet<u8> = rows.iter().map(|(key, _)| key[TABLE_AT]).collect();
        assert!(tables.len() >= TABLES_MIN, "rows of {} tables tell little: {tables:02x?}", tables.len());
        let (keys, values) = rows.into_iter().unzip();
        Rows { steps, keys, values }
    }

    /// A row of some table: tables of many rows don't come more often.
    fn row(&self, random: &mut SplitMix64, state: &MemoryState) -> (Vec<u8>, Vec<u8>) {
        let tables: BTreeSet<u8> = state.map.keys().map(|key| key[TABLE_AT]).collect();
        let table = *pick(random, &tables.into_iter().collect::<Vec<u8>>());
        let rows: Vec<_> = state.map.iter().filter(|(key, _)| key[TABLE_AT] == table).collect();
        let (key, value) = pick(random, &rows);
        (key.to_vec(), value.to_vec())
    }

    /// What was applied next to the shard, then entries of any shard and time.
    fn entries(&self, random: &mut SplitMix64, at: usize) -> Vec<&LogEntry> {
        let shard = self.steps[at].shard;
        let next = self.steps[at + 1..].iter().filter(|step| step.shard == shard).take(NEXT_ENTRIES);
        let mut entries: Vec<&LogEntry> = next.map(|step| &step.entry).collect();
        entries.extend((0..OTHER_ENTRIES).map(|_| &pick(random, &self.steps).entry));
        entries
    }
}

impl Target for Rows {
    fn round(&self, random: &mut SplitMix64, trial: &mut Trial) {
        for _ in 0..INPUTS_PER_ROUND {
            let at = random.below(self.steps.len() as u64) as usize;
            let Step { shard, state, .. } = &self.steps[at];
            let (old, mut value) = self.row(random, state);
            let mut key = old.clone();
            if random.one_in(3) {
                mutate(random, &mut key, KEY_HEAD_BYTES, &self.keys, Length::Free);
            } else {
                mutate(random, &mut value, 0, &self.values, Length::Free);
            }
            let entries = self.entries(random, at);
            let inos = inodes_in(&[&old, &key], *shard);
            let what = format!("row {key:02x?} of {shard} after step {at}");
            trial.feed(&what, &value, |value| {
                let fed = stays_the_same(&key, value)?;
                let mut state = state.clone();
                state.map.remove(&old);
                state.map.insert(key, Bytes::copy_from_slice(value));
                read_all(&state, *shard, &inos)?;
                for entry in entries {
                    if let Ok(outcome) = apply(&state, *shard, entry)? {
                        state.write(&outcome);
                    }
                }
                read_all(&state, *shard, &inos)?;
                Ok(fed)
            });
        }
    }
}

fn stays_the_same(key: &[u8], value: &[u8]) -> Result<Fed, String> {
    let Ok(written) = rewritten(key, value) else { return Ok(Fed::Refused) };
    match rewritten(key, &written) {
        Ok(again) if again == written => Ok(Fed::Taken),
        other => Err(format!("it is written as {written:02x?}, and that as {other:02x?}")),
    }
}

/// A state in memory never waits.
fn now<T>(answer: impl Future<Output = T>) -> Result<T, String> {
    answer.now_or_never().ok_or_else(|| "a read waits for ever".to_owned())
}

fn apply(state: &MemoryState, shard: ShardId, entry: &LogEntry) -> Result<Result<Outcome, StateError>, String> {
    now(state::apply(state, shard, entry))
}

/// Inodes of the shard that a key may name: right behind its table, behind a session or directory,
/// or behind a referent.
fn inodes_in(keys: &[&[u8]], shard: ShardId) -> BTreeSet<Ino> {
    let places = [KEY_HEAD_BYTES, KEY_HEAD_BYTES + 8, KEY_HEAD_BYTES + 19];
    let named = keys.iter().flat_map(|key| places.iter().filter_map(|at| key.get(*at..)?.first_chunk()));
    let inos = named.map(|ino| Ino::from_u64(u64::from_be_bytes(*ino)));
    inos.chain([Ino::ROOT]).filter(|ino| ino.shard() == shard).collect()
}

/// Errors are what damaged rows may give, again and again.
fn read_all(state: &MemoryState, shard: ShardId, inos: &BTreeSet<Ino>) -> Result<(), String> {
    let _ = now(state::list_transactions(state, shard))?;
    let _ = now(state::list_orphans(state, shard, None, 100))?;
    let _ = now(state::list_fenced(state, shard))?;
    let _ = now(state::list_half_fenced(state, shard))?;
    let sessions = now(state::list_sessions(state, shard))?.unwrap_or_default();
    for (session, _) in sessions {
        let _ = now(state::check_session(state, shard, session))?;
        let _ = now(state::list_leases(state, shard, session))?;
    }
    for ino in inos {
        read_inode(state, shard, *ino)?;
    }
    let max = 1000;
    let referenced = ShardOp::ListReferenced { after: None, max };
    let ops =
        [ShardOp::ListRegistrations { after: None, max }, ShardOp::ListReleased { max }, referenced, ShardOp::GetEpoch];
    for op in &ops {
        let _ = now(state::read_shard(state, shard, op))?;
    }
    let mut after = None;
    while let Ok(Some(ShardReply::Audit { next: Some(next), .. })) =
        now(state::read_shard(state, shard, &ShardOp::Audit { after: after.clone(), max }))?
    {
        if after.as_ref().is_some_and(|after| *after >= next) {
            return Err(format!("an audit does not go on behind {after:02x?}"));
        }
        after = Some(next);
    }
    Ok(())
}

fn read_inode(state: &MemoryState, shard: ShardId, ino: Ino) -> Result<(), String> {
    let (family, kind) = (LockFamily::Posix, LockKind::Write);
    let lock = LockRange { family, kind, start: 0, end: u64::MAX, owner: 77, pid: 1 };
    let name = |name: &[u8]| name.iter().copied().collect();
    let ops = [
        MetaOp::GetAttr { ino },
        MetaOp::ReadLink { ino },
        MetaOp::Lookup { dir: ino, name: name(b"small") },
        MetaOp::ReadDir { dir: ino, after: 0, entries_max: 100, with_attrs: true },
        MetaOp::GetXattr { ino, name: name(b"user.color") },
        MetaOp::ListXattr { ino },
        MetaOp::GetExtents { ino, offset: 100, length: u64::MAX, extents_max: 100 },
        MetaOp::TestLock { ino, lock },
    ];
    for op in &ops {
        let _ = now(state::read(state, shard, SessionId(1), op))?;
    }
    let _ = now(state::parent_of(state, shard, ino))?;
    let _ = now(state::lease_holder(state, shard, ino))?;
    let extents = ShardOp::Extents { ino, offset: 0, length: u64::MAX, max: 100 };
    let _ = now(state::read_shard(state, shard, &extents))?;
    Ok(())
}
