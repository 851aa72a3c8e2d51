//! Open files: holds that keep an unlinked inode alive, and errors each file reports once.

use crate::Client;
use crate::inode::Inode;
use cfs_wire::meta::{AttrChanges, MetaOp, MetaReply};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino};
use std::cell::Cell;
use std::rc::Rc;

/// How a file was opened, as far as it matters here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenFlags {
    pub append: bool,
    pub direct: bool,
    /// O_SYNC or O_DSYNC: a write is answered when it is durable. Size and times travel in the
    /// same commit as the data, so the two differ in nothing.
    pub sync: bool,
    pub truncate: bool,
    /// O_RDWR: it may be mapped to be stored to.
    pub read_write: bool,
}

impl OpenFlags {
    /// Linux's `O_*` bits.
    pub fn from_bits(bits: i32) -> OpenFlags {
        const O_RDWR: i32 = 0o2;
        const O_TRUNC: i32 = 0o1000;
        const O_APPEND: i32 = 0o2000;
        /// O_SYNC is this and one bit more.
        const O_DSYNC: i32 = 0o10000;
        const O_DIRECT: i32 = if cfg!(any(target_arch = "aarch64", target_arch = "arm")) { 0o200000 } else { 0o40000 };
        OpenFlags {
            append: bits & O_APPEND != 0,
            direct: bits & O_DIRECT != 0,
            sync: bits & O_DSYNC != 0,
            truncate: bits & O_TRUNC != 0,
            read_write: bits & O_RDWR != 0,
        }
    }
}

/// One open file description.
pub struct OpenFile {
    pub(crate) inode: Rc<Inode>,
    pub flags: OpenFlags,
    /// Failures to write back that this file knows of.
    failures_seen: Cell<u64>,
    /// Where the last read ended and how far ahead of it is read.
    pub(crate) read_end: Cell<u64>,
    pub(crate) read_ahead: Cell<u64>,
}

impl OpenFile {
    pub fn ino(&self) -> Ino {
        self.inode.ino
    }

    /// The error of a failed write-back, once.
    pub(crate) fn take_failure(&self) -> Result<(), Errno> {
        let failures = &mut self.inode.state().failures;
        if self.failures_seen.replace(failures.count) == failures.count {
            return Ok(());
        }
        failures.unseen = false;
        failures.last.map_or(Ok(()), Err)
    }

    /// How many failures this file has told of.
    pub(crate) fn failures_told(&self) -> u64 {
        self.failures_seen.get()
    }

    /// The failures since then are told again: whoever took them could not.
    pub(crate) fn tell_failures_after(&self, told: u64) {
        if self.failures_seen.replace(told) != told {
            self.inode.state().failures.unseen = true;
        }
    }
}

impl Client {
    /// Opens a file. `kill_privileges`: with `truncate`, the caller lacks CAP_FSETID.
    pub async fn open(
        self: &Rc<Self>,
        ino: Ino,
        flags: OpenFlags,
        kill_privileges: bool,
    ) -> Result<Rc<OpenFile>, Errno> {
        let file = self.opened(ino, flags);
        let mut outcome = self.hold(&file.inode).await;
        if outcome.is_ok() && flags.truncate {
            let changes = AttrChanges { size: Some(0), kill_privileges, ..AttrChanges::default() };
            outcome = self.setattr(ino, changes).await.map(|_| ());
        }
        match outcome {
            Ok(()) => Ok(file),
            Err(errno) => {
                self.release(&file);
                Err(errno)
            }
        }
    }

    /// Counts an open file.
    pub(crate) fn opened(&self, ino: Ino, flags: OpenFlags) -> Rc<OpenFile> {
        let inode = self.inode(ino);
        let mut state = inode.state();
        state.opens += 1;
        state.mappable += u32::from(flags.read_write);
        let failures_seen = Cell::new(state.failures.count - u64::from(state.failures.unseen));
        drop(state);
        if self.open_inodes.borrow_mut().insert(ino) {
            self.page_care_wanted.notify_all();
        }
        Rc::new(OpenFile { inode, flags, failures_seen, read_end: Cell::new(0), read_ahead: Cell::new(0) })
    }

    /// Makes sure that the server keeps the inode while it is open.
    pub(crate) async fn hold(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<(), Errno> {
        let _turn = inode.hold_order.acquire(1).await;
        let session = self.session().await?;
        if inode.state().held == Some(session.id) {
            return Ok(());
        }
        let answer = self.change(MetaOp::Open { ino: inode.ino }).await?;
        inode.state().held = Some(answer.session.id);
        if let MetaReply::Attr { attr, grant } = &answer.reply {
            self.take_attr(attr, *grant, &answer);
        }
        Ok(())
    }

    /// The last reference to an open file is gone. What is dirty goes on being written back.
    pub fn release(self: &Rc<Self>, file: &OpenFile) {
        let inode = &file.inode;
        let unused = {
            let mut state = inode.state();
            state.opens = state.opens.saturating_sub(1);
            state.mappable = state.mappable.saturating_sub(u32::from(file.flags.read_write));
            state.last_close = self.now();
            if state.opens == 0 {
                state.lock_owners.clear();
                state.locks_lost.clear();
            }
            state.opens == 0
        };
        if unused {
            self.open_inodes.borrow_mut().remove(&inode.ino);
        }
        if unused && inode.state().unlinked {
            self.finish_unlinked(inode);
        }
        if unused {
            self.linger(inode.ino);
        }
    }

    /// Nobody here can read the inode any more: the hold is given back. What is dirty is committed
    /// all the same, since another client may have the file open.
    pub(crate) fn finish_unlinked(self: &Rc<Self>, inode: &Rc<Inode>) {
        let (client, inode) = (self.clone(), inode.clone());
        self.handle.spawn(async move { client.give_back(&inode).await });
    }

    /// `close`: reports what failed in the background, and starts writing back. It does not
    /// wait: leases keep other clients from seeing anything older.
    pub async fn flush(self: &Rc<Self>, file: &OpenFile) -> Result<(), Errno> {
        if file.inode.state().is_dirty() {
            self.spawn_flush(&file.inode);
        }
        file.take_failure()
    }

    /// Everything written through this inode before the call is durable when it returns. Data
    /// and attributes travel together: `datasync` saves nothing.
    pub async fn fsync(self: &Rc<Self>, file: &OpenFile, _datasync: bool) -> Result<(), Errno> {
        if planted::is(Bug::ClientFsyncEarly) {
            self.spawn_flush(&file.inode);
            return file.take_failure();
        }
        let outcome = self.flush_inode(&file.inode).await;
        file.take_failure()?;
        outcome
    }

    /// Commits everything that is dirty.
    pub async fn syncfs(self: &Rc<Self>) -> Result<(), Errno> {
        let inos: Vec<Ino> = self.dirty_inodes.borrow().iter().copied().collect();
        let flushes = inos
            .into_iter()
            .filter_map(|ino| self.known_inode(ino))
            .map(|inode| async move { self.flush_inode(&inode).await });
        let outcomes = futures_util::future::join_all(flushes).await;
        outcomes.into_iter().collect()
    }
}
