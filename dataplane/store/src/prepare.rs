//! What is done ahead of the appends, so that they need not wait for it.
//!
//! The headers of free zones are written before a zone is needed, so that a stream whose zone is
//! full does not stand still for a flush (the collector leaves its zones with a header; only
//! zones that were never used need this). And the device is asked to settle the next part of an
//! open zone of small appends.

use crate::core::Core;
use std::rc::Rc;

/// Free zones kept with their header written: two streams may fill theirs at the same time.
const ZONES_AHEAD: usize = 2;

impl Core {
    pub(crate) fn prepare_in_background(self: &Rc<Self>) {
        if self.preparing.replace(true) {
            return;
        }
        let core = self.clone();
        self.handle.spawn(async move {
            core.prepare_zones().await;
            core.preparing.set(false);
        });
    }

    async fn prepare_zones(self: &Rc<Self>) {
        while self.check_writable().is_ok() {
            let taken = self.state.borrow_mut().zones.take_unready(ZONES_AHEAD);
            let Some(zone) = taken else { return };
            // A failure has fenced the device.
            let written = self.write_generation(zone).await;
            let mut state = self.state.borrow_mut();
            if let Ok(generation) = written {
                state.zone_reset(zone, generation);
            }
            state.zones.prepared();
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Lets the device get ready what the next appends to an open zone will need.
    pub(crate) fn settle_in_background(self: &Rc<Self>, zone: u32) {
        let Some(range) = self.state.borrow_mut().zones.take_unsettled(zone) else { return };
        let core = self.clone();
        self.handle.spawn(async move {
            let offset = core.superblock.zone_offset(zone) + u64::from(range.start);
            if let Err(error) = core.device.settle(offset, range.len() as u64).await {
                core.fence(&error);
            }
            core.state.borrow_mut().zones.settled(zone, &range);
            core.changed.notify_all();
        });
    }
}
