//! Scrub of one target: reads every live blob and checks it.

use crate::core::Core;
use crate::error::StoreError;
use crate::layout::{PAGE_BYTES, round_up};
use crate::state::{Entry, Place};
use cfs_wire::BlobId;
use cfs_wire::blobs::BlobInfo;
use std::time::Duration;

/// What a scrub found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ScrubReport {
    /// Blobs read, damaged ones included.
    pub blobs: u64,
    pub bytes: u64,
    /// No copy on this target matches its checksums.
    pub corrupt: Vec<BlobInfo>,
    /// The device refused to read them.
    pub unreadable: Vec<BlobInfo>,
}

impl ScrubReport {
    pub fn is_clean(&self) -> bool {
        self.corrupt.is_empty() && self.unreadable.is_empty()
    }
}

impl Core {
    /// Reads in the order of the medium, at no more than `bytes_per_second` if given. Blobs
    /// that come or go meanwhile may be left out.
    pub async fn scrub(&self, bytes_per_second: Option<u64>) -> ScrubReport {
        let mut ids: Vec<(Place, BlobId)> =
            self.state.borrow().index.iter().map(|(id, entry)| (entry.place, *id)).collect();
        ids.sort_unstable();
        let mut report = ScrubReport::default();
        let started = self.handle.now();
        for (_, id) in ids {
            let Some(entry) = self.current(id) else { continue };
            let pages = 0..round_up(entry.info.length) / PAGE_BYTES;
            let mut result = self.read_any_copy(&entry, pages.clone()).await;
            if let (Err(_), Some(now)) = (&result, self.current(id)) {
                // Moved by the collector while we read.
                if now.place != entry.place {
                    result = self.read_any_copy(&now, pages).await;
                }
            }
            if self.current(id).is_none() {
                continue;
            }
            report.blobs += 1;
            report.bytes += u64::from(entry.info.length);
            match result {
                Ok(_) => {}
                Err(StoreError::Corrupt { .. }) => report.corrupt.push(entry.info),
                Err(_) => report.unreadable.push(entry.info),
            }
            if let Some(rate) = bytes_per_second {
                let due = Duration::from_secs_f64(report.bytes as f64 / rate.max(1) as f64);
                self.handle.sleep_until(started + due).await;
            }
            self.handle.yield_now().await;
        }
        report
    }

    fn current(&self, id: BlobId) -> Option<Entry> {
        self.state.borrow().index.get(&id).cloned()
    }
}
