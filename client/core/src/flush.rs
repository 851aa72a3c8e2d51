//! Write-back: what is dirty is stored, then committed, one inode's commits one after the other.

use crate::Client;
use crate::calls::{Backoff, CallError};
use crate::dirty::{Frozen, frozen_bytes, frozen_end};
use crate::inode::{Inode, Written};
use crate::session::Session;
use bytes::Bytes;
use cfs_reactor::buffer::DmaBuf;
use cfs_wire::data::{Extent, Location};
use cfs_wire::limits::{COMMIT_WRITES_MAX, INLINE_BYTES_MAX, STORE_BYTES_MAX};
use cfs_wire::meta::{Commit, FileWrite, MetaOp, MetaReply};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Epoch, Errno, Ino, Policy, Timestamp};
use futures_util::stream::{self, StreamExt};
use std::rc::Rc;

/// Stored bytes with their place in the file.
pub(crate) type Placement = Extent;

/// Dirty data that could not be committed and is gone.
pub(crate) struct Lost {
    pub error: CallError,
    /// Whether the open files have been told.
    reported: bool,
}

impl Client {
    /// Everything dirty at the time of the call is committed, or reported as lost, at the end.
    pub(crate) async fn flush_inode(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<(), Errno> {
        if !inode.state().is_dirty() {
            return Ok(());
        }
        let failures = inode.state().failures.count;
        let _turn = inode.order.acquire(1).await;
        let flushed = self.flush_in_turn(inode).await;
        // One that was under way may have lost what this one was to commit.
        let state = inode.state();
        let lost = state.failures.last.filter(|_| state.failures.count != failures);
        lost.map_or(flushed, Err)
    }

    /// Before a file gets a name, maybe that of another: what was written to it here is committed,
    /// or it is an error. So it is where a flush before this one, or a fence, has lost what was
    /// written, and nobody has been told.
    pub(crate) async fn flush_for_name(self: &Rc<Self>, ino: Ino) -> Result<(), Errno> {
        let Some(inode) = self.known_inode(ino) else { return Ok(()) };
        let flushed = self.flush_inode(&inode).await;
        let failures = &mut inode.state().failures;
        let untold = std::mem::take(&mut failures.unseen);
        match failures.last {
            Some(errno) if untold => Err(errno),
            _ => flushed,
        }
    }

    /// Flushes in a task of its own, one per inode.
    pub(crate) fn spawn_flush(self: &Rc<Self>, inode: &Rc<Inode>) {
        if std::mem::replace(&mut inode.state().flush_spawned, true) {
            return;
        }
        let (client, inode) = (self.clone(), inode.clone());
        self.handle.spawn(async move {
            let turn = inode.order.acquire(1).await;
            // What is written from here on needs a task of its own.
            inode.state().flush_spawned = false;
            let _ = client.flush_in_turn(&inode).await;
            drop(turn);
        });
    }

    /// One flush; the caller holds the inode's turn.
    pub(crate) async fn flush_in_turn(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<(), Errno> {
        self.write_back(inode).await.map_err(|lost| {
            let mut state = inode.state();
            let unreadable = state.unlinked && state.opens == 0;
            if !lost.reported && !unreadable {
                tracing::error!(ino = %inode.ino, error = ?lost.error, "written data was lost");
                state.fail(lost.error.errno());
                self.has_lost.set(true);
            }
            lost.error.errno()
        })
    }

    /// What is dirty now is committed or dropped; the caller holds the inode's turn.
    pub(crate) async fn write_back(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<(), Lost> {
        let (frozen, written, session) = {
            let mut state = inode.state();
            if state.dirty.is_empty() {
                return Ok(());
            }
            let session = self.session.borrow().clone();
            let frozen = Rc::new(state.dirty.freeze());
            state.flushing = Some(frozen.clone());
            state.flushing_charge = std::mem::take(&mut state.dirty_charge);
            (frozen, state.written, session)
        };
        let mut outcome = self.commit_frozen(&session, inode, &frozen, written).await;
        if matches!(outcome, Err(CallError::Fenced { .. }))
            && planted::is(Bug::ClientKeepFencedData)
            && let Ok(next) = self.session().await
        {
            outcome = self.commit_frozen(&next, inode, &frozen, written).await;
        }
        let mut state = inode.state();
        let ours = state.flushing.as_ref().is_some_and(|flushing| Rc::ptr_eq(flushing, &frozen));
        if !ours {
            // The session was fenced meanwhile: the data was dropped and reported there.
            return outcome.map(|_| ()).map_err(|error| Lost { error, reported: true });
        }
        state.flushing = None;
        let charge = std::mem::take(&mut state.flushing_charge);
        if state.dirty.is_empty() {
            state.written = Written::default();
            self.dirty_inodes.borrow_mut().remove(&inode.ino);
        }
        self.dirty_less(frozen_bytes(&frozen));
        let stored = outcome.as_ref().is_ok_and(|placed| !placed.is_empty());
        self.settle(charge, if stored { frozen_bytes(&frozen) as u64 } else { 0 });
        self.stamps.changed(inode.ino);
        let mut pages = self.pages.borrow_mut();
        for (offset, run) in frozen.iter() {
            pages.drop_range(inode.ino, *offset, offset + run.len() as u64);
        }
        match outcome {
            Ok(placed) => {
                if placed.is_empty() {
                    state.extents.clear();
                }
                for extent in placed {
                    state.extents.replace(extent);
                }
                Ok(())
            }
            Err(error) => {
                state.attr = None;
                state.extents.clear();
                Err(Lost { error, reported: false })
            }
        }
    }

    /// Answers where the bytes were stored; nowhere if they went inline.
    async fn commit_frozen(
        self: &Rc<Self>,
        session: &Rc<Session>,
        inode: &Rc<Inode>,
        frozen: &Frozen,
        written: Written,
    ) -> Result<Vec<Placement>, CallError> {
        let kept = inode.state().flushing_charge > 0;
        let size = inode.state().attr.as_ref().map_or(u64::MAX, |attr| attr.size);
        let mut inline = size.max(frozen_end(frozen)) <= INLINE_BYTES_MAX as u64;
        let mut backoff = Backoff::new(self);
        loop {
            let placed = if inline {
                Vec::new()
            } else {
                self.store_runs(inode, frozen, kept).await.map_err(CallError::Errno)?
            };
            let writes: Vec<FileWrite> = if inline {
                let inline_write =
                    |(offset, run): (&u64, &Bytes)| FileWrite::Inline { offset: *offset, bytes: run.to_vec() };
                frozen.iter().map(inline_write).collect()
            } else {
                placed.iter().cloned().map(data_write).collect()
            };
            let (kill, capability) = (written.kill_privileges, written.drop_capability);
            match self.commit_all(session, inode, writes, written.at, kill, capability).await {
                Ok(()) => return Ok(placed),
                // Too long to be inline by now; or the server is so full that it makes no inode larger,
                // and there is room for data still.
                Err(CallError::Errno(Errno::EFBIG | Errno::ENOSPC)) if inline => inline = false,
                // The bytes are still here: they are stored anew under fresh references.
                Err(CallError::Stale) if backoff.wait(self).await => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Commits any number of writes, in as many commits as the limit asks for. `drop_capability`: each of
    /// them takes that away, by which the server tells what programs wrote from pages of mappings.
    pub(crate) async fn commit_all(
        self: &Rc<Self>,
        session: &Rc<Session>,
        inode: &Rc<Inode>,
        mut writes: Vec<FileWrite>,
        mtime: Option<Timestamp>,
        kill: bool,
        drop_capability: bool,
    ) -> Result<(), CallError> {
        let room = COMMIT_WRITES_MAX - usize::from(drop_capability);
        loop {
            let rest = writes.split_off(writes.len().min(room));
            writes.extend(drop_capability.then_some(FileWrite::DropCapability));
            self.commit(session, inode, writes, mtime, kill).await?;
            if rest.is_empty() {
                return Ok(());
            }
            writes = rest;
        }
    }

    /// One commit under the inode's next number; answers where an append went.
    pub(crate) async fn commit(
        self: &Rc<Self>,
        session: &Rc<Session>,
        inode: &Rc<Inode>,
        writes: Vec<FileWrite>,
        mtime: Option<Timestamp>,
        kill_privileges: bool,
    ) -> Result<Option<u64>, CallError> {
        let sequence = inode.state().commit_sequence + 1;
        let commit = Commit { ino: inode.ino, sequence, writes, mtime, kill_privileges };
        let leased = self.holds_lease(inode);
        let (outcome, _) = self.change_in(session, MetaOp::Commit(commit)).await;
        let mut state = inode.state();
        match outcome {
            Ok(answer) => {
                // In the next session the count begins anew, also where the old one's last answer comes
                // after that it was given up.
                state.commit_sequence = if session.is_fenced() { 0 } else { sequence };
                let unchanged = self.stamps.unchanged_since(inode.ino, answer.stamp);
                self.stamps.changed(inode.ino);
                match answer.reply {
                    MetaReply::Committed { attr, append_offset } => {
                        state.see_version(attr.version, leased);
                        state.committed_version = attr.version;
                        match unchanged {
                            true => state.learn_attr(&attr),
                            // Another change of ours, of a link for one, may have been answered before.
                            false => state.forget_attr_before(attr.version),
                        }
                        Ok(append_offset)
                    }
                    other => Err(CallError::Errno(crate::cache::unexpected(&other))),
                }
            }
            Err(error) => {
                if matches!(error, CallError::Unanswered | CallError::Fenced { .. }) {
                    // Whether the number was used is not known: the count begins anew.
                    state.commit_sequence = 0;
                }
                Err(error)
            }
        }
    }

    /// Stores runs, several calls at once; answers where each byte went, in file order. `kept`: they are
    /// charged for.
    pub(crate) async fn store_runs(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        frozen: &Frozen,
        kept: bool,
    ) -> Result<Vec<Placement>, Errno> {
        let policy = self.policy(inode).await?;
        let calls = batches(frozen).into_iter().map(|batch| async move {
            let reply = self.store(inode.ino, policy, batch.bytes(), kept).await?;
            let pieces = reply.pieces.into_iter().map(|piece| (piece.length, piece.location)).collect();
            place(&batch.runs, pieces, reply.epoch)
        });
        let mut results = stream::iter(calls).buffered(self.config.stores_in_flight.max(1));
        let mut placed = Vec::new();
        while let Some(result) = results.next().await {
            placed.extend(result?);
        }
        Ok(placed)
    }

    /// How redundantly new bytes of this file are stored.
    pub(crate) async fn policy(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<Policy, Errno> {
        let known = inode.state().policy;
        if let Some(policy) = known {
            return Ok(policy);
        }
        match self.read_call(MetaOp::GetAttr { ino: inode.ino }).await?.reply {
            MetaReply::Attr { attr, .. } => {
                inode.state().policy = Some(attr.policy);
                Ok(attr.policy)
            }
            other => Err(crate::cache::unexpected(&other)),
        }
    }
}

pub(crate) fn data_write(placement: Placement) -> FileWrite {
    let Placement { offset, length, location, epoch } = placement;
    FileWrite::Data { offset, length, location, epoch }
}

/// Runs that travel in one `store` call.
#[derive(Default)]
struct Batch {
    /// Offset in the file and bytes.
    runs: Vec<(u64, Bytes)>,
    length: usize,
}

impl Batch {
    fn bytes(&self) -> Bytes {
        if let [(_, only)] = &self.runs[..] {
            return only.clone();
        }
        let mut joined = DmaBuf::uninitialised(self.length);
        let mut at = 0;
        for (_, run) in &self.runs {
            joined[at..at + run.len()].copy_from_slice(run);
            at += run.len();
        }
        joined.freeze()
    }
}

/// Cuts runs into calls of at most [`STORE_BYTES_MAX`].
fn batches(frozen: &Frozen) -> Vec<Batch> {
    let mut batches = Vec::new();
    let mut batch = Batch::default();
    for (offset, run) in frozen {
        let (mut offset, mut run) = (*offset, run.clone());
        while !run.is_empty() {
            let part = run.split_to(run.len().min(STORE_BYTES_MAX - batch.length));
            batch.length += part.len();
            let next = offset + part.len() as u64;
            batch.runs.push((offset, part));
            offset = next;
            if batch.length == STORE_BYTES_MAX {
                batches.push(std::mem::take(&mut batch));
            }
        }
    }
    if batch.length > 0 {
        batches.push(batch);
    }
    batches
}

/// Deals the stored pieces out to the runs they hold: a piece may span several.
fn place(runs: &[(u64, Bytes)], pieces: Vec<(u32, Location)>, epoch: Epoch) -> Result<Vec<Placement>, Errno> {
    let mut placed = Vec::new();
    let mut pieces = pieces.into_iter();
    let mut current: Option<(u32, Location)> = None;
    for (offset, run) in runs {
        let (mut offset, mut left) = (*offset, run.len() as u32);
        while left > 0 {
            let Some((available, location)) = current.take().or_else(|| pieces.next()) else {
                tracing::error!("the data plane says where fewer bytes are than it was given");
                return Err(Errno::EIO);
            };
            let length = available.min(left);
            if available > length {
                current = Some((available - length, location.skip(length)));
            }
            if length > 0 {
                placed.push(Placement { offset, length, location, epoch });
            }
            offset += u64::from(length);
            left -= length;
        }
    }
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_wire::BlobId;

    fn hot(blob: u128, offset: u32) -> Location {
        Location::Hot { blob: BlobId(blob), targets: Default::default(), offset }
    }

    #[test]
    fn a_piece_that_spans_two_runs_is_dealt_out_to_both() {
        let runs = [(100, Bytes::from_static(b"aaaa")), (300, Bytes::from_static(b"bbbb"))];
        let placed = place(&runs, vec![(6, hot(1, 0)), (2, hot(2, 0))], Epoch(3)).unwrap();
        let expected = [(100, 4, hot(1, 0)), (300, 2, hot(1, 4)), (302, 2, hot(2, 0))];
        let expected =
            expected.map(|(offset, length, location)| Placement { offset, length, location, epoch: Epoch(3) });
        assert_eq!(placed, expected);
        assert_eq!(place(&runs, vec![(6, hot(1, 0))], Epoch(3)), Err(Errno::EIO));
    }

    #[test]
    fn no_call_exceeds_the_limit_and_no_byte_is_lost() {
        let long = Bytes::from(vec![1u8; STORE_BYTES_MAX + 10]);
        let frozen = Frozen::from([(0, Bytes::from_static(b"xy")), (100, long)]);
        let lengths: Vec<usize> = batches(&frozen).iter().map(|batch| batch.bytes().len()).collect();
        assert_eq!(lengths, [STORE_BYTES_MAX, 12]);
    }
}
