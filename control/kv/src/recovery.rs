//! Choosing what the store is at open.
//!
//! The manifest of the highest version whose tables all exist is taken. It may be one whose put
//! was never answered: its tables were durable before, so its state is a later prefix, and fine.
//! An older one is taken only when tables of the newer are missing. Runs are durable before
//! their manifest is put and deleted only after a later manifest is durable, so, unless more
//! targets are away than the mirror covers, the newer was then never answered. **The host must
//! still check that its log reaches down to [`crate::Kv::applied`]**, and give the replica up
//! if not: only the log knows what was cut. A manifest that can't be read or decoded is an
//! error, never a reason to go back.

use crate::error::KvError;
use crate::manifest::{self, Header, ListedRun};
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobInfo, BlobKind, MirroredBlobs};
use std::collections::BTreeMap;

/// The manifests and tables of all groups, listed once so that opening hundreds of groups does
/// not list them all hundreds of times. Taken before any of them is opened.
pub struct Inventory {
    groups: BTreeMap<u64, GroupBlobs>,
}

#[derive(Clone, Default)]
pub(crate) struct GroupBlobs {
    manifests: Vec<BlobInfo>,
    tables: BTreeMap<BlobId, BlobInfo>,
}

impl Inventory {
    pub async fn load(blobs: &dyn MirroredBlobs) -> Result<Inventory, KvError> {
        let mut groups: BTreeMap<u64, GroupBlobs> = BTreeMap::new();
        for info in blobs.list(BlobKind::Manifest).await? {
            groups.entry(info.owner.high).or_default().manifests.push(info);
        }
        for info in blobs.list(BlobKind::Run).await? {
            groups.entry(info.owner.high).or_default().tables.insert(info.id, info);
        }
        Ok(Inventory { groups })
    }

    /// The groups that have anything on the targets.
    pub fn groups(&self) -> impl Iterator<Item = u64> {
        self.groups.keys().copied()
    }

    pub(crate) fn of(&self, group: u64) -> GroupBlobs {
        self.groups.get(&group).cloned().unwrap_or_default()
    }
}

/// What open starts from.
pub(crate) struct Chosen {
    pub header: Header,
    pub runs: Vec<ListedRun>,
    /// Absent in a store that never had a checkpoint.
    pub manifest: Option<BlobId>,
    /// No manifest of this or a higher version exists.
    pub version_seen_max: u64,
    /// Manifests and tables that the chosen manifest does not name.
    pub leftovers: Vec<BlobId>,
}

struct Candidate {
    info: BlobInfo,
    header: Header,
    runs: Vec<ListedRun>,
}

impl GroupBlobs {
    pub(crate) async fn choose(mut self, blobs: &dyn MirroredBlobs, group: u64) -> Result<Chosen, KvError> {
        self.manifests.sort_by_key(|info| (std::cmp::Reverse(info.owner.low), info.id));
        let version_seen_max = self.manifests.first().map_or(0, |info| info.owner.low);
        let mut best: Option<Candidate> = None;
        let mut incomplete: Option<KvError> = None;
        for info in &self.manifests {
            if best.as_ref().is_some_and(|best| best.info.owner.low > info.owner.low) {
                break;
            }
            let candidate = read(blobs, group, *info).await?;
            if let Some((missing, count)) = self.missing(&candidate) {
                let reason = format!("{count} of its runs are on no reachable target, {missing} first");
                incomplete.get_or_insert(unusable(group, info, reason));
                continue;
            }
            // Equal versions: an opening's repetition of what it chose, by two openings that
            // saw different targets. The later state is the one that can have been answered.
            if best.as_ref().is_none_or(|best| best.header.sequence < candidate.header.sequence) {
                best = Some(candidate);
            }
        }
        match (best, incomplete) {
            (None, Some(error)) => Err(error),
            (best, _) => Ok(self.finish(group, version_seen_max, best)),
        }
    }

    fn finish(self, group: u64, version_seen_max: u64, best: Option<Candidate>) -> Chosen {
        let (header, runs, manifest) = match best {
            Some(best) => (best.header, best.runs, Some(best.info.id)),
            None => (Header { group, ..Header::default() }, Vec::new(), None),
        };
        let mut tables = self.tables;
        for (id, _) in runs.iter().flat_map(|(_, tables)| tables) {
            tables.remove(id);
        }
        let old = self.manifests.iter().map(|info| info.id).filter(|id| Some(*id) != manifest);
        let leftovers = old.chain(tables.into_keys()).collect();
        Chosen { header, runs, manifest, version_seen_max, leftovers }
    }

    /// The first missing table and how many are missing, if any.
    fn missing(&self, candidate: &Candidate) -> Option<(BlobId, usize)> {
        let listed = candidate.runs.iter().flat_map(|(_, tables)| tables);
        let exists = |id: &BlobId, length| self.tables.get(id).is_some_and(|info| info.length == length);
        let mut missing = listed.filter(|(id, shape)| !exists(id, shape.length)).map(|(id, _)| *id);
        missing.next().map(|first| (first, missing.count() + 1))
    }
}

fn unusable(group: u64, info: &BlobInfo, reason: String) -> KvError {
    KvError::Manifest { group, blob: info.id, version: info.owner.low, reason }
}

async fn read(blobs: &dyn MirroredBlobs, group: u64, info: BlobInfo) -> Result<Candidate, KvError> {
    let bytes = match blobs.get(info.id, 0, info.length).await {
        Ok(bytes) => bytes,
        Err(error) if error.is_retryable() => return Err(error.into()),
        Err(error) => return Err(unusable(group, &info, error.to_string())),
    };
    let (header, runs) = manifest::decode(&bytes).map_err(|reason| unusable(group, &info, reason.to_string()))?;
    if (header.group, header.version) != (group, info.owner.low) {
        return Err(unusable(group, &info, "it belongs to another group or version".to_string()));
    }
    Ok(Candidate { info, header, runs })
}
