//! Frames as a stranger sends them: whole, cut short, flipped, random; and the bytes on disk
//! that no later version may change.

use cfs_wire::frame::{
    BulkSum, FrameError, HEADER_BYTES, Header, Hello, Kind, MAGIC, PREFIX_BYTES_MAX, Refusal, VERSION_MAX, encode,
};
use cfs_wire::golden::Golden;
use cfs_wire::limits::{RPC_BODY_BYTES_MAX, RPC_BULK_BYTES_MAX};
use cfs_wire::offers::{Offer, Offers};
use cfs_wire::packet::{self, Packet, Part, Place, Region};
use proptest::prelude::*;

/// A frame taken apart, owned.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Frame {
    kind: Kind,
    opcode: u16,
    request_id: u64,
    body: Vec<u8>,
    bulk: Vec<u8>,
}

fn write(frame: &Frame) -> Vec<u8> {
    let prefix =
        encode(VERSION_MAX, frame.kind, frame.opcode, frame.request_id, &frame.body, &BulkSum::of(&frame.bulk));
    [prefix.expect("within limits").as_ref(), &frame.body, &frame.bulk].concat()
}

/// Reads as a receiver does: header, then body, then bulk, each checked.
fn read(bytes: &[u8]) -> Result<Option<Frame>, FrameError> {
    let Some(header) = Header::decode(VERSION_MAX, bytes)? else { return Ok(None) };
    let Some(rest) = bytes.get(header.prefix_length()..header.frame_length()) else { return Ok(None) };
    let (body, bulk) = rest.split_at(header.body_length);
    header.verify_body(body)?;
    header.verify_bulk(&BulkSum::of(bulk))?;
    let Header { kind, opcode, request_id, .. } = header;
    Ok(Some(Frame { kind, opcode, request_id, body: body.to_vec(), bulk: bulk.to_vec() }))
}

fn request(body: &[u8], bulk: &[u8]) -> Frame {
    let (body, bulk) = (body.to_vec(), bulk.to_vec());
    Frame { kind: Kind::Request, opcode: 0x0102, request_id: 0x1122_3344_5566_7788, body, bulk }
}

fn bytes(length: usize) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..length)
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        reply: bool, opcode: u16, request_id: u64, body in bytes(300), bulk in bytes(300), after in bytes(40),
    ) {
        let kind = if reply { Kind::Reply } else { Kind::Request };
        let frame = Frame { kind, opcode, request_id, body, bulk };
        let mut wire = write(&frame);
        let prefix = if frame.bulk.is_empty() { HEADER_BYTES } else { PREFIX_BYTES_MAX };
        prop_assert_eq!(wire.len(), prefix + frame.body.len() + frame.bulk.len());
        wire.extend_from_slice(&after);
        prop_assert_eq!(read(&wire), Ok(Some(frame)), "bytes of the next frame change nothing");
    }

    #[test]
    fn a_hello_is_read_by_older_and_newer_peers(a: u8, b: u8, features: u64, tail in bytes(20)) {
        let hello = Hello { version_min: a.min(b), version_max: a.max(b), features };
        let mut body = hello.encode().to_vec();
        body.extend_from_slice(&tail);
        prop_assert_eq!(Hello::decode(&body), Ok(hello));
        prop_assert_eq!(Hello::decode(&body[..11]), Err(FrameError::Hello));
    }
}

#[test]
fn every_single_bit_flip_is_noticed() {
    for frame in [request(b"some body", b""), request(b"", b"bulk bytes"), request(b"body", &[9; 70])] {
        let wire = write(&frame);
        assert_eq!(read(&wire), Ok(Some(frame)));
        let mut longest = wire.clone();
        longest.resize(PREFIX_BYTES_MAX + RPC_BODY_BYTES_MAX + RPC_BULK_BYTES_MAX, 0);
        for bit in 0..wire.len() * 8 {
            let mut damaged = wire.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // A longer length makes the receiver wait for bytes; it never yields a frame.
            let outcome = read(&damaged);
            assert!(matches!(outcome, Err(_) | Ok(None)), "bit {bit} of {} slipped through: {outcome:?}", wire.len());
            // And given those bytes, it is found out.
            longest[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&longest).is_err(), "bit {bit} slipped through once more bytes had come");
            longest[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn every_truncation_asks_for_more() {
    let wire = write(&request(b"a body", b"and bulk"));
    for length in 0..wire.len() {
        assert_eq!(read(&wire[..length]), Ok(None), "cut at {length}");
    }
}

#[test]
fn each_refusal_names_its_reason() {
    let good = write(&request(b"body", b"bulk"));
    let damaged = |offset: usize, value: &[u8]| {
        let mut wire = good.clone();
        wire[offset..offset + value.len()].copy_from_slice(value);
        read(&wire).unwrap_err()
    };
    assert_eq!(damaged(0, b"SSH-2.0"), FrameError::Magic { found: u16::from_le_bytes(*b"SS") });
    assert_eq!(read(b"GET"), Err(FrameError::Magic { found: u16::from_le_bytes(*b"GE") }), "three bytes are enough");
    assert_eq!(damaged(2, &[9]), FrameError::Version { found: 9, expected: VERSION_MAX });
    assert_eq!(damaged(3, &[0x80]), FrameError::Flags { found: 0x80 });
    assert_eq!(damaged(6, &[1, 0]), FrameError::Reserved { found: 1 });
    let length = RPC_BODY_BYTES_MAX + 1;
    let error = damaged(16, &(length as u32).to_le_bytes());
    assert_eq!(error, FrameError::BodyTooLarge { length, limit: RPC_BODY_BYTES_MAX });
    let length = RPC_BULK_BYTES_MAX + 1;
    let error = damaged(24, &(length as u32).to_le_bytes());
    assert_eq!(error, FrameError::BulkTooLarge { length, limit: RPC_BULK_BYTES_MAX });
    assert_eq!(damaged(24, &[0; 4]), FrameError::BulkEmpty);
    assert!(matches!(damaged(32, b"B"), FrameError::Checksum { .. }));
    assert!(matches!(damaged(36, b"B"), FrameError::BulkChecksum { .. }));
}

#[test]
fn a_message_over_its_limit_is_not_written() {
    let body = vec![0; RPC_BODY_BYTES_MAX + 1];
    let error = encode(VERSION_MAX, Kind::Request, 0, 0, &body, &BulkSum::default()).unwrap_err();
    assert_eq!(error, FrameError::BodyTooLarge { length: body.len(), limit: RPC_BODY_BYTES_MAX });
    assert!(error.is_too_large());
    let bulk = vec![0; RPC_BULK_BYTES_MAX + 1];
    let error = encode(VERSION_MAX, Kind::Reply, 0, 0, &[], &BulkSum::of(&bulk)).unwrap_err();
    assert_eq!(error, FrameError::BulkTooLarge { length: bulk.len(), limit: RPC_BULK_BYTES_MAX });
    // At the limits it is, and comes back.
    let frame = request(&body[1..], &bulk[1..]);
    assert_eq!(read(&write(&frame)), Ok(Some(frame)));
}

#[test]
fn random_bytes_never_panic_and_never_pass() {
    let seed = 0x00C0_FFEE_u64;
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    for round in 0..200_000 {
        let length = next() as usize % 96;
        let mut input: Vec<u8> = (0..length).map(|_| next() as u8).collect();
        // Three in four start plausibly, else nothing past the magic would be exercised.
        if round % 4 != 0 && length >= 4 {
            input[..2].copy_from_slice(&MAGIC.to_le_bytes());
            input[2] = VERSION_MAX;
            input[3] &= 0x0F;
        }
        if round % 4 > 1 && length >= HEADER_BYTES {
            input[6..8].fill(0);
            input[16..20].copy_from_slice(&(next() as u32 % 40).to_le_bytes());
        }
        let outcome = read(&input);
        assert!(matches!(outcome, Err(_) | Ok(None)), "seed {seed:#x}, round {round}: {input:02x?} gave {outcome:?}");
        let _ = Hello::decode(&input);
        let _ = Refusal::decode(&input);
    }
}

#[test]
fn versions_are_agreed_or_not() {
    let hello = |version_min, version_max| Hello { version_min, version_max, features: 0 };
    assert_eq!(hello(1, 3).agree(hello(2, 5)), Some(3));
    assert_eq!(hello(2, 5).agree(hello(1, 3)), Some(3));
    assert_eq!(hello(1, 1).agree(hello(1, 1)), Some(1));
    assert_eq!(hello(1, 2).agree(hello(3, 4)), None);
    assert_eq!(Hello::decode(&[2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Err(FrameError::Hello));
}

#[test]
fn golden_bytes_do_not_change() {
    let hello = Hello { version_min: 1, version_max: 1, features: 0x8000_0000_0000_0001 };
    let refusal = Refusal { length: 5_000_000, limit: 4_198_400 };
    let frame = |kind, opcode, request_id, body: &[u8], bulk: &[u8]| {
        write(&Frame { kind, opcode, request_id, body: body.to_vec(), bulk: bulk.to_vec() })
    };
    let bulk = frame(Kind::Request, 7, 2, b"put", b"123456789");
    // The catalogue's check value of CRC-32C, over "123456789", stands in the bulk extension.
    assert_eq!(bulk[28..32], 0xE306_9283_u32.to_le_bytes());
    let mut golden = Golden::new(env!("CARGO_MANIFEST_DIR"), "frames");
    golden.bytes("request-empty", &frame(Kind::Request, 1, 1, b"", b""));
    golden.bytes("request", &frame(Kind::Request, 0x0102, 0x1122_3344_5566_7788, b"hello", b""));
    golden.bytes("request-bulk", &bulk);
    golden.bytes("reply", &frame(Kind::Reply, 0, 2, b"done", b""));
    golden.bytes("refusal", &frame(Kind::Refusal, 0, 3, &refusal.encode(), b""));
    golden.bytes("hello", &frame(Kind::Hello, 0, 0, &hello.encode(), b""));
    golden.bytes("asks-offers", &frame(Kind::AsksOffers, 0, 0, b"", b""));
    let offer = Offer { version: 1, provider: "verbs".to_owned(), address: "192.0.2.1:7401".to_owned() };
    let offers = Offers { token: [0xaa; 32], key: [0xbb; 32], offers: vec![offer] };
    golden.bytes("offers", &frame(Kind::Offers, 0, 0, &offers.encode().unwrap(), b""));
    let place = Place::Apart(Region { address: 0x1122_3344_5566_7788, key: 0x99aa_bbcc_ddee_ff00 });
    let body = Part { length: 5, crc: BulkSum::of(b"hello").crc(), place: Place::Inline };
    let bulk = Part { length: 1 << 20, crc: 7, place };
    let packet = Packet { opcode: 0x0102, credits: 3, body, bulk, ..Packet::bare(packet::Kind::Request, 2) };
    golden.bytes("packet", &[&packet.encode()[..], b"hello"].concat());
    golden.check();
}
