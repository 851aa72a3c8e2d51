//! openraft's oneshot over the executor's.

use cfs_reactor::sync::{Closed, OneshotReceiver, OneshotSender};
use openraft::OptionalSend;
use openraft::async_runtime::Oneshot;

pub struct RcOneshot;

pub struct Sender<T>(OneshotSender<T>);

impl<T: OptionalSend> openraft::async_runtime::OneshotSender<T> for Sender<T> {
    fn send(self, value: T) -> Result<(), T> {
        self.0.send(value)
    }
}

impl Oneshot for RcOneshot {
    type Sender<T: OptionalSend> = Sender<T>;
    type Receiver<T: OptionalSend> = OneshotReceiver<T>;
    type ReceiverError = Closed;

    fn channel<T: OptionalSend>() -> (Self::Sender<T>, Self::Receiver<T>) {
        let (sender, receiver) = cfs_reactor::sync::oneshot();
        (Sender(sender), receiver)
    }
}
