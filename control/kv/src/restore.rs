//! Replacing everything at once: how a Raft snapshot is installed.

use crate::block::Entry;
use crate::error::KvError;
use crate::kv::Inner;
use crate::pick::level_for;
use crate::publish::Cause;
use crate::version::{self, Edit};
use crate::writer::TableWriter;
use crate::{KEY_BYTES_MAX, MARK_BYTES_MAX, VALUE_BYTES_MAX};
use bytes::Bytes;
use std::rc::Rc;

/// Collects the new contents beside the old ones, which stay readable until `finish`. Dropping
/// it unfinished changes nothing.
pub struct Restore {
    inner: Rc<Inner>,
    writer: TableWriter,
    last: Option<Entry>,
}

impl Restore {
    pub(crate) fn new(inner: Rc<Inner>) -> Restore {
        let writer = TableWriter::new(inner.sink(), inner.take_run_number());
        Restore { inner, writer, last: None }
    }

    /// Keys must ascend strictly, as a [`crate::Scan`] gives them.
    ///
    /// # Panics
    /// When key or value are longer than a [`crate::Batch`] takes.
    pub async fn push(&mut self, key: Bytes, value: Bytes) -> Result<(), KvError> {
        assert!(key.len() <= KEY_BYTES_MAX && value.len() <= VALUE_BYTES_MAX, "an entry from a store fits a store");
        if self.last.as_ref().is_some_and(|last| last.key >= key) {
            return Err(KvError::Unsorted);
        }
        self.inner.check_open()?;
        self.writer.push(&key, Some(&value)).await?;
        self.last = Some(Entry { key, value: None });
        Ok(())
    }

    /// Durably and atomically replaces the store's contents and its applied mark. Batches written
    /// to the store meanwhile are discarded: they belong before the snapshot.
    pub async fn finish(self, applied: Bytes) -> Result<(), KvError> {
        assert!(applied.len() <= MARK_BYTES_MAX, "a mark of {} bytes", applied.len());
        let inner = self.inner.clone();
        let finished = inner.handle.spawn(async move {
            let inner = self.inner;
            let tables = inner.finish_writer(self.writer).await?;
            let _turn = inner.flush_turn.acquire(1).await;
            let level = level_for(version::bytes(&tables), &inner.config);
            let edit = Edit { replace: true, level, tables, ..Edit::default() };
            let generation = inner.state.borrow().generation;
            inner.publish(edit, Cause::Restore(applied), generation).await
        });
        finished.await.map_err(|_| KvError::Closed)??;
        Ok(())
    }
}
