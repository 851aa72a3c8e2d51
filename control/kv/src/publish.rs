//! The only place where the durable state changes: a new manifest, then what it replaces goes.
//!
//! A manifest beyond one blob is put as parts and then their root, whose put is what commits.

use crate::error::KvError;
use crate::kv::Inner;
use crate::manifest::{self, Header};
use crate::memtable::Memtable;
use crate::parts::{self, ListedPart, PART_FIXED_BYTES, PARTS_MAX, PartHeader, Root};
use crate::version::{Edit, Version};
use bytes::Bytes;
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobKind, Owner};
use cfs_wire::planted::{self, Bug};
use futures_util::future::join_all;
use std::rc::Rc;

/// Parts put at once: they share the store's group commits, and their copies stay at 4 MiB.
const PUTS_MAX: usize = 4;

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
        let ids = self.put_manifest(&version, sequence, &applied).await?;
        let replaced = self.switch(&edit, cause, version, sequence, applied, ids);
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
        let ids = self.put_manifest(&version, sequence, &applied).await?;
        let replaced = {
            let mut state = self.state.borrow_mut();
            state.announced = true;
            std::mem::replace(&mut state.manifest, ids)
        };
        self.trash.add(replaced);
        Ok(())
    }

    /// Answers its blobs, a root before its parts.
    async fn put_manifest(&self, version: &Version, sequence: u64, applied: &Bytes) -> Result<Vec<BlobId>, KvError> {
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
        if bytes.len() > self.config.manifest_blob_bytes_max {
            return self.put_split(number, &bytes).await;
        }
        Ok(vec![self.put_manifest_blob(number, bytes).await?])
    }

    async fn put_split(&self, version: u64, bytes: &[u8]) -> Result<Vec<BlobId>, KvError> {
        let payload_bytes_max = self.config.manifest_blob_bytes_max - PART_FIXED_BYTES;
        if bytes.len().div_ceil(payload_bytes_max) > PARTS_MAX {
            return Err(KvError::ManifestFull { group: self.group, bytes: bytes.len() });
        }
        let payloads: Vec<&[u8]> = bytes.chunks(payload_bytes_max).collect();
        let mut listed = Vec::with_capacity(payloads.len());
        let outcome = self.put_parts_and_root(version, &payloads, &mut listed).await;
        let parts = listed.iter().map(|part| part.id);
        match outcome {
            Ok(root) => Ok(std::iter::once(root).chain(parts).collect()),
            Err(error) => {
                // The root may be on a target all the same: without its parts it counts for nothing,
                // as a manifest does whose tables a failed checkpoint threw away.
                self.trash.add(parts);
                Err(error)
            }
        }
    }

    /// `listed` gets every part that is durable, also when the outcome is an error.
    async fn put_parts_and_root(
        &self,
        version: u64,
        payloads: &[&[u8]],
        listed: &mut Vec<ListedPart>,
    ) -> Result<BlobId, KvError> {
        for payloads in payloads.chunks(PUTS_MAX) {
            let first = listed.len() as u32;
            let puts = payloads.iter().zip(first..).map(|(payload, index)| self.put_part(version, index, payload));
            let mut failed = None;
            for put in join_all(puts).await {
                match put {
                    Ok(part) => listed.push(part),
                    Err(error) => failed = Some(error),
                }
            }
            if let Some(error) = failed {
                return Err(error);
            }
        }
        let root = Root { group: self.group, version, parts: listed.clone() };
        self.put_manifest_blob(version, parts::encode_root(&root)).await
    }

    async fn put_part(&self, version: u64, index: u32, payload: &[u8]) -> Result<ListedPart, KvError> {
        let bytes = parts::encode_part(&PartHeader { group: self.group, version, index }, payload);
        let length = bytes.len() as u32;
        Ok(ListedPart { id: self.put_manifest_blob(version, bytes).await?, length })
    }

    async fn put_manifest_blob(&self, version: u64, bytes: Vec<u8>) -> Result<BlobId, KvError> {
        let owner = Owner { high: self.group, low: version };
        Ok(self.blobs.put(BlobKind::Manifest, owner, bytes.into()).await?)
    }

    /// Makes the durable manifest the one that readers see; answers the blobs of the one it replaces.
    fn switch(
        &self,
        edit: &Edit,
        cause: Cause,
        version: Version,
        sequence: u64,
        applied: Bytes,
        ids: Vec<BlobId>,
    ) -> Vec<BlobId> {
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
        std::mem::replace(&mut state.manifest, ids)
    }
}
