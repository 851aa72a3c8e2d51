//! Finding the log again after a restart: which batches count, which are a torn tail, and
//! whether anything that was durable is missing.

use super::LogError;
use super::batch::{self, BadBatch, Header, Record};
use super::state::State;
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_wire::ShardId;
use cfs_wire::blobs::{BlobError, BlobInfo, BlobKind, MirroredBlobs};
use cfs_wire::ids::BlobId;
use cfs_wire::planted::{self, Bug};
use futures_util::{StreamExt, TryStreamExt, stream};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

/// Batches read at once: enough to hide a device's latency, few enough to bound memory.
const READS_AT_ONCE: usize = 8;

/// Blobs deleted by one call: one delete is one group commit of the store.
pub(super) const DELETES_AT_ONCE: usize = 256;

/// What recovery found and did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecoveryReport {
    /// Sequences of the batches that make up the log; `None` for a new one.
    pub range: Option<(u64, u64)>,
    /// Entries above the purge marks.
    pub entries: usize,
    pub groups: usize,
    /// Sequences of batches discarded because the crash tore them or one before them.
    pub torn: Vec<u64>,
    /// Batches of a cut that the crash interrupted, now deleted.
    pub obsolete: usize,
    /// Batches that count from now on and lack copies for which there is no room yet.
    pub unhealed: Vec<BlobId>,
}

/// A batch that could be read.
struct Found {
    id: BlobId,
    length: usize,
    header: Header,
    records: Vec<(ShardId, Record)>,
}

enum Read {
    Good(Found),
    /// Written in part, or damaged on every target.
    Bad(String),
}

pub(super) async fn recover(blobs: &dyn MirroredBlobs, handle: &Handle) -> Result<(State, RecoveryReport), LogError> {
    let listed = blobs.list(BlobKind::Log).await?;
    let reads = stream::iter(listed.iter().map(|info| read(blobs, *info)));
    let reads: Vec<Read> = reads.buffered(READS_AT_ONCE).try_collect().await?;
    let mut bad: BTreeMap<u64, String> = BTreeMap::new();
    let mut good: BTreeMap<u64, Found> = BTreeMap::new();
    let mut twins = BTreeSet::new();
    for (info, read) in listed.iter().zip(reads) {
        match read {
            Read::Good(found) => keep_newer(&mut good, &mut twins, found),
            Read::Bad(detail) => drop(bad.insert(info.owner.low, detail)),
        }
    }
    let newest = good.values().map(|found| found.header.incarnation).max().unwrap_or(0);
    drop_left_over(&mut good);
    let (first, last) = extent(&good, &bad)?.unwrap_or((1, 0));
    for (sequence, detail) in bad.range(last + 1..) {
        // The mark can't tell: it is known to be durable only by those behind it.
        tracing::error!(sequence, detail, "the end of the Raft log can't be read: if it was answered, it is lost");
    }
    let durable = good.values().map(|found| found.header.durable).max().unwrap_or(0);
    let kept: Vec<Found> =
        good.into_iter().filter(|(at, _)| (first..=last).contains(at)).map(|(_, found)| found).collect();
    // The one that is kept may be the one with fewer copies: the other goes after it has all.
    let mut unhealed = heal(blobs, kept.iter().filter(|found| twins.contains(&found.header.sequence))).await?;
    let spared: BTreeSet<u64> = unhealed.iter().map(|found| found.header.sequence).collect();
    let gone: Vec<&BlobInfo> = listed
        .iter()
        .filter(|info| !kept.iter().any(|found| found.id == info.id) && !spared.contains(&info.owner.low))
        .collect();
    let report = discard(blobs, &gone, first, last).await?;
    // Batches above the mark were never answered and may have one copy only; they count from
    // now on, so they get all of them: later, where full targets would keep the node from starting.
    let unanswered = |found: &&Found| found.header.sequence > durable && !twins.contains(&found.header.sequence);
    unhealed.extend(heal(blobs, kept.iter().filter(unanswered)).await?);
    let unhealed = unhealed.into_iter().map(|found| found.id).collect();
    let mut state = replay(kept, first, last)?;
    // The wall clock breaks the tie between two openings that saw the same past.
    let wall = u64::try_from(handle.wall().secs).unwrap_or(0);
    state.incarnation = (newest + 1).max(wall);
    let entries = state.groups.values().map(|group| group.entry_count()).sum();
    let report = RecoveryReport { entries, groups: state.groups.len(), unhealed, ..report };
    Ok((state, report))
}

/// Gives batches all their copies; answers those for which there is no room now.
async fn heal<'a>(
    blobs: &dyn MirroredBlobs,
    batches: impl Iterator<Item = &'a Found>,
) -> Result<Vec<&'a Found>, LogError> {
    let mut unhealed = Vec::new();
    for found in batches {
        match blobs.heal(found.id).await {
            Err(error) if error.is_retryable() => {
                tracing::warn!(batch = found.header.sequence, %error, "a batch of the Raft log lacks a copy");
                unhealed.push(found);
            }
            outcome => outcome?,
        }
    }
    Ok(unhealed)
}

async fn read(blobs: &dyn MirroredBlobs, info: BlobInfo) -> Result<Read, LogError> {
    let sequence = info.owner.low;
    let bytes: Bytes = match blobs.get(info.id, 0, info.length).await {
        Ok(bytes) => bytes,
        Err(error @ (BlobError::Unreadable { .. } | BlobError::NotFound(_) | BlobError::OutOfRange { .. })) => {
            return Ok(Read::Bad(error.to_string()));
        }
        // A store that can't be reached says nothing about what it holds.
        Err(error) => return Err(LogError::Store(error)),
    };
    match batch::decode(&bytes, sequence) {
        Ok((header, records)) => Ok(Read::Good(Found { id: info.id, length: bytes.len(), header, records })),
        Err(cause @ BadBatch::Version(_)) => Err(LogError::Format { sequence, cause }),
        Err(cause) => Ok(Read::Bad(cause.to_string())),
    }
}

/// Of two batches with one sequence the later opening's counts; a put that was tried twice left
/// two equal ones, `twins`.
fn keep_newer(good: &mut BTreeMap<u64, Found>, twins: &mut BTreeSet<u64>, found: Found) {
    let sequence = found.header.sequence;
    match good.get(&sequence).map(|other| other.header.incarnation.cmp(&found.header.incarnation)) {
        Some(Ordering::Greater) => {}
        Some(Ordering::Equal) => drop(twins.insert(sequence)),
        Some(Ordering::Less) | None => drop(good.insert(sequence, found)),
    }
}

/// A batch of an older opening behind one of a newer opening was discarded once already, on a
/// target that was away when it was deleted.
fn drop_left_over(good: &mut BTreeMap<u64, Found>) {
    let mut newest = 0;
    good.retain(|_, found| {
        let current = found.header.incarnation >= newest;
        newest = newest.max(found.header.incarnation);
        current
    });
}

/// First and last sequence of the log: the longest unbroken run that ends in a batch whose own
/// idea of the beginning it reaches back to.
fn extent(good: &BTreeMap<u64, Found>, bad: &BTreeMap<u64, String>) -> Result<Option<(u64, u64)>, LogError> {
    let durable = good.values().map(|found| found.header.durable).max().unwrap_or(0);
    let missing = |from: u64, to: u64| (from..=to).find(|at| !good.contains_key(at));
    let whole = good.values().rev().find(|found| missing(found.header.first, found.header.sequence).is_none());
    if let Some(found) = whole
        && (found.header.sequence >= durable || planted::is(Bug::LogCorruptionAsTornTail))
    {
        return Ok(Some((found.header.first, found.header.sequence)));
    }
    let lost = match good.values().rev().find(|found| found.header.durable == durable) {
        Some(found) => missing(found.header.first.min(durable), durable),
        // The first batch is waited for before there is a second: alone it may be torn.
        None => bad.keys().next().copied().filter(|first| *first > 1 || bad.len() > 1),
    };
    // Batches below its `first` go only once a batch and all before it are durable: where none reaches
    // back to its own beginning, one that did is missing.
    let beginning = good.values().rev().find_map(|found| missing(found.header.first, found.header.sequence));
    match lost.or(beginning) {
        Some(sequence) => {
            let detail = bad.get(&sequence).cloned().unwrap_or_else(|| "it is on no reachable target".into());
            Err(LogError::Corrupt { sequence, detail })
        }
        None => Ok(None),
    }
}

/// Deletes what does not count, durably: its sequences are about to be used again. On targets too
/// full for that it stays, and the incarnation tells it from what is written now.
async fn discard(
    blobs: &dyn MirroredBlobs,
    gone: &[&BlobInfo],
    first: u64,
    last: u64,
) -> Result<RecoveryReport, LogError> {
    let mut torn: Vec<u64> = gone.iter().map(|info| info.owner.low).filter(|at| *at > last).collect();
    torn.dedup();
    let obsolete = gone.iter().filter(|info| info.owner.low < first).count();
    let ids: Vec<BlobId> = gone.iter().map(|info| info.id).collect();
    for some in ids.chunks(DELETES_AT_ONCE) {
        match blobs.delete(some.to_vec()).await {
            Err(error) if error.is_retryable() => {
                tracing::warn!(%error, count = some.len(), "batches that do not count are still there");
            }
            outcome => outcome?,
        }
    }
    let range = (last >= first).then_some((first, last));
    Ok(RecoveryReport { range, torn, obsolete, ..RecoveryReport::default() })
}

fn replay(kept: Vec<Found>, first: u64, last: u64) -> Result<State, LogError> {
    let mut state = State::new();
    state.first = first;
    state.durable = last;
    state.next_sequence = last + 1;
    for found in kept {
        let sequence = found.header.sequence;
        state.recovered(sequence, found.id, found.length);
        for (group, record) in found.records {
            if planted::is(Bug::LogForgetVote) && matches!(record, Record::Vote(_)) {
                continue;
            }
            state.replay(group, record, sequence);
        }
    }
    for (id, group) in &state.groups {
        if let Some(index) = group.hole() {
            let detail = format!("group {id} lacks entry {index}");
            return Err(LogError::Corrupt { sequence: first, detail });
        }
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(sequence: u64, first: u64, durable: u64) -> (u64, Found) {
        let header = Header { sequence, first, durable, incarnation: 1 };
        (sequence, Found { id: BlobId(sequence.into()), length: 1, header, records: Vec::new() })
    }

    /// Batches 2 to 6 were cut off, for which 10 and all before it must have been durable.
    #[test]
    fn a_log_of_which_no_batch_reaches_back_to_its_beginning_is_damaged() {
        let batches = || BTreeMap::from([found(7, 2, 6), found(8, 2, 7), found(10, 7, 8)]);
        let bad = BTreeMap::from([(9, "checksum".to_owned())]);
        let named = |error: LogError| matches!(error, LogError::Corrupt { sequence: 9, .. });
        assert!(extent(&batches(), &bad).is_err_and(named));
        assert!(extent(&batches(), &BTreeMap::new()).is_err_and(named));
        let mut whole = batches();
        whole.extend([found(9, 2, 8)]);
        assert_eq!(extent(&whole, &BTreeMap::new()), Ok(Some((7, 10))));
        // Before the cut the last one may be torn, and what overtook it does not count.
        let before = BTreeMap::from([found(1, 1, 0), found(2, 1, 1), found(4, 1, 2)]);
        assert_eq!(extent(&before, &bad), Ok(Some((1, 2))));
    }
}
