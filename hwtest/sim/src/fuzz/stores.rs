//! A whole target, opened with one of its structures changed and its checksum right: superblock,
//! roster, zone header, append header, footer, summary.

use super::mutate::{Length, mutate, pick};
use super::{Fed, Target, Trial, seal, simulated, u32_at};
use bytes::Bytes;
use cfs_codec::crc32c::crc32c;
use cfs_device::mem::MemDisk;
use cfs_device::{BlockDevice, Placement};
use cfs_reactor::Handle;
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::clock::SplitMix64;
use cfs_store::{FormatOptions, Identity, Lacks, Member, Roster, TargetStore};
use cfs_wire::blobs::{BlobKind, Owner, ShardGeometry};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::{BlobId, ClusterId, DeviceId, NodeId, Policy, TargetId};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

const INPUTS_PER_ROUND: usize = 2;
const PAGE: usize = 4096;
const AREA_BYTES: u64 = 1 << 20;
const ZONE_BYTES: u32 = 256 << 10;
const ZONES: u32 = 32;
const CHECKSUM_AT: usize = 12;
const STAMP_BYTES: usize = 96;
/// Of a stamp: how long its structure is.
const BYTES_AT: usize = 72;
/// Of a footer: length and checksum of the summary before it.
const SUMMARY_LENGTH_AT: usize = 352;
const SUMMARY_CHECKSUM_AT: usize = 360;
const MAGICS: [&[u8; 8]; 5] = [b"CFSSUPER", b"CFSROSTR", b"CFSZHEAD", b"CFSAPPND", b"CFSZFOOT"];

/// A structure with a magic, as it was found on the disk.
struct Found {
    magic: usize,
    offset: u64,
    bytes: Vec<u8>,
    /// What a footer describes, whole pages right before it.
    summary: Vec<u8>,
}

pub struct Stores {
    disk: Rc<MemDisk>,
    found: Vec<Found>,
    donors: Vec<Vec<u8>>,
    blobs: Rc<BTreeMap<u128, Bytes>>,
}

/// The blobs on a disk, and all its bytes.
type Filled = (BTreeMap<u128, Bytes>, Vec<u8>);

/// What is written to the disk before it is opened.
type Forged = Vec<(u64, Vec<u8>)>;

fn identity() -> Identity {
    Identity { cluster: ClusterId(0xC1), node: NodeId(1), target: TargetId(0), device: DeviceId(0xDE) }
}

fn payload(id: u128, length: usize) -> Bytes {
    let mut random = SplitMix64::new(id as u64);
    let mut buffer = DmaBuf::uninitialised(length);
    buffer.iter_mut().for_each(|byte| *byte = random.next_u64() as u8);
    buffer.freeze()
}

async fn put(store: &TargetStore, id: u128, kind: BlobKind, bytes: &Bytes) -> Result<(), String> {
    let owner = Owner { high: id as u64 % 7, low: id as u64 };
    store.put(BlobId(id), kind, owner, ShardGeometry::NONE, bytes.clone()).await.map_err(|error| error.to_string())
}

/// Formats the disk, fills some zones of all streams, and deletes a part; what is left.
async fn fill(disk: Rc<MemDisk>, handle: Handle) -> BTreeMap<u128, Bytes> {
    let parameters = ClusterParameters {
        format: ClusterParameters::FORMAT,
        shards: 8,
        policy: Policy::new(2, 1).expect("2+1 is a policy"),
        tolerated: 1,
        targets: 3,
        name_key: [5; 32],
    };
    let options = FormatOptions { identity: identity(), parameters, zone_bytes: Some(ZONE_BYTES), force: false };
    let device = disk.open(&handle);
    cfs_store::format(&*device, &options).await.expect("formats");
    let member = |device| Member { device: DeviceId(device), seen: 3, lacks: Lacks::NOTHING };
    let roster = Roster { epoch: 3, created: true, members: vec![member(0xDE), member(0xDF)] };
    cfs_store::write_roster(&*device, &identity(), &roster).await.expect("writes");
    let store = TargetStore::open(device, &handle, Some(identity())).await.expect("opens");
    let mut random = SplitMix64::new(5);
    let mut blobs = BTreeMap::new();
    for number in 0..70u128 {
        // Ids that don't occur by chance.
        let id = (u128::from(random.next_u64()) << 64) | number;
        let bytes = payload(id, *pick(&mut random, &[100, 5000, 20_000, 60_000]));
        put(&store, id, BlobKind::ALL[number as usize % 6], &bytes).await.expect("fits");
        blobs.insert(id, bytes);
        if random.one_in(3) {
            let victim = *blobs.keys().nth(random.below(blobs.len() as u64) as usize).expect("there is one");
            store.delete(vec![BlobId(victim)]).await.expect("deletes");
            blobs.remove(&victim);
        }
    }
    drop(store);
    handle.sleep(Duration::from_secs(1)).await;
    blobs
}

async fn read_disk(disk: &Rc<MemDisk>, handle: &Handle) -> Vec<u8> {
    let device = disk.open(handle);
    let mut image = Vec::new();
    while (image.len() as u64) < disk.size() {
        image.extend_from_slice(&device.read(image.len() as u64, 256 << 10).await.expect("reads"));
    }
    image
}

/// Every structure that begins with a magic.
fn structures(image: &[u8]) -> Vec<Found> {
    let mut found = Vec::new();
    for (offset, page) in (0..).step_by(PAGE).zip(image.chunks(PAGE)) {
        let Some(magic) = MAGICS.iter().position(|magic| page.starts_with(*magic)) else { continue };
        let length = if magic < 2 { PAGE } else { u32_at(page, BYTES_AT) as usize };
        let summary = if magic == 4 { (u32_at(page, SUMMARY_LENGTH_AT) as usize).next_multiple_of(PAGE) } else { 0 };
        let bytes = image[offset..offset + length].to_vec();
        found.push(Found { magic, offset: offset as u64, bytes, summary: image[offset - summary..offset].to_vec() });
    }
    found
}

impl Stores {
    pub fn new() -> Stores {
        let disk = MemDisk::new("fuzzed", AREA_BYTES + u64::from(ZONES) * u64::from(ZONE_BYTES), 4096, 1);
        let kept: Rc<RefCell<Filled>> = Rc::default();
        let (keep, filled) = (kept.clone(), disk.clone());
        let outcome = simulated(|handle| async move {
            let blobs = fill(filled.clone(), handle.clone()).await;
            *keep.borrow_mut() = (blobs, read_disk(&filled, &handle).await);
            Ok(Fed::Taken)
        });
        assert!(outcome.is_ok(), "the disk is filled: {:?}", outcome.err());
        let (blobs, image) = kept.take();
        let found = structures(&image);
        for (number, magic) in MAGICS.iter().enumerate() {
            let count = found.iter().filter(|found| found.magic == number).count();
            assert!(count > 1, "only {count} of {}", String::from_utf8_lossy(*magic));
        }
        assert!(found.iter().any(|found| !found.summary.is_empty()), "no zone has a summary");
        let donors = found.iter().map(|found| found.bytes.clone()).collect();
        Stores { disk, found, donors, blobs: Rc::new(blobs) }
    }

    /// One structure changed: what to write where.
    fn forge(&self, random: &mut SplitMix64) -> (&Found, Forged) {
        let magic = *pick(random, &[0, 1, 2, 3, 3, 3, 4, 4]);
        let of_kind: Vec<&Found> = self.found.iter().filter(|found| found.magic == magic).collect();
        let found = *pick(random, &of_kind);
        let (mut bytes, mut summary) = (found.bytes.clone(), found.summary.clone());
        let sealed = !random.one_in(4);
        if !summary.is_empty() && random.one_in(2) {
            mutate(random, &mut summary, 0, &self.donors, Length::Fixed);
            let length = u32_at(&bytes, SUMMARY_LENGTH_AT) as usize;
            let crc = crc32c(&summary[..length]);
            bytes[SUMMARY_CHECKSUM_AT..SUMMARY_CHECKSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
        } else {
            mutate(random, &mut bytes, STAMP_BYTES, &self.donors, Length::Fixed);
        }
        if sealed {
            seal(&mut bytes, CHECKSUM_AT, &[0; 4]);
        }
        let mut forged = vec![(found.offset, bytes.clone())];
        if !summary.is_empty() {
            forged.push((found.offset - summary.len() as u64, summary));
        }
        if magic == 0 && random.one_in(2) {
            // The other copy says the same.
            let others = self.found.iter().filter(|other| other.magic == magic && other.offset != found.offset);
            forged.extend(others.map(|other| (other.offset, bytes.clone())));
        }
        (found, forged)
    }
}

impl Target for Stores {
    fn round(&self, random: &mut SplitMix64, trial: &mut Trial) {
        for _ in 0..INPUTS_PER_ROUND {
            let (found, forged) = self.forge(random);
            let touched: Vec<&[u8]> =
                forged.iter().map(|(_, bytes)| &bytes[..]).chain([&found.bytes[..], &found.summary]).collect();
            let is_touched = |id: &u128| touched.iter().any(|bytes| holds(bytes, &id.to_le_bytes()));
            let doubtful: Vec<u128> = self.blobs.keys().copied().filter(is_touched).collect();
            let what = format!("{} at {:#x}", String::from_utf8_lossy(MAGICS[found.magic]), found.offset);
            let shown = forged.iter().flat_map(|(_, bytes)| bytes).copied().collect::<Vec<u8>>();
            trial.feed(&what, &shown, |_| {
                let (disk, blobs) = (self.disk.snapshot(), self.blobs.clone());
                simulated(|handle| open(handle, disk, forged, blobs, doubtful))
            });
        }
    }
}

fn holds(bytes: &[u8], id: &[u8; 16]) -> bool {
    // Ids lie at multiples of 8, but for what was moved.
    bytes.windows(id.len()).any(|window| window == id)
}

/// Opens the target, reads everything, writes something, and opens what that left. A blob whose
/// records were not touched has its old bytes or none.
async fn open(
    handle: Handle,
    disk: Rc<MemDisk>,
    forged: Forged,
    blobs: Rc<BTreeMap<u128, Bytes>>,
    doubtful: Vec<u128>,
) -> Result<Fed, String> {
    let device = disk.open(&handle);
    for (offset, bytes) in forged {
        let part = DmaBuf::copy_of(&bytes).freeze();
        device.write(offset, vec![part], Placement::Log, true).await.map_err(|error| error.to_string())?;
    }
    let _ = cfs_store::inspect(&*device).await;
    let mut fed = Fed::Refused;
    for opening in 0..2u128 {
        let Ok(store) = TargetStore::open(disk.open(&handle), &handle, None).await else { return Ok(fed) };
        fed = Fed::Taken;
        let listed: Vec<u128> =
            BlobKind::ALL.into_iter().flat_map(|kind| store.list(kind)).map(|info| info.id.0).collect();
        for id in listed.iter().chain(blobs.keys()) {
            let Some(info) = store.stat(BlobId(*id)) else { continue };
            let Ok(bytes) = store.get(BlobId(*id), 0, info.length).await else { continue };
            let wrong = blobs.get(id).is_some_and(|old| *old != bytes);
            if wrong && !doubtful.contains(id) {
                return Err(format!("blob {id:032x} reads as other bytes"));
            }
        }
        store.scrub(0..u32::MAX, &|| u64::MAX, &|_| {}).await;
        store.check_structures(0..u32::MAX, true, &|| u64::MAX, &|_| {}).await;
        let _ = store.space();
        let (id, bytes) = (0xF00D + opening, payload(opening, 9000));
        if put(&store, id, BlobKind::Data, &bytes).await.is_ok() {
            match store.get(BlobId(id), 0, bytes.len() as u32).await {
                Ok(read) if read == bytes => {}
                other => return Err(format!("what was just put reads as {other:?}")),
            }
            let _ = store.delete(vec![BlobId(id)]).await;
        }
        drop(store);
        handle.sleep(Duration::from_secs(1)).await;
    }
    Ok(fed)
}
