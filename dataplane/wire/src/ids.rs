//! Identifiers. Each is a newtype so that a zone number can't be passed where an inode goes.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "(", $format, ")"), self.0)
            }
        }
    };
}

id!(/// A storage node, numbered by the cluster map; never reused.
    NodeId(u16), "n{}");
id!(/// A target (one device) as the cluster map numbers it; never reused. The superblock also
    /// carries a 128-bit device id that no other device shares.
    TargetId(u32), "t{}");
id!(/// A metadata shard, which is also its Raft group. Shard 0 holds the cluster map.
    ShardId(u16), "s{}");
id!(/// An immutable blob on one target: 128 random bits drawn by the server for each attempt.
    BlobId(u128), "{:032x}");
id!(/// An erasure-coded segment: 128 random bits drawn by the server for each attempt.
    SegmentId(u128), "{:032x}");
id!(/// A volume: a namespace with its own root, keys and quotas.
    VolumeId(u32), "v{}");
id!(/// A client session, drawn at random when the session is opened.
    SessionId(u64), "{:016x}");
id!(/// A counter of shard 0: the reference epoch of section 7 of the design.
    Epoch(u64), "e{}");
id!(/// A device's own identity, written in its superblock at format.
    DeviceId(u128), "{:032x}");
id!(/// A cluster's identity, drawn at creation.
    ClusterId(u128), "{:032x}");
id!(/// A zone of a target: an aligned range written sequentially.
    ZoneNo(u32), "z{}");
id!(/// How often a zone has been reused; every header in the zone carries it.
    Generation(u64), "g{}");

impl From<Epoch> for u64 {
    fn from(epoch: Epoch) -> u64 {
        epoch.0
    }
}

/// An inode number: 16 bits of home shard, 48 bits of a counter that shard never reuses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ino(u64);

impl Ino {
    /// Low 48 bits: the shard's own counter.
    pub const COUNTER_BITS: u32 = 48;
    pub const COUNTER_MAX: u64 = (1 << Self::COUNTER_BITS) - 1;
    /// The root directory of the first volume: counter 1 of shard 0, and what FUSE calls inode 1.
    pub const ROOT: Ino = Ino(1);

    /// # Panics
    /// When the counter exceeds 48 bits: a shard would have to create 2^48 inodes first.
    pub fn new(shard: ShardId, counter: u64) -> Ino {
        assert!(counter <= Self::COUNTER_MAX, "inode counter {counter} exceeds 48 bits");
        Ino((u64::from(shard.0) << Self::COUNTER_BITS) | counter)
    }

    pub const fn from_u64(raw: u64) -> Ino {
        Ino(raw)
    }

    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The shard that holds this inode's record.
    pub const fn shard(self) -> ShardId {
        ShardId((self.0 >> Self::COUNTER_BITS) as u16)
    }

    pub const fn counter(self) -> u64 {
        self.0 & Self::COUNTER_MAX
    }
}

impl fmt::Display for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.shard(), self.counter())
    }
}

impl fmt::Debug for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ino({self})")
    }
}

/// A request as the client numbers it. The server answers a repeated id from the stored reply.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct RequestId {
    pub session: SessionId,
    pub sequence: u64,
}
