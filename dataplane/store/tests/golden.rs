//! The bytes on disk are pinned: a change here needs a new format version.

use cfs_store::layout::append::{AppendHeader, BlobRecord, Record, Tail, TombstoneRecord, ZoneUse, header_bytes};
use cfs_store::layout::stamp::{Role, Stamp};
use cfs_store::layout::summary::{Summary, ZoneFooter};
use cfs_store::{Identity, Lacks, Member, Roster, Superblock};
use cfs_wire::blobs::{BlobInfo, BlobKind, Owner, ShardGeometry};
use cfs_wire::golden::Golden;
use cfs_wire::{BlobId, ClusterId, DeviceId, Generation, NodeId, TargetId, Timestamp, ZoneNo};

fn superblock() -> Superblock {
    let device = DeviceId(0x1112_1314_1516_1718_191a_1b1c_1d1e_1f20);
    let cluster = ClusterId(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10);
    Superblock {
        identity: Identity { cluster, node: NodeId(0x2122), target: TargetId(0x3132_3334), device },
        incarnation: 0x4142_4344_4546_4748,
        device_bytes: (1 << 20) + 64 * (4 << 20),
        zone_bytes: 4 << 20,
        zones: 64,
        lanes: 64,
        created: Timestamp { secs: 1_800_000_000, nanos: 123_456_789 },
        parameters: cfs_wire::cluster::ClusterParameters {
            format: 1,
            shards: 256,
            policy: cfs_wire::Policy::new(4, 2).unwrap(),
            tolerated: 2,
            targets: 6,
            name_key: [0x77; 32],
        },
    }
}

fn roster() -> Roster {
    let member = |device, seen, lacks| Member { device: DeviceId(device), seen, lacks };
    let metadata = Lacks { metadata: true, data: false };
    let members = vec![
        member(superblock().identity.device.0, 0x1112_1314_1516, Lacks::NOTHING),
        member(0x2122, 0x1112_1314_1510, metadata),
        member(0x3132, 0x1112_1314_1516, Lacks::ALL),
    ];
    Roster { epoch: 0x1112_1314_1516, created: true, members }
}

fn stamp(offset: u32, bytes: u32, extent: u32) -> Stamp {
    Stamp {
        stream: 3,
        device: superblock().identity.device,
        incarnation: superblock().incarnation,
        generation: Generation(0x5152),
        zone: ZoneNo(0x0607),
        offset,
        sequence: 0x6162_6364,
        durable: 0x6162_6360,
        bytes,
        extent,
        records: 0,
        tails: 0,
    }
}

fn append() -> AppendHeader {
    let blob = BlobRecord {
        info: BlobInfo {
            id: BlobId(0x7172_7374_7576_7778_797a_7b7c_7d7e_7f80),
            kind: BlobKind::Parity,
            owner: Owner { high: 0x8182, low: 0x9192 },
            geometry: ShardGeometry { data: 4, parity: 2, index: 5 },
            length: 5000,
        },
        start: 4096,
        checksums: [0xa1a2_a3a4, 0xb1b2_b3b4].into(),
    };
    let place = ZoneUse { zone: 9, generation: Generation(0xc1c2) };
    let tombstone = TombstoneRecord { id: BlobId(0xd1d2), places: [place].into_iter().collect() };
    let tails = [Tail { zone: 0x0607, end: 8192, generation: Generation(0x5152) }].into_iter().collect();
    let records = vec![Record::Blob(blob), Record::Tombstone(tombstone)];
    AppendHeader { stamp: stamp(8192, header_bytes(200).unwrap(), 3 * 4096), tails, records }
}

/// The end of a zone that holds [`append`] and nothing else.
fn sealed() -> (ZoneFooter, Vec<u8>) {
    let header = append();
    let end = header.stamp.offset + header.stamp.extent;
    let tails = [Tail { zone: 0x0809, end: 8192, generation: Generation(0x5354) }].into_iter().collect();
    let stamp = Stamp { sequence: 0x6162_6365, ..stamp((4 << 20) - 4096, 4096, end) };
    Summary::of(&[header], end).expect("no append is missing").finish(stamp, tails)
}

#[test]
fn the_formats_are_what_they_were() {
    let mut golden = Golden::new(env!("CARGO_MANIFEST_DIR"), "target");
    // The zeroes that pad structures to whole pages are left out.
    let mut used = |name: &str, bytes: &[u8]| {
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        golden.bytes(name, &bytes[..end]);
    };
    used("superblock", &superblock().encode());
    used("roster", &roster().encode(&superblock().identity));
    used("zone_header", &stamp(0, 4096, 0).encode_page(Role::ZoneHeader));
    let (footer, summary) = sealed();
    used("zone_footer", &footer.encode_page());
    used("zone_summary", &summary);
    used("append_header", &append().encode());
    golden.check();
}

#[test]
fn what_is_encoded_decodes_and_no_flipped_bit_goes_unnoticed() {
    let header = append();
    let bytes = header.encode();
    let decoded = AppendHeader::decode(&bytes).unwrap();
    assert_eq!((&decoded.records, &decoded.tails), (&header.records, &header.tails));
    assert_eq!(decoded.stamp, Stamp { records: 2, tails: 1, ..header.stamp });
    for byte in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[byte] ^= 1 << (byte % 8);
        assert!(AppendHeader::decode(&bad).is_err(), "byte {byte}");
    }
    for length in (0..bytes.len()).step_by(97) {
        assert!(AppendHeader::decode(&bytes[..length]).is_err(), "length {length}");
    }
    assert!(Stamp::decode(Role::ZoneHeader, &bytes).is_err(), "roles are told apart");
}

#[test]
fn a_summary_gives_back_what_the_headers_said_and_no_flipped_bit_goes_unnoticed() {
    let (footer, summary) = sealed();
    let decoded = ZoneFooter::decode(&footer.encode_page()).unwrap();
    assert_eq!(decoded, ZoneFooter { stamp: Stamp { tails: 1, ..footer.stamp }, ..footer.clone() });
    let headers = decoded.decode_summary(&summary).unwrap();
    assert_eq!(headers.len(), 1);
    let (found, written) = (&headers[0], append());
    assert_eq!(found.records, written.records);
    let place = |stamp: &Stamp| (stamp.zone, stamp.generation, stamp.offset, stamp.bytes, stamp.extent, stamp.sequence);
    assert_eq!(place(&found.stamp), place(&written.stamp));
    for byte in 0..footer.length as usize {
        let mut bad = summary.clone();
        bad[byte] ^= 1 << (byte % 8);
        assert!(footer.decode_summary(&bad).is_err(), "byte {byte}");
    }
    for length in 0..footer.length as usize {
        assert!(footer.decode_summary(&summary[..length]).is_err(), "length {length}");
    }
    let early = ZoneFooter { stamp: Stamp { extent: footer.stamp.extent - 4096, ..footer.stamp }, ..footer };
    assert!(early.decode_summary(&summary).is_err(), "an append beyond the end");
}
