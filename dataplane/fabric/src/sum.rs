//! Checksums of bulk bytes, made so that other tasks run meanwhile.

use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_wire::frame::BulkSum;

/// Summed in one go: some 100 µs, half of what a task may run without yielding.
pub(crate) const SUM_BYTES: usize = 1 << 20;

/// The sum of bulk bytes; others run between its pieces.
pub(crate) async fn sum(bulk: &Bytes) -> BulkSum {
    let mut sum = BulkSum::default();
    for (index, piece) in bulk.chunks(SUM_BYTES).enumerate() {
        if index > 0 {
            Handle::current().yield_now().await;
        }
        sum.update(piece);
    }
    sum
}
