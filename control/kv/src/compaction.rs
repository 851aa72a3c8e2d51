//! Background merging: recent runs into level 1, and each level that is over its size into the
//! next. One merge at a time per group; it gives the core up after every block.

use crate::config::KvConfig;
use crate::cursor::{Merge, Reading, RunCursor, Source};
use crate::error::KvError;
use crate::kv::Inner;
use crate::publish::{Cause, Published};
use crate::table::Table;
use crate::version::{self, Edit, LEVELS_MAX, Run, Version};
use crate::writer::TableWriter;
use bytes::Bytes;
use cfs_wire::planted::{self, Bug};
use std::ops::Bound;
use std::rc::Rc;

/// Tables of one level merged downwards at once: with a factor of 8, some 72 MiB a merge.
const TABLES_MAX: usize = 8;
/// Entries looked at without giving the core up: under 100 µs.
pub const ENTRIES_PER_TURN: usize = 128;

/// A merge to be done.
struct Job {
    /// Newest first.
    inputs: Vec<Run>,
    output_level: usize,
    /// Nothing below the output can hold these keys: deletions have done their work.
    bottom: bool,
}

impl Job {
    fn tables(&self) -> impl Iterator<Item = &Rc<Table>> {
        self.inputs.iter().flatten()
    }

    /// Nothing to merge with: the tables only change their level.
    fn is_move(&self) -> bool {
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

/// `merged_to`: for each level, the highest key last merged out of it.
fn pick(version: &Version, config: &KvConfig, merged_to: &[Bytes; LEVELS_MAX]) -> Option<Job> {
    if version.recent.len() >= config.recent_runs_max {
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
    None
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

impl Inner {
    fn pick_job(&self) -> Option<(Job, u64)> {
        let state = self.state.borrow();
        pick(&state.version, &self.config, &state.merged_to).map(|job| (job, state.generation))
    }

    /// Starts the background task if there is something to merge and it does not run.
    pub fn nudge_compaction(self: &Rc<Self>) {
        if self.closed.get() || self.compacting.get() || self.pick_job().is_none() {
            return;
        }
        self.compacting.set(true);
        let inner = self.clone();
        self.handle.spawn(async move {
            while let (false, Some((job, generation))) = (inner.closed.get(), inner.pick_job()) {
                match inner.merge(job, generation).await {
                    Ok(()) | Err(KvError::Closed) => {}
                    Err(error) => {
                        // Tried again after the next checkpoint; reads go on over more runs.
                        tracing::warn!(group = inner.group, %error, "merging runs of the ordered store");
                        break;
                    }
                }
            }
            inner.compacting.set(false);
            inner.changed.notify_all();
        });
    }

    async fn merge(&self, job: Job, generation: u64) -> Result<(), KvError> {
        let _one_of_few = self.config.merges.acquire(1).await;
        self.check_open()?;
        let remove: Run = job.tables().cloned().collect();
        let merged_to = job.inputs[0].last().map(|table| table.shape.last_key.clone());
        let level = job.output_level;
        let tables = if job.is_move() { remove.clone() } else { self.merge_tables(job).await? };
        let edit = Edit { remove, level, tables, ..Edit::default() };
        let published = self.publish(edit, Cause::Merge, generation).await?;
        if published == Published::Done
            && let Some(source) = level.checked_sub(2)
            && let Some(key) = merged_to
        {
            self.state.borrow_mut().merged_to[source] = key;
        }
        Ok(())
    }

    async fn merge_tables(&self, job: Job) -> Result<Run, KvError> {
        let drop_deletions = job.bottom || planted::is(Bug::KvDropDeletionEarly);
        let whole = || (Bound::Unbounded, Bound::Unbounded);
        let sources = job.inputs.into_iter().map(|run| {
            let (lower, upper) = whole();
            Source::Run(RunCursor::new(self.reader.clone(), Reading::Ahead, run, lower, upper))
        });
        let mut merge = Merge::new(sources.collect());
        let mut writer = TableWriter::new(self.sink(), self.take_run_number());
        let mut entries = 0;
        while let Some(entry) = merge.next().await? {
            entries += 1;
            if entries % ENTRIES_PER_TURN == 0 {
                self.handle.yield_now().await;
                self.check_open()?;
            }
            if entry.value.is_none() && drop_deletions {
                continue;
            }
            writer.push(&entry.key, entry.value.as_deref()).await?;
        }
        self.finish_writer(writer).await
    }

    pub async fn finish_writer(&self, writer: TableWriter) -> Result<Run, KvError> {
        let (tables, written) = writer.finish().await?;
        self.state.borrow_mut().written_bytes += written;
        Ok(tables)
    }
}
