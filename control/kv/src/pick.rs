//! Which runs are merged next: recent runs into level 1, each level that is over its size into
//! the next, and whatever holds back space that deletions have given up.

use crate::config::KvConfig;
use crate::table::Table;
use crate::version::{self, LEVELS_MAX, Run, Version};
use bytes::Bytes;
use std::ops::Bound;
use std::rc::Rc;

/// Tables of one level merged downwards at once: with a factor of 8, some 72 MiB a merge.
const TABLES_MAX: usize = 8;
/// A merge pays when one entry of so many is a deletion: it then writes at most four times what
/// it frees, and what deletions hold back stays below a quarter of what lives.
const DELETION_SHARE: u64 = 4;

/// A merge to be done.
pub struct Job {
    /// Newest first.
    pub inputs: Vec<Run>,
    pub output_level: usize,
    /// Nothing below the output can hold these keys: deletions have done their work.
    pub bottom: bool,
}

impl Job {
    pub fn tables(&self) -> impl Iterator<Item = &Rc<Table>> {
        self.inputs.iter().flatten()
    }

    /// Nothing to merge with: the tables only change their level.
    pub fn is_move(&self) -> bool {
        self.inputs.len() == 1 && !(self.bottom && self.tables().any(|table| table.shape.deletions > 0))
    }
}

/// The lowest and the highest key of some tables.
fn key_range<'a>(tables: impl Iterator<Item = &'a Rc<Table>>) -> Option<(Bytes, Bytes)> {
    tables.fold(None, |range, table| {
        let (first, last) = (&table.shape.first_key, &table.shape.last_key);
        Some(match range {
            None => (first.clone(), last.clone()),
            Some((low, high)) => (low.min(first.clone()), high.max(last.clone())),
        })
    })
}

fn overlap(run: &[Rc<Table>], (low, high): &(Bytes, Bytes)) -> Run {
    version::overlapping(run, &Bound::Included(low.clone()), &Bound::Included(high.clone())).to_vec()
}

/// Completes a job: adds what overlaps in the output level, and judges whether that is the bottom.
fn job(version: &Version, mut inputs: Vec<Run>, output_level: usize) -> Option<Job> {
    let range = key_range(inputs.iter().flatten())?;
    let below = version.levels.get(output_level - 1).map(|run| overlap(run, &range)).unwrap_or_default();
    if !below.is_empty() {
        inputs.push(below);
    }
    let range = key_range(inputs.iter().flatten())?;
    let bottom = version.levels.iter().skip(output_level).all(|run| overlap(run, &range).is_empty());
    Some(Job { inputs, output_level, bottom })
}

/// Sums over tables.
#[derive(Clone, Copy, Default)]
struct Totals {
    entries: u64,
    deletions: u64,
    bytes: u64,
}

impl Totals {
    fn of<'a>(runs: impl IntoIterator<Item = &'a Run>) -> Totals {
        runs.into_iter().flatten().fold(Totals::default(), |sum, table| Totals {
            entries: sum.entries + u64::from(table.shape.entries),
            deletions: sum.deletions + u64::from(table.shape.deletions),
            bytes: sum.bytes + u64::from(table.shape.length),
        })
    }

    fn and(self, other: Totals) -> Totals {
        Totals {
            entries: self.entries + other.entries,
            deletions: self.deletions + other.deletions,
            bytes: self.bytes + other.bytes,
        }
    }

    /// Whether merging these into what is `below` frees enough. A deletion is garbage once it
    /// meets what it hides, and most hide an entry of average size.
    fn deletions_pay(self, below: Totals, config: &KvConfig) -> bool {
        let all = self.and(below);
        let freed = u128::from(self.deletions) * u128::from(all.bytes) / u128::from(all.entries.max(1));
        self.deletions * DELETION_SHARE >= all.entries && self.deletions > 0 && freed >= config.garbage_bytes_min.into()
    }
}

/// Whether the recent runs are to be merged before there are many of them: for their deletions,
/// or because they are as large as all below, half of which they may have replaced. (Each such
/// merge doubles what is below, so it costs a growing store little.)
fn recent_pay(version: &Version, config: &KvConfig) -> bool {
    let (recent, below) = (Totals::of(&version.recent), Totals::of(&version.levels));
    let replaced =
        version.recent.len() > 1 && recent.entries >= below.entries && recent.bytes >= config.garbage_bytes_min.max(1);
    replaced || recent.deletions_pay(below, config)
}

/// Tables of a level whose deletions hold back space below, if any do.
fn deletions_in_level(version: &Version, config: &KvConfig, index: usize) -> Option<Run> {
    let run = version.levels.get(index)?;
    let below = Totals::of(version.levels.get(index + 1..)?);
    if below.entries == 0 || !Totals::of([run]).deletions_pay(below, config) {
        return None;
    }
    let tables = run.iter().skip_while(|table| table.shape.deletions == 0).take(TABLES_MAX);
    Some(tables.cloned().collect())
}

/// `merged_to`: for each level, the highest key last merged out of it.
pub fn pick(version: &Version, config: &KvConfig, merged_to: &[Bytes; LEVELS_MAX]) -> Option<Job> {
    if version.recent.len() >= config.recent_runs_max || recent_pay(version, config) {
        return job(version, version.recent.clone(), 1);
    }
    let mut limit = config.level_bytes;
    for (index, run) in version.levels.iter().enumerate().take(LEVELS_MAX - 1) {
        let excess = version::bytes(run).saturating_sub(limit);
        if excess > 0 {
            let start = run.partition_point(|table| table.shape.first_key <= merged_to[index]);
            let start = if start == run.len() { 0 } else { start };
            let mut taken = 0;
            let tables = run[start..].iter().take(TABLES_MAX).take_while(|table| {
                let wanted = taken < excess;
                taken += u64::from(table.shape.length);
                wanted
            });
            return job(version, vec![tables.cloned().collect()], index + 2);
        }
        limit = limit.saturating_mul(config.level_factor);
    }
    let levels = 0..version.levels.len();
    levels.into_iter().find_map(|index| job(version, vec![deletions_in_level(version, config, index)?], index + 2))
}

/// Where a restored store of this size goes: the first level that holds it without merging.
pub fn level_for(bytes: u64, config: &KvConfig) -> usize {
    let mut limit = config.level_bytes;
    for level in 1..LEVELS_MAX {
        if bytes <= limit {
            return level;
        }
        limit = limit.saturating_mul(config.level_factor);
    }
    LEVELS_MAX
}
