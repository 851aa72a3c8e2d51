//! Carries operations out, on the client's executor.

use crate::listing::Listing;
use crate::locks::Locks;
use crate::operation::{Answer, Asked, Handle, Opened, Operation, Outcome};
use cfs_client::{Caller, Client, LocatedEntry, NewFile, OpenFile, OpenFlags};
use cfs_wire::meta::{AttrChanges, FileKind};
use cfs_wire::{Errno, Ino};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// A copy in one request: the kernel's caller gets a short count and goes on.
const COPY_BYTES_MAX: u64 = 1 << 30;

pub(crate) struct Performer {
    client: Rc<Client>,
    locks: Locks,
    files: RefCell<BTreeMap<Handle, Rc<OpenFile>>>,
    listings: RefCell<BTreeMap<Handle, Rc<RefCell<Listing>>>>,
    next_handle: Cell<u64>,
}

impl Performer {
    pub fn new(client: Rc<Client>) -> Performer {
        Performer {
            locks: Locks::new(&client),
            client,
            files: RefCell::default(),
            listings: RefCell::default(),
            next_handle: Cell::new(1),
        }
    }

    pub async fn perform(&self, asked: Asked) -> Outcome {
        let Asked { caller, operation } = asked;
        match operation {
            Operation::Lookup { .. }
            | Operation::MkNod { .. }
            | Operation::MkDir { .. }
            | Operation::Symlink { .. }
            | Operation::Create { .. }
            | Operation::TmpFile { .. }
            | Operation::Link { .. }
            | Operation::Unlink { .. }
            | Operation::RmDir { .. }
            | Operation::Rename { .. } => self.name_operation(caller, operation).await,
            Operation::Open { .. }
            | Operation::Read { .. }
            | Operation::Write { .. }
            | Operation::Flush { .. }
            | Operation::Fsync { .. }
            | Operation::Release { .. }
            | Operation::Fallocate { .. }
            | Operation::Seek { .. }
            | Operation::CopyRange { .. } => self.file_operation(caller, operation).await,
            Operation::GetLock { ino, lock } => self.locks.test(ino, lock).await.map(Answer::Lock),
            Operation::SetLock { ino, handle, lock, interruption } => {
                self.locks.set(ino, handle, lock, interruption).await.map(done)
            }
            Operation::Unlock { ino, lock } => self.locks.unlock(ino, lock).await.map(done),
            other => self.inode_operation(caller, other).await,
        }
    }

    async fn name_operation(&self, caller: Caller, operation: Operation) -> Outcome {
        let client = &self.client;
        match operation {
            // Asked by inode number alone (FUSE_EXPORT_SUPPORT): a file handle is being opened.
            Operation::Lookup { dir, name } if name == b"." => self.by_number(dir).await,
            Operation::Lookup { dir, name } if name == b".." => {
                let parent = client.readdir(dir, 0, 1, false).await?.parent;
                self.by_number(parent).await
            }
            Operation::Lookup { dir, name } => match client.lookup(dir, &name).await {
                Ok(found) => Ok(entry(found)),
                // Without a time the kernel must not keep it.
                Err(Ok(negative)) if negative.valid.is_zero() => Err(Errno::ENOENT),
                Err(Ok(negative)) => Ok(Answer::Absent { valid: negative.valid }),
                Err(Err(errno)) => Err(errno),
            },
            Operation::MkNod { dir, name, kind, mode, umask, rdev } => {
                client.mknod(caller, dir, &name, NewFile { kind, mode, umask, rdev }).await.map(entry)
            }
            Operation::MkDir { dir, name, mode, umask } => {
                client.mkdir(caller, dir, &name, mode, umask).await.map(entry)
            }
            Operation::Symlink { dir, name, target } => client.symlink(caller, dir, &name, &target).await.map(entry),
            Operation::Create { dir, name, mode, umask, flags } => {
                let exclusive = flags & libc::O_EXCL != 0;
                let flags = OpenFlags { truncate: false, ..OpenFlags::from_bits(flags) };
                let new = NewFile::regular(mode, umask);
                match client.create(caller, dir, &name, new, flags).await {
                    // Another mount made it since the kernel looked: this has the kernel look again,
                    // and open what is there with the checks that belong to that. It does so
                    // once: who loses to others twice in a row is told ESTALE.
                    Err(Errno::EEXIST) if !exclusive => Err(Errno::ESTALE),
                    made => made.map(|made| self.created(made)),
                }
            }
            Operation::TmpFile { dir, mode, umask, flags } => {
                let flags = OpenFlags { truncate: false, ..OpenFlags::from_bits(flags) };
                client.tmpfile(caller, dir, NewFile::regular(mode, umask), flags).await.map(|made| self.created(made))
            }
            Operation::Link { ino, dir, name } => client.link(ino, dir, &name).await.map(entry),
            Operation::Unlink { dir, name } => client.unlink(dir, &name).await.map(done),
            Operation::RmDir { dir, name } => client.rmdir(dir, &name).await.map(done),
            Operation::Rename { dir, name, to_dir, to_name, flags } => {
                client.rename(dir, &name, to_dir, &to_name, flags).await.map(done)
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    async fn by_number(&self, ino: Ino) -> Outcome {
        let found = self.client.getattr(ino).await.map_err(|errno| match errno {
            Errno::ENOENT => Errno::ESTALE,
            other => other,
        })?;
        Ok(Answer::Entry { attr: found.attr, attr_valid: found.valid, entry_valid: Duration::ZERO })
    }

    async fn file_operation(&self, caller: Caller, operation: Operation) -> Outcome {
        let client = &self.client;
        // The kernel has seen to it already, and says nothing with these two.
        let unprivileged = caller.uid != 0;
        match operation {
            Operation::Open { ino, flags, kill_privileges } => {
                let file = client.open(ino, OpenFlags::from_bits(flags), kill_privileges).await?;
                Ok(Answer::Opened(self.keep(file)))
            }
            Operation::Read { handle, offset, length } => {
                let file = self.file(handle)?;
                let bytes = if file.flags.direct || file.flags.append {
                    client.read(&file, offset, length).await
                } else {
                    client.read_for_pages(&file, offset, length).await
                };
                bytes.map(Answer::Bytes)
            }
            Operation::Write { handle, offset, data, how } => {
                client.write_with(&*self.file(handle)?, offset, data, how).await.map(Answer::Written)
            }
            Operation::Flush { handle, owner } => {
                let file = self.file(handle)?;
                self.locks.closed_by(file.ino(), owner).await;
                client.flush(&file).await.map(done)
            }
            Operation::Fsync { handle, datasync } => client.fsync(&*self.file(handle)?, datasync).await.map(done),
            Operation::Release { handle, flock_owner } => {
                let file = self.files.borrow_mut().remove(&handle).ok_or(Errno::EBADF)?;
                self.locks.ended(file.ino(), handle, flock_owner).await;
                client.release(&file);
                Ok(Answer::Done)
            }
            Operation::Fallocate { handle, offset, length, mode } => {
                client.fallocate(&*self.file(handle)?, mode, offset, length, unprivileged).await.map(done)
            }
            Operation::Seek { handle, offset, whence } => {
                client.lseek(&*self.file(handle)?, offset, whence).await.map(Answer::Offset)
            }
            Operation::CopyRange { from, from_offset, to, to_offset, length, wide } => {
                let (from, to) = (self.file(from)?, self.file(to)?);
                let length = length.min(COPY_BYTES_MAX);
                let copied = client.copy_file_range(&from, from_offset, &to, to_offset, length, unprivileged).await?;
                Ok(if wide { Answer::Copied(copied) } else { Answer::Written(copied as u32) })
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    async fn inode_operation(&self, caller: Caller, operation: Operation) -> Outcome {
        let client = &self.client;
        match operation {
            Operation::GetAttr { ino, for_pages: true } => attributes(client.getattr_for_pages(ino).await),
            Operation::GetAttr { ino, for_pages: false } => attributes(client.getattr(ino).await),
            Operation::Statx { ino } => {
                let found = client.getattr(ino).await?;
                Ok(Answer::Statx { attr: found.attr, valid: found.valid })
            }
            Operation::SetAttr { ino, changes } => {
                let changes = self.with_privileges_killed(ino, changes).await?;
                attributes(client.setattr(ino, changes).await)
            }
            Operation::ReadLink { ino } => client.readlink(ino).await.map(|target| Answer::Bytes(target.into())),
            Operation::OpenDir { ino } => {
                client.opendir(ino).await?;
                let handle = self.new_handle();
                self.listings.borrow_mut().insert(handle, Rc::new(RefCell::new(Listing::new(ino))));
                Ok(Answer::OpenedDirectory(handle))
            }
            Operation::ReadDir { handle, after, room } => self.list(handle, after, room).await,
            Operation::ReleaseDir { handle } => {
                self.listings.borrow_mut().remove(&handle);
                Ok(Answer::Done)
            }
            Operation::FsyncDir { ino } => client.fsyncdir(ino).await.map(done),
            Operation::SyncFs => client.syncfs().await.map(done),
            Operation::StatFs => client.statfs_counted().await.map(Answer::StatFs),
            Operation::SetXattr { ino, name, value, flags } => {
                client.setxattr(ino, &name, &value, flags).await.map(done)
            }
            Operation::GetXattr { ino, name, room } => fitting(client.getxattr(ino, &name).await?, room),
            Operation::ListXattr { ino, room } => {
                let mut list = Vec::new();
                // The kernel does not let them be read without CAP_SYS_ADMIN, and leaves it to the file system
                // not to list them: the user is all that a request tells of its caller.
                let hidden = |name: &[u8]| caller.uid != 0 && name.starts_with(b"trusted.");
                for name in client.listxattr(ino).await?.into_iter().filter(|name| !hidden(name)) {
                    list.extend_from_slice(&name);
                    list.push(0);
                }
                fitting(list, room)
            }
            Operation::RemoveXattr { ino, name } => client.removexattr(ino, &name).await.map(done),
            _ => Err(Errno::ENOSYS),
        }
    }

    /// FUSE_HANDLE_KILLPRIV_V2 leaves setuid and setgid to us. The kernel says so with a new owner
    /// or size; elsewhere (chown to -1:-1, fallocate) by a request that changes nothing.
    async fn with_privileges_killed(&self, ino: Ino, changes: AttrChanges) -> Result<AttrChanges, Errno> {
        if changes != AttrChanges::default() {
            return Ok(changes);
        }
        let kill_privileges = self.client.getattr(ino).await?.attr.kind != FileKind::Directory;
        Ok(AttrChanges { kill_privileges, ..changes })
    }

    fn new_handle(&self) -> Handle {
        let handle = self.next_handle.get();
        self.next_handle.set(handle + 1);
        Handle(handle)
    }

    fn keep(&self, file: Rc<OpenFile>) -> Opened {
        // Into pages the kernel writes what is appended page by page, where it takes the end to be:
        // what two mounts append would mix.
        let direct = file.flags.direct || file.flags.append;
        let keep_pages = !direct && self.client.pages_are_current(&file);
        let opened = Opened { handle: self.new_handle(), direct, keep_pages };
        self.files.borrow_mut().insert(opened.handle, file);
        opened
    }

    fn file(&self, handle: Handle) -> Result<Rc<OpenFile>, Errno> {
        self.files.borrow().get(&handle).cloned().ok_or(Errno::EBADF)
    }

    fn created(&self, (made, file): (LocatedEntry, Rc<OpenFile>)) -> Answer {
        let opened = self.keep(file);
        Answer::Created { attr: made.attr, attr_valid: made.attr_valid, entry_valid: made.entry_valid, opened }
    }

    /// Entries behind a cookie, from what was fetched before where that goes on there.
    async fn list(&self, handle: Handle, after: u64, room: usize) -> Outcome {
        let listing = self.listings.borrow().get(&handle).cloned().ok_or(Errno::EBADF)?;
        if let Some(answer) = listing.borrow().answer(after, room) {
            return Ok(Answer::Bytes(answer.into()));
        }
        let ino = listing.borrow().ino();
        let fetched = Listing::fetch(&self.client, ino, after).await?;
        let answer = fetched.first(room);
        *listing.borrow_mut() = fetched;
        Ok(Answer::Bytes(answer.into()))
    }
}

fn entry(found: LocatedEntry) -> Answer {
    Answer::Entry { attr: found.attr, attr_valid: found.attr_valid, entry_valid: found.entry_valid }
}

fn done((): ()) -> Answer {
    Answer::Done
}

fn attributes(located: Result<cfs_client::Located, Errno>) -> Outcome {
    located.map(|located| Answer::Attr { attr: located.attr, valid: located.valid })
}

/// A value for a caller with so much room; without any it asks how long the value is.
fn fitting(value: Vec<u8>, room: usize) -> Outcome {
    match room {
        0 => Ok(Answer::Length(value.len() as u32)),
        room if value.len() > room => Err(Errno::ERANGE),
        _ => Ok(Answer::Bytes(value.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_given_measured_or_refused_by_the_room_there_is() {
        assert!(matches!(fitting(vec![1, 2, 3], 3), Ok(Answer::Bytes(value)) if value[..] == [1, 2, 3]));
        assert!(matches!(fitting(vec![1, 2, 3], 0), Ok(Answer::Length(3))));
        assert!(matches!(fitting(vec![1, 2, 3], 2), Err(Errno::ERANGE)));
    }
}
