//! Making inodes: files, directories, symlinks and special files.

use crate::Client;
use crate::cache::{LocatedEntry, unexpected};
use crate::calls::Answer;
use crate::files::{OpenFile, OpenFlags};
use crate::inode::WriteLease;
use cfs_wire::limits::{NAME_BYTES_MAX, SYMLINK_BYTES_MAX};
use cfs_wire::meta::{FileKind, MetaOp, MetaReply, Name, NewNode};
use cfs_wire::{Errno, Ino};
use std::rc::Rc;

/// Who asks: owner of what is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
}

/// What to make. `mode` is as the program gave it, before the umask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewFile {
    pub kind: FileKind,
    pub mode: u32,
    pub umask: u32,
    pub rdev: u32,
}

impl NewFile {
    pub fn regular(mode: u32, umask: u32) -> NewFile {
        NewFile { kind: FileKind::File, mode, umask, rdev: 0 }
    }

    fn node(&self, caller: Caller, target: Vec<u8>) -> NewNode {
        NewNode {
            kind: self.kind,
            mode: self.mode & 0o7777,
            umask: self.umask & 0o777,
            uid: caller.uid,
            gid: caller.gid,
            rdev: self.rdev,
            target,
        }
    }
}

/// A name as the wire has it.
pub(crate) fn name(bytes: &[u8]) -> Result<Name, Errno> {
    if bytes.len() > NAME_BYTES_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    if bytes.is_empty() || bytes.contains(&b'/') || bytes.contains(&0) {
        return Err(Errno::EINVAL);
    }
    Ok(Name::from_slice(bytes))
}

impl Client {
    /// A special file, or a regular one that is not opened.
    pub async fn mknod(
        self: &Rc<Self>,
        caller: Caller,
        dir: Ino,
        file_name: &[u8],
        new: NewFile,
    ) -> Result<LocatedEntry, Errno> {
        match new.kind {
            FileKind::Directory | FileKind::Symlink => Err(Errno::EINVAL),
            _ => self.make(dir, file_name, new.node(caller, Vec::new()), false).await,
        }
    }

    pub async fn mkdir(
        self: &Rc<Self>,
        caller: Caller,
        dir: Ino,
        file_name: &[u8],
        mode: u32,
        umask: u32,
    ) -> Result<LocatedEntry, Errno> {
        let new = NewFile { kind: FileKind::Directory, mode, umask, rdev: 0 };
        self.make(dir, file_name, new.node(caller, Vec::new()), false).await
    }

    pub async fn symlink(
        self: &Rc<Self>,
        caller: Caller,
        dir: Ino,
        file_name: &[u8],
        target: &[u8],
    ) -> Result<LocatedEntry, Errno> {
        if target.len() > SYMLINK_BYTES_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if target.is_empty() {
            return Err(Errno::ENOENT);
        }
        let new = NewFile { kind: FileKind::Symlink, mode: 0o777, umask: 0, rdev: 0 };
        self.make(dir, file_name, new.node(caller, target.to_vec()), false).await
    }

    /// Makes a regular file and opens it. EEXIST if the name is taken.
    pub async fn create(
        self: &Rc<Self>,
        caller: Caller,
        dir: Ino,
        file_name: &[u8],
        new: NewFile,
        flags: OpenFlags,
    ) -> Result<(LocatedEntry, Rc<OpenFile>), Errno> {
        let node = NewFile { kind: FileKind::File, ..new }.node(caller, Vec::new());
        let entry = self.make(dir, file_name, node, true).await?;
        let file = self.opened(entry.attr.ino, flags);
        Ok((entry, file))
    }

    /// A regular file without a name, opened; `link` may give it one.
    pub async fn tmpfile(
        self: &Rc<Self>,
        caller: Caller,
        dir: Ino,
        new: NewFile,
        flags: OpenFlags,
    ) -> Result<(LocatedEntry, Rc<OpenFile>), Errno> {
        let node = NewFile { kind: FileKind::File, ..new }.node(caller, Vec::new());
        let answer = self.change(MetaOp::Tmpfile { dir, node }).await?;
        let entry = self.take_entry(&answer, None)?;
        // A file without a name lives by nothing but its hold.
        self.take_creation(&answer, entry.attr.ino);
        let file = self.opened(entry.attr.ino, flags);
        Ok((entry, file))
    }

    async fn make(
        self: &Rc<Self>,
        dir: Ino,
        file_name: &[u8],
        node: NewNode,
        hold: bool,
    ) -> Result<LocatedEntry, Errno> {
        let entry_name = name(file_name)?;
        let op = MetaOp::Create { dir, name: entry_name.clone(), node, hold };
        let answer = match self.change(op).await {
            Ok(answer) => answer,
            Err(errno) => {
                // Another client may have been first: what is cached of the name is in doubt.
                self.forget_entry(dir, &entry_name);
                return Err(errno);
            }
        };
        let entry = self.take_entry(&answer, Some((dir, &entry_name)))?;
        if hold {
            self.take_creation(&answer, entry.attr.ino);
        }
        Ok(entry)
    }

    /// Takes what comes with a file that was made and opened: the hold, and the write lease unless it
    /// was recalled at once.
    fn take_creation(&self, answer: &Answer, ino: Ino) {
        let MetaReply::Entry(entry) = &answer.reply else { return };
        let inode = self.inode(ino);
        inode.state().held = Some(answer.session.id);
        let current = self.session.borrow().id == answer.session.id && !answer.session.is_fenced();
        if entry.grant.write && current && self.stamps.unchanged_since(ino, answer.stamp) {
            inode.state().lease = Some(WriteLease { session: answer.session.id });
            self.linger(ino);
        }
    }

    pub(crate) fn forget_entry(&self, dir: Ino, entry_name: &Name) {
        if let Some(inode) = self.known_inode(dir) {
            inode.state().entries.remove(entry_name);
        }
    }

    /// Takes in an entry that a change of our own made at a place, if it has one.
    pub(crate) fn take_entry(&self, answer: &Answer, at: Option<(Ino, &Name)>) -> Result<LocatedEntry, Errno> {
        let MetaReply::Entry(entry) = &answer.reply else { return Err(unexpected(&answer.reply)) };
        let located = self.take_attr(&entry.attr, entry.grant, answer);
        let mut entry_valid = std::time::Duration::ZERO;
        if let Some((dir, entry_name)) = at {
            let parent = self.inode(dir);
            self.take_grant(&parent, entry.dir_grant, &answer.session, answer.sent, answer.stamp);
            self.entry_changed(dir, entry_name, Some(entry.attr.ino), answer.stamp);
            entry_valid = self.entry_left(dir, entry_name);
        }
        Ok(LocatedEntry { attr: located.attr, attr_valid: located.valid, entry_valid })
    }
}
