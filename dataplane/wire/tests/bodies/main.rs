//! The bytes of every body on the wire are pinned. A body that comes out differently is misread by
//! nodes and clients of the version before: a change here needs a new protocol version.

mod data;
mod ops;
mod property;
mod replies;
mod shard;

use cfs_wire::golden::Golden;
use cfs_wire::{Ino, NodeId, Policy, RequestId, SessionId, ShardId, Timestamp};

const GOLDEN: fn(&str) -> Golden = |name| Golden::new(env!("CARGO_MANIFEST_DIR"), name);

const DIR: Ino = Ino::from_u64(0x0003_0000_0000_0101);
const OTHER_DIR: Ino = Ino::from_u64(0x0004_0000_0000_0202);
const INO: Ino = Ino::from_u64(0x0005_0000_0000_0303);
const SESSION: SessionId = SessionId(0x5151_5252_5353_5454);
const SHARD: ShardId = ShardId(0x0607);
const NODE: NodeId = NodeId(0x0809);
const REQUEST: RequestId = RequestId { session: SESSION, sequence: 0x6161_6262 };

fn policy(data: u8, parity: u8) -> Policy {
    Policy::new(data, parity).expect("a policy in range")
}

/// Another one for each second.
fn time(secs: i64) -> Timestamp {
    Timestamp { secs, nanos: 123_456_000 + secs.unsigned_abs() as u32 }
}
