//! The roster: which devices are the targets of a node, as every one of them records it.

use super::superblock::Identity;
use super::{AREA_BYTES, Fields, Invalid, PAGE_BYTES, checksum_without};
use bytes::BufMut;
use cfs_wire::limits::PAGE;
use cfs_wire::{ClusterId, DeviceId, TargetId};

const MAGIC: &[u8; 8] = b"CFSROSTR";
pub const VERSION: u32 = 1;
/// Beside the superblocks, each in a block of its own; written in this order.
pub const COPIES: [u64; 2] = [AREA_BYTES - 2 * PAGE as u64, PAGE_BYTES as u64];
/// Members that fit in the page.
pub const MEMBERS_MAX: usize = (PAGE - MEMBERS_AT) / MEMBER_BYTES;

const CHECKSUM_AT: usize = 12;
/// Epochs are counted up from 1: a larger one was never counted, and would leave no room to count on.
const EPOCH_MAX: u64 = u64::MAX >> 1;
const MEMBERS_AT: usize = 64;
const MEMBER_BYTES: usize = 32;

/// What a target that took the place of another does not hold yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lacks {
    /// Copies of the Raft log and the ordered store.
    pub metadata: bool,
    /// Shards of segments and hot blobs.
    pub data: bool,
}

impl Lacks {
    pub const NOTHING: Lacks = Lacks { metadata: false, data: false };
    pub const ALL: Lacks = Lacks { metadata: true, data: true };

    fn bits(self) -> u32 {
        u32::from(self.metadata) | u32::from(self.data) << 1
    }

    fn from_bits(bits: u32) -> Result<Lacks, Invalid> {
        if bits > 3 {
            return Err(Invalid::Field("lacks"));
        }
        Ok(Lacks { metadata: bits & 1 != 0, data: bits & 2 != 0 })
    }
}

/// One target of the node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    pub device: DeviceId,
    /// The last epoch in which the device took part.
    pub seen: u64,
    pub lacks: Lacks,
}

/// One page, drawn (little-endian):
///
/// ```text
///   0  8  magic "CFSROSTR"         48  8  epoch
///   8  4  version                  56  2  members
///  12  4  CRC32C of the page       58  1  1: the file system was created
///  16 16  cluster                  59  5  0
///  32 16  device that holds this   64     members, target 0 first: 32 bytes each:
///                                          device 16, seen 8, lacks 4, 0 4
/// ```
///
/// The epoch rises with every change, and a change is on all targets that take part before
/// anything else is done: so of several rosters the one of the highest epoch is in force, and a
/// device that it does not name is out of date.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Roster {
    pub epoch: u64,
    /// Every shard has had its first entry: one without any has lost them, and is not begun anew.
    pub created: bool,
    /// By target id.
    pub members: Vec<Member>,
}

impl Roster {
    pub fn member(&self, target: TargetId) -> Option<&Member> {
        self.members.get(target.0 as usize)
    }

    /// The page as `holder` keeps it.
    ///
    /// # Panics
    /// With more than [`MEMBERS_MAX`] members.
    pub fn encode(&self, holder: &Identity) -> Vec<u8> {
        assert!(self.members.len() <= MEMBERS_MAX, "{} members do not fit", self.members.len());
        let mut page = Vec::with_capacity(PAGE);
        page.put_slice(MAGIC);
        page.put_u32_le(VERSION);
        page.put_u32_le(0);
        page.put_u128_le(holder.cluster.0);
        page.put_u128_le(holder.device.0);
        page.put_u64_le(self.epoch);
        page.put_u16_le(self.members.len() as u16);
        page.put_u8(self.created.into());
        page.resize(MEMBERS_AT, 0);
        for member in &self.members {
            page.put_u128_le(member.device.0);
            page.put_u64_le(member.seen);
            page.put_u32_le(member.lacks.bits());
            page.put_u32_le(0);
        }
        page.resize(PAGE, 0);
        let crc = checksum_without(&page, CHECKSUM_AT);
        page[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// The roster in a page of `holder`; one that another device wrote there is not believed.
    pub fn decode(page: &[u8], holder: &Identity) -> Result<Roster, Invalid> {
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
        if ClusterId(fields.u128()?) != holder.cluster || DeviceId(fields.u128()?) != holder.device {
            return Err(Invalid::Field("holder"));
        }
        let epoch = fields.u64()?;
        if epoch > EPOCH_MAX {
            return Err(Invalid::Field("epoch"));
        }
        let count = usize::from(fields.u16()?);
        let created = match fields.u8()? {
            0 => false,
            1 => true,
            _ => return Err(Invalid::Field("created")),
        };
        fields.skip(5)?;
        if count == 0 || count > MEMBERS_MAX {
            return Err(Invalid::Field("members"));
        }
        let mut members = Vec::with_capacity(count);
        for _ in 0..count {
            let (device, seen) = (DeviceId(fields.u128()?), fields.u64()?);
            let lacks = Lacks::from_bits(fields.u32()?)?;
            fields.skip(4)?;
            if seen > epoch {
                return Err(Invalid::Field("seen"));
            }
            members.push(Member { device, seen, lacks });
        }
        Ok(Roster { epoch, created, members })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_wire::NodeId;

    fn holder(device: u128) -> Identity {
        Identity { cluster: ClusterId(7), node: NodeId(0), target: TargetId(1), device: DeviceId(device) }
    }

    fn sample() -> Roster {
        let member = |device, seen, lacks| Member { device: DeviceId(device), seen, lacks };
        let data = Lacks { metadata: false, data: true };
        Roster {
            epoch: 9,
            created: true,
            members: vec![member(5, 9, Lacks::NOTHING), member(6, 9, data), member(8, 4, Lacks::ALL)],
        }
    }

    #[test]
    fn a_roster_comes_back_and_every_flipped_bit_is_noticed() {
        let page = sample().encode(&holder(6));
        assert_eq!(Roster::decode(&page, &holder(6)), Ok(sample()));
        for byte in 0..PAGE {
            let mut bad = page.clone();
            bad[byte] ^= 1 << (byte % 8);
            assert!(Roster::decode(&bad, &holder(6)).is_err(), "byte {byte}");
        }
        for length in [0, 7, 8, 63, 100, PAGE - 1] {
            assert!(Roster::decode(&page[..length], &holder(6)).is_err(), "length {length}");
        }
    }

    #[test]
    fn a_page_that_another_device_wrote_is_not_believed() {
        let page = sample().encode(&holder(6));
        assert_eq!(Roster::decode(&page, &holder(5)), Err(Invalid::Field("holder")));
    }

    #[test]
    fn an_epoch_that_was_never_counted_is_refused() {
        let decoded = |epoch| Roster::decode(&Roster { epoch, ..sample() }.encode(&holder(6)), &holder(6));
        assert_eq!(decoded(EPOCH_MAX).map(|roster| roster.epoch), Ok(EPOCH_MAX));
        assert_eq!(decoded(EPOCH_MAX + 1), Err(Invalid::Field("epoch")));
    }

    #[test]
    fn the_largest_roster_fits_its_page() {
        let member = Member { device: DeviceId(1), seen: 0, lacks: Lacks::NOTHING };
        let roster = Roster { epoch: 1, created: false, members: vec![member; MEMBERS_MAX] };
        let page = roster.encode(&holder(1));
        assert_eq!((page.len(), Roster::decode(&page, &holder(1))), (PAGE, Ok(roster)));
    }
}
