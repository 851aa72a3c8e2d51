//! Scrub of one target: reads every live blob and checks it.

use crate::core::Core;
use crate::layout::{PAGE_BYTES, round_up};
use crate::state::Entry;
use cfs_wire::BlobId;
use cfs_wire::blobs::BlobInfo;
use std::ops::Range;
use std::time::Duration;

/// What a scrub read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Scrubbed {
    /// Damaged ones included.
    pub blobs: u64,
    pub bytes: u64,
    pub damaged: u64,
}

impl Core {
    /// Reads these zones one after the other, at no more than the bytes per second that `pace` says each time, and
    /// hands over every blob of which no copy on this target verifies, or can be read. Blobs that come,
    /// go or move meanwhile may be left out.
    pub async fn scrub(&self, zones: Range<u32>, pace: &dyn Fn() -> u64, found: &dyn Fn(&BlobInfo)) -> Scrubbed {
        let mut scrubbed = Scrubbed::default();
        for zone in zones.start..zones.end.min(self.superblock.zones) {
            let ids = self.state.borrow().zones.get(zone).blobs.clone();
            for id in ids {
                let Some(entry) = self.current(id).filter(|entry| entry.place.zone == zone) else { continue };
                let sound = self.is_sound(&entry).await;
                if self.current(id).is_none() {
                    continue;
                }
                scrubbed.blobs += 1;
                scrubbed.bytes += u64::from(entry.info.length);
                if !sound {
                    scrubbed.damaged += 1;
                    found(&entry.info);
                }
                let seconds = f64::from(entry.info.length) / pace().max(1) as f64;
                self.handle.sleep(Duration::from_secs_f64(seconds)).await;
                self.handle.yield_now().await;
            }
            self.handle.yield_now().await;
        }
        scrubbed
    }

    async fn is_sound(&self, entry: &Entry) -> bool {
        let pages = 0..round_up(entry.info.length) / PAGE_BYTES;
        let read = self.read_any_copy(entry, pages.clone()).await;
        match self.current(entry.info.id) {
            // Moved by the collector while we read.
            Some(now) if read.is_err() && now.place != entry.place => self.read_any_copy(&now, pages).await.is_ok(),
            _ => read.is_ok(),
        }
    }

    fn current(&self, id: BlobId) -> Option<Entry> {
        self.state.borrow().index.get(&id).cloned()
    }
}
