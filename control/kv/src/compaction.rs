//! Background merging: carries out what [`crate::pick`] asks for. One merge at a time per group;
//! it gives the core up after every block.

use crate::cursor::{Merge, Reading, RunCursor, Source};
use crate::error::KvError;
use crate::kv::Inner;
use crate::pick::{self, Job};
use crate::publish::{Cause, Published};
use crate::version::{Edit, Run};
use crate::writer::TableWriter;
use cfs_wire::planted::{self, Bug};
use std::ops::Bound;
use std::rc::Rc;

/// Entries looked at without giving the core up: under 100 µs.
pub const ENTRIES_PER_TURN: usize = 128;

impl Inner {
    fn pick_job(&self) -> Option<(Job, u64)> {
        let state = self.state.borrow();
        pick::pick(&state.version, &self.config, &state.merged_to).map(|job| (job, state.generation))
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
