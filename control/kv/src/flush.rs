//! Checkpoints: the active memtable is frozen, written out as a recent run, and named by a new
//! manifest with its mark.

use crate::compaction::ENTRIES_PER_TURN;
use crate::error::KvError;
use crate::kv::Inner;
use crate::memtable::{Memtable, MemtableCursor};
use crate::publish::Cause;
use crate::version::{Edit, Run};
use crate::writer::TableWriter;
use bytes::Bytes;
use cfs_wire::planted::{self, Bug};
use std::ops::Bound;
use std::rc::Rc;

impl Inner {
    /// Makes everything written up to the call durable; see [`crate::Kv::checkpoint`].
    pub async fn checkpoint(self: Rc<Self>) -> Result<Bytes, KvError> {
        let outcome = self.clone().write_out().await;
        // Also of a failure: who waits to be admitted tries the checkpoint itself then.
        self.changed.notify_all();
        outcome
    }

    async fn write_out(self: Rc<Self>) -> Result<Bytes, KvError> {
        let target = self.state.borrow().sequence;
        let _turn = self.flush_turn.acquire(1).await;
        self.check_open()?;
        // A checkpoint that was waited for, or a restore, may have covered the target.
        while self.state.borrow().synced_sequence < target {
            let (memtable, generation) = self.freeze();
            self.flush(memtable, generation).await?;
        }
        self.nudge_compaction();
        let state = self.state.borrow();
        Ok(if planted::is(Bug::KvSyncedEarly) { state.applied.clone() } else { state.synced.clone() })
    }

    /// The memtable to write out: one that an earlier failure left, else the active one, which
    /// a new one takes over from.
    fn freeze(&self) -> (Rc<Memtable>, u64) {
        let mut state = self.state.borrow_mut();
        if state.frozen.is_empty() {
            let active = Memtable::new(state.sequence, state.applied.clone());
            let frozen = std::mem::replace(&mut state.active, active);
            state.frozen.push(frozen);
        }
        (state.frozen[0].clone(), state.generation)
    }

    async fn flush(&self, memtable: Rc<Memtable>, generation: u64) -> Result<(), KvError> {
        let mut recent = Run::new();
        if !memtable.is_empty() {
            let (all, newest) = (Bound::Unbounded, memtable.sequence());
            let mut cursor = MemtableCursor::new(memtable.clone(), newest, all.clone(), all);
            let mut writer = TableWriter::new(self.sink(), self.take_run_number());
            let mut entries = 0;
            while let Some(entry) = cursor.next() {
                entries += 1;
                if entries % ENTRIES_PER_TURN == 0 {
                    self.handle.yield_now().await;
                }
                writer.push(&entry.key, entry.value.as_deref()).await?;
            }
            recent = self.finish_writer(writer).await?;
        }
        let edit = Edit { recent, ..Edit::default() };
        self.publish(edit, Cause::Flush(memtable.clone()), generation).await?;
        self.free_gently(memtable);
        Ok(())
    }

    /// Frees a memtable piece by piece: at once, its 50,000 entries would take milliseconds.
    /// Views that still hold it free it themselves.
    fn free_gently(&self, memtable: Rc<Memtable>) {
        let Ok(mut memtable) = Rc::try_unwrap(memtable) else { return };
        let handle = self.handle.clone();
        self.handle.spawn(async move {
            while !memtable.shed(ENTRIES_PER_TURN) {
                handle.yield_now().await;
            }
        });
    }
}
