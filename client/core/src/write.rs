//! Writes: kept here under the inode's write lease, else stored and committed before they are
//! answered.

use crate::Client;
use crate::calls::{Backoff, CallError};
use crate::dirty::Frozen;
use crate::files::{OpenFile, OpenFlags};
use crate::flush::Placement;
use crate::inode::{Inode, WriteLease};
use bytes::Bytes;
use cfs_reactor::Instant;
use cfs_wire::limits::{FILE_BYTES_MAX, INLINE_BYTES_MAX, STORE_BYTES_MAX};
use cfs_wire::meta::{FileWrite, MetaOp, MetaReply};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, SessionId};
use std::rc::Rc;
use std::time::Duration;

/// A lease that another client needs is not asked for again before this: every asking is an
/// entry in the shard's log.
pub(crate) const LEASE_DENIED: Duration = Duration::from_secs(1);

/// How one write is to be done, whatever its file was opened for: pages of a mapping go to their
/// offset, and fcntl(F_SETFL) and pwritev2(RWF_DSYNC) change what holds for a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WriteFlags {
    /// At the end, whatever the offset.
    pub append: bool,
    /// Answered when it is durable.
    pub sync: bool,
    /// The caller lacks CAP_FSETID.
    pub kill_privileges: bool,
    /// Pages of a mapping are written back: whoever changed them did so long before, and the file's
    /// capabilities may have been set since.
    pub mapped: bool,
}

/// Counts a write until it ends, answered or not.
struct WriteUnderWay<'a> {
    client: &'a Client,
    inode: &'a Inode,
    of_pages: bool,
}

impl WriteUnderWay<'_> {
    fn begin<'a>(client: &'a Client, inode: &'a Inode, of_pages: bool) -> WriteUnderWay<'a> {
        let mut state = inode.state();
        state.writes_under_way += 1;
        state.page_writes_under_way += u32::from(of_pages);
        WriteUnderWay { client, inode, of_pages }
    }
}

impl Drop for WriteUnderWay<'_> {
    fn drop(&mut self) {
        let mut state = self.inode.state();
        state.page_writes_under_way -= u32::from(self.of_pages);
        state.writes_under_way -= 1;
        if state.writes_under_way == 0 {
            self.client.writes_ended.notify_all();
        }
    }
}

impl Client {
    /// Writes as the file was opened for. `kill_privileges`: the caller lacks CAP_FSETID.
    pub async fn write(
        self: &Rc<Self>,
        file: &OpenFile,
        offset: u64,
        data: Bytes,
        kill_privileges: bool,
    ) -> Result<u32, Errno> {
        let OpenFlags { append, sync, .. } = file.flags;
        self.write_with(file, offset, data, WriteFlags { append, sync, kill_privileges, mapped: false }).await
    }

    /// Writes `data` at `offset`, or at the end; answers how much was written.
    pub async fn write_with(
        self: &Rc<Self>,
        file: &OpenFile,
        offset: u64,
        data: Bytes,
        how: WriteFlags,
    ) -> Result<u32, Errno> {
        let length = u32::try_from(data.len()).map_err(|_| Errno::EINVAL)?;
        if length == 0 {
            return Ok(0);
        }
        let mapped_in = how.mapped.then(|| self.session.borrow().id);
        if how.mapped && file.inode.state().pages_void {
            return Err(self.lose_page(&file.inode));
        }
        let _under_way = WriteUnderWay::begin(self, &file.inode, how.mapped);
        self.write_bytes(file, offset, data, how, mapped_in).await.map(|()| length)
    }

    async fn write_bytes(
        self: &Rc<Self>,
        file: &OpenFile,
        offset: u64,
        data: Bytes,
        how: WriteFlags,
        mapped_in: Option<SessionId>,
    ) -> Result<(), Errno> {
        let inode = &file.inode;
        let mut has_asked = false;
        loop {
            self.wait_for_room(inode, data.len()).await;
            self.check_page(inode, mapped_in)?;
            inode.state().check_locks()?;
            if self.holds_lease(inode) {
                if inode.state().attr.is_none() {
                    self.getattr(inode.ino).await?;
                    continue;
                }
                let may_keep = self.may_keep(inode, data.len());
                if !may_keep && !std::mem::replace(&mut has_asked, true) {
                    self.reserve_for(inode, data.len()).await;
                    continue;
                }
                if !may_keep {
                    let _turn = inode.order.acquire(1).await;
                    if !self.store_what_is_kept(file).await? {
                        continue;
                    }
                    self.keep(file, offset, data, how, false)?;
                    let outcome = self.write_back(inode).await;
                    file.take_failure()?;
                    return outcome.map_err(|lost| lost.error.errno());
                }
                self.keep(file, offset, data, how, true)?;
                self.renew_reservation();
                break;
            }
            let _turn = inode.order.acquire(1).await;
            if self.holds_lease(inode) || self.acquire_lease(inode).await? {
                continue;
            }
            self.write_kept(inode).await;
            self.write_through(file, offset, data, how, mapped_in).await?;
            return Ok(());
        }
        if how.sync {
            let outcome = self.flush_inode(inode).await;
            file.take_failure()?;
            outcome?;
        }
        Ok(())
    }

    /// A program stored to a mapped page in that session: in a later one the page is not written any more,
    /// for what another client has written since would be gone.
    fn check_page(&self, inode: &Inode, mapped_in: Option<SessionId>) -> Result<(), Errno> {
        match mapped_in {
            Some(session) if session != self.session.borrow().id => Err(self.lose_page(inode)),
            _ => Ok(()),
        }
    }

    fn lose_page(&self, inode: &Inode) -> Errno {
        inode.state().fail(Errno::EIO);
        self.has_lost.set(true);
        Errno::EIO
    }

    /// Makes a write that no room is reserved for the only dirty one, so that ENOSPC is for whoever
    /// writes it, not for whoever wrote before or closes. False if the lease is lost or the size is
    /// not known afterwards. Called in turn.
    async fn store_what_is_kept(self: &Rc<Self>, file: &OpenFile) -> Result<bool, Errno> {
        let inode = &file.inode;
        self.write_kept(inode).await;
        file.take_failure()?;
        Ok(self.holds_lease(inode) && inode.state().attr.is_some())
    }

    /// Commits what is kept; called in turn. What cannot be committed is the open files' to report.
    pub(crate) async fn write_kept(self: &Rc<Self>, inode: &Rc<Inode>) {
        while !inode.state().dirty.is_empty() {
            let _ = self.flush_in_turn(inode).await;
        }
    }

    /// Waits until so many bytes more may be dirty.
    async fn wait_for_room(self: &Rc<Self>, inode: &Rc<Inode>, length: usize) {
        loop {
            let changed = self.dirty_changed.notified();
            let (all, own) = (self.dirty_bytes.get(), inode.state().dirty_bytes());
            if own > 0 && own + length > self.config.dirty_inode_bytes_max {
                self.spawn_flush(inode);
            } else if all > 0 && all + length > self.config.dirty_bytes_max {
                let inos: Vec<_> = self.dirty_inodes.borrow().iter().copied().collect();
                for inode in inos.into_iter().filter_map(|ino| self.known_inode(ino)) {
                    self.spawn_flush(&inode);
                }
            } else {
                return;
            }
            changed.await;
        }
    }

    /// Takes the bytes into the dirty map. Nothing is awaited, so writes are atomic to each other.
    /// `charged`: the write is answered while they are there. Whoever keeps pages has put bytes that are
    /// appended where it took the end to be: if that is elsewhere, these pages are not to be read.
    fn keep(
        self: &Rc<Self>,
        file: &OpenFile,
        mut offset: u64,
        data: Bytes,
        how: WriteFlags,
        charged: bool,
    ) -> Result<(), Errno> {
        let inode = &file.inode;
        let mut state = inode.state();
        let size = state.attr.as_ref().map_or(0, |attr| attr.size).max(state.dirty_end());
        if how.append && offset != size {
            state.pages_version = None;
            offset = size;
        }
        check_end(offset, data.len())?;
        let before = state.dirty.bytes();
        if before == 0 {
            state.dirty_since = self.now();
        }
        state.dirty.insert(offset, data);
        let after = state.dirty.bytes();
        if charged {
            let charge = state.dirty.footprint();
            self.charge(std::mem::replace(&mut state.dirty_charge, charge), charge);
        }
        state.written.at = Some(self.handle.wall());
        state.written.kill_privileges |= how.kill_privileges;
        state.written.drop_capability |= !how.mapped;
        drop(state);
        self.dirty_bytes.set(self.dirty_bytes.get() + after - before);
        if self.dirty_inodes.borrow_mut().insert(inode.ino) {
            self.upkeep_wanted.notify_all();
        }
        if after >= STORE_BYTES_MAX {
            self.spawn_flush(inode);
        }
        Ok(())
    }

    /// Asks for the write lease; called in turn. False if another client needs the inode.
    async fn acquire_lease(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<bool, Errno> {
        if self.now() < inode.state().lease_denied_until {
            return Ok(false);
        }
        let answer = self.change(MetaOp::AcquireLease { ino: inode.ino }).await?;
        let MetaReply::Lease { granted, attr, grant } = &answer.reply else {
            return Err(crate::cache::unexpected(&answer.reply));
        };
        let recalled = !self.stamps.unchanged_since(inode.ino, answer.stamp);
        let read_only = cfs_wire::meta::Grant { write: false, ..*grant };
        if *granted && !recalled && answer.session.is_live() {
            if self.cache_left(inode).is_zero() {
                inode.state().drop_cached();
                self.pages.borrow_mut().drop_inode(inode.ino);
            }
            self.take_attr(attr, read_only, &answer);
            inode.state().lease = Some(WriteLease { session: answer.session.id });
            self.linger(inode.ino);
            return Ok(true);
        }
        inode.state().lease_denied_until = self.now() + LEASE_DENIED;
        Ok(false)
    }

    /// Stores and commits one write; called in turn.
    async fn write_through(
        self: &Rc<Self>,
        file: &OpenFile,
        offset: u64,
        data: Bytes,
        how: WriteFlags,
        mapped_in: Option<SessionId>,
    ) -> Result<(), Errno> {
        let inode = &file.inode;
        let WriteFlags { append, kill_privileges, mapped, .. } = how;
        let (append, offset) = match planted::is(Bug::ClientAppendAtSize) && append {
            true => (false, inode.state().attr.as_ref().map_or(0, |attr| attr.size)),
            false => (append, offset),
        };
        if !append {
            check_end(offset, data.len())?;
        }
        let mtime = Some(self.handle.wall());
        let fits = data.len() <= INLINE_BYTES_MAX && (append || offset <= (INLINE_BYTES_MAX - data.len()) as u64);
        let mut inline = fits && inode.state().attr.as_ref().is_none_or(|attr| attr.size <= INLINE_BYTES_MAX as u64);
        let mut backoff = Backoff::new(self);
        loop {
            let session = self.session().await?;
            self.check_page(inode, mapped_in)?;
            inode.state().check_locks()?;
            let mut writes = match (inline, append) {
                (true, true) => vec![FileWrite::AppendInline { bytes: data.to_vec() }],
                (true, false) => vec![FileWrite::Inline { offset, bytes: data.to_vec() }],
                (false, _) => {
                    let frozen = Frozen::from([(offset, data.clone())]);
                    let placed = self.store_runs(inode, &frozen, false).await?;
                    placed.into_iter().map(|extent| as_write(extent, append)).collect()
                }
            };
            if !mapped {
                writes.push(FileWrite::DropCapability);
            }
            let outcome = self.commit(&session, inode, writes, mtime, kill_privileges).await;
            inode.state().extents.clear();
            self.pages.borrow_mut().drop_inode(inode.ino);
            match outcome {
                Ok(appended) => {
                    if append && appended != Some(offset) {
                        inode.state().pages_version = None;
                    }
                    return Ok(());
                }
                Err(CallError::Errno(Errno::EFBIG | Errno::ENOSPC)) if inline => inline = false,
                Err(CallError::Stale | CallError::Fenced { executed: false }) if backoff.wait(self).await => {}
                Err(error) => return Err(error.errno()),
            }
        }
    }

    pub(crate) fn dirty_less(&self, bytes: usize) {
        self.dirty_bytes.set(self.dirty_bytes.get().saturating_sub(bytes));
        self.dirty_changed.notify_all();
    }

    /// The age at which an inode's dirty data is due.
    pub(crate) fn flush_due(&self, inode: &Inode) -> Instant {
        inode.state().dirty_since + self.config.write_back_after
    }
}

fn as_write(placement: Placement, append: bool) -> FileWrite {
    let Placement { offset, length, location, epoch } = placement;
    if append {
        FileWrite::Append { length, location, epoch }
    } else {
        FileWrite::Data { offset, length, location, epoch }
    }
}

/// Where a write may end.
fn check_end(offset: u64, length: usize) -> Result<(), Errno> {
    match offset.checked_add(length as u64) {
        Some(end) if end <= FILE_BYTES_MAX => Ok(()),
        _ => Err(Errno::EFBIG),
    }
}
