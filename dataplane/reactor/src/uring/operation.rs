//! One operation's future.

use super::Ring;
use super::core::{Key, Layout, Plain, SUBMIT_AT, outcome};
use super::sockets::{Message, RawAddress};
use rustix::io::Errno;
use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// What the kernel works on until the completion.
pub(super) struct Kept<R> {
    /// Goes back to the caller with the result.
    resource: R,
    /// Keeps the descriptor's number, or the file's place in the table, from being reused before
    /// the submission.
    _file: Rc<dyn Any>,
    _extra: Extra,
}

/// More heap memory that the entry points to.
pub(super) enum Extra {
    None,
    Vectors(#[expect(dead_code, reason = "the kernel reads it")] Vec<libc::iovec>),
    Message(#[expect(dead_code, reason = "the kernel reads it")] Box<Message>),
    Address(#[expect(dead_code, reason = "the kernel reads it")] Box<RawAddress>),
}

impl<R> Kept<R> {
    pub(super) fn new(resource: R, file: Rc<dyn Any>) -> Kept<R> {
        Kept { resource, _file: file, _extra: Extra::None }
    }

    pub(super) fn with(mut self, extra: Extra) -> Kept<R> {
        self._extra = extra;
        self
    }
}

/// An operation under way. Gives what it worked on back with its result: the bytes moved, or
/// the error. Dropping it cancels the operation, which may have taken effect all the same.
#[must_use = "dropping an operation cancels it"]
pub struct Operation<R: 'static, L: Layout = Plain> {
    ring: Rc<Ring<L>>,
    key: Key,
    /// Taken when the operation completes.
    kept: Option<Kept<R>>,
}

impl<R: 'static, L: Layout> Operation<R, L> {
    /// # Safety
    /// Everything `entry` points to is heap memory owned by `kept`, and nothing else touches it
    /// before `kept` is given back (or only reads it, if the kernel only reads it).
    pub(super) unsafe fn start(ring: &Rc<Ring<L>>, entry: L::Submission, kept: Kept<R>, opens_fd: bool) -> Self {
        // SAFETY: `kept` stays with us until the completion or goes to `orphan`.
        let key = unsafe { ring.core.borrow_mut().start(entry, opens_fd, SUBMIT_AT) };
        Operation { ring: ring.clone(), key, kept: Some(kept) }
    }

    /// As `start`, for a file that takes its entries in lots of so many.
    ///
    /// # Safety
    /// As for `start`.
    pub(super) unsafe fn start_in_lots(ring: &Rc<Ring<L>>, entry: L::Submission, kept: Kept<R>, lot: usize) -> Self {
        // SAFETY: as above.
        let key = unsafe { ring.core.borrow_mut().start(entry, false, lot) };
        Operation { ring: ring.clone(), key, kept: Some(kept) }
    }
}

// Moving the future moves only the handles to heap memory.
impl<R: 'static, L: Layout> Unpin for Operation<R, L> {}

impl<R: 'static, L: Layout> Future for Operation<R, L> {
    type Output = (Result<usize, Errno>, R);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        assert!(self.kept.is_some(), "an operation was polled after its end");
        let Some(result) = self.ring.core.borrow_mut().poll(self.key, context.waker()) else {
            return Poll::Pending;
        };
        let kept = self.kept.take().expect("checked above");
        Poll::Ready((outcome(result), kept.resource))
    }
}

impl<R: 'static, L: Layout> Drop for Operation<R, L> {
    fn drop(&mut self) {
        if let Some(kept) = self.kept.take() {
            let released = self.ring.core.borrow_mut().orphan(self.key, Box::new(kept));
            drop(released);
        }
    }
}

/// An operation that moves no data: its result is a number, usually 0.
#[must_use = "dropping a command cancels it"]
pub struct Command(pub(super) Operation<()>);

impl Future for Command {
    type Output = Result<usize, Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|(result, ())| result)
    }
}
