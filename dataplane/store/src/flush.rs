//! One device flush for everybody who waits for one.

use crate::core::Core;
use cfs_device::DeviceResult;
use cfs_reactor::sync::{OneshotSender, oneshot};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

#[derive(Default)]
pub(crate) struct Flusher {
    waiting: RefCell<Vec<OneshotSender<DeviceResult<()>>>>,
    running: Cell<bool>,
}

impl Core {
    /// Makes every write answered before this call durable. A flush under way may have started
    /// too early for the caller, so it shares the next one.
    pub(crate) async fn flush(self: &Rc<Self>) -> DeviceResult<()> {
        if !self.device.geometry().volatile_cache {
            return Ok(());
        }
        let (sender, receiver) = oneshot();
        self.flusher.waiting.borrow_mut().push(sender);
        if !self.flusher.running.replace(true) {
            let core = self.clone();
            self.handle.spawn(async move { core.flush_all().await });
        }
        match receiver.await {
            Ok(result) => result,
            // The flushing task is gone only when its domain was killed, and this task with it.
            Err(_) => std::future::pending().await,
        }
    }

    async fn flush_all(&self) {
        loop {
            let served = std::mem::take(&mut *self.flusher.waiting.borrow_mut());
            if served.is_empty() {
                self.flusher.running.set(false);
                return;
            }
            let result = self.device.flush().await;
            for sender in served {
                // A caller that stopped waiting needs no answer.
                let _ = sender.send(result.clone());
            }
        }
    }
}
