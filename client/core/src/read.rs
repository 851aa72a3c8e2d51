//! Reads: our own dirty bytes over what is committed, from kept blocks or the data plane, and
//! ahead of sequential readers.

use crate::Client;
use crate::calls::Backoff;
use crate::dirty::overlay_frozen;
use crate::extents::{ExtentCache, Run, Source, place_in};
use crate::fetch::FetchError;
use crate::files::OpenFile;
use crate::inode::Inode;
use crate::pages::{BLOCK_BYTES, Found};
use bytes::{Bytes, BytesMut};
use cfs_wire::limits::{FILE_BYTES_MAX, RPC_BULK_BYTES_MAX};
use cfs_wire::meta::{MetaOp, MetaReply};
use cfs_wire::{Errno, Ino};
use std::rc::Rc;

/// Extents asked for at once: with 64 KiB chunks 64 MiB of file, in some 50 KiB of reply.
const EXTENTS_PER_CALL: u32 = 1024;
/// How much of a file's mapping is asked for when it may be kept.
const MAPPING_BYTES: u64 = 64 << 20;
/// Blocks in one fetch of read-ahead.
const BLOCKS_PER_FETCH: u64 = 4;
/// Reads this close to where the last one ended count as sequential: the kernel sends several
/// at once, and its threads overtake each other.
const SEQUENTIAL_SLACK: u64 = 2 << 20;
/// What `lseek` looks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whence {
    Data,
    Hole,
}

/// A part of a file as the server has it.
struct Mapped {
    /// Cut at `size`.
    runs: Vec<Run>,
    size: u64,
}

impl Client {
    /// Up to `length` bytes from `offset`; fewer only at the end of the file.
    pub async fn read(self: &Rc<Self>, file: &OpenFile, offset: u64, length: u32) -> Result<Bytes, Errno> {
        let length = (length as usize).min(RPC_BULK_BYTES_MAX);
        let inode = &file.inode;
        let (overlay, local_end, (base, size)) = loop {
            let session = self.session.borrow().clone();
            // Taken before the committed bytes are asked for: what is committed in between would
            // otherwise be in neither.
            let mut overlay: Vec<(u64, Bytes)> = Vec::new();
            let local_end = {
                let state = inode.state();
                if let Some(frozen) = &state.flushing {
                    overlay_frozen(frozen, offset, length, &mut overlay);
                }
                state.dirty.overlay(offset, length, &mut overlay);
                state.dirty_end()
            };
            let is_own = !overlay.is_empty() || local_end > 0;
            if is_own && !session.is_live() {
                // Whether it will ever be the file's is the server's to say: the session may be over, and
                // the file another's.
                self.read_call(MetaOp::GetAttr { ino: inode.ino }).await?;
            } else if let Some((_, bytes)) = overlay.last().filter(|(at, own)| *at == offset && own.len() == length) {
                return Ok(bytes.clone());
            }
            let committed = self.read_committed(file, offset, length).await?;
            if !is_own || !session.is_fenced() {
                break (overlay, local_end, committed);
            }
        };
        let wanted = size.max(local_end).saturating_sub(offset).min(length as u64) as usize;
        if overlay.is_empty() && base.len() == wanted {
            return Ok(base);
        }
        let mut result = BytesMut::with_capacity(wanted);
        result.extend_from_slice(&base[..base.len().min(wanted)]);
        result.resize(wanted, 0);
        for (start, bytes) in overlay {
            let at = (start - offset) as usize;
            // Nothing of our own lies beyond the end it has itself made.
            let fits = bytes.len().min(wanted.saturating_sub(at));
            result[at..at + fits].copy_from_slice(&bytes[..fits]);
        }
        Ok(result.freeze())
    }

    /// Committed bytes of a range, cut at the committed size, and that size.
    async fn read_committed(
        self: &Rc<Self>,
        file: &OpenFile,
        offset: u64,
        length: usize,
    ) -> Result<(Bytes, u64), Errno> {
        let inode = &file.inode;
        if self.may_use_cache(inode) {
            let size = inode.state().attr.as_ref().map(|attr| attr.size);
            if let Some(size) = size {
                let end = size.min(offset + length as u64);
                if offset >= end {
                    return Ok((Bytes::new(), size));
                }
                self.read_ahead(file, offset, end, size);
                if let Some(bytes) = self.kept_range(inode.ino, offset, end).await {
                    return Ok((bytes, size));
                }
            }
        }
        self.fetch_range(inode, offset, length as u64).await
    }

    /// A range put together from kept blocks; `None` if one of them is missing.
    async fn kept_range(&self, ino: Ino, offset: u64, end: u64) -> Option<Bytes> {
        let mut parts = Vec::new();
        for block in offset / BLOCK_BYTES..=(end - 1) / BLOCK_BYTES {
            let bytes = loop {
                let found = self.pages.borrow().find(ino, block);
                match found {
                    Found::Bytes(bytes) => break bytes,
                    Found::Loading(done) => done.await,
                    Found::Nothing => return None,
                }
            };
            let start = block * BLOCK_BYTES;
            let from = offset.saturating_sub(start) as usize;
            let to = (end - start).min(BLOCK_BYTES) as usize;
            // A shorter block than the size says was kept before the file grew.
            if to > bytes.len() || from > to {
                return None;
            }
            parts.push(bytes.slice(from..to));
        }
        if let [only] = &parts[..] {
            return Some(only.clone());
        }
        let mut joined = BytesMut::with_capacity((end - offset) as usize);
        parts.iter().for_each(|part| joined.extend_from_slice(part));
        Some(joined.freeze())
    }

    /// Starts fetching what a sequential reader will want next, this read included.
    fn read_ahead(self: &Rc<Self>, file: &OpenFile, offset: u64, end: u64, size: u64) {
        let last = file.read_end.get();
        let sequential = offset <= last + SEQUENTIAL_SLACK && offset + SEQUENTIAL_SLACK >= last;
        file.read_end.set(if sequential { last.max(end) } else { end });
        let bytes_max = self.config.read_ahead_bytes_max as u64;
        if !sequential || bytes_max == 0 || file.flags.direct {
            file.read_ahead.set(0);
            return;
        }
        let window = (file.read_ahead.get() * 2).clamp(BLOCK_BYTES, bytes_max.max(BLOCK_BYTES));
        file.read_ahead.set(window);
        // A small file is fetched whole with its first read; a large one once it is read on.
        let ahead = if last == 0 { 0 } else { window };
        let until = (end + ahead).min(size);
        let (first, last_block) = (offset / BLOCK_BYTES, (until - 1) / BLOCK_BYTES);
        let mut group: Vec<(u64, u64)> = Vec::new();
        for block in first..=last_block {
            let token = self.pages.borrow_mut().begin(file.inode.ino, block);
            let broken = token.is_none() || group.len() as u64 == BLOCKS_PER_FETCH;
            if broken && !group.is_empty() {
                self.spawn_load(&file.inode, std::mem::take(&mut group), size);
            }
            group.extend(token.map(|token| (block, token)));
        }
        if !group.is_empty() {
            self.spawn_load(&file.inode, group, size);
        }
    }

    /// Fetches blocks that follow each other; `group` holds each with its token.
    fn spawn_load(self: &Rc<Self>, inode: &Rc<Inode>, group: Vec<(u64, u64)>, size: u64) {
        let (client, inode) = (self.clone(), inode.clone());
        self.handle.spawn(async move {
            let _turn = client.read_ahead_turns.acquire(1).await;
            let start = group.first().map_or(0, |(block, _)| block * BLOCK_BYTES);
            let length = group.len() as u64 * BLOCK_BYTES;
            let fetched = client.fetch_range(&inode, start, length.min(size.saturating_sub(start))).await;
            let mut pages = client.pages.borrow_mut();
            for (index, (block, token)) in group.into_iter().enumerate() {
                let from = index * BLOCK_BYTES as usize;
                let cut = |bytes: &Bytes| {
                    let to = (from + BLOCK_BYTES as usize).min(bytes.len());
                    (from < to).then(|| bytes.slice(from..to))
                };
                let bytes = fetched.as_ref().ok().and_then(|(bytes, _)| cut(bytes));
                pages.end(inode.ino, block, token, bytes);
            }
            client.upkeep_wanted.notify_all();
        });
    }

    /// Committed bytes straight from the data plane. What is gone there was moved: the extents
    /// are asked for again.
    pub(crate) async fn fetch_range(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        offset: u64,
        length: u64,
    ) -> Result<(Bytes, u64), Errno> {
        let mut backoff = Backoff::new(self);
        let mut unreadable: Option<Vec<Run>> = None;
        loop {
            let mapped = self.mapping(inode, offset, length).await?;
            match self.fetch_runs(&mapped.runs).await {
                Ok(bytes) => return Ok((bytes, mapped.size)),
                Err(FetchError::Errno(errno)) => return Err(errno),
                // What was packed or written over and collected meanwhile is named by other extents
                // by now: only where they still say the same are the bytes lost.
                Err(FetchError::Moved) if unreadable.as_ref() == Some(&mapped.runs) => {
                    tracing::error!(ino = %inode.ino, offset, length, "bytes that the file refers to are lost");
                    return Err(Errno::EIO);
                }
                Err(FetchError::Moved) => {
                    unreadable = Some(mapped.runs);
                    self.stamps.changed(inode.ino);
                    inode.state().extents.clear();
                }
            }
            if !backoff.wait(self).await {
                return Err(Errno::EIO);
            }
        }
    }

    async fn fetch_runs(self: &Rc<Self>, runs: &[Run]) -> Result<Bytes, FetchError> {
        let stored = |run: &Run| match &run.source {
            Source::Stored(piece) => Some(piece.clone()),
            _ => None,
        };
        let pieces: Vec<_> = runs.iter().filter_map(stored).collect();
        let all_stored = pieces.len() == runs.len();
        let mut fetched = if pieces.is_empty() { Bytes::new() } else { self.fetch(pieces).await? };
        if all_stored {
            return Ok(fetched);
        }
        let mut result = BytesMut::with_capacity(runs.iter().map(|run| run.length as usize).sum());
        for run in runs {
            match &run.source {
                Source::Hole => result.resize(result.len() + run.length as usize, 0),
                Source::Inline(bytes) => result.extend_from_slice(bytes),
                Source::Stored(_) => result.extend_from_slice(&fetched.split_to(run.length as usize)),
            }
        }
        Ok(result.freeze())
    }

    /// Where a range's committed bytes are: as it is known, or as the shard says.
    async fn mapping(self: &Rc<Self>, inode: &Rc<Inode>, offset: u64, length: u64) -> Result<Mapped, Errno> {
        if self.may_use_cache(inode) {
            let state = inode.state();
            if let Some(size) = state.attr.as_ref().map(|attr| attr.size) {
                let end = offset.saturating_add(length).min(size);
                let runs = if offset >= end { Some(Vec::new()) } else { state.extents.runs(offset, end - offset) };
                if let Some(runs) = runs {
                    return Ok(Mapped { runs, size });
                }
            }
        }
        self.ask_mapping(inode, offset, length).await
    }

    async fn ask_mapping(self: &Rc<Self>, inode: &Rc<Inode>, offset: u64, length: u64) -> Result<Mapped, Errno> {
        let wanted_end = offset.saturating_add(length);
        let mut seen = ExtentCache::default();
        let mut at = offset;
        loop {
            let asked = if self.may_use_cache(inode) { length.max(MAPPING_BYTES) } else { wanted_end - at };
            let op = MetaOp::GetExtents { ino: inode.ino, offset: at, length: asked, extents_max: EXTENTS_PER_CALL };
            let answer = self.read_call(op).await?;
            let MetaReply::Extents(reply) = &answer.reply else {
                return Err(crate::cache::unexpected(&answer.reply));
            };
            self.take_attr(&reply.attr, reply.grant, &answer);
            if self.may_use_cache(inode) && self.is_current(inode, answer.stamp) {
                let known = &mut inode.state().extents;
                known.make_room(reply.extents.len());
                known.learn(at, reply);
            }
            seen.learn(at, reply);
            let size = reply.attr.size;
            let end = wanted_end.min(size);
            if offset >= end {
                return Ok(Mapped { runs: Vec::new(), size });
            }
            if let Some(runs) = seen.runs(offset, end - offset) {
                return Ok(Mapped { runs, size });
            }
            if reply.covered <= at {
                return Err(told_nothing(inode.ino, at));
            }
            at = reply.covered;
        }
    }

    /// The next data or hole at or after `offset`; ENXIO beyond the end.
    pub async fn lseek(self: &Rc<Self>, file: &OpenFile, offset: u64, whence: Whence) -> Result<u64, Errno> {
        let inode = &file.inode;
        let _ = self.flush_inode(inode).await;
        let mut at = offset;
        while let Some(length) = FILE_BYTES_MAX.checked_sub(at) {
            let op = MetaOp::GetExtents { ino: inode.ino, offset: at, length, extents_max: EXTENTS_PER_CALL };
            let answer = self.read_call(op).await?;
            let MetaReply::Extents(reply) = &answer.reply else {
                return Err(crate::cache::unexpected(&answer.reply));
            };
            let size = reply.attr.size;
            if at >= size {
                // Every file ends in a hole.
                let found = whence == Whence::Hole && offset < size;
                return if found { Ok(size) } else { Err(Errno::ENXIO) };
            }
            if let Some(found) = place_in(reply, at, whence) {
                return Ok(found);
            }
            if reply.covered <= at {
                return Err(told_nothing(inode.ino, at));
            }
            at = reply.covered;
        }
        Err(Errno::ENXIO)
    }
}

fn told_nothing(ino: Ino, at: u64) -> Errno {
    tracing::error!(%ino, at, "the server tells nothing of a file's extents");
    Errno::EIO
}
