//! Names: finding, linking, removing, renaming, listing.

use crate::Client;
use crate::cache::{DirEntries, LocatedEntry, Negative, unexpected};
use crate::calls::Answer;
use crate::nodes::name;
use crate::stamps::Stamp;
use cfs_wire::meta::{FileKind, MetaOp, MetaReply, Name, RENAME_EXCHANGE, RENAME_WHITEOUT, StatFs};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino};
use std::rc::Rc;

impl Client {
    /// Finds a name. `Err(Ok(..))` is a name that does not exist, with how long that holds.
    pub async fn lookup(self: &Rc<Self>, dir: Ino, file_name: &[u8]) -> Result<LocatedEntry, Result<Negative, Errno>> {
        let entry_name = name(file_name).map_err(Err)?;
        match self.cached_entry(dir, &entry_name) {
            Some(None) => return Err(Ok(Negative { valid: self.entry_left(dir, &entry_name) })),
            Some(Some(ino)) => {
                if let Some(located) = self.cached_attr(ino) {
                    let entry_valid = self.entry_left(dir, &entry_name);
                    return Ok(LocatedEntry { attr: located.attr, attr_valid: located.valid, entry_valid });
                }
            }
            None => {}
        }
        self.lookup_remote(dir, entry_name).await
    }

    async fn lookup_remote(
        self: &Rc<Self>,
        dir: Ino,
        entry_name: Name,
    ) -> Result<LocatedEntry, Result<Negative, Errno>> {
        // A name whose inode is in another shard may move while its attributes are asked for.
        const ATTEMPTS: usize = 8;
        for _ in 0..ATTEMPTS {
            let stamp = self.stamps.now();
            let answer = match self.read_call(MetaOp::Lookup { dir, name: entry_name.clone() }).await {
                Ok(answer) => answer,
                Err(Errno::ENOENT) => {
                    self.keep_entry(dir, &entry_name, None, stamp);
                    return Err(Ok(Negative { valid: self.entry_left(dir, &entry_name) }));
                }
                Err(errno) => return Err(Err(errno)),
            };
            let (ino, dir_grant, located) = match &answer.reply {
                MetaReply::Entry(entry) => {
                    let located = self.take_attr(&entry.attr, entry.grant, &answer);
                    (entry.attr.ino, entry.dir_grant, Some(located).filter(|_| !self.lacks_commit(&entry.attr)))
                }
                MetaReply::Remote { ino, dir_grant, .. } => (*ino, *dir_grant, None),
                other => return Err(Err(unexpected(other))),
            };
            self.take_grant(&self.inode(dir), dir_grant, &answer.session, answer.sent, answer.stamp);
            self.keep_entry(dir, &entry_name, Some(ino), answer.stamp);
            let located = match located {
                Some(located) => Ok(located),
                None => self.getattr(ino).await,
            };
            match located {
                Ok(located) => {
                    let entry_valid = self.entry_left(dir, &entry_name);
                    return Ok(LocatedEntry { attr: located.attr, attr_valid: located.valid, entry_valid });
                }
                Err(Errno::ENOENT | Errno::ESTALE) => self.forget_entry(dir, &entry_name),
                Err(errno) => return Err(Err(errno)),
            }
        }
        Err(Err(Errno::ENOENT))
    }

    pub async fn readlink(self: &Rc<Self>, ino: Ino) -> Result<Vec<u8>, Errno> {
        match self.read_call(MetaOp::ReadLink { ino }).await?.reply {
            MetaReply::Target(target) => Ok(target),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn link(self: &Rc<Self>, ino: Ino, dir: Ino, file_name: &[u8]) -> Result<LocatedEntry, Errno> {
        let entry_name = name(file_name)?;
        self.flush_for_name(ino).await?;
        let op = MetaOp::Link { ino, dir, name: entry_name.clone() };
        match self.change(op).await {
            Ok(answer) => {
                if let Some(inode) = self.known_inode(ino) {
                    inode.state().unlinked = false;
                }
                self.attr_changed(ino);
                if let MetaReply::Entry(entry) = &answer.reply {
                    let taken = self.take_entry(&answer, Some((dir, &entry_name)))?;
                    if !self.lacks_commit(&entry.attr) {
                        return Ok(taken);
                    }
                } else {
                    self.entry_changed(dir, &entry_name, Some(ino), answer.stamp);
                }
                // Its attributes are another shard's to tell, or were told of before a commit.
                let located = self.getattr(ino).await?;
                let entry_valid = self.entry_left(dir, &entry_name);
                Ok(LocatedEntry { attr: located.attr, attr_valid: located.valid, entry_valid })
            }
            Err(errno) => {
                self.forget_entry(dir, &entry_name);
                Err(errno)
            }
        }
    }

    pub async fn unlink(self: &Rc<Self>, dir: Ino, file_name: &[u8]) -> Result<(), Errno> {
        let entry_name = name(file_name)?;
        let outcome = self.change(MetaOp::Unlink { dir, name: entry_name.clone() }).await;
        self.removed(dir, &entry_name, outcome)
    }

    pub async fn rmdir(self: &Rc<Self>, dir: Ino, file_name: &[u8]) -> Result<(), Errno> {
        let entry_name = name(file_name)?;
        let outcome = self.change(MetaOp::Rmdir { dir, name: entry_name.clone() }).await;
        self.removed(dir, &entry_name, outcome)
    }

    fn removed(self: &Rc<Self>, dir: Ino, entry_name: &Name, outcome: Result<Answer, Errno>) -> Result<(), Errno> {
        match outcome {
            Ok(answer) => {
                self.entry_changed(dir, entry_name, None, answer.stamp);
                if let MetaReply::Removed { ino, nlink } = answer.reply {
                    self.lost_name(ino, nlink);
                }
                Ok(())
            }
            Err(errno) => {
                self.forget_entry(dir, entry_name);
                Err(errno)
            }
        }
    }

    /// An inode lost a name: its attributes changed, and without any name or user left its hold is
    /// given back.
    fn lost_name(self: &Rc<Self>, ino: Ino, nlink: u32) {
        self.attr_changed(ino);
        let Some(inode) = self.known_inode(ino) else { return };
        if nlink > 0 {
            return;
        }
        let unused = {
            let mut state = inode.state();
            state.unlinked = true;
            state.opens == 0
        };
        if unused {
            self.finish_unlinked(&inode);
        }
    }

    /// `flags` are those of `renameat2`. RENAME_WHITEOUT is not supported.
    pub async fn rename(
        self: &Rc<Self>,
        dir: Ino,
        file_name: &[u8],
        to_dir: Ino,
        to_file_name: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        let (from, to) = (name(file_name)?, name(to_file_name)?);
        if flags & RENAME_WHITEOUT != 0 {
            return Err(Errno::EINVAL);
        }
        // Whoever writes a new version and renames it over the old one must never find the name with
        // neither: what can't be written replaces nothing.
        let mut replacing = vec![(dir, &from)];
        if flags & RENAME_EXCHANGE != 0 {
            replacing.push((to_dir, &to));
        }
        for (dir, name) in replacing {
            if let Some(ino) = self.rename_source(dir, name).await
                && !planted::is(Bug::ClientRenameDirty)
            {
                self.flush_for_name(ino).await?;
            }
        }
        let op = MetaOp::Rename { dir, name: from.clone(), to_dir, to_name: to.clone(), flags };
        match self.change(op).await {
            Ok(answer) => {
                if let MetaReply::Renamed { moved, replaced } = &answer.reply {
                    moved.iter().for_each(|ino| self.attr_changed(*ino));
                    match moved[..] {
                        [ino] => {
                            self.entry_changed(dir, &from, None, answer.stamp);
                            self.entry_changed(to_dir, &to, Some(ino), answer.stamp);
                        }
                        // Which of the two went where is not said.
                        _ => self.entries_changed([(dir, &from), (to_dir, &to)], answer.stamp),
                    }
                    if let Some((ino, nlink)) = replaced {
                        self.lost_name(*ino, *nlink);
                    }
                }
                // Else both names stand for one inode, and are left as they were.
                Ok(())
            }
            Err(errno) => {
                self.forget_entry(dir, &from);
                self.forget_entry(to_dir, &to);
                Err(errno)
            }
        }
    }

    /// Changes of our own to entries of which it is not known what they name now.
    fn entries_changed(self: &Rc<Self>, entries: [(Ino, &Name); 2], stamp: Stamp) {
        for (dir, entry_name) in entries {
            self.entry_changed(dir, entry_name, None, stamp);
            self.forget_entry(dir, entry_name);
        }
    }

    /// The inode a rename will move, as far as it is worth asking.
    async fn rename_source(self: &Rc<Self>, dir: Ino, from: &Name) -> Option<Ino> {
        match self.cached_entry(dir, from) {
            Some(found) => found,
            None if self.dirty_inodes.borrow().is_empty() && !self.has_lost.get() => None,
            None => self.lookup_remote(dir, from.clone()).await.ok().map(|entry| entry.attr.ino),
        }
    }

    /// Entries behind the cookie `after` (0: from the start). `.` and `..` are not among them.
    pub async fn readdir(
        self: &Rc<Self>,
        dir: Ino,
        after: u64,
        entries_max: u32,
        with_attrs: bool,
    ) -> Result<DirEntries, Errno> {
        let answer = self.read_call(MetaOp::ReadDir { dir, after, entries_max, with_attrs }).await?;
        let MetaReply::Entries { entries, end, parent, grant } = &answer.reply else {
            return Err(unexpected(&answer.reply));
        };
        self.take_grant(&self.inode(dir), *grant, &answer.session, answer.sent, answer.stamp);
        for entry in entries {
            self.keep_entry(dir, &entry.name, Some(entry.ino), answer.stamp);
        }
        let mut entries = entries.clone();
        for entry in &mut entries {
            // Sizes and times of files written here are known better here.
            if let Some(inode) = self.known_inode(entry.ino)
                && entry.attr.is_some()
                && inode.state().is_dirty()
            {
                entry.attr = self.cached_attr(entry.ino).map(|located| located.attr);
            }
        }
        Ok(DirEntries { entries, end: *end, parent: *parent })
    }

    /// Fails unless `ino` is a directory. Listing needs no state here.
    pub async fn opendir(self: &Rc<Self>, ino: Ino) -> Result<(), Errno> {
        let located = self.getattr(ino).await?;
        if located.attr.kind == FileKind::Directory { Ok(()) } else { Err(Errno::ENOTDIR) }
    }

    /// Every change of a directory was durable when it was answered.
    pub async fn fsyncdir(&self, _ino: Ino) -> Result<(), Errno> {
        Ok(())
    }

    /// Space; the inodes in use are one shard's.
    pub async fn statfs(self: &Rc<Self>) -> Result<StatFs, Errno> {
        self.statfs_with(false).await
    }

    /// Space, and the inodes in use in all shards, which costs the server a look into each.
    pub async fn statfs_counted(self: &Rc<Self>) -> Result<StatFs, Errno> {
        self.statfs_with(true).await
    }

    async fn statfs_with(self: &Rc<Self>, count_inodes: bool) -> Result<StatFs, Errno> {
        match self.read_call(MetaOp::StatFs { count_inodes }).await?.reply {
            MetaReply::StatFs(mut stat) => {
                // What is written but not committed is as good as used.
                stat.bytes_free = stat.bytes_free.saturating_sub(self.dirty_bytes.get() as u64);
                Ok(stat)
            }
            other => Err(unexpected(&other)),
        }
    }
}
