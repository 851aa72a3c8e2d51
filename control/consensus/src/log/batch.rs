//! The bytes of one batch of the log: drawn in `docs/on-disk.md`, section "Raft log".
//!
//! Everything is little-endian. A batch is one blob of kind Log, owner (0, sequence).

use crate::types::{Command, Entry, LogId, NUMBER_MAX, Vote, decode_membership, encode_membership, log_id};
use bytes::{BufMut, Bytes, BytesMut};
use cfs_wire::ShardId;
use openraft::EntryPayload;
use openraft::vote::RaftLeaderId;

pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"CFLG");
/// First version of the format.
pub(super) const VERSION: u16 = 1;
pub(super) const HEADER_BYTES: usize = 64;
pub(super) const RECORD_BYTES: usize = 32;
/// Where the header's checksum lies: its last four bytes.
const CRC_AT: usize = HEADER_BYTES - 4;

const KIND_ENTRY: u8 = 1;
const KIND_VOTE: u8 = 2;
const KIND_COMMITTED: u8 = 3;
const KIND_TRUNCATE: u8 = 4;
const KIND_PURGE: u8 = 5;

/// In a vote: a quorum granted it. In a truncation: nothing is kept.
const FLAG: u8 = 1;

const PAYLOAD_BLANK: u8 = 0;
const PAYLOAD_NORMAL: u8 = 1;
const PAYLOAD_MEMBERSHIP: u8 = 2;

/// The fixed part of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub sequence: u64,
    /// Highest sequence known durable when this batch was written: below it nothing is torn.
    pub durable: u64,
    /// Lowest sequence that is still part of the log: batches below it hold nothing alive.
    pub first: u64,
    /// Which opening of the log wrote this batch; a later opening has a higher number.
    pub incarnation: u64,
}

impl Header {
    /// A batch is part of the log, and written before it is durable.
    fn is_possible(&self) -> bool {
        self.sequence <= NUMBER_MAX
            && self.incarnation <= NUMBER_MAX
            && self.first <= self.sequence
            && self.durable < self.sequence
    }
}

/// One record, of one group.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Record {
    Entry(Entry),
    Vote(Vote),
    Committed(LogId),
    /// Entries after this one are gone; `None`: all are.
    TruncateAfter(Option<LogId>),
    /// Entries up to this one are gone.
    Purge(LogId),
}

/// Bytes that should have been a batch are not.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadBatch {
    #[error("too short")]
    Short,
    #[error("no batch of the log")]
    Magic,
    #[error("version {0} of the format, this program reads up to {VERSION}: upgrade it")]
    Version(u16),
    #[error("checksum mismatch")]
    Checksum,
    #[error("sequence {found} where {expected} was expected")]
    Sequence { found: u64, expected: u64 },
    #[error("a number in its header is out of range")]
    Range,
    #[error("record {0} is malformed")]
    Record(u32),
}

/// Bytes a record takes in a batch.
pub(super) fn record_bytes(record: &Record) -> usize {
    match record {
        Record::Entry(entry) => entry_bytes(entry),
        _ => RECORD_BYTES,
    }
}

/// The same of an entry's record.
pub(crate) fn entry_bytes(entry: &Entry) -> usize {
    let payload = match &entry.payload {
        EntryPayload::Blank => 1,
        EntryPayload::Normal(command) => 1 + command.0.len(),
        EntryPayload::Membership(membership) => 1 + encode_membership(membership).len(),
    };
    RECORD_BYTES + payload
}

/// Collects records, then seals them under a header.
pub(super) struct BatchWriter {
    bytes: BytesMut,
    records: u32,
}

impl BatchWriter {
    pub fn new() -> BatchWriter {
        let mut bytes = BytesMut::with_capacity(4096);
        bytes.resize(HEADER_BYTES, 0);
        BatchWriter { bytes, records: 0 }
    }

    /// Bytes so far, the header included.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn push(&mut self, group: ShardId, record: &Record) {
        self.records += 1;
        match record {
            Record::Entry(entry) => self.push_entry(group, entry),
            Record::Vote(vote) => {
                let flag = if vote.committed { FLAG } else { 0 };
                self.fixed(KIND_VOTE, flag, group, 0, vote.leader_id.term, vote.leader_id.voted_for, 0);
            }
            Record::Committed(id) => self.fixed(KIND_COMMITTED, 0, group, 0, id.leader_id.term, 0, id.index),
            Record::Purge(id) => self.fixed(KIND_PURGE, 0, group, 0, id.leader_id.term, 0, id.index),
            Record::TruncateAfter(Some(id)) => {
                self.fixed(KIND_TRUNCATE, 0, group, 0, id.leader_id.term, 0, id.index);
            }
            Record::TruncateAfter(None) => self.fixed(KIND_TRUNCATE, FLAG, group, 0, 0, 0, 0),
        }
    }

    pub fn seal(mut self, header: Header) -> Bytes {
        let body_len = (self.bytes.len() - HEADER_BYTES) as u32;
        {
            let mut head = &mut self.bytes[..HEADER_BYTES];
            head.put_u32_le(MAGIC);
            head.put_u16_le(VERSION);
            head.put_u16_le(0);
            head.put_u64_le(header.sequence);
            head.put_u64_le(header.durable);
            head.put_u64_le(header.first);
            head.put_u64_le(header.incarnation);
            head.put_u32_le(self.records);
            head.put_u32_le(body_len);
        }
        let crc = checksum(&self.bytes);
        self.bytes[CRC_AT..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        self.bytes.freeze()
    }

    fn push_entry(&mut self, group: ShardId, entry: &Entry) {
        let (term, index) = (entry.log_id.leader_id.term, entry.log_id.index);
        let (tag, payload): (u8, Bytes) = match &entry.payload {
            EntryPayload::Blank => (PAYLOAD_BLANK, Bytes::new()),
            EntryPayload::Normal(command) => (PAYLOAD_NORMAL, command.0.clone()),
            EntryPayload::Membership(membership) => (PAYLOAD_MEMBERSHIP, encode_membership(membership).into()),
        };
        self.fixed(KIND_ENTRY, 0, group, 1 + payload.len() as u32, term, 0, index);
        self.bytes.put_u8(tag);
        self.bytes.put_slice(&payload);
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of the record in the order they are written")]
    fn fixed(&mut self, kind: u8, flags: u8, group: ShardId, length: u32, term: u64, node: u64, index: u64) {
        self.bytes.put_u8(kind);
        self.bytes.put_u8(flags);
        self.bytes.put_u16_le(group.0);
        self.bytes.put_u32_le(length);
        self.bytes.put_u64_le(term);
        self.bytes.put_u64_le(node);
        self.bytes.put_u64_le(index);
    }
}

/// CRC32C of the whole batch with the checksum field left out.
fn checksum(bytes: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&bytes[..CRC_AT]);
    digest.update(&bytes[HEADER_BYTES..]);
    digest.finalize() as u32
}

/// Reads little-endian fields off the front of a slice.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}

/// Checks and takes apart a batch that should have `expected` as its sequence.
pub(super) fn decode(bytes: &Bytes, expected: u64) -> Result<(Header, Vec<(ShardId, Record)>), BadBatch> {
    let mut fields = Fields(bytes);
    let magic = fields.u32().ok_or(BadBatch::Short)?;
    let version = fields.u16().ok_or(BadBatch::Short)?;
    if magic != MAGIC {
        return Err(BadBatch::Magic);
    }
    if version != VERSION {
        return Err(BadBatch::Version(version));
    }
    if bytes.len() < HEADER_BYTES {
        return Err(BadBatch::Short);
    }
    let (header, records, body_len) = read_header(&mut fields).ok_or(BadBatch::Short)?;
    if bytes.len() != HEADER_BYTES + body_len as usize {
        return Err(BadBatch::Short);
    }
    let stored = u32::from_le_bytes(bytes[CRC_AT..HEADER_BYTES].try_into().map_err(|_| BadBatch::Short)?);
    if checksum(bytes) != stored {
        return Err(BadBatch::Checksum);
    }
    if header.sequence != expected {
        return Err(BadBatch::Sequence { found: header.sequence, expected });
    }
    if !header.is_possible() {
        return Err(BadBatch::Range);
    }
    let mut body = Fields(&bytes[HEADER_BYTES..]);
    let mut out = Vec::new();
    for number in 0..records {
        out.push(read_record(&mut body, bytes).ok_or(BadBatch::Record(number))?);
    }
    if body.0.is_empty() { Ok((header, out)) } else { Err(BadBatch::Record(records)) }
}

fn read_header(fields: &mut Fields<'_>) -> Option<(Header, u32, u32)> {
    let _flags = fields.u16()?;
    let header =
        Header { sequence: fields.u64()?, durable: fields.u64()?, first: fields.u64()?, incarnation: fields.u64()? };
    Some((header, fields.u32()?, fields.u32()?))
}

fn read_record(body: &mut Fields<'_>, whole: &Bytes) -> Option<(ShardId, Record)> {
    let (kind, flags, group) = (body.u8()?, body.u8()?, ShardId(body.u16()?));
    let length = body.u32()?;
    let (term, node, index) = (body.u64()?, body.u64()?, body.u64()?);
    // Entries borrow the batch's memory: no copy of what is replayed.
    let payload = whole.slice_ref(body.take(length as usize)?);
    let flag = match flags {
        0 => false,
        FLAG => true,
        _ => return None,
    };
    if term > NUMBER_MAX || index > NUMBER_MAX {
        return None;
    }
    let id = log_id(term, index);
    let record = match kind {
        KIND_ENTRY => Record::Entry(Entry { log_id: id, payload: read_payload(&payload)? }),
        KIND_VOTE => Record::Vote(Vote { leader_id: RaftLeaderId::new(term, node), committed: flag }),
        KIND_COMMITTED => Record::Committed(id),
        KIND_TRUNCATE => Record::TruncateAfter((!flag).then_some(id)),
        KIND_PURGE => Record::Purge(id),
        _ => return None,
    };
    Some((group, record))
}

fn read_payload(payload: &Bytes) -> Option<EntryPayload<Command, u64, crate::types::Member>> {
    match *payload.first()? {
        PAYLOAD_BLANK if payload.len() == 1 => Some(EntryPayload::Blank),
        PAYLOAD_NORMAL => Some(EntryPayload::Normal(Command(payload.slice(1..)))),
        PAYLOAD_MEMBERSHIP => Some(EntryPayload::Membership(decode_membership(&payload[1..])?)),
        _ => None,
    }
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
