//! Answers, written straight to the device. A reply that is dropped answers EIO, so that no
//! request stays open whatever happens to the executor's tasks.

use crate::abi::{self, CopyFileRangeOut, GetXattrOut, LseekOut, OpenOut, OutHeader, StatFsOut, WriteOut};
use crate::attributes::{BLOCK_BYTES, absent_out, attr_out, entry_out, statx_out};
use crate::operation::{Answer, Opened, Outcome};
use crate::translate::file_lock;
use cfs_wire::Errno;
use cfs_wire::meta::StatFs;
use rustix::io::{Errno as SystemErrno, writev};
use smallvec::SmallVec;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};

/// What every body but STATX's fits in.
const BODY_BYTES: usize = 256;
/// The kernel takes errors from 1 to 511.
const ERRNO_MAX: i32 = 511;

type Body = SmallVec<[u8; BODY_BYTES]>;

/// The answer to one request, still to be given. It does not keep the device open: closing it is
/// what ends every request at once.
pub(crate) struct Reply {
    device: Weak<OwnedFd>,
    unique: u64,
    open: bool,
}

impl Reply {
    pub fn new(device: &Rc<OwnedFd>, unique: u64) -> Reply {
        Reply { device: Rc::downgrade(device), unique, open: true }
    }

    pub fn send(mut self, outcome: Outcome) {
        self.open = false;
        match outcome {
            Ok(Answer::Bytes(bytes)) => self.write(0, &[], &bytes),
            Ok(answer) => self.write(0, &body(&answer), &[]),
            Err(errno) => self.fail(errno),
        }
    }

    fn fail(&self, errno: Errno) {
        let known = (1..=ERRNO_MAX).contains(&errno.0);
        self.write(if known { -errno.0 } else { -Errno::EIO.0 }, &[], &[]);
    }

    fn write(&self, error: i32, body: &[u8], payload: &[u8]) {
        let Ok(len) = u32::try_from(size_of::<OutHeader>() + body.len() + payload.len()) else {
            tracing::error!(bytes = payload.len(), "an answer is too large for the kernel");
            return self.fail(Errno::EIO);
        };
        let Some(device) = self.device.upgrade() else { return };
        let header = OutHeader { len, error, unique: self.unique };
        let parts = [IoSlice::new(bytemuck::bytes_of(&header)), IoSlice::new(body), IoSlice::new(payload)];
        match writev(&*device, &parts) {
            Ok(_) => {}
            // The caller was killed meanwhile, or the mount is gone: nobody waits any more.
            Err(SystemErrno::NOENT | SystemErrno::NODEV) => {}
            Err(errno) => tracing::error!(%errno, error, len, "the kernel refuses an answer"),
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.open {
            self.fail(Errno::EIO);
        }
    }
}

/// What an answer looks like behind its header.
fn body(answer: &Answer) -> Body {
    let mut body = Body::new();
    let mut put = |bytes: &[u8]| body.extend_from_slice(bytes);
    match answer {
        Answer::Done => {}
        Answer::Entry { attr, attr_valid, entry_valid } => {
            put(bytemuck::bytes_of(&entry_out(attr, *attr_valid, *entry_valid)));
        }
        Answer::Absent { valid } => put(bytemuck::bytes_of(&absent_out(*valid))),
        Answer::Attr { attr, valid } => put(bytemuck::bytes_of(&attr_out(attr, *valid))),
        Answer::Statx { attr, valid } => put(bytemuck::bytes_of(&statx_out(attr, *valid))),
        Answer::Created { attr, attr_valid, entry_valid, opened } => {
            put(bytemuck::bytes_of(&entry_out(attr, *attr_valid, *entry_valid)));
            put(bytemuck::bytes_of(&open_out(opened)));
        }
        Answer::Opened(opened) => put(bytemuck::bytes_of(&open_out(opened))),
        Answer::OpenedDirectory(handle) => {
            put(bytemuck::bytes_of(&OpenOut { fh: handle.0, ..OpenOut::default() }));
        }
        Answer::Bytes(bytes) => put(bytes),
        Answer::Written(size) => put(bytemuck::bytes_of(&WriteOut { size: *size, padding: 0 })),
        Answer::Copied(bytes_copied) => {
            put(bytemuck::bytes_of(&CopyFileRangeOut { bytes_copied: *bytes_copied }));
        }
        Answer::Length(size) => put(bytemuck::bytes_of(&GetXattrOut { size: *size, padding: 0 })),
        Answer::StatFs(stat) => put(bytemuck::bytes_of(&statfs_out(stat))),
        Answer::Offset(offset) => put(bytemuck::bytes_of(&LseekOut { offset: *offset })),
        Answer::Lock(conflict) => put(bytemuck::bytes_of(&file_lock(conflict.as_ref()))),
    }
    body
}

fn open_out(opened: &Opened) -> OpenOut {
    let open_flags = if opened.direct {
        abi::FOPEN_DIRECT_IO | abi::FOPEN_PARALLEL_DIRECT_WRITES
    } else if opened.keep_pages {
        // Pages stay from one open to the next: whoever changes the file elsewhere has them
        // invalidated, and the kernel drops them itself when size or times differ.
        abi::FOPEN_KEEP_CACHE
    } else {
        0
    };
    OpenOut { fh: opened.handle.0, open_flags, backing_id: 0 }
}

fn statfs_out(stat: &StatFs) -> StatFsOut {
    let blocks = |bytes: u64| bytes / u64::from(BLOCK_BYTES);
    let free = blocks(stat.bytes_free);
    StatFsOut {
        blocks: blocks(stat.bytes_total),
        bfree: free,
        bavail: free,
        // Inodes are not limited; what is free for data bounds them well enough.
        files: stat.inodes_used.saturating_add(free),
        ffree: free,
        bsize: BLOCK_BYTES,
        namelen: cfs_wire::limits::NAME_BYTES_MAX as u32,
        frsize: BLOCK_BYTES,
        ..StatFsOut::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::Handle;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    /// What the kernel would get for an outcome.
    fn sent(act: impl FnOnce(Reply)) -> (i32, u64, Vec<u8>) {
        let (device, mut kernel) = UnixStream::pair().unwrap();
        let device = Rc::new(OwnedFd::from(device));
        act(Reply::new(&device, 77));
        drop(device);
        let mut bytes = Vec::new();
        kernel.read_to_end(&mut bytes).unwrap();
        let header: OutHeader = bytemuck::pod_read_unaligned(&bytes[..16]);
        assert_eq!(header.len as usize, bytes.len());
        (header.error, header.unique, bytes[16..].to_vec())
    }

    #[test]
    fn answers_carry_the_requests_number_and_their_body() {
        assert_eq!(sent(|reply| reply.send(Ok(Answer::Done))), (0, 77, vec![]));
        assert_eq!(sent(|reply| reply.send(Ok(Answer::Bytes(b"data".as_slice().into())))), (0, 77, b"data".to_vec()));
        let opened = Opened { handle: Handle(0x0102), direct: true, keep_pages: false };
        let expected = [&0x0102u64.to_ne_bytes()[..], &0x41u32.to_ne_bytes(), &[0; 4]].concat();
        assert_eq!(sent(|reply| reply.send(Ok(Answer::Opened(opened)))), (0, 77, expected));
    }

    #[test]
    fn errors_outside_the_kernels_range_and_dropped_replies_are_eio() {
        assert_eq!(sent(|reply| reply.send(Err(Errno::ENOSPC))), (-28, 77, vec![]));
        for wild in [0, -5, 512, i32::MAX, i32::MIN] {
            assert_eq!(sent(|reply| reply.send(Err(Errno(wild)))), (-5, 77, vec![]), "{wild}");
        }
        assert_eq!(sent(drop), (-5, 77, vec![]));
    }
}
