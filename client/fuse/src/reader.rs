//! Requests, read from the device by the client's own executor: no other thread stands between a
//! program and the client.
//!
//! The device never blocks this thread: it is read until it has nothing more, and then waited for
//! through the executor's ring. A request lands so that a write's payload begins on a page.

use crate::abi::{Call, Features, Opcode, REQUEST_BYTES_MAX, Request, WRITE_HEAD_BYTES};
use crate::interrupts::Interrupts;
use crate::operation::Answer;
use crate::perform::Performer;
use crate::reply::Reply;
use crate::translate::asked;
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::uring::Ring;
use cfs_wire::limits::PAGE;
use rustix::io::Errno as SystemErrno;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// Where in its buffer a request begins.
const REQUEST_AT: usize = PAGE - WRITE_HEAD_BYTES;
/// A payload that fills its buffer by half keeps it; a smaller one is copied, so that what is
/// written in small pieces does not hold a large buffer each.
const KEPT_BYTES_MIN: usize = REQUEST_BYTES_MAX / 2;
/// What is read before other tasks get a turn: some 100 µs of copying.
const TURN_BYTES_MAX: usize = 1 << 20;
/// What a request costs beside its bytes, in the same measure.
const REQUEST_COST_BYTES: usize = 16 << 10;

/// The device and what its requests are carried out by.
pub(crate) struct Reader {
    handle: Handle,
    ring: Rc<Ring>,
    device: Rc<OwnedFd>,
    features: Features,
    performer: Rc<Performer>,
    interrupts: Rc<Interrupts>,
}

impl Reader {
    /// `device` does not block.
    pub fn new(
        handle: &Handle,
        ring: &Rc<Ring>,
        device: Rc<OwnedFd>,
        features: Features,
        performer: Performer,
    ) -> Reader {
        Reader {
            handle: handle.clone(),
            ring: ring.clone(),
            device,
            features,
            performer: Rc::new(performer),
            interrupts: Rc::default(),
        }
    }

    /// Takes requests until the file system is unmounted.
    pub async fn run(&self) -> io::Result<()> {
        let mut buffer = fresh_buffer();
        let mut read_in_turn = 0;
        loop {
            match rustix::io::read(&*self.device, &mut buffer[REQUEST_AT..]) {
                Ok(length) => {
                    buffer = self.take(buffer, length);
                    read_in_turn += length + REQUEST_COST_BYTES;
                    if read_in_turn >= TURN_BYTES_MAX {
                        read_in_turn = 0;
                        self.handle.yield_now().await;
                    }
                }
                Err(SystemErrno::AGAIN) => {
                    read_in_turn = 0;
                    self.ring.poll_readable(&self.device).await?;
                }
                // A request whose caller was killed is taken back while it is being read.
                Err(SystemErrno::INTR | SystemErrno::NOENT) => {}
                Err(SystemErrno::NODEV) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Begins a request; gives back the buffer for the next.
    fn take(&self, buffer: DmaBuf, length: usize) -> DmaBuf {
        let request = REQUEST_AT..REQUEST_AT + length;
        if length < KEPT_BYTES_MIN {
            self.begin(&buffer[request], |payload| DmaBuf::copy_of(payload).freeze());
            return buffer;
        }
        let kept = buffer.freeze();
        self.begin(&kept[request], |payload| kept.slice_ref(payload));
        fresh_buffer()
    }

    fn begin(&self, bytes: &[u8], payload: impl FnOnce(&[u8]) -> Bytes) {
        let request = match Request::decode(bytes, self.features) {
            Ok(request) => request,
            Err(malformed) => {
                tracing::error!(?malformed, "the kernel sent a malformed request");
                // Dropped, it answers EIO.
                drop(malformed.unique.map(|unique| self.reply(unique)));
                return;
            }
        };
        match request.call {
            // Nobody waits for an answer to these.
            Call::Forget | Call::Unserved(Opcode::NotifyReply) => {}
            Call::Interrupt(interrupt) => self.interrupts.raise(interrupt.unique),
            Call::Destroy => self.reply(request.header.unique).send(Ok(Answer::Done)),
            _ => {
                let reply = self.reply(request.header.unique);
                match asked(&request, payload, &self.interrupts) {
                    Ok(asked) => {
                        let performer = self.performer.clone();
                        self.handle.spawn(async move { reply.send(performer.perform(asked).await) });
                    }
                    Err(errno) => reply.send(Err(errno)),
                }
            }
        }
    }

    fn reply(&self, unique: u64) -> Reply {
        Reply::new(&self.device, unique)
    }
}

fn fresh_buffer() -> DmaBuf {
    DmaBuf::uninitialised(REQUEST_AT + REQUEST_BYTES_MAX)
}
