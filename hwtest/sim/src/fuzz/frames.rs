//! Frames as a stranger may send them, read as the fabric reads them.

use super::corpus;
use super::mutate::{Length, mutate, noise, pick};
use super::{Fed, Target, Trial};
use cfs_codec::crc32c::crc32c;
use cfs_fabric::Message;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::frame::{BulkSum, HEADER_BYTES, Header, Hello, Kind, PREFIX_BYTES_MAX, Refusal, VERSION_MAX, encode};
use cfs_wire::limits::{RPC_BODY_BYTES_MAX, RPC_BULK_BYTES_MAX};

const INPUTS_PER_ROUND: usize = 40;
/// Bulk bytes are only summed: a frame keeps so many of them.
const BULK_BYTES_MAX: usize = 512;
const CHECKSUM_AT: usize = 20;
const BULK_CHECKSUM_AT: usize = 28;

pub struct Frames {
    corpus: Vec<Vec<u8>>,
}

fn write(kind: Kind, opcode: u16, body: &[u8], bulk: &[u8]) -> Vec<u8> {
    let prefix = encode(VERSION_MAX, kind, opcode, 7, body, &BulkSum::of(bulk)).expect("within limits");
    [prefix.as_ref(), body, bulk].concat()
}

impl Frames {
    pub fn new() -> Frames {
        let mut corpus = vec![
            write(Kind::Hello, 0, &Hello::OURS.encode(), b""),
            write(Kind::Refusal, 0, &Refusal { length: 5_000_000, limit: 4_198_400 }.encode(), b""),
        ];
        let frame = |kind, message: &Message| {
            let bulk = &message.bulk[..message.bulk.len().min(BULK_BYTES_MAX)];
            write(kind, message.opcode, &message.body, bulk)
        };
        for (request, reply) in corpus::recorded().calls.iter() {
            corpus.extend([frame(Kind::Request, request), frame(Kind::Reply, reply)]);
        }
        Frames { corpus }
    }
}

impl Target for Frames {
    fn round(&self, random: &mut SplitMix64, trial: &mut Trial) {
        for _ in 0..INPUTS_PER_ROUND {
            let mut frame = if random.one_in(16) { noise(random) } else { pick(random, &self.corpus).clone() };
            mutate(random, &mut frame, PREFIX_BYTES_MAX, &self.corpus, Length::Free);
            if random.one_in(2) {
                set_checksums(&mut frame);
            }
            trial.feed("frame", &frame, read);
        }
    }
}

/// As far as the header's lengths reach.
fn set_checksums(frame: &mut [u8]) {
    let Some(fixed) = frame.first_chunk::<HEADER_BYTES>() else { return };
    let body_length = u32::from_le_bytes([fixed[16], fixed[17], fixed[18], fixed[19]]) as usize;
    let has_bulk = fixed[3] & 2 != 0;
    let prefix = if has_bulk { PREFIX_BYTES_MAX } else { HEADER_BYTES };
    let body_end = prefix.saturating_add(body_length).min(frame.len());
    if has_bulk && body_end >= PREFIX_BYTES_MAX {
        let crc = crc32c(&frame[body_end..]);
        frame[BULK_CHECKSUM_AT..PREFIX_BYTES_MAX].copy_from_slice(&crc.to_le_bytes());
    }
    frame[CHECKSUM_AT..HEADER_BYTES].fill(0);
    let crc = crc32c(&frame[..body_end]);
    frame[CHECKSUM_AT..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

/// Header, then body, then bulk, each checked; what passes is what its sender wrote.
fn read(bytes: &[u8]) -> Result<Fed, String> {
    let Ok(Some(header)) = Header::decode(VERSION_MAX, bytes) else { return Ok(Fed::Refused) };
    if header.body_length > RPC_BODY_BYTES_MAX || header.bulk_length > RPC_BULK_BYTES_MAX {
        return Err(format!("the receiver would wait for {} bytes", header.frame_length()));
    }
    let Some(rest) = bytes.get(header.prefix_length()..header.frame_length()) else { return Ok(Fed::Refused) };
    let (body, bulk) = rest.split_at(header.body_length);
    let sum = BulkSum::of(bulk);
    if header.verify_body(body).is_err() || header.verify_bulk(&sum).is_err() {
        return Ok(Fed::Refused);
    }
    let hello = Hello::decode(body);
    if let Ok(hello) = &hello {
        let agreed = hello.agree(Hello::OURS);
        if agreed.is_some_and(|version| version < hello.version_min || version > hello.version_max) {
            return Err(format!("{hello:?} agreed on version {agreed:?}"));
        }
    }
    let _ = Refusal::decode(body);
    let Header { kind, opcode, request_id, .. } = header;
    let written = encode(VERSION_MAX, kind, opcode, request_id, body, &sum).map_err(|error| error.to_string())?;
    if written.as_ref() != &bytes[..header.prefix_length()] {
        return Err(format!("the same message is written as {:02x?}", written.as_ref()));
    }
    Ok(Fed::Taken)
}
