//! The steps every namespace operation is made of. Each is checked first and carried out after:
//! in one entry when all are in one shard, else under a transaction's key locks.

use super::entry::{Action, Answer, ChangeKind};
use super::keys;
use super::records::{Inode, RenameLockRecord};
use super::view::{Attempt, Fail, View};
use cfs_wire::limits::LINKS_MAX;
use cfs_wire::meta::{FileKind, Name};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino, SessionId, Timestamp};

/// What a check found, and the keys a transaction must lock until it is decided.
pub(crate) struct Checked {
    pub answer: Answer,
    pub lock: Vec<u8>,
}

impl View<'_> {
    /// Whether an action can be carried out. Sets the number of an inode to be created.
    pub(crate) async fn check(&mut self, action: &mut Action) -> Attempt<Checked> {
        match action {
            Action::Insert { dir, name, replaces, links, .. } => {
                let directory = self.directory(*dir).await?;
                let grown = i64::from(directory.nlink) + i64::from(*links);
                if *links > 0 && grown > i64::from(LINKS_MAX) {
                    return Err(Errno::EMLINK.into());
                }
                self.check_entry(*dir, name, *replaces).await
            }
            Action::Remove { dir, name, ino, kind, .. } => {
                self.directory(*dir).await?;
                self.check_entry(*dir, name, Some((*ino, *kind))).await
            }
            Action::MakeDir { inode, .. } => {
                inode.ino = self.next_ino()?;
                let lock = keys::locked_inode(self.shard, inode.ino);
                Ok(Checked { answer: Answer::Attr(inode.attr(self.config.policy)), lock })
            }
            Action::AddLink { ino, session, now } => self.check_add_link(*ino, *session, *now).await,
            Action::DropLink { ino, .. } => self.check_drop_link(*ino).await,
            Action::Moved { ino, .. } => {
                self.inode(*ino).await?;
                Ok(Checked { answer: Answer::Moved { ino: *ino }, lock: keys::locked_inode(self.shard, *ino) })
            }
            Action::HoldRenameLock { token } => {
                let lock = keys::locked_rename_lock(self.shard);
                self.unlocked(&lock).await?;
                match self.get::<RenameLockRecord>(&keys::rename_lock(self.shard)).await? {
                    Some(held) if held.token == *token && held.holder.is_some() => {}
                    _ => return Err(Fail::Changed),
                }
                Ok(Checked { answer: Answer::Nothing, lock })
            }
        }
    }

    async fn check_entry(&self, dir: Ino, name: &Name, expected: Option<(Ino, FileKind)>) -> Attempt<Checked> {
        let found = self.lookup(dir, name).await?.map(|found| (found.ino, found.kind));
        if found != expected {
            return Err(Fail::Changed);
        }
        Ok(Checked { answer: Answer::Nothing, lock: self.name_lock(dir, name) })
    }

    async fn check_add_link(&self, ino: Ino, session: SessionId, now: Timestamp) -> Attempt<Checked> {
        let mut inode = self.inode(ino).await?;
        if inode.is_dir() {
            return Err(Errno::EPERM.into());
        }
        if inode.nlink >= LINKS_MAX {
            return Err(Errno::EMLINK.into());
        }
        let held = self.exists(&keys::hold(self.shard, ino, session)).await?;
        if inode.nlink == 0 && !(inode.tmpfile && held) {
            return Err(Errno::ENOENT.into());
        }
        link(&mut inode, now);
        Ok(Checked { answer: Answer::Attr(inode.attr(self.config.policy)), lock: keys::locked_inode(self.shard, ino) })
    }

    async fn check_drop_link(&self, ino: Ino) -> Attempt<Checked> {
        let inode = self.inode(ino).await?;
        let nlink = if inode.is_dir() {
            if !planted::is(Bug::MetaSkipEmptyCheck) {
                self.check_empty(&inode).await?;
            }
            0
        } else {
            inode.nlink.saturating_sub(1)
        };
        let answer = Answer::Links { ino, nlink };
        Ok(Checked { answer, lock: keys::locked_inode(self.shard, ino) })
    }

    async fn check_empty(&self, dir: &Inode) -> Attempt<()> {
        if dir.entries > 0 {
            return Err(Errno::ENOTEMPTY.into());
        }
        self.names_unlocked(dir.ino).await
    }

    /// Waits for transactions that are about to change any name of a directory.
    pub(crate) async fn names_unlocked(&self, dir: Ino) -> Attempt<()> {
        if self.counters.prepared == 0 {
            return Ok(());
        }
        match self.first(&keys::locked_names(self.shard, dir)).await? {
            Some((key, value)) => Err(Fail::Blocked(super::records::decode(&key, &value)?)),
            None => Ok(()),
        }
    }

    /// Carries a checked action out. `answers` are those of the whole operation.
    pub(crate) async fn carry_out(&mut self, action: &Action, answers: &[Answer]) -> Attempt<()> {
        match action {
            Action::Insert { dir, name, ino, kind, replaces, links, now } => {
                let (ino, kind) = named_by(*ino, *kind, answers)?;
                self.put_entry(*dir, name, ino, kind).await?;
                self.names_changed(*dir, *links, i64::from(replaces.is_none()), *now).await
            }
            Action::Remove { dir, name, links, now, .. } => {
                self.remove_entry(*dir, name).await?;
                self.names_changed(*dir, *links, -1, *now).await
            }
            Action::MakeDir { inode, xattrs } => {
                self.add_inode(inode, xattrs);
                Ok(())
            }
            Action::AddLink { ino, now, .. } => {
                let mut inode = self.inode_raw(*ino).await?.ok_or(Errno::ESTALE)?;
                if inode.nlink == 0 {
                    self.delete(keys::orphan(self.shard, *ino));
                }
                link(&mut inode, *now);
                self.put_inode(&inode, ChangeKind::Attributes);
                Ok(())
            }
            Action::DropLink { ino, now } => {
                let mut inode = self.inode_raw(*ino).await?.ok_or(Errno::ESTALE)?;
                inode.nlink = if inode.is_dir() { 0 } else { inode.nlink.saturating_sub(1) };
                inode.touch(*now);
                if inode.nlink == 0 {
                    return self.unlinked(inode).await;
                }
                self.put_inode(&inode, ChangeKind::Attributes);
                Ok(())
            }
            Action::Moved { ino, parent, now } => {
                let mut inode = self.inode_raw(*ino).await?.ok_or(Errno::ESTALE)?;
                if inode.is_dir() && parent.is_some() {
                    inode.parent = *parent;
                }
                inode.touch(*now);
                self.put_inode(&inode, ChangeKind::Attributes);
                Ok(())
            }
            Action::HoldRenameLock { .. } => Ok(()),
        }
    }
}

fn link(inode: &mut Inode, now: Timestamp) {
    inode.nlink += 1;
    inode.tmpfile = false;
    inode.touch(now);
}

/// What a name is to stand for: an inode of another shard is known by that shard's answer.
fn named_by(ino: Option<Ino>, kind: FileKind, answers: &[Answer]) -> Result<(Ino, FileKind), Fail> {
    let answered = answers.iter().find_map(|answer| match answer {
        Answer::Attr(attr) if ino.is_none_or(|ino| ino == attr.ino) => Some((attr.ino, attr.kind)),
        _ => None,
    });
    match (answered, ino) {
        (Some(named), _) => Ok(named),
        (None, Some(ino)) => Ok((ino, kind)),
        // A decision without the answer it rests on.
        (None, None) => Err(Errno::EPROTO.into()),
    }
}
