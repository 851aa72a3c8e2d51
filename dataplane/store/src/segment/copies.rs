//! Blobs in whole copies (hot ones, the log, the ordered store): which targets hold a sound one, and
//! putting back those that are missing or damaged.

use super::{Repaired, TargetPool};
use bytes::Bytes;
use cfs_wire::TargetId;
use cfs_wire::blobs::BlobInfo;

/// Why copies could not be put back.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum NotRestored {
    #[error("no copy can be read: {0}")]
    Unreadable(String),
    #[error("no target takes another copy")]
    NoTarget,
}

/// Who holds a copy.
struct Copies {
    /// Of these a sound one, and they take writes.
    sound: Vec<TargetId>,
    holders: Vec<TargetId>,
}

/// `deep` reads every byte.
async fn find(pool: &TargetPool, info: &BlobInfo, deep: bool) -> Copies {
    let mut copies = Copies { sound: Vec::new(), holders: Vec::new() };
    for target in pool.readable() {
        if target.stat(info.id).is_none() {
            continue;
        }
        copies.holders.push(target.id());
        let readable = !deep || target.get(info.id, 0, info.length).await.is_ok();
        if readable && target.failure().is_none() {
            copies.sound.push(target.id());
        }
    }
    copies
}

/// How many of `wanted` sound copies are missing.
pub(super) async fn missing(pool: &TargetPool, info: &BlobInfo, wanted: usize, deep: bool) -> usize {
    wanted.saturating_sub(find(pool, info, deep).await.sound.len())
}

/// Brings a blob back to `wanted` sound copies. One that is deleted meanwhile stays deleted.
pub(super) async fn restore(
    pool: &TargetPool,
    info: &BlobInfo,
    wanted: usize,
    deep: bool,
) -> Result<Repaired, NotRestored> {
    // Two of one blob at once would both put a copy.
    let _turn = pool.restoring().acquire(1).await;
    let mut report = Repaired { checked: 1, ..Repaired::default() };
    let Copies { mut sound, holders } = find(pool, info, deep).await;
    // A put heals a damaged copy in place: there may be no target without one, and where there is, the
    // zone of the damaged one could still not be collected.
    let mut damaged: Vec<_> = holders.iter().filter(|id| !sound.contains(*id)).filter_map(|id| pool.get(*id)).collect();
    damaged.retain(|target| target.failure().is_none());
    if holders.is_empty() || (sound.len() >= wanted && damaged.is_empty()) || is_deleted(pool, info, &holders) {
        return Ok(report);
    }
    let payload = match read(pool, info, &holders).await {
        Err(_) if is_deleted(pool, info, &holders) => return Ok(report),
        read => read?,
    };
    let mut exclude = holders.clone();
    while sound.len() < wanted || !damaged.is_empty() {
        let next = damaged.pop().or_else(|| pool.pick(1, &exclude).pop());
        let target = next.ok_or(NotRestored::NoTarget)?;
        exclude.push(target.id());
        if let Err(error) = target.put(info.id, info.kind, info.owner, info.geometry, payload.clone()).await {
            tracing::warn!(blob = %info.id, target = %target.id(), %error, "cannot place a copy");
            continue;
        }
        // The new copy must not outlive the others: who deletes them does not know of it.
        if is_deleted(pool, info, &holders) {
            if let Err(error) = target.delete(vec![info.id]).await {
                tracing::warn!(blob = %info.id, target = %target.id(), %error, "a copy of a deleted blob stays");
            }
            return Ok(report);
        }
        sound.push(target.id());
        report.rebuilt += 1;
        report.bytes += u64::from(info.length);
    }
    Ok(report)
}

/// Whether those who held a blob do no more, or won't soon.
fn is_deleted(pool: &TargetPool, info: &BlobInfo, holders: &[TargetId]) -> bool {
    let mut present: Vec<_> = holders.iter().filter_map(|id| pool.get(*id)).collect();
    // A failed target takes no deletions: what it lists may be deleted.
    if present.iter().any(|target| target.failure().is_none()) {
        present.retain(|target| target.failure().is_none());
    }
    !present.is_empty()
        && (present.iter().any(|target| target.is_being_deleted(info.id))
            || present.iter().all(|target| target.stat(info.id).is_none()))
}

async fn read(pool: &TargetPool, info: &BlobInfo, holders: &[TargetId]) -> Result<Bytes, NotRestored> {
    let mut detail = "nobody holds one".to_owned();
    for target in holders.iter().filter_map(|id| pool.get(*id)) {
        match target.get(info.id, 0, info.length).await {
            Ok(bytes) => return Ok(bytes),
            Err(error) => detail = format!("{}: {error}", target.id()),
        }
    }
    Err(NotRestored::Unreadable(detail))
}
