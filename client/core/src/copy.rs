//! `copy_file_range`: the copy refers to the same stored bytes. Where that is refused the bytes
//! themselves are copied.

use crate::Client;
use crate::WriteFlags;
use crate::calls::CallError;
use crate::extents::{Run, Source};
use crate::files::OpenFile;
use crate::flush::data_write;
use crate::inode::Inode;
use cfs_wire::Errno;
use cfs_wire::data::Extent;
use cfs_wire::limits::{COMMIT_WRITES_MAX, FILE_BYTES_MAX};
use cfs_wire::meta::{FileWrite, MetaOp, MetaReply};
use std::rc::Rc;

/// Bytes copied by reading and writing in one step.
const COPY_STEP: u32 = 1 << 20;
/// Bytes whose references are copied in one call: 256 chunks of 64 KiB are one commit.
const SHARE_STEP: u64 = 16 << 20;

/// So many bytes from `source` of one file that belong at `target` of the other.
struct Part {
    source: u64,
    target: u64,
    length: u64,
}

/// What a step of copying did.
enum Copied {
    Bytes(u64),
    /// References to these bytes are not accepted, or there are none: to be copied as bytes.
    Refused,
}

impl Client {
    /// Copies up to `length` bytes; fewer at the end of the source. Answers how many.
    pub async fn copy_file_range(
        self: &Rc<Self>,
        from: &OpenFile,
        from_offset: u64,
        to: &OpenFile,
        to_offset: u64,
        length: u64,
        kill_privileges: bool,
    ) -> Result<u64, Errno> {
        // What is shared is what the server knows of the source.
        let flushed = self.flush_inode(&from.inode).await;
        from.take_failure()?;
        flushed?;
        let mut length = length;
        if Rc::ptr_eq(&from.inode, &to.inode) {
            // Cut at the end as it is now: the copy must not go on into what it has just written.
            let size = self.getattr(from.inode.ino).await?.attr.size;
            length = length.min(size.saturating_sub(from_offset));
            if from_offset < to_offset.saturating_add(length) && to_offset < from_offset.saturating_add(length) {
                return Err(Errno::EINVAL);
            }
        }
        if to_offset.checked_add(length).is_none_or(|end| end > FILE_BYTES_MAX) {
            return Err(Errno::EFBIG);
        }
        let mut done = 0;
        let mut share = true;
        while done < length {
            let (source, target) = (from_offset + done, to_offset + done);
            let step = length - done;
            let told = to.failures_told();
            let copied = if share {
                let part = Part { source, target, length: step.min(SHARE_STEP) };
                self.share(&from.inode, to, part, kill_privileges).await
            } else {
                self.copy_bytes(from, source, to, target, step.min(COPY_STEP.into()) as u32, kill_privileges).await
            };
            match copied {
                Ok(Copied::Bytes(0)) => break,
                Ok(Copied::Bytes(copied)) => done += copied,
                Ok(Copied::Refused) => share = false,
                Err(error) if done == 0 => return Err(error),
                // As write(2): the next call meets the error again, or is told of the loss.
                Err(_) => {
                    to.tell_failures_after(told);
                    break;
                }
            }
        }
        Ok(done)
    }

    async fn copy_bytes(
        self: &Rc<Self>,
        from: &OpenFile,
        source: u64,
        to: &OpenFile,
        target: u64,
        length: u32,
        kill_privileges: bool,
    ) -> Result<Copied, Errno> {
        let bytes = self.read(from, source, length).await?;
        // The kernel refuses a target with O_APPEND; what it was opened with says nothing.
        let how = WriteFlags { append: false, sync: to.flags.sync, kill_privileges, mapped: false };
        Ok(Copied::Bytes(self.write_with(to, target, bytes, how).await?.into()))
    }

    async fn share(
        self: &Rc<Self>,
        from: &Rc<Inode>,
        file: &OpenFile,
        part: Part,
        kill: bool,
    ) -> Result<Copied, Errno> {
        let Part { source, target, length } = part;
        let op =
            MetaOp::GetExtents { ino: from.ino, offset: source, length, extents_max: COMMIT_WRITES_MAX as u32 / 4 };
        let MetaReply::Extents(reply) = self.read_call(op).await?.reply else { return Err(Errno::EIO) };
        let end = source.saturating_add(length).min(reply.attr.size).min(reply.covered.max(source));
        if source >= reply.attr.size {
            return Ok(Copied::Bytes(0));
        }
        let to = &file.inode;
        let _turn = to.order.acquire(1).await;
        // What was written before must not be missing when the copy is there.
        let _ = self.flush_in_turn(to).await;
        file.take_failure()?;
        let session = self.session().await?;
        let target_policy = self.policy(to).await?;
        let mut known = crate::extents::ExtentCache::default();
        known.learn(source, &reply);
        let inline = |run: &Run| matches!(run.source, Source::Inline(_));
        let shareable = known
            .runs(source, end.saturating_sub(source))
            .is_some_and(|runs| !runs.is_empty() && !runs.iter().any(inline));
        if !shareable || target_policy != reply.attr.policy {
            return Ok(Copied::Refused);
        }
        let mut writes: Vec<FileWrite> = Vec::new();
        let mut next = source;
        for extent in known.extents(source, end) {
            punch(&mut writes, next + target - source, extent.offset - next);
            next = extent.offset + u64::from(extent.length);
            writes.push(data_write(Extent { offset: extent.offset - source + target, ..extent }));
        }
        punch(&mut writes, next + target - source, end - next);
        writes.push(FileWrite::Extend { size: target + (end - source) });
        let outcome = self.commit_all(&session, to, writes, Some(self.handle.wall()), kill, false).await;
        to.state().extents.clear();
        self.pages.borrow_mut().drop_inode(to.ino);
        match outcome {
            Ok(_) => Ok(Copied::Bytes(end - source)),
            // Too many extents lie where the copy has holes: bytes take their place one step at a time.
            Err(CallError::Stale | CallError::Errno(Errno::E2BIG)) => Ok(Copied::Refused),
            Err(error) => Err(error.errno()),
        }
    }
}

fn punch(writes: &mut Vec<FileWrite>, offset: u64, length: u64) {
    if length > 0 {
        writes.push(FileWrite::Punch { offset, length });
    }
}
