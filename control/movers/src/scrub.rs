//! The scrub: reads everything on every target once in a given time, so that what rots unread is found
//! while its redundancy is still there. What it finds is repaired like what reads find.

use cfs_store::segment::{Damaged, SegmentStore};
use cfs_wire::blobs::BlobInfo;
use std::rc::Rc;
use std::time::Duration;

pub struct Scrub {
    store: Rc<SegmentStore>,
}

impl Scrub {
    pub fn new(store: Rc<SegmentStore>) -> Scrub {
        Scrub { store }
    }

    /// Reads everything once, evenly over `period`, and ends with it.
    pub async fn pass(&self, period: Duration) {
        let (handle, pool) = (self.store.handle(), self.store.pool());
        let end = handle.now() + period;
        let targets = pool.writable();
        let bytes: u64 = targets.iter().map(|target| target.space().live).sum();
        let bytes_per_second = bytes as f64 / period.as_secs_f64().max(1.0);
        for target in targets {
            let found = |info: &BlobInfo| {
                // A target that failed as a whole is rebuilt when it stays away.
                if target.failure().is_none() {
                    tracing::warn!(target = %target.id(), blob = %info.id, kind = ?info.kind, "the scrub found damage");
                    pool.note_damage(Damaged::of(info));
                }
            };
            target.scrub(bytes_per_second.ceil() as u64, &found).await;
        }
        handle.sleep_until(end).await;
    }
}
