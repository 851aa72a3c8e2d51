//! The scrub: reads everything on every target once in a given time, so that what rots unread is found
//! while its redundancy is still there. What it finds is repaired like what reads find; damage to what
//! locates data on its target is mended there, before the next opening needs it.

use cfs_store::Flaw;
use cfs_store::segment::{Damaged, SegmentStore};
use cfs_wire::blobs::BlobInfo;
use std::rc::Rc;
use std::time::Duration;

/// So slow that nobody feels it, and so quick that a blob of a near empty cluster does not hold up
/// those that come after it.
const BYTES_PER_SECOND_MIN: u64 = 1 << 20;

pub struct Scrub {
    store: Rc<SegmentStore>,
}

impl Scrub {
    pub fn new(store: Rc<SegmentStore>) -> Scrub {
        Scrub { store }
    }

    /// Reads everything once, evenly over `period` where there is much, and ends with it. Begins
    /// anywhere: where a server is started more often than that, what comes last in order would
    /// otherwise never be read.
    pub async fn pass(&self, period: Duration) {
        let (handle, pool) = (self.store.handle(), self.store.pool());
        let end = handle.now() + period;
        // What lives may be many times more at the end than it was at the beginning.
        let pace = || {
            let bytes: u64 = pool.writable().iter().map(|target| target.space().live).sum();
            BYTES_PER_SECOND_MIN.max(bytes / period.as_secs().max(1))
        };
        let mut targets = pool.writable();
        if targets.is_empty() {
            return handle.sleep_until(end).await;
        }
        let (first, count) = (handle.random_u64() as usize % targets.len(), targets.len());
        targets.rotate_left(first);
        let zones = targets[0].space().zones_total;
        let start = (handle.random_u64() % u64::from(zones.max(1))) as u32;
        let parts = targets.iter().cycle().zip(0..=count).map(|(target, part)| match part {
            0 => (target, start..zones),
            _ if part == count => (target, 0..start),
            _ => (target, 0..target.space().zones_total),
        });
        for (target, zones) in parts {
            let found = |info: &BlobInfo| {
                // A target that failed as a whole is rebuilt when it stays away.
                if target.failure().is_none() {
                    tracing::warn!(target = %target.id(), blob = %info.id, kind = ?info.kind, "the scrub found damage");
                    pool.note_damage(Damaged::of(info));
                }
            };
            let flawed = |flaw: &Flaw| {
                if target.failure().is_none() {
                    tracing::warn!(target = %target.id(), ?flaw, "the scrub found damage in what locates data");
                }
            };
            target.check_structures(zones.clone(), true, &pace, &flawed).await;
            target.scrub(zones, &pace, &found).await;
        }
        handle.sleep_until(end).await;
    }
}
