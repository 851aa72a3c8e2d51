//! Manifests that outgrow one blob: a root and its parts, and what is left of them.

mod common;

use bytes::Bytes;
use cfs_kv::testing::{LostBlob, MemMedium};
use cfs_kv::{Batch, Kv, KvConfig, KvError};
use cfs_reactor::clock::SimClock;
use cfs_reactor::{Executor, Handle};
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobInfo, BlobKind, MirroredBlobs, Owner};
use common::{GROUP, config, mark, split_config};
use std::rc::Rc;

/// In a root.
const LISTED_AT: usize = 28;
const LISTED_BYTES: usize = 20;
/// In a part.
const INDEX_AT: usize = 24;

fn simulate(story: impl AsyncFnOnce(Rc<MemMedium>, Handle) + 'static) {
    let executor = Executor::new(Rc::new(SimClock::new(7)));
    let handle = executor.domain();
    let node = handle.clone();
    executor.run_simulated(&handle, async move { story(MemMedium::new(7), node).await }).unwrap().unwrap();
}

async fn open(medium: &Rc<MemMedium>, node: &Handle, config: KvConfig) -> Result<Rc<Kv>, KvError> {
    Kv::open(medium.open(node), node, GROUP, config).await
}

/// With such levels no second run has the first merged, whose tables an older manifest names.
fn unmerged_config() -> KvConfig {
    KvConfig { level_bytes: 1 << 20, garbage_bytes_min: u64::MAX, ..split_config() }
}

/// Writes so many rows of some 70 bytes as one batch.
fn write(kv: &Kv, rows: u64, number: u64) {
    let mut batch = Batch::new();
    for row in 0..rows {
        batch.put(format!("row/{row:04}"), vec![b'x'; 60]);
    }
    kv.write(batch, mark(number));
}

/// A store of one run of several tables, at mark 1.
async fn filled(medium: &Rc<MemMedium>, node: &Handle, config: KvConfig) {
    let kv = open(medium, node, config).await.unwrap();
    write(&kv, 80, 1);
    assert_eq!(kv.checkpoint().await.unwrap(), mark(1));
    kv.settle().await;
    kv.close().await;
}

struct Split {
    root: BlobInfo,
    parts: Vec<BlobInfo>,
}

impl Split {
    /// The one manifest of the medium.
    fn of(medium: &MemMedium) -> Split {
        let payload = |info: &BlobInfo| medium.payload(info.id).unwrap();
        let all = medium.list(BlobKind::Manifest).into_iter();
        let (mut parts, roots): (Vec<_>, Vec<_>) = all.partition(|info| payload(info).starts_with(b"CFSP"));
        parts.sort_by_key(|info| payload(info)[INDEX_AT]);
        assert_eq!(roots.len(), 1, "{roots:?}");
        assert!(parts.len() > 3, "{} parts tell little", parts.len());
        Split { root: roots[0], parts }
    }

    fn blobs(&self) -> Vec<BlobInfo> {
        std::iter::once(self.root).chain(self.parts.iter().copied()).collect()
    }
}

/// Puts a changed copy in the place of a blob, with the checksum that belongs to it.
async fn replace(medium: &Rc<MemMedium>, node: &Handle, info: &BlobInfo, change: impl FnOnce(&mut [u8])) -> BlobId {
    let mut bytes = medium.payload(info.id).unwrap().to_vec();
    let body = bytes.len() - 4;
    change(&mut bytes[..body]);
    let crc = crc_fast::crc32_iscsi(&bytes[..body]);
    bytes[body..].copy_from_slice(&crc.to_le_bytes());
    medium.take_away(info.id).unwrap();
    medium.open(node).put(info.kind, info.owner, bytes.into()).await.unwrap()
}

#[test]
fn a_manifest_is_split_at_its_limit_and_whichever_it_was_opens() {
    simulate(async |medium, node| {
        filled(&medium, &node, split_config()).await;
        let split = Split::of(&medium);
        let limit = split_config().manifest_blob_bytes_max as u32;
        let (last, full) = split.parts.split_last().unwrap();
        assert!(full.iter().all(|part| part.length == limit) && last.length <= limit, "{:?}", split.parts);
        assert!(split.parts.iter().all(|part| part.owner == split.root.owner), "{:?}", split.blobs());
        let kv = open(&medium, &node, config()).await.unwrap();
        assert_eq!((kv.applied(), kv.stats().manifest_blobs), (mark(1), split.blobs().len()));
        assert_eq!(kv.get(b"row/0079").await.unwrap(), Some(vec![b'x'; 60].into()));
        // Under the larger limit it is one blob again, and the parts go.
        kv.write(Batch::new(), mark(2));
        kv.checkpoint().await.unwrap();
        kv.settle().await;
        assert_eq!((medium.list(BlobKind::Manifest).len(), kv.stats().manifest_blobs), (1, 1));
        kv.close().await;
        assert_eq!(open(&medium, &node, split_config()).await.unwrap().applied(), mark(2));
    });
}

#[test]
fn every_flipped_bit_of_a_root_or_a_part_is_an_error_that_names_it() {
    simulate(async |medium, node| {
        filled(&medium, &node, split_config()).await;
        for info in Split::of(&medium).blobs() {
            for bit in 0..info.length as usize * 8 {
                medium.flip_bit(info.id, bit);
                let error = open(&medium, &node, split_config()).await.err().unwrap();
                assert!(error.is_corrupt() && error.to_string().contains(&info.id.to_string()), "bit {bit}: {error}");
                medium.flip_bit(info.id, bit);
            }
        }
        assert_eq!(open(&medium, &node, split_config()).await.unwrap().applied(), mark(1));
    });
}

#[test]
fn a_missing_part_refuses_to_open_and_comes_back() {
    simulate(async |medium, node| {
        filled(&medium, &node, split_config()).await;
        let split = Split::of(&medium);
        for part in &split.parts {
            let away = medium.take_away(part.id).unwrap();
            let error = open(&medium, &node, split_config()).await.err().unwrap();
            assert!(error.is_corrupt(), "{error}");
            let told = error.to_string();
            assert!(told.contains(&format!("1 of its parts are on no reachable target, {} first", part.id)), "{told}");
            assert!(told.contains(&split.root.id.to_string()), "{told}");
            assert_eq!(medium.list(BlobKind::Manifest).len(), split.parts.len(), "refusing deletes nothing");
            medium.bring_back(away);
        }
        assert_eq!(open(&medium, &node, split_config()).await.unwrap().applied(), mark(1));
    });
}

/// Two openings' manifests, both there: of mark 1, and of mark 2 that replaced it.
async fn two_versions(medium: &Rc<MemMedium>, node: &Handle) -> (Split, Split) {
    filled(medium, node, unmerged_config()).await;
    let older = Split::of(medium);
    let kv = open(medium, node, unmerged_config()).await.unwrap();
    let away: Vec<LostBlob> = older.blobs().iter().map(|info| medium.take_away(info.id).unwrap()).collect();
    let mut batch = Batch::new();
    batch.put("second", "value");
    kv.write(batch, mark(2));
    assert_eq!(kv.checkpoint().await.unwrap(), mark(2));
    kv.settle().await;
    kv.close().await;
    let newer = Split::of(medium);
    assert_eq!([older.root, newer.root].map(|root| root.owner.low >> 32), [1, 2]);
    away.into_iter().for_each(|blob| medium.bring_back(blob));
    (older, newer)
}

#[test]
fn a_root_without_one_of_its_parts_gives_way_to_an_older_manifest() {
    for missing in [None, Some(0), Some(2)] {
        simulate(async move |medium, node| {
            let (older, newer) = two_versions(&medium, &node).await;
            if let Some(index) = missing {
                medium.take_away(newer.parts[index].id).unwrap();
            }
            let (number, kept) = if missing.is_some() { (1, older) } else { (2, newer) };
            let kv = open(&medium, &node, unmerged_config()).await.unwrap();
            assert_eq!(kv.applied(), mark(number));
            kv.settle().await;
            let mut kept: Vec<BlobId> = kept.blobs().iter().map(|info| info.id).collect();
            let mut left: Vec<BlobId> = medium.list(BlobKind::Manifest).iter().map(|info| info.id).collect();
            kept.sort();
            left.sort();
            assert_eq!(left, kept, "what is not the chosen one is deleted");
        });
    }
}

#[test]
fn a_part_that_can_not_be_read_is_no_reason_to_go_back() {
    simulate(async |medium, node| {
        let (_, newer) = two_versions(&medium, &node).await;
        medium.flip_bit(newer.parts[2].id, 500);
        let told = open(&medium, &node, unmerged_config()).await.err().unwrap().to_string();
        let wrong = format!("its checksum is wrong, as part 2 of {}", newer.root.id);
        assert!(told.contains(&newer.parts[2].id.to_string()) && told.contains(&wrong), "{told}");
    });
}

#[test]
fn parts_without_a_root_are_deleted_and_their_version_is_not_used_again() {
    simulate(async |medium, node| {
        let (older, newer) = two_versions(&medium, &node).await;
        medium.take_away(newer.root.id).unwrap();
        // What nobody names need not be whole.
        medium.flip_bit(newer.parts[0].id, 500);
        let kv = open(&medium, &node, unmerged_config()).await.unwrap();
        assert_eq!(kv.applied(), mark(1));
        kv.settle().await;
        assert_eq!(Split::of(&medium).blobs(), older.blobs());
        kv.write(Batch::new(), mark(3));
        kv.checkpoint().await.unwrap();
        kv.settle().await;
        assert_eq!(Split::of(&medium).root.owner.low >> 32, 3);
    });
}

#[test]
fn a_lone_part_makes_no_store_and_leaves_room_to_count_on() {
    simulate(async |medium, node| {
        let blobs = medium.open(&node);
        let part = Bytes::from_static(b"CFSP and then nothing of use");
        blobs.put(BlobKind::Manifest, Owner { high: GROUP, low: 5 << 32 }, part.clone()).await.unwrap();
        let kv = open(&medium, &node, unmerged_config()).await.unwrap();
        assert_eq!((kv.applied(), kv.stats().manifest_blobs), (Bytes::new(), 0));
        kv.settle().await;
        assert_eq!(medium.list(BlobKind::Manifest), []);
        kv.close().await;
        let id = medium.open(&node).put(BlobKind::Manifest, Owner { high: GROUP, low: u64::MAX }, part).await.unwrap();
        let told = open(&medium, &node, unmerged_config()).await.err().unwrap().to_string();
        assert!(told.contains(&id.to_string()) && told.contains("its version is out of range"), "{told}");
    });
}

/// Of a blob's bytes up to the checksum.
type Change = fn(&mut [u8]);

/// Opens a store of which one blob of the manifest was changed below its checksum.
async fn refusal(
    medium: &Rc<MemMedium>,
    node: &Handle,
    of: fn(&Split) -> BlobInfo,
    change: Change,
) -> (BlobId, String) {
    filled(medium, node, split_config()).await;
    let id = replace(medium, node, &of(&Split::of(medium)), change).await;
    let error = open(medium, node, split_config()).await.err().unwrap();
    assert!(error.is_corrupt(), "{error}");
    (id, error.to_string())
}

#[test]
fn a_root_that_means_something_else_is_an_error_that_names_it() {
    let swap_parts = |root: &mut [u8]| {
        let (first, second) = root[LISTED_AT..].split_at_mut(LISTED_BYTES);
        first.swap_with_slice(&mut second[..LISTED_BYTES]);
    };
    let cases: [(Change, &str); 6] = [
        (|root| root[4] = 3, "its format version is unknown to this binary"),
        (|root| root[8] ^= 1, "it belongs to another group or version"),
        (|root| root[16] ^= 1, "it belongs to another group or version"),
        (|root| root[24..28].fill(0xff), "its number of parts is out of range"),
        (|root| root[LISTED_AT + 16] ^= 1, "1 of its parts are on no reachable target"),
        (swap_parts, "it belongs elsewhere, as part 0 of"),
    ];
    for (change, reason) in cases {
        simulate(async move |medium, node| {
            let (id, told) = refusal(&medium, &node, |split| split.root, change).await;
            assert!(told.contains(&id.to_string()) && told.contains(reason), "{told}");
        });
    }
}

#[test]
fn failed_puts_of_parts_or_root_leave_nothing_behind() {
    simulate(async |medium, node| {
        filled(&medium, &node, split_config()).await;
        let kv = open(&medium, &node, split_config()).await.unwrap();
        medium.fail_puts(Some(5));
        let mut failed = 0;
        for number in 2..12 {
            kv.write(Batch::new(), mark(number));
            while kv.checkpoint().await.is_err() {
                failed += 1;
            }
        }
        assert!(failed > 10, "only {failed} of the checkpoints failed");
        kv.settle().await;
        assert_eq!(Split::of(&medium).blobs().len(), kv.stats().manifest_blobs);
    });
}

#[test]
fn a_manifest_of_more_parts_than_a_root_lists_is_refused_and_loses_nothing() {
    simulate(async |medium, node| {
        let narrow = KvConfig { manifest_blob_bytes_max: 0, ..config() };
        filled(&medium, &node, narrow.clone()).await;
        let kv = open(&medium, &node, narrow).await.unwrap();
        write(&kv, 4000, 2);
        let error = kv.checkpoint().await.unwrap_err();
        assert!(matches!(error, KvError::ManifestFull { group: GROUP, bytes } if bytes > 32 * 256), "{error}");
        assert!(!error.is_retryable() && !error.is_corrupt(), "{error}");
        assert_eq!(kv.get(b"row/3999").await.unwrap(), Some(vec![b'x'; 60].into()));
        kv.settle().await;
        assert_eq!(Split::of(&medium).blobs().len(), kv.stats().manifest_blobs);
        kv.close().await;
        let kv = open(&medium, &node, split_config()).await.unwrap();
        assert_eq!(kv.applied(), mark(1));
        write(&kv, 4000, 2);
        assert_eq!(kv.checkpoint().await.unwrap(), mark(2));
    });
}
