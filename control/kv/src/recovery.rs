//! Choosing what the store is at open.
//!
//! The manifest of the highest version whose tables, and parts if it has any, all exist is taken.
//! It may be one whose put was never answered: its tables were durable before, so its state is a
//! later prefix, and fine. An older one is taken only when tables or parts of the newer are
//! missing. Both are durable before their manifest is put and deleted only after a later manifest
//! is durable, so, unless more targets are away than the mirror covers, the newer was then never
//! answered. **The host must still check that its log reaches down to [`crate::Kv::applied`]**,
//! and give the replica up if not: only the log knows what was cut. A manifest that can't be read
//! or decoded, be it in one of its parts, is an error, never a reason to go back.
//!
//! Parts that no root names are what a put left that died before its root: they count for nothing
//! but their version. Of a blob whose very begin can't be read nobody knows that it is one, so
//! that is an error too.

use crate::error::KvError;
use crate::manifest::{self, Header, ListedRun, NUMBER_MAX};
use crate::parts::{self, PartHeader, Root};
use bytes::Bytes;
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobInfo, BlobKind, MirroredBlobs};
use std::collections::{BTreeMap, BTreeSet};

/// As much of a blob as says whether it is a part.
const MAGIC_BYTES: u32 = 4;

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
    /// The manifest's blobs, a root before its parts; none in a store that never had a checkpoint.
    pub manifest: Vec<BlobId>,
    /// No manifest of a higher version exists, nor a part of one.
    pub version_seen_max: u64,
    /// Manifests, parts and tables that the chosen manifest does not name.
    pub leftovers: Vec<BlobId>,
}

/// What a blob of kind `Manifest` is.
enum Found {
    Part,
    /// A manifest of which parts or tables are missing, and which.
    Incomplete(KvError),
    Complete(Candidate),
}

struct Candidate {
    /// A root before its parts.
    ids: Vec<BlobId>,
    header: Header,
    runs: Vec<ListedRun>,
}

impl GroupBlobs {
    pub(crate) async fn choose(mut self, blobs: &dyn MirroredBlobs, group: u64) -> Result<Chosen, KvError> {
        self.manifests.sort_by_key(|info| (std::cmp::Reverse(info.owner.low), info.id));
        let version_seen_max = self.manifests.first().map_or(0, |info| info.owner.low);
        if let Some(info) = self.manifests.first().filter(|info| info.owner.low > NUMBER_MAX) {
            return Err(unusable(group, info, "its version is out of range".to_string()));
        }
        let mut best: Option<Candidate> = None;
        let mut incomplete: Option<KvError> = None;
        for info in &self.manifests {
            if best.as_ref().is_some_and(|best| best.header.version > info.owner.low) {
                break;
            }
            match self.look_at(blobs, group, info).await? {
                Found::Part => {}
                Found::Incomplete(error) => incomplete = incomplete.or(Some(error)),
                // Equal versions: an opening's repetition of what it chose, by two openings that
                // saw different targets. The later state is the one that can have been answered.
                Found::Complete(candidate) => {
                    if best.as_ref().is_none_or(|best| best.header.sequence < candidate.header.sequence) {
                        best = Some(candidate);
                    }
                }
            }
        }
        match (best, incomplete) {
            (None, Some(error)) => Err(error),
            (best, _) => Ok(self.finish(group, version_seen_max, best)),
        }
    }

    fn finish(self, group: u64, version_seen_max: u64, best: Option<Candidate>) -> Chosen {
        let (header, runs, manifest) = match best {
            Some(best) => (best.header, best.runs, best.ids),
            None => (Header { group, ..Header::default() }, Vec::new(), Vec::new()),
        };
        let mut tables = self.tables;
        for (id, _) in runs.iter().flat_map(|(_, tables)| tables) {
            tables.remove(id);
        }
        let named: BTreeSet<BlobId> = manifest.iter().copied().collect();
        let old = self.manifests.iter().map(|info| info.id).filter(|id| !named.contains(id));
        let leftovers = old.chain(tables.into_keys()).collect();
        Chosen { header, runs, manifest, version_seen_max, leftovers }
    }

    async fn look_at(&self, blobs: &dyn MirroredBlobs, group: u64, info: &BlobInfo) -> Result<Found, KvError> {
        let start = read(blobs, group, info, MAGIC_BYTES.min(info.length)).await?;
        if parts::is_part(&start) {
            return Ok(Found::Part);
        }
        let mut bytes = read(blobs, group, info, info.length).await?;
        let mut ids = vec![info.id];
        if parts::is_root(&bytes) {
            let root = parts::decode_root(&bytes).map_err(|reason| unusable(group, info, reason.to_string()))?;
            check_named(group, info, (root.group, root.version))?;
            let parts = match self.parts_of(&root) {
                Ok(parts) => parts,
                Err(missing) => return Ok(Found::Incomplete(unusable(group, info, missing.told("parts")))),
            };
            ids.extend(parts.iter().map(|part| part.id));
            bytes = join(blobs, group, info, &parts).await?.into();
        }
        let (header, runs) = manifest::decode(&bytes).map_err(|reason| unusable(group, info, reason.to_string()))?;
        check_named(group, info, (header.group, header.version))?;
        Ok(match self.missing_tables(&runs) {
            Some(missing) => Found::Incomplete(unusable(group, info, missing.told("runs"))),
            None => Found::Complete(Candidate { ids, header, runs }),
        })
    }

    /// The blobs a root lists, in order.
    fn parts_of(&self, root: &Root) -> Result<Vec<BlobInfo>, Missing> {
        let known: BTreeMap<BlobId, &BlobInfo> = self.manifests.iter().map(|info| (info.id, info)).collect();
        let (mut found, mut absent) = (Vec::new(), Vec::new());
        for part in &root.parts {
            match known.get(&part.id).filter(|info| info.length == part.length) {
                Some(info) => found.push(**info),
                None => absent.push(part.id),
            }
        }
        Missing::of(absent.into_iter()).map_or(Ok(found), Err)
    }

    fn missing_tables(&self, runs: &[ListedRun]) -> Option<Missing> {
        let listed = runs.iter().flat_map(|(_, tables)| tables);
        let exists = |id: &BlobId, length| self.tables.get(id).is_some_and(|info| info.length == length);
        Missing::of(listed.filter(|(id, shape)| !exists(id, shape.length)).map(|(id, _)| *id))
    }
}

/// Blobs that are listed but not there.
struct Missing {
    first: BlobId,
    count: usize,
}

impl Missing {
    fn of(mut ids: impl Iterator<Item = BlobId>) -> Option<Missing> {
        ids.next().map(|first| Missing { first, count: ids.count() + 1 })
    }

    fn told(&self, what: &str) -> String {
        format!("{} of its {what} are on no reachable target, {} first", self.count, self.first)
    }
}

fn unusable(group: u64, info: &BlobInfo, reason: String) -> KvError {
    KvError::Manifest { group, blob: info.id, version: info.owner.low, reason }
}

/// What a manifest or root says of itself against whose blob it is.
fn check_named(group: u64, info: &BlobInfo, named: (u64, u64)) -> Result<(), KvError> {
    if named == (group, info.owner.low) {
        return Ok(());
    }
    Err(unusable(group, info, "it belongs to another group or version".to_string()))
}

/// The first `length` bytes.
async fn read(blobs: &dyn MirroredBlobs, group: u64, info: &BlobInfo, length: u32) -> Result<Bytes, KvError> {
    match blobs.get(info.id, 0, length).await {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.is_retryable() => Err(error.into()),
        Err(error) => Err(unusable(group, info, error.to_string())),
    }
}

/// The manifest that the parts of a root hold.
async fn join(blobs: &dyn MirroredBlobs, group: u64, root: &BlobInfo, parts: &[BlobInfo]) -> Result<Vec<u8>, KvError> {
    let mut joined = Vec::new();
    for (info, index) in parts.iter().zip(0..) {
        let bytes = read(blobs, group, info, info.length).await?;
        let wrong = |reason: &str| unusable(group, info, format!("{reason}, as part {index} of {}", root.id));
        let (header, payload) = parts::decode_part(&bytes).map_err(|reason| wrong(reason.0))?;
        if header != (PartHeader { group, version: root.owner.low, index }) {
            return Err(wrong("it belongs elsewhere"));
        }
        joined.extend_from_slice(payload);
    }
    Ok(joined)
}
