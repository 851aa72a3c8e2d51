//! CRC32C against a bitwise oracle and published vectors.

mod common;

use cfs_codec::crc32c::{PAGE_BYTES, crc32c, crc32c_append, crc32c_pages};
use common::Random;

/// The definition: reflected polynomial 0x82f63b78, register preset to ones, complemented at the end.
fn slow_crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |register, &byte| {
        (0..8).fold(register ^ u32::from(byte), |register, _| {
            (register >> 1) ^ if register & 1 != 0 { 0x82f6_3b78 } else { 0 }
        })
    })
}

/// RFC 3720 appendix B.4, and the usual check value.
#[test]
fn published_vectors() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    let ascending: Vec<u8> = (0..32).collect();
    assert_eq!(crc32c(&ascending), 0x46dd_794e);
    assert_eq!(crc32c(b""), 0);
}

#[test]
fn any_length_at_any_alignment_matches_the_bitwise_oracle() {
    let bytes = Random(0xc3c).bytes(9000);
    let lengths = (0..300).chain([511, 512, 513, 1023, 1024, 4095, 4096, 4097, 8192, 8990]);
    for (i, len) in lengths.enumerate() {
        let slice = &bytes[i % 10..][..len];
        assert_eq!(crc32c(slice), slow_crc32c(slice), "{len} bytes from {}", i % 10);
    }
}

#[test]
fn appending_in_pieces_equals_the_whole_and_order_matters() {
    let bytes = Random(0xc3d).bytes(5000);
    for cut in [0, 1, 7, 8, 64, 255, 256, 1000, 4096, 4999, 5000] {
        let (head, tail) = bytes.split_at(cut);
        assert_eq!(crc32c_append(crc32c(head), tail), slow_crc32c(&bytes), "cut at {cut}");
    }
    assert_eq!(crc32c_append(0, &bytes), slow_crc32c(&bytes));
    let (head, tail) = bytes.split_at(1000);
    assert_ne!(crc32c_append(crc32c(tail), head), slow_crc32c(&bytes));
}

#[test]
fn pages_have_their_own_checksums_and_the_last_may_be_short() {
    let payload = Random(0xc3e).bytes(2 * PAGE_BYTES + 100);
    let mut sums = vec![7];
    crc32c_pages(&payload, &mut sums);
    let pages = [&payload[..4096], &payload[4096..8192], &payload[8192..]];
    assert_eq!(sums, [7, slow_crc32c(pages[0]), slow_crc32c(pages[1]), slow_crc32c(pages[2])]);

    let mut none = Vec::new();
    crc32c_pages(&[], &mut none);
    assert!(none.is_empty());
    crc32c_pages(&payload[..PAGE_BYTES], &mut none);
    assert_eq!(none.len(), 1);
}
