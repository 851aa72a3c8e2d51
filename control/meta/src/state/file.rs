//! File content: extents that never overlap, the inline head beneath them, the back-references
//! that keep stored bytes alive, and commits.
//!
//! Content is: where an extent covers, the extent; else within `inline`, those bytes; else
//! zero. Inline bytes beneath an extent are kept zero, so that nothing old shows when the
//! extent is punched out, and they end before an extent that reaches their end. So a `Data`
//! over an inline file loses nothing of the rest and needs no bytes read.

use super::entry::{ChangeKind, FollowUp};
use super::inode::REAP_EXTENTS_MAX;
use super::records::{CommitMark, ExtentRecord, Inode, LeaseRecord, Versioned, decode};
use super::view::{Attempt, Fail, View, bad_key};
use super::{StateError, keys};
use cfs_wire::data::{Extent, Location, Referent};
use cfs_wire::limits::{FILE_BYTES_MAX, INLINE_BYTES_MAX, PUNCH_EXTENTS_MAX};
use cfs_wire::meta::{Commit, FileKind, FileWrite, MetaError, MetaReply, XATTR_CAPABILITY};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Epoch, Errno, Ino, SessionId, Timestamp};

/// Sessions whose last commit an inode remembers; more write it only in turns.
const COMMIT_MARKS_MAX: usize = 8;
/// Extents fetched at once when a range is changed.
const PAGE_ROWS: usize = 128;
/// Extents in one reply: with five targets each well below the body limit.
const EXTENTS_MAX: u32 = 8192;

/// Extents that the entry of a truncation drops itself. More are released by entries of their
/// own, or by the writes behind it in the same commit. In tests nearly every truncation goes that
/// way.
const TRIM_EXTENTS_MAX: usize = if cfg!(test) { 3 } else { PUNCH_EXTENTS_MAX };

/// What the writes of one commit have come to so far.
struct Done {
    append_offset: Option<u64>,
    /// Extents that they may still drop without having bytes of their own for the place.
    room: usize,
}

fn malformed(what: &str) -> Fail {
    MetaError::Malformed(what.to_owned()).into()
}

fn end_of(offset: u64, length: u64) -> Result<u64, Errno> {
    offset.checked_add(length).filter(|end| *end <= FILE_BYTES_MAX).ok_or(Errno::EFBIG)
}

/// The part of `extent` from `from` to `to`, both within it.
fn cut(extent: &Extent, from: u64, to: u64) -> Extent {
    let skipped = (from - extent.offset) as u32;
    let location = if skipped == 0 { extent.location.clone() } else { extent.location.skip(skipped) };
    Extent { offset: from, length: (to - from) as u32, location, epoch: extent.epoch }
}

pub(crate) fn extent_end(extent: &Extent) -> u64 {
    extent.offset + u64::from(extent.length)
}

pub(crate) fn extent_of(key: &[u8], value: &[u8]) -> Result<Extent, StateError> {
    let end = keys::u64_at(key, keys::FIELDS + 8).ok_or_else(|| bad_key(key))?;
    let record = decode::<Versioned<ExtentRecord>>(key, value)?.record;
    let offset = end.checked_sub(u64::from(record.length)).ok_or_else(|| bad_key(key))?;
    Ok(Extent { offset, length: record.length, location: record.location, epoch: record.epoch })
}

impl View<'_> {
    /// Extents that overlap `start..end`, at most `max`, in order.
    pub(crate) async fn extents(&self, ino: Ino, start: u64, end: u64, max: usize) -> Result<Vec<Extent>, StateError> {
        let limit = keys::after_prefix(&keys::of_ino(self.shard, keys::EXTENT, ino));
        let mut found = Vec::new();
        // The first key above `start` is the first extent that ends behind it.
        let mut from = start.saturating_add(1);
        while found.len() < max {
            let rows = self.scan(keys::extent(self.shard, ino, from), &limit, PAGE_ROWS.min(max)).await?;
            let last_page = rows.len() < PAGE_ROWS.min(max);
            for (key, value) in rows {
                let extent = extent_of(&key, &value)?;
                if extent.offset >= end {
                    return Ok(found);
                }
                from = extent_end(&extent).saturating_add(1);
                found.push(extent);
            }
            if last_page {
                break;
            }
        }
        found.truncate(max);
        Ok(found)
    }

    /// Stores an extent and its back-reference: always together, so that what a file shows is
    /// never collected.
    fn add_extent(&mut self, inode: &mut Inode, extent: &Extent) {
        let Extent { offset, length, location, epoch } = extent.clone();
        let referent = location.referent();
        inode.mapped += u64::from(length);
        let record = ExtentRecord { length, location, epoch };
        self.put_versioned(keys::extent(self.shard, inode.ino, extent_end(extent)), &record);
        if !planted::is(Bug::MetaForgetReference) {
            self.put(keys::reference(self.shard, &referent, inode.ino, offset), &());
        }
    }

    fn drop_extent(&mut self, inode: &mut Inode, extent: &Extent) {
        let referent = extent.location.referent();
        inode.mapped = inode.mapped.saturating_sub(u64::from(extent.length));
        self.delete(keys::extent(self.shard, inode.ino, extent_end(extent)));
        self.delete(keys::reference(self.shard, &referent, inode.ino, extent.offset));
        self.lost.insert(referent, extent.location.clone());
    }

    /// Makes `start..end` a hole in the extents; what reaches over an edge is cut there.
    async fn punch_extents(&mut self, inode: &mut Inode, start: u64, end: u64) -> Result<(), StateError> {
        let mut from = start;
        loop {
            let hit = self.extents(inode.ino, from, end, PAGE_ROWS).await?;
            for extent in &hit {
                self.drop_extent(inode, extent);
                let stop = extent_end(extent);
                if extent.offset < start {
                    self.add_extent(inode, &cut(extent, extent.offset, start));
                }
                if stop > end {
                    self.add_extent(inode, &cut(extent, end, stop));
                }
            }
            match hit.last() {
                // Not from the start again: that would read over all that was deleted already.
                Some(last) if hit.len() == PAGE_ROWS => from = extent_end(last),
                _ => return Ok(()),
            }
        }
    }

    /// Drops up to `max` extents of an inode that goes; true when none is left.
    pub(crate) async fn release_extents(&mut self, inode: &mut Inode, max: usize) -> Result<bool, StateError> {
        let mut hit = self.extents(inode.ino, 0, u64::MAX, max + 1).await?;
        let whole = hit.len() <= max;
        hit.truncate(max);
        for extent in &hit {
            self.drop_extent(inode, extent);
        }
        Ok(whole)
    }

    /// Puts what lost its last reference in this shard on the released list. Runs once per
    /// entry, after all of its writes.
    pub(crate) async fn settle_released(&mut self) -> Result<(), StateError> {
        for (referent, location) in std::mem::take(&mut self.lost) {
            if !self.any(&keys::references(self.shard, &referent)).await? {
                let record = super::records::ReleasedRecord { location, seen: false };
                self.put(keys::released(self.shard, &referent), &record);
            }
        }
        Ok(())
    }

    /// Whether a new reference may be made: handed out recently enough, and not being
    /// collected.
    ///
    /// No reference comes to something deleted: that is deleted only after one freeze, of epoch f, to
    /// which every shard answered that it holds none.
    /// - With what was just stored comes the epoch of the store, which is at most f: freezes are of
    ///   what is there, under the newest epoch.
    /// - With the extents of a file comes `handed_out_epoch` of the shard that holds them. Its freeze is a
    ///   later entry of the same log, or it would have answered that it holds one; and `freeze`
    ///   refuses an f below what the shard has handed out by then.
    ///
    /// So whoever got hold of it has an epoch of at most f. Where that is still accepted, the freeze of
    /// that shard counts too (`is_frozen`), and a reference made before it was answered as held.
    pub(crate) async fn check_reference(&self, referent: &Referent, epoch: Epoch) -> Attempt<()> {
        if planted::is(Bug::MetaAcceptFrozen) {
            return Ok(());
        }
        let old = epoch < self.counters.minimum_epoch;
        if old || self.is_frozen(referent).await? {
            return Err(MetaError::StaleReference.into());
        }
        Ok(())
    }

    async fn write_data(&mut self, inode: &mut Inode, extent: Extent) -> Attempt<()> {
        if extent.length == 0 {
            return Err(malformed("data of length 0"));
        }
        let end = end_of(extent.offset, extent.length.into())?;
        let (Location::Hot { offset, .. } | Location::Chunk { offset, .. }) = &extent.location;
        if offset.checked_add(extent.length).is_none() {
            return Err(malformed("location beyond 4 GiB"));
        }
        self.check_reference(&extent.location.referent(), extent.epoch).await?;
        self.punch_extents(inode, extent.offset, end).await?;
        clear_inline(inode, extent.offset, end);
        self.add_extent(inode, &extent);
        inode.size = inode.size.max(end);
        Ok(())
    }

    async fn write_inline(&mut self, inode: &mut Inode, offset: u64, bytes: &[u8]) -> Attempt<()> {
        let end = end_of(offset, bytes.len() as u64)?;
        if inode.size.max(end) > INLINE_BYTES_MAX as u64 {
            return Err(Errno::EFBIG.into());
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.punch_extents(inode, offset, end).await?;
        let (start, stop) = (offset as usize, end as usize);
        if inode.inline.len() < stop {
            inode.inline.resize(stop, 0);
        }
        inode.inline[start..stop].copy_from_slice(bytes);
        inode.size = inode.size.max(end);
        Ok(())
    }

    pub(crate) async fn truncate(&mut self, inode: &mut Inode, size: u64) -> Attempt<()> {
        if size > FILE_BYTES_MAX {
            return Err(Errno::EFBIG.into());
        }
        self.check_trimmed(inode)?;
        if size < inode.size {
            clear_inline(inode, size, u64::MAX);
            inode.trim = Some(size);
            self.put(keys::trimming(self.shard, inode.ino), &());
            self.trim(inode, TRIM_EXTENTS_MAX).await?;
            if inode.trim.is_some() {
                self.follow_up.push(FollowUp::Reap { ino: inode.ino });
            }
        }
        inode.size = size;
        Ok(())
    }

    /// Drops up to `max` extents that a truncation left behind. What reaches over the new end
    /// is cut by the first call, the truncation's own.
    async fn trim(&mut self, inode: &mut Inode, max: usize) -> Result<(), StateError> {
        let Some(size) = inode.trim else {
            return Ok(());
        };
        let mut hit = self.extents(inode.ino, size, u64::MAX, max.saturating_add(1)).await?;
        if hit.len() <= max {
            inode.trim = None;
            self.delete(keys::trimming(self.shard, inode.ino));
        }
        hit.truncate(max);
        for extent in &hit {
            self.drop_extent(inode, extent);
            if extent.offset < size {
                self.add_extent(inode, &cut(extent, extent.offset, size));
            }
        }
        Ok(())
    }

    /// `LogEntry::Reap` of a truncated file.
    pub(crate) async fn go_on_trimming(&mut self, mut inode: Inode) -> Attempt<()> {
        self.trim(&mut inode, REAP_EXTENTS_MAX).await?;
        self.put_versioned(keys::inode(self.shard, inode.ino), &inode);
        if inode.trim.is_some() {
            self.follow_up.push(FollowUp::Reap { ino: inode.ino });
        }
        Ok(())
    }

    /// Content waits until nothing of a truncated past lies where it might come to lie.
    fn check_trimmed(&self, inode: &Inode) -> Attempt<()> {
        match inode.trim {
            Some(_) => Err(MetaError::Busy("a truncation is being finished".to_owned()).into()),
            None => Ok(()),
        }
    }

    /// Takes extents that overlap `start..end` out of what a commit may drop.
    async fn take_room(&self, ino: Ino, start: u64, end: u64, room: &mut usize) -> Attempt<()> {
        let met = self.extents(ino, start, end, *room + 1).await?.len();
        *room = room.checked_sub(met).ok_or(Errno::E2BIG)?;
        Ok(())
    }

    async fn write(&mut self, inode: &mut Inode, write: &FileWrite, done: &mut Done) -> Attempt<()> {
        // After a truncation in the same commit.
        if let Some(size) = inode.trim {
            self.take_room(inode.ino, size, u64::MAX, &mut done.room).await?;
            self.trim(inode, usize::MAX).await?;
        }
        match write {
            FileWrite::Data { offset, length, location, epoch } => {
                let (offset, length, location, epoch) = (*offset, *length, location.clone(), *epoch);
                self.write_data(inode, Extent { offset, length, location, epoch }).await
            }
            FileWrite::Append { length, location, epoch } => {
                let (offset, length, location, epoch) = (inode.size, *length, location.clone(), *epoch);
                done.append_offset.get_or_insert(offset);
                self.write_data(inode, Extent { offset, length, location, epoch }).await
            }
            FileWrite::Inline { offset, bytes } => self.write_inline(inode, *offset, bytes).await,
            FileWrite::AppendInline { bytes } => {
                let offset = inode.size;
                done.append_offset.get_or_insert(offset);
                self.write_inline(inode, offset, bytes).await
            }
            FileWrite::Punch { offset, length } => {
                let end = offset.saturating_add(*length);
                self.take_room(inode.ino, *offset, end, &mut done.room).await?;
                self.punch_extents(inode, *offset, end).await?;
                clear_inline(inode, *offset, end);
                Ok(())
            }
            FileWrite::Truncate { size } => self.truncate(inode, *size).await,
            FileWrite::Extend { size } => {
                inode.size = inode.size.max(end_of(0, *size)?);
                Ok(())
            }
            FileWrite::DropCapability => {
                self.erase_xattr(inode, XATTR_CAPABILITY).await?;
                Ok(())
            }
        }
    }

    /// Refuses a change of content while another session holds the write lease: the service
    /// recalls it first.
    pub(crate) async fn check_lease(&self, ino: Ino, session: SessionId) -> Attempt<()> {
        match self.get::<LeaseRecord>(&keys::lease(self.shard, ino)).await? {
            Some(lease) if lease.session != session => {
                Err(MetaError::Unavailable("another session holds the write lease".to_owned()).into())
            }
            _ => Ok(()),
        }
    }

    pub(crate) async fn commit(&mut self, session: SessionId, commit: &Commit, now: Timestamp) -> Attempt<MetaReply> {
        let mut inode = self.live_inode(commit.ino).await?;
        match inode.kind {
            FileKind::File => {}
            FileKind::Directory => return Err(Errno::EISDIR.into()),
            _ => return Err(Errno::EINVAL.into()),
        }
        self.check_lease(commit.ino, session).await?;
        self.check_trimmed(&inode)?;
        take_turn(&mut inode, session, commit.sequence)?;
        let mut done = Done { append_offset: None, room: PUNCH_EXTENTS_MAX };
        for write in &commit.writes {
            self.write(&mut inode, write, &mut done).await?;
        }
        if commit.kill_privileges {
            let mode = inode.mode;
            inode.kill_privileges();
            if inode.mode != mode {
                inode.touch(now);
            }
        }
        if !commit.writes.is_empty() || commit.mtime.is_some() {
            // Neither a client's clock nor the time a write spent unwritten takes back a ctime that was
            // shown; and it is another one after every change.
            let (written, shown) = (commit.mtime.unwrap_or(now), inode.ctime);
            inode.modify(written);
            inode.ctime = written.not_before(shown);
        }
        self.put_inode(&inode, ChangeKind::Content);
        Ok(MetaReply::Committed { attr: inode.attr(self.config.policy), append_offset: done.append_offset })
    }

    /// Replaces locations where the old ones still stand: what was overwritten since stays.
    /// Neither content nor times change.
    pub(crate) async fn swap(&mut self, ino: Ino, swaps: &[(Extent, Vec<Extent>)]) -> Attempt<u32> {
        self.unlocked(&keys::locked_inode(self.shard, ino)).await?;
        let Some(mut inode) = self.inode_raw(ino).await? else {
            return Ok(0);
        };
        let mut swapped = 0;
        for (old, new) in swaps {
            let end = end_of(old.offset, old.length.into())?;
            if old.length == 0 || !covers(new, old.offset, end) {
                return Err(malformed("a swap must cover the old extent exactly"));
            }
            if self.is_stale(new).await? {
                continue;
            }
            let mut stands = false;
            for piece in self.extents(ino, old.offset, end, usize::MAX).await? {
                let (from, to) = (piece.offset.max(old.offset), extent_end(&piece).min(end));
                let replaced = cut(&piece, from, to).location != cut(old, from, to).location;
                if replaced && !planted::is(Bug::MetaSwapBlindly) {
                    continue;
                }
                self.punch_extents(&mut inode, from, to).await?;
                for extent in new {
                    let (from, to) = (extent.offset.max(from), extent_end(extent).min(to));
                    if from < to {
                        self.add_extent(&mut inode, &cut(extent, from, to));
                    }
                }
                stands = true;
            }
            swapped += u32::from(stands);
        }
        if swapped > 0 {
            self.put_versioned(keys::inode(self.shard, ino), &inode);
        }
        Ok(swapped)
    }

    async fn is_stale(&self, extents: &[Extent]) -> Result<bool, StateError> {
        for extent in extents {
            match self.check_reference(&extent.location.referent(), extent.epoch).await {
                Ok(()) => {}
                Err(Fail::Storage(error)) => return Err(error),
                Err(_) => return Ok(true),
            }
        }
        Ok(false)
    }

    /// The reference epoch that goes with the extents of files here, however long ago their bytes were
    /// stored. Stores and freezes come with one that is above the minimum of every shard, so a freeze
    /// is below this one only if the epoch has advanced since it began.
    pub(crate) fn handed_out_epoch(&self) -> Epoch {
        Epoch(self.counters.minimum_epoch.0.saturating_add(1))
    }

    /// Extents of a range as a client asks for them, to refer to them elsewhere, and how far they
    /// describe it.
    pub(crate) async fn describe(
        &self,
        inode: &Inode,
        offset: u64,
        length: u64,
        max: u32,
    ) -> Attempt<(Vec<Extent>, u64)> {
        let end = offset.saturating_add(length);
        let max = max.clamp(1, EXTENTS_MAX) as usize;
        let content_end = end.min(inode.trim.unwrap_or(u64::MAX));
        let mut extents = self.extents(inode.ino, offset, content_end, max + 1).await?;
        let covered = extents.get(max).map_or(end, |next| next.offset);
        extents.truncate(max);
        for extent in &mut extents {
            extent.epoch = self.handed_out_epoch();
        }
        Ok((extents, covered))
    }
}

/// Whether extents lie end to end from `start` to `end`.
fn covers(extents: &[Extent], start: u64, end: u64) -> bool {
    let mut at = start;
    for extent in extents {
        let (Location::Hot { offset, .. } | Location::Chunk { offset, .. }) = &extent.location;
        if extent.offset != at || extent.length == 0 || offset.checked_add(extent.length).is_none() {
            return false;
        }
        at = at.saturating_add(extent.length.into());
    }
    at == end
}

/// Takes the inline bytes of a range away: zero, or cut off where nothing is left behind.
fn clear_inline(inode: &mut Inode, start: u64, end: u64) {
    let length = inode.inline.len() as u64;
    if start >= length {
        return;
    }
    if end >= length {
        inode.inline.truncate(start as usize);
    } else {
        inode.inline[start as usize..end.max(start) as usize].fill(0);
    }
}

/// Keeps a session's commits to one inode in order.
fn take_turn(inode: &mut Inode, session: SessionId, sequence: u64) -> Attempt<()> {
    let at = inode.commits.iter().position(|mark| mark.session == session);
    let last = at.and_then(|at| inode.commits.get(at)).map(|mark| mark.sequence);
    let in_order = match last {
        _ if sequence == 1 || planted::is(Bug::MetaIgnoreCommitSequence) => true,
        _ if sequence == 0 => return Err(malformed("commits are numbered from 1")),
        Some(last) if sequence <= last => return Err(malformed("a commit of this sequence was applied before")),
        Some(last) => sequence == last + 1,
        // A session whose mark was dropped may go on where it was.
        None => inode.commits_forgotten,
    };
    if !in_order {
        return Err(MetaError::Unavailable("an earlier commit of the inode is missing".to_owned()).into());
    }
    if let Some(at) = at {
        inode.commits.remove(at);
    }
    inode.commits.insert(0, CommitMark { session, sequence });
    if inode.commits.len() > COMMIT_MARKS_MAX {
        inode.commits.truncate(COMMIT_MARKS_MAX);
        inode.commits_forgotten = true;
    }
    Ok(())
}
