use super::*;
use crate::types::Member;
use cfs_wire::golden::Golden;
use std::collections::BTreeSet;

fn membership() -> crate::types::Membership {
    openraft::Membership::new(
        vec![[1].into()],
        std::collections::BTreeMap::from([(1, Member { address: "n1".into() })]),
    )
    .unwrap()
}

fn sample() -> Bytes {
    let mut writer = BatchWriter::new();
    for record in records(membership()) {
        writer.push(ShardId(3), &record);
    }
    writer.seal(Header { sequence: 9, durable: 7, first: 2, incarnation: 5 })
}

fn records(membership: crate::types::Membership) -> Vec<Record> {
    vec![
        Record::Entry(Entry { log_id: log_id(1, 0), payload: EntryPayload::Membership(membership) }),
        Record::Entry(Entry { log_id: log_id(2, 1), payload: EntryPayload::Blank }),
        Record::Entry(Entry { log_id: log_id(2, 2), payload: EntryPayload::Normal(Command("abc".into())) }),
        Record::Vote(Vote { leader_id: RaftLeaderId::new(2, 1), committed: true }),
        Record::Committed(log_id(2, 2)),
        Record::TruncateAfter(Some(log_id(1, 0))),
        Record::TruncateAfter(None),
        Record::Purge(log_id(1, 0)),
    ]
}

#[test]
fn a_batch_survives_encoding() {
    let bytes = sample();
    let (header, decoded) = decode(&bytes, 9).unwrap();
    assert_eq!(header, Header { sequence: 9, durable: 7, first: 2, incarnation: 5 });
    assert_eq!(decoded.len(), 8);
    let Record::Entry(Entry { payload: EntryPayload::Membership(membership), .. }) = &decoded[0].1 else { panic!() };
    let again: Vec<(ShardId, Record)> = records(membership.clone()).into_iter().map(|r| (ShardId(3), r)).collect();
    assert_eq!(decoded, again);
    assert_eq!(bytes.len(), HEADER_BYTES + decoded.iter().map(|(_, r)| record_bytes(r)).sum::<usize>());
}

#[test]
fn every_damaged_byte_and_every_cut_is_noticed() {
    let bytes = sample();
    for at in 0..bytes.len() {
        let mut damaged = bytes.to_vec();
        damaged[at] ^= 0x40;
        assert!(decode(&damaged.into(), 9).is_err(), "byte {at} flipped and nothing noticed");
        assert!(decode(&bytes.slice(..at), 9).is_err(), "cut to {at} and nothing noticed");
    }
    assert_eq!(decode(&bytes, 10), Err(BadBatch::Sequence { found: 9, expected: 10 }));
}

/// A right checksum proves nothing: what is added to these would not fit.
#[test]
fn numbers_that_were_never_counted_are_refused() {
    let header = Header { sequence: 9, durable: 7, first: 2, incarnation: 5 };
    for wrong in [
        Header { incarnation: u64::MAX, ..header },
        Header { durable: 9, ..header },
        Header { durable: u64::MAX, ..header },
        Header { first: 10, ..header },
    ] {
        assert_eq!(decode(&BatchWriter::new().seal(wrong), 9), Err(BadBatch::Range), "{wrong:?}");
    }
    let last = Header { sequence: u64::MAX, first: u64::MAX, ..header };
    assert_eq!(decode(&BatchWriter::new().seal(last), u64::MAX), Err(BadBatch::Range));
    for id in [log_id(1, u64::MAX), log_id(u64::MAX, 1)] {
        let mut writer = BatchWriter::new();
        writer.push(ShardId(3), &Record::Purge(id));
        assert_eq!(decode(&writer.seal(header), 9), Err(BadBatch::Record(0)), "{id}");
    }
    assert_eq!(decode(&BatchWriter::new().seal(header), 9), Ok((header, Vec::new())));
}

#[test]
fn the_first_bytes_are_those_of_the_document() {
    let mut writer = BatchWriter::new();
    writer.push(
        ShardId(3),
        &Record::Entry(Entry { log_id: log_id(2, 6), payload: EntryPayload::Normal(Command("hi".into())) }),
    );
    let bytes = writer.seal(Header { sequence: 9, durable: 7, first: 2, incarnation: 5 });
    let mut expected = Vec::new();
    expected.extend(b"CFLG\x01\x00\x00\x00");
    for word in [9u64, 7, 2, 5] {
        expected.extend(word.to_le_bytes());
    }
    expected.extend([1, 0, 0, 0, 35, 0, 0, 0]);
    expected.extend([0; 12]);
    expected.extend(&bytes[CRC_AT..HEADER_BYTES]);
    expected.extend([1, 0, 3, 0, 3, 0, 0, 0]);
    for word in [2u64, 0, 6] {
        expected.extend(word.to_le_bytes());
    }
    expected.extend(b"\x01hi");
    assert_eq!(bytes, expected);
}

/// One record in a batch of its own, with what payload its bytes ask for.
fn alone(kind: u8, payload: u8) -> Bytes {
    let membership = encode_membership(&membership());
    let payload = if payload == PAYLOAD_MEMBERSHIP { [&[payload], &membership[..]].concat() } else { vec![payload] };
    let mut writer = BatchWriter::new();
    writer.records = 1;
    writer.fixed(kind, 0, ShardId(3), payload.len() as u32, 2, 1, 6);
    writer.bytes.extend_from_slice(&payload);
    writer.seal(Header { sequence: 9, durable: 7, first: 2, incarnation: 5 })
}

#[test]
fn records_are_what_they_were_and_no_other_kind_is_read() {
    let mut golden = Golden::new(env!("CARGO_MANIFEST_DIR"), "log");
    let header = Header { sequence: 0x1112_1314, durable: 0x1011_1213, first: 0x0102, incarnation: 0x6162_6364 };
    let ballot = |committed| Record::Vote(Vote { leader_id: RaftLeaderId::new(0x0304, 0x0506), committed });
    let id = log_id(0x0708, 0x0910_1112);
    let entry = |payload| Record::Entry(Entry { log_id: id, payload });
    let records = [
        ("entry-blank", entry(EntryPayload::Blank)),
        ("entry-proposal", entry(EntryPayload::Normal(Command("proposal".into())))),
        ("entry-membership", entry(EntryPayload::Membership(membership()))),
        ("vote", ballot(false)),
        ("vote-granted", ballot(true)),
        ("committed", Record::Committed(id)),
        ("truncate-after", Record::TruncateAfter(Some(id))),
        ("truncate-all", Record::TruncateAfter(None)),
        ("purge", Record::Purge(id)),
    ];
    let (mut kinds, mut payloads) = (BTreeSet::new(), BTreeSet::new());
    golden.bytes("empty-batch", &BatchWriter::new().seal(header));
    for (name, record) in records {
        let mut writer = BatchWriter::new();
        writer.push(ShardId(0x0203), &record);
        let batch = writer.seal(header);
        assert_eq!(decode(&batch, header.sequence), Ok((header, vec![(ShardId(0x0203), record.clone())])));
        golden.bytes(name, &batch[HEADER_BYTES..]);
        kinds.insert(batch[HEADER_BYTES]);
        if let Record::Entry(_) = record {
            payloads.insert(batch[HEADER_BYTES + RECORD_BYTES]);
        }
    }
    golden.check();
    let is_read = |kind, payload| decode(&alone(kind, payload), 9).is_ok();
    assert_eq!((0..=u8::MAX).filter(|kind| is_read(*kind, PAYLOAD_BLANK)).collect::<BTreeSet<u8>>(), kinds);
    assert_eq!((0..=u8::MAX).filter(|payload| is_read(KIND_ENTRY, *payload)).collect::<BTreeSet<u8>>(), payloads);
}
