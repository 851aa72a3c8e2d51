//! CRC32C (Castagnoli, the CRC of iSCSI, RFC 3720 appendix B.4), by the CPU's instructions.

use crc_fast::{CrcAlgorithm, Digest};

/// The unit of a payload that has a checksum of its own, so that a range read verifies only the
/// pages it touches.
pub const PAGE_BYTES: usize = 4096;

/// The CRC32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// How [`crc32c`] is computed on this CPU, in the words of the crate crc-fast.
pub fn crc32c_method() -> String {
    crc_fast::get_calculator_target(CrcAlgorithm::Crc32Iscsi)
}

/// The CRC32C of what `crc` is the CRC32C of, followed by `bytes`. The CRC32C of nothing is 0.
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    // The register holds the complement of the checksum.
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    // The checksum of a 32-bit algorithm is in the low half.
    digest.finalize() as u32
}

/// Appends to `out` the CRC32C of each page of `payload`; the last page may be short.
pub fn crc32c_pages(payload: &[u8], out: &mut Vec<u32>) {
    out.extend(payload.chunks(PAGE_BYTES).map(crc32c));
}
