//! What must hold between the records of the shards of one volume.

use super::super::entry::LogEntry;
use super::super::entry::Reply;
use super::super::{MemoryState, apply, keys, records::Counters, records::decode};
use super::{at, now_or_never};
use cfs_wire::data::Referent;
use cfs_wire::meta::{AuditRecord, FileKind, ShardOp, ShardReply};
use cfs_wire::{Ino, ShardId};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) fn audit(state: &MemoryState, shard: ShardId) -> Vec<AuditRecord> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let op = ShardOp::Audit { after, max: 7 };
        let outcome = now_or_never(apply(state, shard, &LogEntry::Shard { op, now: at(0) }));
        assert!(outcome.batch.is_empty());
        let Reply::Shard(ShardReply::Audit { records, next }) = outcome.reply else {
            panic!("not an audit: {:?}", outcome.reply);
        };
        all.extend(records);
        if next.is_none() {
            return all;
        }
        after = next;
    }
}

/// Link counts, back-references, orphans and counters of a quiet volume.
pub(crate) fn check(shards: &[(ShardId, &MemoryState)]) -> Result<(), String> {
    let records: Vec<AuditRecord> = shards.iter().flat_map(|(id, state)| audit(state, *id)).collect();
    let mut names: BTreeMap<Ino, u32> = BTreeMap::new();
    let mut subdirs: BTreeMap<Ino, u32> = BTreeMap::new();
    let mut parents: BTreeMap<Ino, Ino> = BTreeMap::new();
    let (mut extents, mut references, mut orphans) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let mut mapped: BTreeMap<Ino, u64> = BTreeMap::new();
    for record in &records {
        match record {
            AuditRecord::Entry { dir, ino, kind, .. } => {
                *names.entry(*ino).or_default() += 1;
                if *kind == FileKind::Directory {
                    *subdirs.entry(*dir).or_default() += 1;
                    parents.insert(*ino, *dir);
                }
            }
            AuditRecord::Extent { ino, extent } => {
                let referent: Referent = extent.location.referent();
                extents.insert((referent, *ino, extent.offset));
                *mapped.entry(*ino).or_default() += u64::from(extent.length);
            }
            AuditRecord::BackReference { referent, ino, offset } => {
                references.insert((*referent, *ino, *offset));
            }
            AuditRecord::Orphan { ino } => {
                orphans.insert(*ino);
            }
            AuditRecord::Transaction { detail } => return Err(format!("transaction left: {detail}")),
            _ => {}
        }
    }
    if extents != references {
        return Err(format!("extents {extents:?} but back-references {references:?}"));
    }
    let mut inodes = BTreeSet::new();
    for record in &records {
        let AuditRecord::Inode { ino, kind, nlink, allocated, inline, parent, .. } = record else { continue };
        inodes.insert(*ino);
        let named = names.get(ino).copied().unwrap_or(0);
        let expected = match kind {
            FileKind::Directory if *nlink == 0 => named,
            FileKind::Directory => 2 + subdirs.get(ino).copied().unwrap_or(0),
            _ => named,
        };
        if *nlink != expected {
            return Err(format!("{ino} {kind:?} has nlink {nlink}, not {expected}"));
        }
        if (*nlink == 0) != orphans.contains(ino) {
            return Err(format!("{ino} nlink {nlink}, orphan {}", orphans.contains(ino)));
        }
        if *kind == FileKind::Directory && *ino != Ino::ROOT && *nlink > 0 && parents.get(ino) != parent.as_ref() {
            return Err(format!("{ino} says its parent is {parent:?}, but {:?} names it", parents.get(ino)));
        }
        let bytes = mapped.remove(ino).unwrap_or(0) + if *kind == FileKind::File { u64::from(*inline) } else { 0 };
        if *allocated != bytes {
            return Err(format!("{ino} has {allocated} bytes allocated, not {bytes}"));
        }
    }
    if !mapped.is_empty() {
        return Err(format!("extents of inodes that are not there: {mapped:?}"));
    }
    if let Some(lost) = names.keys().chain(&orphans).find(|ino| !inodes.contains(ino)) {
        return Err(format!("{lost} is named or an orphan but not there"));
    }
    let mut counted = 0;
    for (id, state) in shards {
        let key = keys::table(*id, keys::COUNTERS);
        let counters: Counters = decode(&key, &state.map[&key]).unwrap();
        counted += counters.inodes;
        let locked = state.map.range(keys::table(*id, keys::KEY_LOCK)..keys::table(*id, keys::KEY_LOCK + 1)).count();
        if counters.prepared != 0 || locked != 0 {
            return Err(format!("{id}: {} prepared, {locked} keys locked", counters.prepared));
        }
    }
    if counted != inodes.len() as u64 {
        return Err(format!("{counted} inodes counted, {} there", inodes.len()));
    }
    Ok(())
}
