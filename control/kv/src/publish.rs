//! The only place where the durable state changes: a new manifest, then what it replaces goes.

use crate::error::KvError;
use crate::kv::Inner;
use crate::manifest::{self, Header};
use crate::memtable::Memtable;
use crate::version::{Edit, Version};
use bytes::Bytes;
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobKind, Owner};
use cfs_wire::limits::BLOB_BYTES_MAX;
use cfs_wire::planted::{self, Bug};
use std::rc::Rc;

/// Why the manifest changes, which decides what it says of the applied mark.
pub enum Cause {
    /// A memtable's run was written: the mark moves to the memtable's.
    Flush(Rc<Memtable>),
    /// Runs were merged: the mark stays.
    Merge,
    /// Everything was replaced: mark as given.
    Restore(Bytes),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Published {
    Done,
    /// A restore replaced everything since the work began; its output is void.
    Overtaken,
}

impl Inner {
    /// Puts the manifest that `edit` leads to; when it is durable, switches readers to it and
    /// throws away what it no longer names.
    ///
    /// `generation` is the one in which the work began. The edit's new tables must be durable.
    pub async fn publish(&self, mut edit: Edit, cause: Cause, generation: u64) -> Result<Published, KvError> {
        let _turn = self.manifest_turn.acquire(1).await;
        self.check_open()?;
        if self.state.borrow().generation != generation {
            return Ok(Published::Overtaken);
        }
        self.announce().await?;
        if edit.replace {
            edit.remove = self.state.borrow().version.tables().cloned().collect();
        }
        let (version, sequence, applied) = {
            let state = self.state.borrow();
            let version = state.version.apply(&edit);
            match &cause {
                Cause::Flush(memtable) => (version, memtable.sequence(), memtable.applied()),
                Cause::Merge => (version, state.synced_sequence, state.synced.clone()),
                Cause::Restore(mark) => (version, state.sequence + 1, mark.clone()),
            }
        };
        if planted::is(Bug::KvDeleteRunsEarly) {
            let _ = self.blobs.delete(edit.remove.iter().map(|table| table.id).collect()).await;
        }
        let id = self.put_manifest(&version, sequence, &applied).await?;
        let replaced = self.switch(&edit, cause, version, sequence, applied, id);
        self.trash.add(replaced);
        for table in &edit.remove {
            table.set_unnamed(true);
        }
        for table in edit.added() {
            table.set_unnamed(false);
        }
        self.changed.notify_all();
        Ok(Published::Done)
    }

    /// Before its first change, an opening repeats the manifest it chose under a version above
    /// all it has seen. A manifest that an earlier opening put without an answer, on a target
    /// that is away now, is then below everything this opening answers, should it come back.
    async fn announce(&self) -> Result<(), KvError> {
        if self.state.borrow().announced {
            return Ok(());
        }
        let (version, sequence, applied) = {
            let state = self.state.borrow();
            (state.version.clone(), state.synced_sequence, state.synced.clone())
        };
        let id = self.put_manifest(&version, sequence, &applied).await?;
        let replaced = {
            let mut state = self.state.borrow_mut();
            state.announced = true;
            state.manifest.replace(id)
        };
        self.trash.add(replaced);
        Ok(())
    }

    async fn put_manifest(&self, version: &Version, sequence: u64, applied: &Bytes) -> Result<BlobId, KvError> {
        let number = {
            let mut state = self.state.borrow_mut();
            // Also after a failure: what failed may still be on a target.
            state.manifest_version += 1;
            state.manifest_version
        };
        let applied = if planted::is(Bug::KvForgetApplied) { Bytes::new() } else { applied.clone() };
        let next_run = self.state.borrow().next_run;
        let header = Header { group: self.group, version: number, sequence, next_run, applied };
        let bytes = manifest::encode(&header, version);
        if bytes.len() > BLOB_BYTES_MAX {
            return Err(KvError::ManifestFull { group: self.group, bytes: bytes.len() });
        }
        let owner = Owner { high: self.group, low: number };
        Ok(self.blobs.put(BlobKind::Manifest, owner, bytes.into()).await?)
    }

    /// Makes the durable manifest the one that readers see; answers the manifest it replaces.
    fn switch(
        &self,
        edit: &Edit,
        cause: Cause,
        version: Version,
        sequence: u64,
        applied: Bytes,
        id: BlobId,
    ) -> Option<BlobId> {
        let mut state = self.state.borrow_mut();
        state.version = Rc::new(version);
        state.synced = applied.clone();
        state.synced_sequence = sequence;
        state.edits += u64::from(!edit.remove.is_empty());
        match cause {
            Cause::Flush(memtable) => {
                state.frozen.retain(|frozen| !Rc::ptr_eq(frozen, &memtable));
                state.checkpoints += 1;
            }
            Cause::Merge => {}
            Cause::Restore(_) => {
                state.generation += 1;
                // Batches written while this was under way are void, but their numbers are used.
                state.sequence = state.sequence.max(sequence);
                state.synced_sequence = state.sequence;
                state.applied = applied.clone();
                state.frozen.clear();
                state.active = Memtable::new(state.sequence, applied);
            }
        }
        state.manifest.replace(id)
    }
}
