//! RPC packets: what crosses a connection whose ends read and write each other's memory (RDMA).
//!
//! All integers are little-endian. A packet is a 96-byte header and what of body and bulk bytes fits behind
//! it. A part that does not fit lies apart, in memory that the client has exposed: the server reads a request's
//! from there, and writes a reply's there.
//!
//! ```text
//!  0        2     3     4        6        8                16
//!  +--------+-----+-----+--------+--------+----------------+
//!  | magic  | ver | kind| opcode | credits| request id     |
//!  | "CP"   | u8  | u8  | u16    | u16    | u64            |
//!  +--------+-----+-----+--------+--------+----------------+
//! 16       20       24                32                40
//!  +--------+--------+-----------------+-----------------+
//!  | body   | CRC32C | address, if it  | key, if it lies |   at most limits::RPC_BODY_BYTES_MAX
//!  | length | of body| lies apart      | apart           |
//!  +--------+--------+-----------------+-----------------+
//! 40       44       48                56                64
//!  +--------+--------+-----------------+-----------------+
//!  | bulk   | CRC32C | address, if it  | key, if it lies |   at most limits::RPC_BULK_BYTES_MAX
//!  | length | of bulk| lies apart      | apart           |
//!  +--------+--------+-----------------+-----------------+
//! 64      65   68         76       84       88    92       96
//!  +-------+----+----------+--------+--------+-----+--------+
//!  | flags | 0  | room's   | room's | room's |  0  | CRC32C |   of the header with this field zero
//!  | u8    |    | address  | key    | length |     | u32    |
//!  +-------+----+----------+--------+--------+-----+--------+
//!  | body, unless it lies apart, then bulk, unless it lies apart; at most 4080 bytes in all
//!  +-----------------------------------+
//! ```
//!
//! In a session, which a TCP connection has given a token and a key for, every packet is encrypted and
//! followed by a tag of 16 bytes. Before the client's first one goes the token, in the clear. Bytes that lie
//! apart are **not** encrypted: the CRC32C of them in a packet keeps them from being changed by accident, and
//! whoever can change a packet's header has the key.
//!
//! Flags: 1 the body lies apart, 2 the bulk bytes lie apart, 4 a request has room for its reply's bulk bytes, which
//! the server writes there if they fit, without asking. Kinds: 1 HELLO, 2 REQUEST, 3 WAITS (a reply that
//! does not fit waits for memory: its lengths), 4 OFFER (the client's memory for it), 5 REPLY, 6 REFUSAL (in
//! place of a reply; its body is a [`Refusal`](crate::frame::Refusal)), 7 CREDIT (nothing but credits). An empty
//! part never lies apart. WAITS and OFFER have no bytes behind their header, and nothing but parts that lie
//! apart.
//!
//! The first packet each way is a HELLO, whose version byte is 0 and whose body is that of a frame's HELLO.
//!
//! **Credits.** Each end has memory for [`PACKETS_MAX`] packets from the beginning. Every packet takes one of
//! its sender's credits and gives back as many as its sender has received packets since it last said so. The
//! last credit is for a CREDIT packet only, so that two ends that wait for credits never wait for each other.

use crate::frame::{BulkSum, HELLO_VERSION};
use crate::limits::{RPC_BODY_BYTES_MAX, RPC_BULK_BYTES_MAX};

pub const HEADER_BYTES: usize = 96;
/// Header and what is behind it: a page, in which most requests and replies fit.
pub const PACKET_BYTES_MAX: usize = 4096;
pub const INLINE_BYTES_MAX: usize = PACKET_BYTES_MAX - HEADER_BYTES - TAG_BYTES;
/// What a packet of a session is longer by (AES-256-GCM).
pub const TAG_BYTES: usize = 16;
/// Packets that a peer has memory for: what 64 calls at once need to never wait, at 256 KiB per connection
/// and end.
pub const PACKETS_MAX: usize = 64;
/// Received packets that are told of by a CREDIT, if nothing else is sent.
pub const CREDITS_TOLD: usize = PACKETS_MAX / 2;
pub const MAGIC: [u8; 2] = *b"CP";
/// The layout that this program speaks.
pub const VERSION: u8 = 1;

const FLAG_BODY_APART: u8 = 1;
const FLAG_BULK_APART: u8 = 2;
const FLAG_ROOM: u8 = 4;
const ROOM_OFFSET: usize = 68;
const ROOM_END: usize = 88;
const BODY_OFFSET: usize = 16;
const BULK_OFFSET: usize = 40;
const FLAGS_OFFSET: usize = 64;
const CRC_OFFSET: usize = HEADER_BYTES - 4;

/// Why bytes are not a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PacketError {
    #[error("a packet of {found} bytes, shorter than a header")]
    Short { found: usize },
    #[error("not a ClaudeFS packet")]
    Magic,
    #[error("packet version {found} where {expected} was expected")]
    Version { found: u8, expected: u8 },
    #[error("packets of kind {found} are unknown")]
    Kind { found: u8 },
    #[error("flags {found:#04x} are unknown or contradict the packet")]
    Flags { found: u8 },
    #[error("a part of {length} bytes exceeds the limit of {limit}")]
    TooLarge { length: usize, limit: usize },
    #[error("{found} bytes behind the header where it says {expected}")]
    Length { found: usize, expected: usize },
    #[error("corrupt: CRC32C {computed:08x}, the packet says {stored:08x}")]
    Checksum { stored: u32, computed: u32 },
}

/// What a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Hello = 1,
    Request = 2,
    Waits = 3,
    Offer = 4,
    Reply = 5,
    Refusal = 6,
    Credit = 7,
}

const KINDS: [Kind; 7] =
    [Kind::Hello, Kind::Request, Kind::Waits, Kind::Offer, Kind::Reply, Kind::Refusal, Kind::Credit];

/// Memory of the client, by what the server's device reaches it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Region {
    pub address: u64,
    pub key: u64,
}

/// Where a part's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    Inline,
    Apart(Region),
}

/// A body or bulk bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    pub length: usize,
    pub crc: u32,
    pub place: Place,
}

impl Part {
    pub const EMPTY: Part = Part { length: 0, crc: 0, place: Place::Inline };

    /// A part that lies apart, and how long it is.
    pub fn apart(&self) -> Option<(Region, usize)> {
        match self.place {
            Place::Inline => None,
            Place::Apart(region) => Some((region, self.length)),
        }
    }

    fn inline_bytes(&self) -> usize {
        if self.place == Place::Inline { self.length } else { 0 }
    }

    /// Checks bytes that came, by their sum.
    pub fn verify(&self, sum: &BulkSum) -> Result<(), PacketError> {
        if sum.length() != self.length {
            return Err(PacketError::Length { found: sum.length(), expected: self.length });
        }
        let computed = if self.length == 0 { 0 } else { sum.crc() };
        if computed == self.crc { Ok(()) } else { Err(PacketError::Checksum { stored: self.crc, computed }) }
    }

    fn encode(&self, into: &mut [u8]) {
        let region = self.apart().unwrap_or_default().0;
        into[0..4].copy_from_slice(&(self.length as u32).to_le_bytes());
        into[4..8].copy_from_slice(&self.crc.to_le_bytes());
        into[8..16].copy_from_slice(&region.address.to_le_bytes());
        into[16..24].copy_from_slice(&region.key.to_le_bytes());
    }

    fn decode(header: &[u8; HEADER_BYTES], offset: usize, is_apart: bool, limit: usize) -> Result<Part, PacketError> {
        let length = u32_at(header, offset) as usize;
        if length > limit {
            return Err(PacketError::TooLarge { length, limit });
        }
        let place = match is_apart {
            true if length == 0 => return Err(PacketError::Flags { found: header[FLAGS_OFFSET] }),
            true => Place::Apart(Region { address: u64_at(header, offset + 8), key: u64_at(header, offset + 16) }),
            false => Place::Inline,
        };
        Ok(Part { length, crc: u32_at(header, offset + 4), place })
    }
}

/// A packet's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    pub kind: Kind,
    /// The operation asked for, or the status of a reply.
    pub opcode: u16,
    /// Packets received since the last that was sent.
    pub credits: u16,
    pub request_id: u64,
    pub body: Part,
    pub bulk: Part,
    /// Of a request: memory for its reply's bulk bytes, and how much.
    pub room: Option<(Region, usize)>,
}

impl Packet {
    /// One without parts.
    pub fn bare(kind: Kind, request_id: u64) -> Packet {
        Packet { kind, opcode: 0, credits: 0, request_id, body: Part::EMPTY, bulk: Part::EMPTY, room: None }
    }

    /// Parts of these lengths: which of them lie apart. A body goes before bulk bytes, of which most is to be
    /// kept at the start of a page.
    pub fn parts_apart(body: usize, bulk: usize) -> (bool, bool) {
        let body_apart = body > INLINE_BYTES_MAX;
        let left = if body_apart { INLINE_BYTES_MAX } else { INLINE_BYTES_MAX - body };
        (body_apart, bulk > left)
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[0..2].copy_from_slice(&MAGIC);
        header[2] = version(self.kind);
        header[3] = self.kind as u8;
        header[4..6].copy_from_slice(&self.opcode.to_le_bytes());
        header[6..8].copy_from_slice(&self.credits.to_le_bytes());
        header[8..16].copy_from_slice(&self.request_id.to_le_bytes());
        self.body.encode(&mut header[BODY_OFFSET..]);
        self.bulk.encode(&mut header[BULK_OFFSET..]);
        let flag = |part: &Part, flag| if part.place == Place::Inline { 0 } else { flag };
        header[FLAGS_OFFSET] = flag(&self.body, FLAG_BODY_APART) | flag(&self.bulk, FLAG_BULK_APART);
        if let Some((region, length)) = self.room {
            header[FLAGS_OFFSET] |= FLAG_ROOM;
            header[68..76].copy_from_slice(&region.address.to_le_bytes());
            header[76..84].copy_from_slice(&region.key.to_le_bytes());
            header[84..88].copy_from_slice(&(length as u32).to_le_bytes());
        }
        let crc = BulkSum::of(&header).crc();
        header[CRC_OFFSET..].copy_from_slice(&crc.to_le_bytes());
        header
    }

    /// A packet and the bytes of body and bulk behind it, checked.
    pub fn decode(bytes: &[u8]) -> Result<(Packet, &[u8], &[u8]), PacketError> {
        let Some((header, behind)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(PacketError::Short { found: bytes.len() });
        };
        if header[0..2] != MAGIC {
            return Err(PacketError::Magic);
        }
        let kind = KINDS.into_iter().find(|kind| *kind as u8 == header[3]);
        let kind = kind.ok_or(PacketError::Kind { found: header[3] })?;
        if header[2] != version(kind) {
            return Err(PacketError::Version { found: header[2], expected: version(kind) });
        }
        let mut summed = *header;
        summed[CRC_OFFSET..].fill(0);
        let (stored, computed) = (u32_at(header, CRC_OFFSET), BulkSum::of(&summed).crc());
        if stored != computed {
            return Err(PacketError::Checksum { stored, computed });
        }
        let flags = header[FLAGS_OFFSET];
        let reserved = [&header[FLAGS_OFFSET + 1..ROOM_OFFSET], &header[ROOM_END..CRC_OFFSET]].concat();
        if flags & !(FLAG_BODY_APART | FLAG_BULK_APART | FLAG_ROOM) != 0 || reserved != [0; 7] {
            return Err(PacketError::Flags { found: flags });
        }
        let room = decode_room(header, kind)?;
        let body = Part::decode(header, BODY_OFFSET, flags & FLAG_BODY_APART != 0, RPC_BODY_BYTES_MAX)?;
        let bulk = Part::decode(header, BULK_OFFSET, flags & FLAG_BULK_APART != 0, RPC_BULK_BYTES_MAX)?;
        let opcode = u16::from_le_bytes([header[4], header[5]]);
        let credits = u16::from_le_bytes([header[6], header[7]]);
        let packet = Packet { kind, opcode, credits, request_id: u64_at(header, 8), body, bulk, room };
        let is_place = matches!(kind, Kind::Waits | Kind::Offer);
        let expected = body.inline_bytes() + bulk.inline_bytes();
        if is_place && (expected > 0 || flags == 0)
            || !is_place && kind != Kind::Request && kind != Kind::Reply && flags != 0
        {
            return Err(PacketError::Flags { found: flags });
        }
        if behind.len() != expected {
            return Err(PacketError::Length { found: behind.len(), expected });
        }
        let (body_bytes, bulk_bytes) = behind.split_at(body.inline_bytes());
        if body.place == Place::Inline {
            body.verify(&BulkSum::of(body_bytes))?;
        }
        if bulk.place == Place::Inline {
            bulk.verify(&BulkSum::of(bulk_bytes))?;
        }
        Ok((packet, body_bytes, bulk_bytes))
    }
}

/// Memory that a request has for its reply's bulk bytes. Nothing else has any.
fn decode_room(header: &[u8; HEADER_BYTES], kind: Kind) -> Result<Option<(Region, usize)>, PacketError> {
    let flags = header[FLAGS_OFFSET];
    let length = u32_at(header, ROOM_OFFSET + 16) as usize;
    if length > RPC_BULK_BYTES_MAX {
        return Err(PacketError::TooLarge { length, limit: RPC_BULK_BYTES_MAX });
    }
    match flags & FLAG_ROOM != 0 {
        true if kind == Kind::Request && length > 0 => {
            let region = Region { address: u64_at(header, ROOM_OFFSET), key: u64_at(header, ROOM_OFFSET + 8) };
            Ok(Some((region, length)))
        }
        false if header[ROOM_OFFSET..ROOM_END] == [0; 20] => Ok(None),
        _ => Err(PacketError::Flags { found: flags }),
    }
}

fn version(kind: Kind) -> u8 {
    if kind == Kind::Hello { HELLO_VERSION } else { VERSION }
}

fn u32_at(header: &[u8; HEADER_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes(*header[offset..].first_chunk().expect("inside the header"))
}

fn u64_at(header: &[u8; HEADER_BYTES], offset: usize) -> u64 {
    u64::from_le_bytes(*header[offset..].first_chunk().expect("inside the header"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn part(bytes: &[u8]) -> Part {
        let crc = if bytes.is_empty() { 0 } else { BulkSum::of(bytes).crc() };
        Part { length: bytes.len(), crc, place: Place::Inline }
    }

    fn request(body: &[u8], bulk: &[u8]) -> Vec<u8> {
        let packet =
            Packet { opcode: 7, credits: 3, body: part(body), bulk: part(bulk), ..Packet::bare(Kind::Request, 9) };
        [&packet.encode()[..], body, bulk].concat()
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let bytes = request(b"body", b"bulk bytes");
        let (packet, body, bulk) = Packet::decode(&bytes).unwrap();
        assert_eq!((packet.kind, packet.opcode, packet.credits, packet.request_id), (Kind::Request, 7, 3, 9));
        assert_eq!((body, bulk), (&b"body"[..], &b"bulk bytes"[..]));
        let place = Place::Apart(Region { address: 0x1234_5678_9abc_def0, key: u64::MAX });
        let apart = Part { length: RPC_BULK_BYTES_MAX, crc: 5, place };
        for kind in [Kind::Request, Kind::Waits, Kind::Offer, Kind::Reply] {
            let packet = Packet { bulk: apart, ..Packet::bare(kind, u64::MAX) };
            assert_eq!(Packet::decode(&packet.encode()), Ok((packet, &b""[..], &b""[..])));
        }
        let room = Some((Region { address: 1, key: 2 }, 3));
        let packet = Packet { room, ..Packet::bare(Kind::Request, 5) };
        assert_eq!(Packet::decode(&packet.encode()), Ok((packet, &b""[..], &b""[..])));
        let other = Packet { room, ..Packet::bare(Kind::Reply, 5) };
        assert_eq!(Packet::decode(&other.encode()), Err(PacketError::Flags { found: FLAG_ROOM }));
        for kind in [Kind::Hello, Kind::Refusal, Kind::Credit] {
            let packet = Packet { bulk: apart, ..Packet::bare(kind, 0) };
            assert_eq!(Packet::decode(&packet.encode()), Err(PacketError::Flags { found: FLAG_BULK_APART }));
        }
    }

    #[test]
    fn lengths_are_checked_against_limits_and_bytes() {
        let place = Place::Apart(Region::default());
        let of = |length| Packet { body: Part { length, crc: 0, place }, ..Packet::bare(Kind::Request, 1) }.encode();
        let limit = RPC_BODY_BYTES_MAX;
        assert!(Packet::decode(&of(limit)).is_ok());
        assert_eq!(Packet::decode(&of(limit + 1)), Err(PacketError::TooLarge { length: limit + 1, limit }));
        assert_eq!(Packet::decode(&of(0)), Err(PacketError::Flags { found: FLAG_BODY_APART }));
        let mut longer = request(b"body", b"bulk");
        longer.push(0);
        assert_eq!(Packet::decode(&longer), Err(PacketError::Length { found: 9, expected: 8 }));
        assert_eq!(Packet::decode(&longer[..50]), Err(PacketError::Short { found: 50 }));
    }

    #[test]
    fn what_fits_lies_inline() {
        assert_eq!(Packet::parts_apart(INLINE_BYTES_MAX, 0), (false, false));
        assert_eq!(Packet::parts_apart(INLINE_BYTES_MAX, 1), (false, true));
        assert_eq!(Packet::parts_apart(INLINE_BYTES_MAX + 1, 1), (true, false));
        assert_eq!(Packet::parts_apart(100, INLINE_BYTES_MAX - 100), (false, false));
        assert_eq!(Packet::parts_apart(100, INLINE_BYTES_MAX - 99), (false, true));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(
            body in prop::collection::vec(any::<u8>(), 0..64), bulk in prop::collection::vec(any::<u8>(), 0..64),
            place in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let mut bytes = request(&body, &bulk);
            let place = place.index(bytes.len());
            bytes[place] ^= 1 << bit;
            prop_assert!(Packet::decode(&bytes).is_err());
        }

        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Packet::decode(&bytes);
            let mut framed = bytes;
            if framed.len() >= HEADER_BYTES {
                framed[0..2].copy_from_slice(&MAGIC);
                framed[2] = VERSION;
                framed[CRC_OFFSET..HEADER_BYTES].fill(0);
                let crc = BulkSum::of(&framed[..HEADER_BYTES]).crc();
                framed[CRC_OFFSET..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
                let _ = Packet::decode(&framed);
            }
        }
    }
}
