//! The ordered store, opened from a manifest and tables that its own program never wrote.

use super::blobs::Blobs;
use super::mutate::{Length, mutate, pick};
use super::{Fed, Target, Trial, seal, simulated, u32_at};
use bytes::Bytes;
use cfs_kv::{Batch, BlockCache, Kv, KvConfig};
use cfs_reactor::Handle;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::blobs::{BlobInfo, BlobKind};
use cfs_wire::limits::BLOB_BYTES_MAX;
use std::cell::RefCell;
use std::ops::Bound;
use std::rc::Rc;

const INPUTS_PER_ROUND: usize = 4;
const GROUP: u64 = 9;
const FOOTER_BYTES: usize = 48;
const MANIFEST_FIXED_BYTES: usize = 40;
/// Up to its payload.
const PART_FIXED_BYTES: usize = 28;
/// In a manifest, a root and a part.
const VERSION_AT: usize = 16;
/// Manifests in one blob, and such as have parts.
const MANIFEST_BLOB_BYTES_MAX: [usize; 2] = [BLOB_BYTES_MAX, 200];
/// In the footer.
const FILTER_LENGTH_AT: usize = 28;
const INDEX_LENGTH_AT: usize = 32;

type Stored = Vec<(BlobInfo, Bytes)>;

pub struct Ordered {
    /// For each limit of a manifest's blob.
    stores: [Stored; 2],
    donors: Vec<Vec<u8>>,
}

/// So small that a few hundred batches make several runs and levels.
fn config(manifest_blob_bytes_max: usize) -> KvConfig {
    KvConfig {
        memtable_bytes_max: 2500,
        block_bytes: 200,
        table_bytes_max: 900,
        manifest_blob_bytes_max,
        recent_runs_max: 3,
        level_bytes: 2000,
        level_factor: 3,
        garbage_bytes_min: 400,
        cache: BlockCache::new(20_000),
        ..KvConfig::default()
    }
}

fn key(number: u64) -> String {
    format!("row/{:03}/{}", number % 120, number % 7)
}

async fn change(kv: &Kv, number: u64) -> Result<(), String> {
    let mut batch = Batch::new();
    if number % 5 == 4 {
        batch.delete(key(number / 2));
    } else {
        batch.put(key(number), Bytes::from(vec![number as u8; (number % 60) as usize]));
    }
    kv.write(batch, Bytes::copy_from_slice(&number.to_be_bytes()));
    kv.admit().await.map_err(|error| error.to_string())?;
    if kv.should_checkpoint() {
        kv.checkpoint().await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

async fn written(handle: Handle, config: KvConfig) -> Stored {
    let blobs = Blobs::new(&handle, []);
    let kv = Kv::open(blobs.clone(), &handle, GROUP, config).await.expect("opens");
    for number in 0..700 {
        change(&kv, number).await.expect("is written");
    }
    kv.checkpoint().await.expect("is written");
    kv.settle().await;
    kv.close().await;
    blobs.all()
}

fn store(manifest_blob_bytes_max: usize) -> Stored {
    let kept: Rc<RefCell<Stored>> = Rc::default();
    let keep = kept.clone();
    let outcome = simulated(|handle| async move {
        *keep.borrow_mut() = written(handle, config(manifest_blob_bytes_max)).await;
        Ok(Fed::Taken)
    });
    assert!(outcome.is_ok(), "the store is written: {:?}", outcome.err());
    let blobs = kept.take();
    let tables = blobs.iter().filter(|(info, _)| info.kind == BlobKind::Run).count();
    assert!(tables > 5 && tables < blobs.len(), "{tables} tables of {} blobs tell little", blobs.len());
    let parts = blobs.iter().filter(|(_, bytes)| is_part(bytes)).count();
    assert_eq!(parts > 1, manifest_blob_bytes_max < BLOB_BYTES_MAX, "{parts} parts at {manifest_blob_bytes_max}");
    blobs
}

impl Ordered {
    pub fn new() -> Ordered {
        let stores = MANIFEST_BLOB_BYTES_MAX.map(store);
        let donors = stores.iter().flatten().map(|(_, bytes)| bytes.to_vec()).collect();
        Ordered { stores, donors }
    }
}

fn is_part(bytes: &[u8]) -> bool {
    bytes.starts_with(b"CFSP")
}

impl Target for Ordered {
    fn round(&self, random: &mut SplitMix64, trial: &mut Trial) {
        for _ in 0..INPUTS_PER_ROUND {
            let (stored, limit) =
                *pick(random, &[0, 1].map(|which| (&self.stores[which], MANIFEST_BLOB_BYTES_MAX[which])));
            let kind = if random.one_in(2) { BlobKind::Manifest } else { BlobKind::Run };
            let of_kind: Vec<usize> = (0..stored.len()).filter(|number| stored[*number].0.kind == kind).collect();
            let number = *pick(random, &of_kind);
            let mut blob = stored[number].1.to_vec();
            match kind {
                BlobKind::Manifest => self.mutate_manifest(random, &mut blob),
                _ => self.mutate_table(random, &mut blob),
            }
            if !random.one_in(4) {
                let (from, end) = (if kind == BlobKind::Run { index_offset(&blob) } else { 0 }, blob.len() - 4);
                seal(&mut blob[from..], end - from, &[]);
            }
            let version =
                blob.get(VERSION_AT..).and_then(|rest| rest.first_chunk()).map(|version| u64::from_le_bytes(*version));
            trial.feed(&format!("{kind:?} {number} at {limit}"), &blob, |blob| {
                let mut blobs = stored.clone();
                if let Some(version) = version.filter(|_| kind == BlobKind::Manifest) {
                    blobs[number].0.owner.low = version;
                }
                blobs[number].0.length = blob.len() as u32;
                blobs[number].1 = Bytes::copy_from_slice(blob);
                simulated(|handle| open(handle, blobs, config(limit)))
            });
        }
    }
}

impl Ordered {
    /// A part is as long as its root says.
    fn mutate_manifest(&self, random: &mut SplitMix64, blob: &mut Vec<u8>) {
        let (head, length) = match is_part(blob) {
            true => (PART_FIXED_BYTES, Length::Fixed),
            false => (MANIFEST_FIXED_BYTES, Length::Free),
        };
        let crc = blob.split_off(blob.len() - 4);
        mutate(random, blob, head, &self.donors, length);
        blob.extend(crc);
    }

    /// A table is as long as its manifest says: all of it, what describes its data blocks, or the
    /// footer.
    fn mutate_table(&self, random: &mut SplitMix64, blob: &mut Vec<u8>) {
        let footer = blob.len() - FOOTER_BYTES;
        let part = *pick(random, &[0, index_offset(blob), footer]);
        let mut tail = blob.split_off(part);
        mutate(random, &mut tail, 0, &self.donors, Length::Fixed);
        blob.extend(tail);
    }
}

/// Where filter, index and footer of a table begin, as it says itself.
fn index_offset(table: &[u8]) -> usize {
    let footer = table.len() - FOOTER_BYTES;
    let lengths = [FILTER_LENGTH_AT, INDEX_LENGTH_AT].map(|at| u32_at(table, footer + at) as usize);
    footer.saturating_sub(lengths.into_iter().sum())
}

/// Opens the store, reads everything by walking and by key, and writes and merges on top of it.
async fn open(handle: Handle, blobs: Stored, config: KvConfig) -> Result<Fed, String> {
    let Ok(kv) = Kv::open(Blobs::new(&handle, blobs), &handle, GROUP, config).await else { return Ok(Fed::Refused) };
    let mut scan = kv.scan((Bound::Unbounded, Bound::Unbounded));
    while let Ok(Some(_)) = scan.next().await {}
    for number in 0..120 {
        let _ = kv.get(key(number).as_bytes()).await;
    }
    // Errors are what damaged tables may give, again and again.
    for number in 1000..1100 {
        if change(&kv, number).await.is_err() {
            break;
        }
    }
    let _ = kv.checkpoint().await;
    kv.close().await;
    Ok(Fed::Taken)
}
