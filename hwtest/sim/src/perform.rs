//! Operations carried out on the real file system.

use crate::access;
use crate::op::{NodeId, Op, Opening};
use crate::workload::{Actor, Opened, Seen, list};
use cfs_client::{Caller, LocatedEntry, NewFile, OpenFile, OpenFlags, Whence};
use cfs_wire::meta::{Attr, AttrChanges, FileKind, SetTime};
use cfs_wire::{Errno, Ino};
use std::rc::Rc;

/// Linux's falloc.h.
const FALLOC_KEEP_SIZE: i32 = 0x01;
const FALLOC_PUNCH_HOLE: i32 = 0x02;
const FALLOC_ZERO_RANGE: i32 = 0x10;

impl Actor {
    pub(crate) fn ino(&self, node: NodeId) -> Ino {
        self.history.model.borrow().node(node).ino.expect("every node an operation names has been seen")
    }

    /// Whether the program opened it with O_DSYNC.
    pub(crate) fn is_sync(&self, node: NodeId) -> bool {
        self.open.borrow().get(&node).is_some_and(|opened| opened.file.flags.sync)
    }

    fn file(&self, node: NodeId) -> Rc<OpenFile> {
        self.open.borrow().get(&node).expect("the file is open").file.clone()
    }

    pub(crate) async fn perform(&self, op: &Op, shared: bool) -> Result<Seen, Errno> {
        let client = &self.client;
        match op {
            Op::Make { .. } | Op::Tmpfile { .. } | Op::Open { .. } | Op::Close { .. } => {
                self.perform_open(op, shared).await
            }
            Op::Link { node, dir, name } => {
                client.link(self.ino(*node), self.ino(*dir), name).await.map(|entry| attr(entry.attr))
            }
            Op::Unlink { dir, name } => client.unlink(self.ino(*dir), name).await.map(|()| Seen::Done),
            Op::Rmdir { dir, name } => client.rmdir(self.ino(*dir), name).await.map(|()| Seen::Done),
            Op::Rename { dir, name, to_dir, to_name, flags } => {
                client.rename(self.ino(*dir), name, self.ino(*to_dir), to_name, *flags).await.map(|()| Seen::Done)
            }
            Op::Lookup { dir, name } => match client.lookup(self.ino(*dir), name).await {
                Ok(entry) => Ok(attr(entry.attr)),
                Err(Ok(_)) => Err(Errno::ENOENT),
                Err(Err(errno)) => Err(errno),
            },
            Op::List { dir } => list(client, self.ino(*dir)).await.map(Seen::Names),
            Op::Stat { node } => client.getattr(self.ino(*node)).await.map(|located| attr(located.attr)),
            Op::ReadLink { node } => client.readlink(self.ino(*node)).await.map(|target| Seen::Bytes(target.into())),
            Op::SetXattr { node, name, value, flags } => {
                client.setxattr(self.ino(*node), name, value, *flags).await.map(|()| Seen::Done)
            }
            Op::RemoveXattr { node, name } => client.removexattr(self.ino(*node), name).await.map(|()| Seen::Done),
            Op::GetXattr { node, name } => {
                client.getxattr(self.ino(*node), name).await.map(|value| Seen::Bytes(value.into()))
            }
            Op::ListXattrs { node } => {
                let names = client.listxattr(self.ino(*node)).await?;
                Ok(Seen::AttributeNames(names.iter().map(|name| name.to_vec()).collect()))
            }
            Op::SetAcl { node, default, acl } => {
                let name = if *default { access::DEFAULT } else { access::ACCESS };
                match acl {
                    Some(acl) => client.setxattr(self.ino(*node), name, &acl.bytes(), 0).await?,
                    None => client.removexattr(self.ino(*node), name).await?,
                }
                Ok(Seen::Done)
            }
            Op::StatFs => {
                let space = client.statfs_counted().await?;
                let sane = space.bytes_free <= space.bytes_total;
                if sane { Ok(Seen::Done) } else { Ok(Seen::Count(space.bytes_free)) }
            }
            Op::SyncAll => client.syncfs().await.map(|()| Seen::Done),
            Op::SetMode { node, .. }
            | Op::SetOwner { node, .. }
            | Op::SetSize { node, .. }
            | Op::SetMtime { node, .. } => {
                client.setattr(self.ino(*node), changes(op)).await.map(|located| attr(located.attr))
            }
            _ => self.perform_data(op).await,
        }
    }

    async fn perform_open(&self, op: &Op, shared: bool) -> Result<Seen, Errno> {
        let client = &self.client;
        let flags = OpenFlags::default();
        match op {
            Op::Make { dir, name, new } => {
                let caller = Caller { uid: new.uid, gid: new.gid, pid: 1 };
                let dir = self.ino(*dir);
                let node = NewFile { kind: new.kind, mode: new.mode, umask: new.umask, rdev: 0 };
                let made: Result<LocatedEntry, Errno> = match new.kind {
                    FileKind::Directory => client.mkdir(caller, dir, name, new.mode, new.umask).await,
                    FileKind::Symlink => client.symlink(caller, dir, name, &new.target).await,
                    FileKind::File => client.create(caller, dir, name, node, flags).await.map(|(entry, file)| {
                        self.opened_new(file, shared);
                        entry
                    }),
                    _ => client.mknod(caller, dir, name, node).await,
                };
                made.map(|entry| attr(entry.attr))
            }
            Op::Tmpfile { dir, new } => {
                let caller = Caller { uid: new.uid, gid: new.gid, pid: 1 };
                let node = NewFile { kind: new.kind, mode: new.mode, umask: new.umask, rdev: 0 };
                let (entry, file) = client.tmpfile(caller, self.ino(*dir), node, flags).await?;
                self.opened_new(file, shared);
                Ok(attr(entry.attr))
            }
            Op::Open { node, how: Opening { direct, sync, truncate } } => {
                let flags = OpenFlags { direct: *direct, sync: *sync, truncate: *truncate, ..OpenFlags::default() };
                let file = client.open(self.ino(*node), flags, false).await?;
                self.open.borrow_mut().insert(*node, Opened { file, shared });
                Ok(Seen::Done)
            }
            Op::Close { node } => {
                let file = self.open.borrow_mut().remove(node).expect("only open files are closed").file;
                let closed = client.flush(&file).await;
                client.release(&file);
                closed.map(|()| Seen::Done)
            }
            other => unreachable!("{other:?} opens nothing"),
        }
    }

    /// A file that was just made gets the number that the model is about to give it.
    fn opened_new(&self, file: Rc<OpenFile>, shared: bool) {
        let id = self.history.model.borrow().next_id();
        self.open.borrow_mut().insert(id, Opened { file, shared });
    }

    async fn perform_data(&self, op: &Op) -> Result<Seen, Errno> {
        let client = &self.client;
        match op {
            Op::Write { node, offset, data, .. } => {
                let written = client.write(&self.file(*node), *offset, data.clone(), false).await?;
                Ok(Seen::Count(written.into()))
            }
            Op::Append { node, data } => {
                // A second open file, as a program that appends would have.
                let flags = OpenFlags { append: true, ..OpenFlags::default() };
                let file = client.open(self.ino(*node), flags, false).await?;
                let written = client.write(&file, 0, data.clone(), false).await;
                let closed = client.flush(&file).await;
                client.release(&file);
                closed?;
                Ok(Seen::Count(written?.into()))
            }
            Op::Punch { node, offset, length } => {
                let mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE;
                client.fallocate(&self.file(*node), mode, *offset, *length, false).await.map(|()| Seen::Done)
            }
            Op::Zero { node, offset, length, keep_size } => {
                let mode = FALLOC_ZERO_RANGE | if *keep_size { FALLOC_KEEP_SIZE } else { 0 };
                client.fallocate(&self.file(*node), mode, *offset, *length, false).await.map(|()| Seen::Done)
            }
            Op::Reserve { node, offset, length } => {
                let file = self.file(*node);
                client.fallocate(&file, FALLOC_KEEP_SIZE, *offset, *length, false).await.map(|()| Seen::Done)
            }
            Op::Seek { node, offset, data } => {
                let whence = if *data { Whence::Data } else { Whence::Hole };
                client.lseek(&self.file(*node), *offset, whence).await.map(Seen::Count)
            }
            Op::Extend { node, size } => {
                client.fallocate(&self.file(*node), 0, 0, *size, false).await.map(|()| Seen::Done)
            }
            Op::Copy { from, from_offset, to, to_offset, length } => {
                let (from, to) = (self.file(*from), self.file(*to));
                let copied = client.copy_file_range(&from, *from_offset, &to, *to_offset, *length, false).await?;
                Ok(Seen::Count(copied))
            }
            Op::Fsync { node } => client.fsync(&self.file(*node), false).await.map(|()| Seen::Done),
            Op::Read { node, offset, length } => {
                client.read(&self.file(*node), *offset, *length).await.map(Seen::Bytes)
            }
            other => unreachable!("{other:?} touches no data"),
        }
    }
}

fn attr(attr: Attr) -> Seen {
    Seen::Attr(Box::new(attr))
}

fn changes(op: &Op) -> AttrChanges {
    let none = AttrChanges::default();
    match op {
        Op::SetMode { mode, .. } => AttrChanges { mode: Some(*mode), ..none },
        Op::SetOwner { uid, gid, .. } => AttrChanges { uid: Some(*uid), gid: Some(*gid), ..none },
        Op::SetSize { size, .. } => AttrChanges { size: Some(*size), ..none },
        Op::SetMtime { time, .. } => AttrChanges { mtime: Some(SetTime::At(*time)), ..none },
        _ => none,
    }
}
