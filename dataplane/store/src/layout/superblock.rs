//! The superblock: whose the target is and how it is divided.

use super::{AREA_BYTES, Fields, Invalid, PAGE_BYTES, checksum_without};
use bytes::BufMut;
use cfs_wire::cluster::{ClusterParameters, PARAMETERS_BYTES_MAX};
use cfs_wire::limits::{BLOB_BYTES_MAX, LANES, PAGE};
use cfs_wire::{ClusterId, DeviceId, NodeId, TargetId, Timestamp};
use std::fmt;

const MAGIC: &[u8; 8] = b"CFSSUPER";
pub const VERSION: u32 = 1;
/// Feature bits a reader must know; none are defined yet.
pub const FEATURES_KNOWN: u64 = 0;
/// Copy 0 is authoritative; copy 1, written first at format, stands in when 0 is damaged.
pub const COPIES: [u64; 2] = [0, AREA_BYTES - PAGE as u64];

/// Small enough for tests, large enough for a few blobs and the zone's own three pages.
pub const ZONE_BYTES_MIN: u32 = 256 << 10;
/// Offsets in a zone are 32 bits.
pub const ZONE_BYTES_MAX: u32 = 1 << 30;
/// Fewer leave nothing to ordinary writers beside the reserve and one open zone per stream.
pub const ZONES_MIN: u32 = 12;

const CHECKSUM_AT: usize = 12;
const PARAMETERS_AT: usize = 126;

/// Whose a target is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub target: TargetId,
    pub device: DeviceId,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cluster {} {} {} (device {})", self.cluster, self.node, self.target, self.device)
    }
}

/// One page, drawn (little-endian):
///
/// ```text
///   0  8  magic "CFSSUPER"         72  8  device size in bytes
///   8  4  version                  80  8  incarnation, random at each format
///  12  4  CRC32C of the page       88  4  zone size in bytes
///  16  8  features                 92  4  zones
///  24 16  cluster                  96  8  offset of zone 0
///  40 16  device                  104  4  lanes (64)
///  56  2  node                    108  4  alignment of payloads (4096)
///  58  2  0                       112  8  created: seconds
///  60  4  target                  120  4  created: nanoseconds
///  64  8  0                       124  2  length of the cluster parameters
///                                 126     cluster parameters, then 0 to the end
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    pub identity: Identity,
    /// Random; every header on the target carries it, so that nothing written before the last
    /// format is ever taken for the target's own, even under a reused device id.
    pub incarnation: u64,
    pub device_bytes: u64,
    pub zone_bytes: u32,
    pub zones: u32,
    /// Lanes dealt to the reactors. In this version all are dealt to the one reactor that opened
    /// the target; the number is fixed here so that later versions need no reformat.
    pub lanes: u32,
    pub created: Timestamp,
    /// What the cluster fixed at its creation.
    pub parameters: ClusterParameters,
}

impl Superblock {
    pub fn encode(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE);
        page.put_slice(MAGIC);
        page.put_u32_le(VERSION);
        page.put_u32_le(0);
        page.put_u64_le(FEATURES_KNOWN);
        page.put_u128_le(self.identity.cluster.0);
        page.put_u128_le(self.identity.device.0);
        page.put_u16_le(self.identity.node.0);
        page.put_u16_le(0);
        page.put_u32_le(self.identity.target.0);
        page.put_u64_le(0);
        page.put_u64_le(self.device_bytes);
        page.put_u64_le(self.incarnation);
        page.put_u32_le(self.zone_bytes);
        page.put_u32_le(self.zones);
        page.put_u64_le(AREA_BYTES);
        page.put_u32_le(self.lanes);
        page.put_u32_le(PAGE_BYTES);
        page.put_i64_le(self.created.secs);
        page.put_u32_le(self.created.nanos);
        let parameters = self.parameters.encode();
        page.put_u16_le(parameters.len() as u16);
        page.put_slice(&parameters);
        page.resize(PAGE, 0);
        let crc = checksum_without(&page, CHECKSUM_AT);
        page[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
        page
    }

    pub fn decode(page: &[u8]) -> Result<Superblock, Invalid> {
        let mut fields = Fields(page);
        fields.magic(MAGIC)?;
        let version = fields.u32()?;
        if version != VERSION {
            return Err(Invalid::Version(version));
        }
        let checksum = fields.u32()?;
        if page.len() != PAGE || checksum != checksum_without(page, CHECKSUM_AT) {
            return Err(Invalid::Checksum);
        }
        if fields.u64()? & !FEATURES_KNOWN != 0 {
            return Err(Invalid::Field("features"));
        }
        let cluster = ClusterId(fields.u128()?);
        let device = DeviceId(fields.u128()?);
        let node = NodeId(fields.u16()?);
        fields.skip(2)?;
        let target = TargetId(fields.u32()?);
        fields.skip(8)?;
        let device_bytes = fields.u64()?;
        let incarnation = fields.u64()?;
        let (zone_bytes, zones) = (fields.u32()?, fields.u32()?);
        let (area, lanes, alignment) = (fields.u64()?, fields.u32()?, fields.u32()?);
        let created = Timestamp { secs: fields.u64()? as i64, nanos: fields.u32()? };
        let length = usize::from(fields.u16()?);
        let parameters = page.get(PARAMETERS_AT..PARAMETERS_AT + length).filter(|_| length <= PARAMETERS_BYTES_MAX);
        let parameters = parameters.and_then(|bytes| ClusterParameters::decode(bytes).ok());
        let parameters = parameters.ok_or(Invalid::Field("cluster parameters"))?;
        if !zone_bytes.is_power_of_two() || !(ZONE_BYTES_MIN..=ZONE_BYTES_MAX).contains(&zone_bytes) {
            return Err(Invalid::Field("zone size"));
        }
        if zones < ZONES_MIN || area != AREA_BYTES || alignment != PAGE_BYTES || lanes != LANES {
            return Err(Invalid::Field("geometry"));
        }
        let identity = Identity { cluster, node, target, device };
        let superblock =
            Superblock { identity, incarnation, device_bytes, zone_bytes, zones, lanes, created, parameters };
        if superblock.end() > device_bytes {
            return Err(Invalid::Field("size"));
        }
        Ok(superblock)
    }

    /// The feature bits of a page that [`Superblock::decode`] refused for them.
    pub fn peek_features(page: &[u8]) -> u64 {
        let mut fields = Fields(page);
        fields.skip(16).and_then(|()| fields.u64()).unwrap_or(0)
    }

    /// Byte offset of a zone on the device.
    pub fn zone_offset(&self, zone: u32) -> u64 {
        AREA_BYTES + u64::from(zone) * u64::from(self.zone_bytes)
    }

    /// Where the last zone ends.
    pub fn end(&self) -> u64 {
        self.zone_offset(self.zones)
    }

    /// The largest payload: two fit in a zone, so that small zones waste less than half.
    pub fn payload_max(&self) -> u32 {
        (BLOB_BYTES_MAX as u32).min(self.zone_bytes / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Superblock {
        let identity =
            Identity { cluster: ClusterId(7), node: NodeId(1), target: TargetId(2), device: DeviceId(0xD0D0) };
        let created = Timestamp { secs: 1_800_000_000, nanos: 5 };
        Superblock {
            identity,
            incarnation: 9,
            device_bytes: AREA_BYTES + 16 * (4 << 20),
            zone_bytes: 4 << 20,
            zones: 16,
            lanes: LANES,
            created,
            parameters: ClusterParameters {
                format: ClusterParameters::FORMAT,
                shards: 8,
                policy: cfs_wire::Policy::new(2, 1).unwrap(),
                tolerated: 1,
                targets: 3,
                name_key: [5; 32],
            },
        }
    }

    #[test]
    fn a_superblock_comes_back_and_every_flipped_bit_is_noticed() {
        let page = sample().encode();
        assert_eq!(Superblock::decode(&page), Ok(sample()));
        for byte in 0..PAGE {
            let mut bad = page.clone();
            bad[byte] ^= 1 << (byte % 8);
            assert!(Superblock::decode(&bad).is_err(), "byte {byte}");
        }
        for length in [0, 7, 8, 100, PAGE - 1] {
            assert!(Superblock::decode(&page[..length]).is_err(), "length {length}");
        }
    }

    #[test]
    fn a_newer_version_is_named_as_such() {
        let mut page = sample().encode();
        page[8] = 2;
        assert_eq!(Superblock::decode(&page), Err(Invalid::Version(2)));
    }
}
