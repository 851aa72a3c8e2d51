//! The future of one command.

use super::Controller;
use crate::nvme::bus::Bus;
use crate::nvme::commands::Outcome;
use cfs_reactor::sync::Permit;
use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// A command that the controller has.
pub(in crate::nvme) struct UnderWay<B: Bus, K: 'static> {
    pub(super) controller: Rc<Controller<B>>,
    pub(super) id: u16,
    /// Taken when the command ends.
    pub(super) kept: Option<(K, Permit)>,
}

// Moving the future moves only the handles to what is kept.
impl<B: Bus, K: 'static> Unpin for UnderWay<B, K> {}

impl<B: Bus, K: 'static> Future for UnderWay<B, K> {
    type Output = (Outcome, K);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(outcome) = self.controller.commands.borrow_mut().poll(self.id, context.waker()) else {
            return Poll::Pending;
        };
        let (kept, _place) = self.kept.take().expect("a command is polled to its end once");
        Poll::Ready((outcome, kept))
    }
}

impl<B: Bus, K: 'static> Drop for UnderWay<B, K> {
    fn drop(&mut self) {
        if let Some(kept) = self.kept.take() {
            let kept: Box<dyn Any> = Box::new(kept);
            let released = self.controller.commands.borrow_mut().orphan(self.id, kept);
            drop(released);
        }
    }
}
