//! RPC frames: what crosses a stream connection.
//!
//! All integers are little-endian. A frame is a 24-byte header, an 8-byte extension when bulk
//! bytes ride along, the body, and the bulk bytes:
//!
//! ```text
//!  0        2     3     4        6        8                16       20       24
//!  +--------+-----+-----+--------+--------+----------------+--------+--------+
//!  | magic  | ver | flg | opcode |   0    | request id     | body   | CRC32C |
//!  | "CF"   | u8  | u8  | u16    | u16    | u64            | length | of (a) |
//!  +--------+-----+-----+--------+--------+----------------+--------+--------+
//! 24        28       32
//!  +--------+--------+  only with flag BULK
//!  | bulk   | CRC32C |
//!  | length | of bulk|
//!  +--------+--------+
//!  | body ...        |  at most limits::RPC_BODY_BYTES_MAX
//!  +-----------------+
//!  | bulk ...        |  at most limits::RPC_BULK_BYTES_MAX, never empty
//!  +-----------------+
//! (a) header with this field zero, extension, body.
//! ```
//!
//! Flags: 1 REPLY (else a request; the opcode is then a status), 2 BULK, 4 HELLO, 8 REFUSAL
//! (a reply that could not be sent; its body is a [`Refusal`]), 16 OFFERS (what else the server can be
//! reached by; the reply's body is that of [`Offers`](crate::offers::Offers)). Others are refused.
//!
//! Features: 1 the server has offers. Whoever has not said so is not asked for them.
//!
//! The first frame each way on a connection is a HELLO: version byte 0 whatever its sender
//! speaks, opcode and request id 0, no bulk, and this body, which only ever grows at its end:
//!
//! ```text
//!  0     1     2        4                12
//!  +-----+-----+--------+----------------+
//!  | min | max |   0    | features       |   versions spoken, both inclusive
//!  | u8  | u8  | u16    | u64            |
//!  +-----+-----+--------+----------------+
//! ```
//!
//! Both sides then speak the highest version both know. Whoever finds none in common sends
//! its own HELLO all the same, so that the peer can say which side is older, and closes.

use crate::limits::{RPC_BODY_BYTES_MAX, RPC_BULK_BYTES_MAX};
use crc_fast::{CrcAlgorithm, Digest};

pub const HEADER_BYTES: usize = 24;
/// Length and checksum of the bulk bytes, after the header of a frame that has them.
pub const EXTENSION_BYTES: usize = 8;
/// Header and extension.
pub const PREFIX_BYTES_MAX: usize = HEADER_BYTES + EXTENSION_BYTES;
pub const MAGIC: u16 = u16::from_le_bytes(*b"CF");
/// The oldest and the newest frame layout this program speaks.
pub const VERSION_MIN: u8 = 1;
pub const VERSION_MAX: u8 = 1;
/// The version byte of every HELLO: its layout is fixed for good.
pub const HELLO_VERSION: u8 = 0;
/// The part of a HELLO body that every version has.
pub const HELLO_BYTES: usize = 12;
/// Feature bits this program offers, whatever it is told to do: none.
pub const FEATURES: u64 = 0;
/// Of a server that answers OFFERS.
pub const FEATURE_OFFERS: u64 = 1;

const FLAG_REPLY: u8 = 1;
const FLAG_BULK: u8 = 2;
const FLAG_HELLO: u8 = 4;
const FLAG_REFUSAL: u8 = 8;
const FLAG_OFFERS: u8 = 16;
const CRC_OFFSET: usize = 20;

const _: () = assert!(RPC_BODY_BYTES_MAX <= u32::MAX as usize);
const _: () = assert!(RPC_BULK_BYTES_MAX <= u32::MAX as usize);

/// Why bytes are not a frame, or a message cannot be one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    #[error("not a ClaudeFS frame: it starts with {found:#06x}")]
    Magic { found: u16 },
    #[error("frame version {found} where {expected} was agreed")]
    Version { found: u8, expected: u8 },
    #[error("flags {found:#04x} are unknown or contradict each other")]
    Flags { found: u8 },
    #[error("reserved header bytes hold {found:#06x}")]
    Reserved { found: u16 },
    #[error("a body of {length} bytes exceeds the limit of {limit}")]
    BodyTooLarge { length: usize, limit: usize },
    #[error("bulk bytes of length {length} exceed the limit of {limit}")]
    BulkTooLarge { length: usize, limit: usize },
    #[error("the frame announces bulk bytes and has none")]
    BulkEmpty,
    #[error("header or body corrupt: CRC32C {computed:08x}, the frame says {stored:08x}")]
    Checksum { stored: u32, computed: u32 },
    #[error("bulk bytes corrupt: CRC32C {computed:08x}, the frame says {stored:08x}")]
    BulkChecksum { stored: u32, computed: u32 },
    #[error("a part of {found} bytes where the header says {expected}")]
    Length { found: usize, expected: usize },
    #[error("malformed HELLO")]
    Hello,
    #[error("malformed refusal")]
    Refusal,
}

impl FrameError {
    /// Whether the sender could have avoided it by sending less.
    pub fn is_too_large(&self) -> bool {
        matches!(self, FrameError::BodyTooLarge { .. } | FrameError::BulkTooLarge { .. })
    }

    /// Whether the bytes were damaged on their way, as far as one can tell.
    pub fn is_corruption(&self) -> bool {
        matches!(self, FrameError::Checksum { .. } | FrameError::BulkChecksum { .. })
    }
}

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Request,
    Reply,
    /// In place of a reply: the service's answer did not fit.
    Refusal,
    /// The first frame each way.
    Hello,
    /// Asks what else the server can be reached by.
    AsksOffers,
    Offers,
}

impl Kind {
    fn flags(self) -> u8 {
        match self {
            Kind::Request => 0,
            Kind::Reply => FLAG_REPLY,
            Kind::Refusal => FLAG_REPLY | FLAG_REFUSAL,
            Kind::Hello => FLAG_HELLO,
            Kind::AsksOffers => FLAG_OFFERS,
            Kind::Offers => FLAG_OFFERS | FLAG_REPLY,
        }
    }

    fn from_flags(flags: u8) -> Result<Kind, FrameError> {
        match flags & !FLAG_BULK {
            0 => Ok(Kind::Request),
            FLAG_REPLY => Ok(Kind::Reply),
            _ if flags == FLAG_REPLY | FLAG_REFUSAL => Ok(Kind::Refusal),
            _ if flags == FLAG_HELLO => Ok(Kind::Hello),
            _ if flags == FLAG_OFFERS => Ok(Kind::AsksOffers),
            _ if flags == FLAG_OFFERS | FLAG_REPLY => Ok(Kind::Offers),
            _ => Err(FrameError::Flags { found: flags }),
        }
    }
}

/// Length and CRC32C of bulk bytes, made piece by piece so that nobody computes for long.
pub struct BulkSum {
    digest: Digest,
    length: usize,
}

impl BulkSum {
    /// Of bulk bytes whole.
    pub fn of(bulk: &[u8]) -> BulkSum {
        let mut sum = BulkSum::default();
        sum.update(bulk);
        sum
    }

    /// Takes in the next piece.
    pub fn update(&mut self, piece: &[u8]) {
        self.digest.update(piece);
        self.length += piece.len();
    }

    /// The CRC32C of what was taken in.
    pub fn crc(&self) -> u32 {
        self.digest.finalize() as u32
    }

    pub fn length(&self) -> usize {
        self.length
    }
}

impl Default for BulkSum {
    fn default() -> BulkSum {
        BulkSum { digest: Digest::new(CrcAlgorithm::Crc32Iscsi), length: 0 }
    }
}

/// Header and extension, ready to be sent before the body.
#[derive(Clone, Copy, Debug)]
pub struct Prefix {
    bytes: [u8; PREFIX_BYTES_MAX],
    length: usize,
}

impl AsRef<[u8]> for Prefix {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// A decoded header: what comes next on the connection and how to check it.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    pub kind: Kind,
    /// The operation asked for, or the status of a reply.
    pub opcode: u16,
    pub request_id: u64,
    pub body_length: usize,
    /// Zero when no bulk bytes follow.
    pub bulk_length: usize,
    crc: u32,
    bulk_crc: u32,
    prefix: Prefix,
}

/// What goes before `body` and the bulk bytes on the wire. `version` is the one agreed; a HELLO has its own.
///
/// # Errors
/// When a part exceeds its limit.
pub fn encode(
    version: u8,
    kind: Kind,
    opcode: u16,
    request_id: u64,
    body: &[u8],
    bulk: &BulkSum,
) -> Result<Prefix, FrameError> {
    let body_length = length_below(body.len(), RPC_BODY_BYTES_MAX)
        .ok_or(FrameError::BodyTooLarge { length: body.len(), limit: RPC_BODY_BYTES_MAX })?;
    let bulk_length = length_below(bulk.length, RPC_BULK_BYTES_MAX)
        .ok_or(FrameError::BulkTooLarge { length: bulk.length, limit: RPC_BULK_BYTES_MAX })?;
    let mut flags = kind.flags();
    let mut prefix = Prefix { bytes: [0; PREFIX_BYTES_MAX], length: HEADER_BYTES };
    if bulk_length > 0 {
        flags |= FLAG_BULK;
        Kind::from_flags(flags)?;
        prefix.length = PREFIX_BYTES_MAX;
        prefix.bytes[24..28].copy_from_slice(&bulk_length.to_le_bytes());
        prefix.bytes[28..32].copy_from_slice(&bulk.crc().to_le_bytes());
    }
    prefix.bytes[0..2].copy_from_slice(&MAGIC.to_le_bytes());
    prefix.bytes[2] = if kind == Kind::Hello { HELLO_VERSION } else { version };
    prefix.bytes[3] = flags;
    prefix.bytes[4..6].copy_from_slice(&opcode.to_le_bytes());
    prefix.bytes[8..16].copy_from_slice(&request_id.to_le_bytes());
    prefix.bytes[16..20].copy_from_slice(&body_length.to_le_bytes());
    // The checksum's own field is still zero here.
    let crc = crc32c(&[prefix.as_ref(), body]);
    prefix.bytes[CRC_OFFSET..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    Ok(prefix)
}

impl Header {
    /// The header at the start of `bytes`, or `None` when more bytes are needed to tell.
    /// Lengths are within limits but unchecked until [`Header::verify_body`] passes.
    pub fn decode(version: u8, bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        // Told apart as early as possible, so that a stranger is not waited for.
        if let Some(found) = u16_at(bytes, 0)
            && found != MAGIC
        {
            return Err(FrameError::Magic { found });
        }
        let Some(fixed) = bytes.get(..HEADER_BYTES) else { return Ok(None) };
        let flags = fixed[3];
        let kind = Kind::from_flags(flags)?;
        let expected = if kind == Kind::Hello { HELLO_VERSION } else { version };
        if fixed[2] != expected {
            return Err(FrameError::Version { found: fixed[2], expected });
        }
        let (Some(opcode), Some(reserved), Some(request_id), Some(body_length), Some(crc)) =
            (u16_at(fixed, 4), u16_at(fixed, 6), u64_at(fixed, 8), u32_at(fixed, 16), u32_at(fixed, CRC_OFFSET))
        else {
            return Ok(None);
        };
        if reserved != 0 {
            return Err(FrameError::Reserved { found: reserved });
        }
        let body_length = body_length as usize;
        if body_length > RPC_BODY_BYTES_MAX {
            return Err(FrameError::BodyTooLarge { length: body_length, limit: RPC_BODY_BYTES_MAX });
        }
        let mut header = Header {
            kind,
            opcode,
            request_id,
            body_length,
            bulk_length: 0,
            crc,
            bulk_crc: 0,
            prefix: Prefix { bytes: [0; PREFIX_BYTES_MAX], length: HEADER_BYTES },
        };
        if flags & FLAG_BULK != 0 {
            let (Some(length), Some(crc)) = (u32_at(bytes, 24), u32_at(bytes, 28)) else { return Ok(None) };
            header.set_bulk(length as usize, crc)?;
        }
        let length = header.prefix.length;
        header.prefix.bytes[..length].copy_from_slice(&bytes[..length]);
        Ok(Some(header))
    }

    fn set_bulk(&mut self, length: usize, crc: u32) -> Result<(), FrameError> {
        if length > RPC_BULK_BYTES_MAX {
            return Err(FrameError::BulkTooLarge { length, limit: RPC_BULK_BYTES_MAX });
        }
        if length == 0 {
            return Err(FrameError::BulkEmpty);
        }
        self.bulk_length = length;
        self.bulk_crc = crc;
        self.prefix.length = PREFIX_BYTES_MAX;
        Ok(())
    }

    /// Bytes of header and extension: where the body starts.
    pub fn prefix_length(&self) -> usize {
        self.prefix.length
    }

    /// The frame's length from magic to the last bulk byte.
    pub fn frame_length(&self) -> usize {
        self.prefix.length + self.body_length + self.bulk_length
    }

    /// Checks the header itself, the extension and the body.
    pub fn verify_body(&self, body: &[u8]) -> Result<(), FrameError> {
        if body.len() != self.body_length {
            return Err(FrameError::Length { found: body.len(), expected: self.body_length });
        }
        let mut prefix = self.prefix;
        prefix.bytes[CRC_OFFSET..HEADER_BYTES].fill(0);
        let computed = crc32c(&[prefix.as_ref(), body]);
        if computed != self.crc {
            return Err(FrameError::Checksum { stored: self.crc, computed });
        }
        Ok(())
    }

    /// Checks the bulk bytes received, by their sum.
    pub fn verify_bulk(&self, bulk: &BulkSum) -> Result<(), FrameError> {
        if bulk.length != self.bulk_length {
            return Err(FrameError::Length { found: bulk.length, expected: self.bulk_length });
        }
        if bulk.length == 0 {
            return Ok(());
        }
        let computed = bulk.crc();
        if computed != self.bulk_crc {
            return Err(FrameError::BulkChecksum { stored: self.bulk_crc, computed });
        }
        Ok(())
    }
}

/// What a side says first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello {
    pub version_min: u8,
    pub version_max: u8,
    pub features: u64,
}

impl Hello {
    /// What this program says.
    pub const OURS: Hello = Hello { version_min: VERSION_MIN, version_max: VERSION_MAX, features: FEATURES };

    pub fn encode(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0] = self.version_min;
        bytes[1] = self.version_max;
        bytes[4..12].copy_from_slice(&self.features.to_le_bytes());
        bytes
    }

    /// Bytes past the known ones belong to a newer peer and are ignored, as are the reserved.
    pub fn decode(body: &[u8]) -> Result<Hello, FrameError> {
        let (Some([version_min, version_max]), Some(features)) = (body.first_chunk::<2>(), u64_at(body, 4)) else {
            return Err(FrameError::Hello);
        };
        if version_min > version_max {
            return Err(FrameError::Hello);
        }
        Ok(Hello { version_min: *version_min, version_max: *version_max, features })
    }

    /// The highest version both sides speak.
    pub fn agree(self, other: Hello) -> Option<u8> {
        let highest = self.version_max.min(other.version_max);
        (highest >= self.version_min.max(other.version_min)).then_some(highest)
    }
}

/// The body of a [`Kind::Refusal`]: the reply's part that was too long, and the limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    pub length: u64,
    pub limit: u64,
}

impl Refusal {
    pub fn encode(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..].copy_from_slice(&self.limit.to_le_bytes());
        bytes
    }

    pub fn decode(body: &[u8]) -> Result<Refusal, FrameError> {
        match (body.len(), u64_at(body, 0), u64_at(body, 8)) {
            (16, Some(length), Some(limit)) => Ok(Refusal { length, limit }),
            _ => Err(FrameError::Refusal),
        }
    }
}

fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for part in parts {
        digest.update(part);
    }
    digest.finalize() as u32
}

fn length_below(length: usize, limit: usize) -> Option<u32> {
    u32::try_from(length).ok().filter(|_| length <= limit)
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}
