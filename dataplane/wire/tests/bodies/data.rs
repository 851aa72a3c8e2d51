//! `store`, `fetch`, and what says where bytes are.

use super::{GOLDEN, INO, policy};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::data::{
    Claim, DataError, Extent, FetchCall, Location, OP_FETCH, OP_RESERVE, OP_STORE, Piece, Referent, Registration,
    ReserveCall, ReserveReply, ShardPlace, Slot, StoreCall, StoreReply,
};
use cfs_wire::{BlobId, Epoch, SegmentId, SessionId, TargetId, VolumeId};

pub const SEGMENT: SegmentId = SegmentId(0xa1a2_a3a4_a5a6_a7a8_a9aa_abac_adae_afb0);

pub fn hot() -> Location {
    let targets = [TargetId(3), TargetId(0x0102_0304)].into_iter().collect();
    Location::Hot { blob: BlobId(0xb1b2_b3b4_b5b6_b7b8_b9ba_bbbc_bdbe_bfc0), targets, offset: 0x1213 }
}

pub fn chunk() -> Location {
    Location::Chunk { segment: SEGMENT, slot: 0x0211, shard: 5, start: 0x21_2223, stored: 0x31_3233, offset: 0x41_4243 }
}

pub fn extent(location: Location) -> Extent {
    Extent { offset: 0x5051_5253_5455, length: 0x61_6263, location, epoch: Epoch(0x7172_7374) }
}

pub fn registration() -> Registration {
    let place =
        |index, target, blob, length| ShardPlace { index, target: TargetId(target), blob: BlobId(blob), length };
    let slot = |shard, start, stored, length| Slot { shard, start, stored, length };
    Registration {
        segment: SEGMENT,
        volume: VolumeId(0x8182),
        epoch: Epoch(0x9192_9394),
        data: 4,
        parity: 2,
        shards: vec![place(0, 0x0d0e, 0x1d1e_1f20, 0x20_2122), place(5, 0x0e0f, 0x2d2e_2f30, 0x30_3132)],
        slots: vec![slot(1, 0x4041, 0x5051, 0x6061), slot(2, 0x7071, 0x8081, 0x9091)],
    }
}

fn piece(length: u32, location: Location) -> Piece {
    Piece { length, location }
}

#[test]
fn the_bodies_of_the_data_endpoint_are_what_they_were() {
    let mut golden = GOLDEN("data");
    golden.bytes("OP_STORE", &OP_STORE.to_le_bytes());
    golden.bytes("OP_FETCH", &OP_FETCH.to_le_bytes());
    golden.bytes("OP_RESERVE", &OP_RESERVE.to_le_bytes());
    let session = SessionId(0xd1d2_d3d4_d5d6_d7d8);
    let claim = Claim { session, reserved: 0x3132_3334, answered: true };
    golden.body("StoreCall", &StoreCall { volume: VolumeId(0x8182), ino: INO, policy: policy(4, 2), claim });
    let call = ReserveCall { session, number: 0x0203, policy: policy(4, 2), held: 0x4142_4344, wanted: 0x5152_5354 };
    golden.body("ReserveCall", &call);
    golden.body("ReserveReply", &ReserveReply { granted: 0x6162_6364, lifetime_ms: 0x7172 });
    let pieces = vec![piece(0x1112, hot()), piece(0x1_3141, chunk())];
    golden.body("StoreReply", &StoreReply { epoch: Epoch(0x7172), pieces: pieces.clone() });
    golden.body("FetchCall", &FetchCall { pieces });
    golden.variants::<Result<StoreReply, DataError>>(&[
        Ok(StoreReply { epoch: Epoch(1), pieces: Vec::new() }),
        Err(DataError::NoSpace),
    ]);
    golden.variants(&[
        DataError::Gone,
        DataError::NoSpace,
        DataError::TooFewTargets { up: 2, needed: 0x0304 },
        DataError::Unreadable("which".to_owned()),
        DataError::Malformed("what".to_owned()),
        DataError::Closed,
        DataError::Starting,
    ]);
    golden.variants(&[hot(), chunk()]);
    golden.variants(&[Referent::Hot(BlobId(0x0102_0304)), Referent::Slot(SEGMENT, 0x0506)]);
    golden.body("Extent", &extent(hot()));
    golden.body("Registration", &registration());
    golden.check();
}

#[test]
fn what_a_cluster_was_created_with_is_read_for_ever() {
    let parameters = ClusterParameters {
        format: ClusterParameters::FORMAT,
        shards: 0x0102,
        policy: policy(4, 2),
        tolerated: 2,
        targets: 0x0304,
        name_key: std::array::from_fn(|at| at as u8 + 0x41),
    };
    let mut golden = GOLDEN("cluster");
    golden.bytes("ClusterParameters", &parameters.encode());
    golden.check();
    assert_eq!(ClusterParameters::decode(&parameters.encode()), Ok(parameters));
}
