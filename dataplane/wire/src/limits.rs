//! Every bound that more than one crate relies on, with the relations between them asserted.

use std::time::Duration;

/// Device and checksum granularity: payloads are aligned to it and carry one CRC32C per page.
pub const PAGE: usize = 4096;
/// An immutable blob's payload at most (section 5 of the design).
pub const BLOB_BYTES_MAX: usize = 1 << 20;
/// A segment's data bytes at most (section 6).
pub const SEGMENT_BYTES_MAX: usize = 2 << 20;
/// A chunk, the unit that is later deduplicated, compressed and sealed. Fixed-size cuts until
/// content-defined chunking lands; 64 KiB is that chunker's average.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Chunks in a segment at most: slot numbers are 16 bits, and the registration stays small.
pub const SEGMENT_SLOTS_MAX: usize = 512;
/// A file up to this size lives in its inode record.
pub const INLINE_BYTES_MAX: usize = 4096;
/// A `store` call's bytes at most: two segments, so that the pipeline can overlap them.
pub const STORE_BYTES_MAX: usize = 4 << 20;
/// A name in a directory (POSIX NAME_MAX).
pub const NAME_BYTES_MAX: usize = 255;
/// A symlink target (Linux PATH_MAX, with the NUL).
pub const SYMLINK_BYTES_MAX: usize = 4095;
/// An extended attribute's name and value (Linux XATTR_NAME_MAX, XATTR_SIZE_MAX).
pub const XATTR_NAME_BYTES_MAX: usize = 255;
pub const XATTR_VALUE_BYTES_MAX: usize = 64 << 10;
/// All attribute names of one file together (Linux XATTR_LIST_MAX).
pub const XATTR_LIST_BYTES_MAX: usize = 64 << 10;
/// Hard links to one inode. `nlink` is a u32; the bound keeps counters far from overflow.
pub const LINKS_MAX: u32 = 1 << 20;
/// Largest file offset: signed 64-bit as `lseek` has it.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;
/// An RPC body (bulk bytes excluded).
pub const RPC_BODY_BYTES_MAX: usize = 2 << 20;
/// Bulk bytes that ride beside one RPC.
pub const RPC_BULK_BYTES_MAX: usize = STORE_BYTES_MAX + PAGE;
/// Pieces that one `fetch` asks for: a MiB of 4 KiB extents.
pub const FETCH_PIECES_MAX: usize = 256;
/// Writes in one commit; more are sent as several commits.
pub const COMMIT_WRITES_MAX: usize = 256;
/// Extents that the holes of one commit take away at most: 256 MiB of 64 KiB chunks. The shard does
/// nothing else meanwhile. A commit that would take more is refused with E2BIG.
pub const PUNCH_EXTENTS_MAX: usize = 4096;
/// Stored replies a shard keeps for one session before it refuses new requests of it.
pub const SESSION_REPLIES_MAX: usize = 1024;
/// Inodes whose grants one call renews, and events that one poll acknowledges out of turn.
pub const RENEWALS_MAX: usize = 1024;
/// Inodes released by one call: its entry is applied in well under a millisecond.
pub const RELEASES_MAX: usize = 64;
/// How long a client waits at most, before it acknowledges an `Invalidate`, for pages that programs stored
/// to through mappings to be written back.
pub const MAPPED_PAGES_WAIT: Duration = Duration::from_secs(2);
/// A client's name as its session records keep it: a mountpoint (PATH_MAX) and what makes it
/// unique.
pub const CLIENT_NAME_BYTES_MAX: usize = 4096 + 255;
/// Data and parity shards of a policy.
pub const DATA_SHARDS_MAX: usize = 32;
pub const PARITY_SHARDS_MAX: usize = 8;
/// Copies of a hot blob: one more than the losses that the widest policy survives.
pub const HOT_COPIES_MAX: usize = PARITY_SHARDS_MAX + 1;
/// Lanes of a target, written in its superblock at format.
pub const LANES: u32 = 64;

const _: () = assert!(SEGMENT_BYTES_MAX / CHUNK_BYTES <= SEGMENT_SLOTS_MAX);
const _: () = assert!(SEGMENT_SLOTS_MAX <= u16::MAX as usize);
const _: () = assert!(CHUNK_BYTES <= BLOB_BYTES_MAX);
const _: () = assert!(BLOB_BYTES_MAX.is_multiple_of(PAGE));
