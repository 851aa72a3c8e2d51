use super::*;
use crate::layout::superblock::Identity;
use crate::{FormatOptions, ShardCursor, StoreError, TargetStore, format};
use bytes::Bytes;
use cfs_device::mem::MemDisk;
use cfs_reactor::Executor;
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_wire::blobs::{BlobError, BlobInfo, BlobKind, MirroredBlobs, Owner, ShardGeometry};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::data::{Claim, FetchCall, Location, Piece, ReserveCall, StoreCall};
use cfs_wire::limits::{CHUNK_BYTES, FETCH_PIECES_MAX};
use cfs_wire::{BlobId, ClusterId, DeviceId, Ino, NodeId, Policy, SessionId, TargetId, VolumeId};
use futures_util::FutureExt;
use std::ops::Range;

/// Registrations in a map: what the metadata shards do, without them.
#[derive(Default)]
struct MapRegistrar {
    map: RefCell<std::collections::BTreeMap<SegmentId, Registration>>,
}

impl Registrar for MapRegistrar {
    fn epoch(&self) -> Epoch {
        Epoch(1)
    }
    fn register(&self, registration: Registration) -> LocalBoxFuture<'_, Result<(), DataError>> {
        async move {
            self.map.borrow_mut().insert(registration.segment, registration);
            Ok(())
        }
        .boxed_local()
    }
    fn replace(&self, old: Registration, new: Registration) -> LocalBoxFuture<'_, Result<(), DataError>> {
        async move {
            let mut map = self.map.borrow_mut();
            if map.get(&old.segment) != Some(&old) {
                return Err(DataError::Gone);
            }
            map.insert(new.segment, new);
            Ok(())
        }
        .boxed_local()
    }
    fn deregister(&self, segment: SegmentId) -> LocalBoxFuture<'_, Result<(), DataError>> {
        async move {
            self.map.borrow_mut().remove(&segment);
            Ok(())
        }
        .boxed_local()
    }
    fn lookup(&self, segment: SegmentId) -> LocalBoxFuture<'_, Result<Option<Registration>, DataError>> {
        async move { Ok(self.map.borrow().get(&segment).cloned()) }.boxed_local()
    }
}

struct Bench {
    disks: Vec<Rc<MemDisk>>,
    pool: Rc<TargetPool>,
    store: Rc<SegmentStore>,
    registrar: Rc<MapRegistrar>,
    handle: Handle,
}

fn parameters() -> ClusterParameters {
    ClusterParameters {
        format: ClusterParameters::FORMAT,
        shards: 8,
        policy: Policy::new(2, 1).unwrap(),
        tolerated: 1,
        targets: 3,
        name_key: [5; 32],
    }
}

async fn open_target(handle: &Handle, disk: &Rc<MemDisk>) -> Rc<LocalTarget> {
    Rc::new(LocalTarget(TargetStore::open(disk.open(handle), handle, None).await.unwrap()))
}

async fn bench(handle: Handle, count: u32) -> Bench {
    bench_with(handle, count, SegmentConfig::default()).await
}

async fn bench_with(handle: Handle, count: u32, config: SegmentConfig) -> Bench {
    let pool = TargetPool::new(&handle);
    let mut disks = Vec::new();
    for index in 0..count {
        let disk = MemDisk::new(&format!("disk-{index}"), 64 << 20, 4096, u64::from(index) + 1);
        let identity = Identity {
            cluster: ClusterId(1),
            node: NodeId(0),
            target: TargetId(index),
            device: DeviceId(u128::from(index) + 100),
        };
        let device = disk.open(&handle);
        format(
            &*device,
            &FormatOptions { identity, parameters: parameters(), zone_bytes: Some(4 << 20), force: false },
        )
        .await
        .unwrap();
        pool.add(open_target(&handle, &disk).await);
        disks.push(disk);
    }
    let registrar = Rc::new(MapRegistrar::default());
    let store = SegmentStore::new(&handle, pool.clone(), registrar.clone(), config);
    // What a predecessor may have reserved is over.
    handle.sleep(2 * config.reservation_lifetime).await;
    Bench { disks, pool, store, registrar, handle }
}

fn run<T: 'static, F: Future<Output = T> + 'static>(seed: u64, body: impl FnOnce(Handle) -> F) -> T {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    executor.run_simulated(&handle, body(handle.clone())).unwrap().unwrap()
}

fn random_bytes(seed: u64, length: usize) -> Bytes {
    let mut random = SplitMix64::new(seed);
    Bytes::from((0..length).map(|_| random.next_u64() as u8).collect::<Vec<u8>>())
}

fn call(policy: &str) -> StoreCall {
    StoreCall {
        volume: VolumeId(1),
        ino: Ino::ROOT,
        policy: policy.parse::<Policy>().unwrap(),
        claim: Claim::default(),
    }
}

async fn read_all(bench: &Bench, pieces: &[Piece]) -> Result<Bytes, DataError> {
    bench.store.fetch(&FetchCall { pieces: pieces.to_vec() }).await
}

#[test]
fn any_m_lost_targets_leave_every_byte_readable_and_one_more_is_a_clear_error() {
    for (policy, targets, seed) in [("2+1", 3, 1), ("4+2", 6, 2), ("3x", 3, 3), ("2+2", 5, 4), ("32+8", 40, 5)] {
        run(seed, move |handle| async move {
            let bench = bench(handle, targets).await;
            let parity = call(policy).policy.parity();
            let mut stored = Vec::new();
            for length in [1, 4096, 65_536, 65_537, 1 << 20, (2 << 20) + 77, 4 << 20] {
                let bytes = random_bytes(length as u64, length);
                let reply = bench.store.store(&call(policy), bytes.clone()).await.unwrap();
                stored.push((bytes, reply.pieces));
            }
            for first in 0..targets {
                let lost: Vec<u32> = (0..parity as u32).map(|step| (first + step) % targets).collect();
                for index in &lost {
                    bench.pool.add_absent(TargetId(*index), "pulled out".into());
                }
                for (bytes, pieces) in &stored {
                    assert_eq!(read_all(&bench, pieces).await.as_ref(), Ok(bytes), "{policy}, lost {lost:?}");
                }
                let beyond = (first + parity as u32) % targets;
                bench.pool.add_absent(TargetId(beyond), "pulled out too".into());
                let unreadable = stored.iter().map(|(_, pieces)| read_all(&bench, pieces));
                let outcomes = futures_util::future::join_all(unreadable).await;
                for outcome in outcomes.iter().filter(|outcome| outcome.is_err()) {
                    assert!(matches!(outcome, Err(DataError::Unreadable(_))), "{policy}: {outcome:?}");
                }
                if usize::try_from(targets).unwrap() == call(policy).policy.total() {
                    assert!(outcomes.last().unwrap().is_err(), "{policy}: a full stripe cannot survive m+1 losses");
                }
                for index in lost.iter().chain([&beyond]) {
                    bench.pool.add(open_target(&bench.handle, &bench.disks[*index as usize]).await);
                }
            }
        });
    }
}

#[test]
fn a_write_with_a_target_down_keeps_m_and_below_m_plus_one_targets_it_waits() {
    run(5, |handle| async move {
        let bench = bench(handle, 3).await;
        let bytes = random_bytes(9, 1 << 20);
        bench.pool.add_absent(TargetId(2), "gone".into());
        let reply = bench.store.store(&call("2+1"), bytes.clone()).await.unwrap();
        let Location::Chunk { segment, .. } = reply.pieces[0].location else { panic!("a segment was expected") };
        let registration = bench.registrar.map.borrow()[&segment].clone();
        assert_eq!((registration.data, registration.parity), (1, 1));
        bench.pool.add_absent(TargetId(1), "gone".into());
        assert_eq!(read_all(&bench, &reply.pieces).await, Ok(bytes.clone()));
        let refused = bench.store.store(&call("2+1"), bytes).await;
        assert_eq!(refused, Err(DataError::TooFewTargets { up: 1, needed: 2 }));
    });
}

#[test]
fn a_target_that_fails_in_mid_write_is_replaced_by_another_and_nothing_is_less_redundant() {
    run(6, |handle| async move {
        let bench = bench(handle, 4).await;
        bench.disks[1].fail();
        let bytes = random_bytes(10, 3 << 20);
        let reply = bench.store.store(&call("2+1"), bytes.clone()).await.unwrap();
        assert_eq!(read_all(&bench, &reply.pieces).await, Ok(bytes.clone()));
        for registration in bench.registrar.map.borrow().values() {
            let mut targets: Vec<TargetId> = registration.shards.iter().map(|place| place.target).collect();
            assert!(!targets.contains(&TargetId(1)), "{registration:?}");
            targets.sort();
            targets.dedup();
            assert_eq!(targets.len(), registration.shards.len(), "one shard per target");
        }
        bench.pool.add_absent(TargetId(0), "gone".into());
        bench.pool.add_absent(TargetId(1), "gone".into());
        assert_eq!(read_all(&bench, &reply.pieces).await, Ok(bytes));
    });
}

#[test]
fn rotten_bytes_are_read_through_redundancy_and_repair_makes_them_sound() {
    run(7, |handle| async move {
        let bench = bench(handle, 3).await;
        let big = random_bytes(11, 1 << 20);
        let small = random_bytes(12, 5000);
        let big_pieces = bench.store.store(&call("2+1"), big.clone()).await.unwrap().pieces;
        let small_pieces = bench.store.store(&call("2+1"), small.clone()).await.unwrap().pieces;
        // Everything behind the first zone's own headers of one disk rots.
        bench.disks[0].corrupt(1 << 20, 60 << 20, 99);
        assert_eq!(read_all(&bench, &big_pieces).await, Ok(big.clone()));
        assert_eq!(read_all(&bench, &small_pieces).await, Ok(small.clone()));
        let registrations: Vec<Registration> = bench.registrar.map.borrow().values().cloned().collect();
        let mut rebuilt = 0;
        for registration in &registrations {
            rebuilt += bench.store.repair_segment(registration, true).await.unwrap().rebuilt;
        }
        assert_eq!(rebuilt, 1, "one shard of the one segment was on the rotten disk");
        for target in bench.pool.readable() {
            for info in target.list(BlobKind::Hot) {
                bench.store.repair_copies(&info, 0, true).await.unwrap();
            }
        }
        bench.pool.add_absent(TargetId(1), "gone".into());
        assert_eq!(read_all(&bench, &big_pieces).await, Ok(big));
        assert_eq!(read_all(&bench, &small_pieces).await, Ok(small));
    });
}

#[test]
fn parts_of_chunks_and_runs_across_chunks_and_segments_give_just_those_bytes() {
    run(8, |handle| async move {
        let bench = bench(handle, 3).await;
        let bytes = random_bytes(13, 3 << 20);
        let pieces = bench.store.store(&call("2+1"), bytes.clone()).await.unwrap().pieces;
        let mut random = SplitMix64::new(14);
        for _ in 0..200 {
            let start = random.below(bytes.len() as u64 - 1) as usize;
            let end = start + 1 + random.below((bytes.len() - start) as u64).min(400_000) as usize;
            let end = end.min(bytes.len());
            let mut wanted = Vec::new();
            let mut at = 0usize;
            for piece in &pieces {
                let (from, to) = (start.max(at), end.min(at + piece.length as usize));
                if from < to {
                    let location = piece.location.skip((from - at) as u32);
                    wanted.push(Piece { length: (to - from) as u32, location });
                }
                at += piece.length as usize;
            }
            assert_eq!(read_all(&bench, &wanted).await.as_deref(), Ok(&bytes[start..end]), "{start}..{end}");
        }
        let mut beyond = pieces[0].clone();
        beyond.length += 1;
        assert!(matches!(read_all(&bench, &[beyond]).await, Err(DataError::Malformed(_))));
    });
}

#[test]
fn a_fetch_of_too_many_pieces_or_of_an_empty_one_is_refused_before_anything_is_looked_up() {
    run(8, |handle| async move {
        let bench = bench(handle, 3).await;
        let bytes = random_bytes(15, 300 * 100);
        let small = bench.store.store(&call("2+1"), bytes.clone()).await.unwrap().pieces.remove(0);
        let piece = |at: u32, length| Piece { length, location: small.location.skip(at) };
        let most: Vec<Piece> = (0..FETCH_PIECES_MAX as u32).map(|index| piece(100 * index, 100)).collect();
        assert_eq!(read_all(&bench, &most).await.as_deref(), Ok(&bytes[..100 * FETCH_PIECES_MAX]));
        let more: Vec<Piece> = most.into_iter().chain([piece(0, 100)]).collect();
        let gone = Location::Hot { blob: BlobId(1), targets: Default::default(), offset: 0 };
        let empty = [Piece { length: 0, location: gone.clone() }, piece(0, 100)];
        for pieces in [&more[..], &empty] {
            assert!(matches!(read_all(&bench, pieces).await, Err(DataError::Malformed(_))));
        }
        assert_eq!(read_all(&bench, &[Piece { length: 1, location: gone }]).await, Err(DataError::Gone));
    });
}

#[test]
fn packed_chunks_of_any_length_come_back_each_by_its_own_piece() {
    run(9, |handle| async move {
        let bench = bench(handle, 3).await;
        let chunks: Vec<Bytes> =
            (0..40).map(|index| random_bytes(index, 1 + (index as usize * 7919) % 65_536)).collect();
        let reply = bench.store.store_chunks(&call("2+1"), chunks.clone()).await.unwrap();
        bench.pool.add_absent(TargetId(0), "gone".into());
        for (chunk, piece) in chunks.iter().zip(&reply.pieces) {
            assert_eq!(read_all(&bench, std::slice::from_ref(piece)).await.as_ref(), Ok(chunk));
        }
        let too_long = vec![random_bytes(1, cfs_wire::limits::CHUNK_BYTES + 1)];
        assert!(matches!(bench.store.store_chunks(&call("2+1"), too_long).await, Err(DataError::Malformed(_))));
    });
}

#[test]
fn mirrored_blobs_survive_a_lost_target_and_heal_onto_another() {
    run(10, |handle| async move {
        let bench = bench(handle.clone(), 3).await;
        let mirror = Mirror::new(&handle, bench.pool.clone(), 2);
        let payload = random_bytes(15, 100_000);
        let owner = Owner { high: 3, low: 4 };
        let id = mirror.put(BlobKind::Run, owner, payload.clone()).await.unwrap();
        let holders = |bench: &Bench| {
            let held = bench.pool.readable().into_iter().filter(|target| target.stat(id).is_some());
            held.map(|target| target.id()).collect::<Vec<_>>()
        };
        let before = holders(&bench);
        assert_eq!(before.len(), 2);
        bench.pool.add_absent(before[0], "gone".into());
        assert_eq!(mirror.get(id, 10, 50_000).await.as_deref(), Ok(&payload[10..50_010]));
        mirror.heal(id).await.unwrap();
        assert_eq!(holders(&bench).len(), 2);
        bench.pool.add_absent(before[1], "gone".into());
        assert_eq!(mirror.get(id, 0, 100_000).await, Ok(payload));
        assert_eq!(mirror.list(BlobKind::Run).await.unwrap().len(), 1);
        mirror.delete(vec![id]).await.unwrap();
        assert_eq!(mirror.list(BlobKind::Run).await.unwrap(), []);
    });
}

/// Stores so many small writes one after the other; which of them became hot blobs.
async fn small_writes(bench: &Bench, count: u64) -> Vec<bool> {
    let mut hot = Vec::new();
    for seed in 0..count {
        let bytes = random_bytes(seed, 5000);
        let reply = bench.store.store(&call("2x"), bytes.clone()).await.unwrap();
        assert_eq!(read_all(bench, &reply.pieces).await, Ok(bytes));
        hot.push(matches!(reply.pieces[0].location, Location::Hot { .. }));
    }
    hot
}

#[test]
fn hot_blobs_end_at_their_share_of_a_target_or_of_memory_and_begin_again_below_it() {
    // 5000 bytes take two pages at most; of 64 MiB one hundredth is 671,088 bytes.
    let share = SegmentConfig { hot_percent_max: 1, ..SegmentConfig::default() };
    let per_blob = crate::state::index_bytes(1, 5000);
    let memory = SegmentConfig { hot_index_bytes_max: 30 * per_blob, ..SegmentConfig::default() };
    let limits = [(share, 671_088_u64.div_ceil(5000 + 4096)), (memory, 30)];
    for (config, expected) in limits {
        run(11, move |handle| async move {
            let bench = bench_with(handle, 2, config).await;
            let hot = small_writes(&bench, 100).await;
            let (first, rest) = hot.split_at(expected as usize);
            assert!(first.iter().all(|hot| *hot), "{config:?}: {hot:?}");
            assert!(rest.iter().all(|hot| !*hot), "{config:?}: {hot:?}");
            assert!(bench.store.packer_called().now_or_never().is_some(), "the packer is called");
            assert!(bench.store.packer_called().now_or_never().is_none(), "once");
            let one = bench.pool.readable()[0].list(BlobKind::Hot)[0];
            for target in bench.pool.readable() {
                target.delete(vec![one.id]).await.unwrap();
            }
            assert_eq!(small_writes(&bench, 2).await, [true, false]);
        });
    }
    // The twin: by default 64 MiB have room for them all, and nobody calls the packer.
    run(12, |handle| async move {
        let bench = bench(handle, 2).await;
        assert!(small_writes(&bench, 100).await.into_iter().all(|hot| hot));
        assert!(bench.store.packer_called().now_or_never().is_none());
    });
}

/// Puts mirrored blobs of a kind until the targets are full.
async fn fill_mirror(mirror: &Mirror, kind: BlobKind, length: usize) -> Vec<BlobId> {
    let mut ids = Vec::new();
    loop {
        let owner = Owner { high: 1, low: ids.len() as u64 };
        match mirror.put(kind, owner, random_bytes(ids.len() as u64, length)).await {
            Ok(id) => ids.push(id),
            Err(BlobError::NoSpace { .. }) => return ids,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn mirrored_blobs_are_deleted_from_targets_that_are_full_to_the_last_put() {
    run(13, |handle| async move {
        let bench = bench(handle.clone(), 2).await;
        let mirror = Mirror::new(&handle, bench.pool.clone(), 2);
        // Everything ordinary, then what only metadata may take.
        let chunks = || vec![random_bytes(1, CHUNK_BYTES); 16];
        while bench.store.store_chunks(&call("2x"), chunks()).await.is_ok() {}
        let mut ids = fill_mirror(&mirror, BlobKind::Run, 200_000).await;
        ids.extend(fill_mirror(&mirror, BlobKind::Log, 3000).await);
        assert!(ids.len() > 50, "{} blobs", ids.len());
        // One at a time is the dearest way: each takes a page of what is kept for deletions.
        for id in &ids {
            mirror.delete(vec![*id]).await.unwrap();
            assert!(bench.pool.readable().iter().all(|target| target.stat(*id).is_none()), "{id}");
        }
        for index in 0..2 {
            bench.pool.add(open_target(&handle, &bench.disks[index]).await);
        }
        for kind in [BlobKind::Run, BlobKind::Log] {
            assert_eq!(mirror.list(kind).await.unwrap(), []);
        }
        let again = fill_mirror(&mirror, BlobKind::Run, 200_000).await;
        assert!(!again.is_empty(), "what was deleted is space again");
    });
}

/// A target that refuses some of what it is asked, and gives a reason of its own.
struct Unwilling {
    target: Rc<LocalTarget>,
    put: Option<StoreError>,
    delete: Option<StoreError>,
}

impl BlobTarget for Unwilling {
    fn id(&self) -> TargetId {
        self.target.id()
    }
    fn put(
        &self,
        id: BlobId,
        kind: BlobKind,
        owner: Owner,
        geometry: ShardGeometry,
        payload: Bytes,
    ) -> LocalBoxFuture<'_, Result<(), StoreError>> {
        match self.put.clone() {
            Some(refusal) => async { Err(refusal) }.boxed_local(),
            None => self.target.put(id, kind, owner, geometry, payload),
        }
    }
    fn get(&self, id: BlobId, offset: u32, length: u32) -> LocalBoxFuture<'_, Result<Bytes, StoreError>> {
        self.target.get(id, offset, length)
    }
    fn delete(&self, ids: Vec<BlobId>) -> LocalBoxFuture<'_, Result<(), StoreError>> {
        match self.delete.clone() {
            Some(refusal) => async { Err(refusal) }.boxed_local(),
            None => self.target.delete(ids),
        }
    }
    fn stat(&self, id: BlobId) -> Option<BlobInfo> {
        self.target.stat(id)
    }
    fn is_being_deleted(&self, id: BlobId) -> bool {
        self.target.is_being_deleted(id)
    }
    fn list(&self, kind: BlobKind) -> Vec<BlobInfo> {
        self.target.list(kind)
    }
    fn shards(&self, from: ShardCursor) -> (Vec<BlobInfo>, Option<ShardCursor>) {
        self.target.shards(from)
    }
    fn free(&self) -> u64 {
        self.target.free()
    }
    fn space(&self) -> crate::Space {
        self.target.space()
    }
    fn failure(&self) -> Option<String> {
        self.target.failure()
    }
    fn look_at_device(&self) {
        self.target.look_at_device();
    }
    fn take_damaged(&self) -> Vec<BlobInfo> {
        self.target.take_damaged()
    }
    fn scrub<'a>(
        &'a self,
        zones: Range<u32>,
        pace: &'a dyn Fn() -> u64,
        found: &'a dyn Fn(&BlobInfo),
    ) -> LocalBoxFuture<'a, ()> {
        self.target.scrub(zones, pace, found)
    }
    fn check_structures<'a>(
        &'a self,
        zones: Range<u32>,
        mend: bool,
        pace: &'a dyn Fn() -> u64,
        found: &'a dyn Fn(&crate::Flaw),
    ) -> LocalBoxFuture<'a, ()> {
        self.target.check_structures(zones, mend, pace, found)
    }
}

/// The twin: a deletion that a target refuses is not said to be done.
#[test]
fn a_mirrored_deletion_without_space_for_it_is_refused_and_goes_through_later() {
    run(14, |handle| async move {
        let bench = bench(handle.clone(), 2).await;
        let mirror = Mirror::new(&handle, bench.pool.clone(), 2);
        let target = open_target(&handle, &bench.disks[1]).await;
        // Its reserve for deletions is used up too.
        let refusal = StoreError::NoSpace { kind: BlobKind::Log, needed: 4096 };
        bench.pool.add(Rc::new(Unwilling { target: target.clone(), put: None, delete: Some(refusal) }));
        let id = mirror.put(BlobKind::Log, Owner { high: 0, low: 1 }, random_bytes(1, 5000)).await.unwrap();
        let refused = mirror.delete(vec![id]).await;
        assert_eq!(refused, Err(BlobError::NoSpace { kind: BlobKind::Log, needed: 4096 }));
        assert_eq!(mirror.list(BlobKind::Log).await.unwrap().len(), 1);
        bench.pool.add(target);
        mirror.delete(vec![id]).await.unwrap();
        assert_eq!(mirror.list(BlobKind::Log).await.unwrap(), []);
    });
}

/// What storing a log batch and a small write comes to when the third target takes them and the
/// first two answer so.
async fn refusals(handle: Handle, first: StoreError, second: StoreError) -> (BlobError, DataError) {
    let bench = bench(handle.clone(), 3).await;
    for (index, refusal) in [first, second].into_iter().enumerate() {
        let target = open_target(&handle, &bench.disks[index]).await;
        bench.pool.add(Rc::new(Unwilling { target, put: Some(refusal), delete: None }));
    }
    let mirror = Mirror::new(&handle, bench.pool.clone(), 2);
    let batch = mirror.put(BlobKind::Log, Owner { high: 0, low: 1 }, random_bytes(1, 5000)).await.unwrap_err();
    let write = bench.store.store(&call("2x"), random_bytes(2, 5000)).await.unwrap_err();
    (batch, write)
}

#[test]
fn copies_that_find_no_room_on_one_target_and_a_failing_device_on_another_may_be_tried_again() {
    let full = || StoreError::NoSpace { kind: BlobKind::Log, needed: 8192 };
    let failing = || {
        let device = "disk".to_owned();
        let (operation, detail) = ("write", "input/output error".to_owned());
        StoreError::Device(cfs_device::DeviceError::Io { device, operation, offset: 0, length: 4096, detail })
    };
    // Whichever of them was asked last.
    for seed in 40..50 {
        let (batch, write) = run(seed, move |handle| refusals(handle, full(), failing()));
        assert_eq!(batch, BlobError::NoSpace { kind: BlobKind::Log, needed: 5000 }, "seed {seed}");
        assert_eq!(write, DataError::NoSpace, "seed {seed}");
    }
    let (batch, write) = run(50, move |handle| refusals(handle, failing(), failing()));
    assert_eq!(batch, BlobError::TooFewTargets { up: 3, needed: 2 });
    assert!(batch.is_retryable());
    assert_eq!(write, DataError::TooFewTargets { up: 3, needed: 2 });
    // The twin: what trying again won't change is not to be tried again.
    let (batch, write) = run(51, move |handle| refusals(handle, StoreError::Closed, StoreError::Closed));
    assert!(matches!(batch, BlobError::Unreadable { .. }) && !batch.is_retryable(), "{batch}");
    assert!(matches!(write, DataError::Unreadable(_)), "{write}");
}

#[test]
fn what_reads_find_damaged_is_remembered_and_repaired_copies_stand_for_the_others() {
    run(60, |handle| async move {
        let bench = bench(handle.clone(), 2).await;
        let mirror = Mirror::new(&handle, bench.pool.clone(), 2);
        let (small, batch) = (random_bytes(1, 5000), random_bytes(2, 9000));
        let pieces = bench.store.store(&call("2x"), small.clone()).await.unwrap().pieces;
        let Location::Hot { blob, .. } = pieces[0].location else { panic!("a hot blob was expected") };
        let id = mirror.put(BlobKind::Log, Owner { high: 0, low: 1 }, batch.clone()).await.unwrap();
        // Asking for more than there is damages nothing.
        let beyond = Piece { length: 5001, ..pieces[0].clone() };
        assert!(matches!(read_all(&bench, &[beyond]).await, Err(DataError::Malformed(_))));
        assert_eq!(bench.pool.take_damaged().len(), 0);
        for disk in 0..2 {
            assert!(bench.disks[disk].corrupt_written(1000, 3) > 0);
            // The first target is asked first.
            let damaged = if disk == 0 { vec![Damaged::Copies(blob), Damaged::Copies(id)] } else { vec![] };
            assert_eq!(read_all(&bench, &pieces).await.as_ref(), Ok(&small), "disk {disk}");
            assert_eq!(mirror.get(id, 0, 9000).await.as_ref(), Ok(&batch), "disk {disk}");
            assert_eq!(bench.pool.take_damaged(), damaged.into_iter().collect(), "disk {disk}");
            for id in [blob, id] {
                let info = bench.pool.readable()[0].stat(id).unwrap();
                assert_eq!(bench.store.repair_copies(&info, 0, true).await.map(|repaired| repaired.rebuilt), Some(1));
            }
        }
    });
}

#[test]
fn a_copy_put_back_while_its_blob_is_being_deleted_does_not_outlive_it() {
    for (seed, deletes) in (70..80).flat_map(|seed| [(seed, true), (seed, false)]) {
        run(seed, move |handle| async move {
            let bench = bench(handle.clone(), 3).await;
            let mirror = Mirror::new(&handle, bench.pool.clone(), 2);
            let id = mirror.put(BlobKind::Log, Owner { high: 0, low: 1 }, random_bytes(1, 9000)).await.unwrap();
            let held = |target: &Rc<dyn BlobTarget>| target.stat(id).is_some();
            let (mut holders, others): (Vec<_>, Vec<_>) = bench.pool.readable().into_iter().partition(held);
            bench.pool.add_absent(holders.pop().unwrap().id(), "gone".into());
            let info = holders[0].stat(id).unwrap();
            let repair = bench.store.repair_copies(&info, 2, false);
            let ids = if deletes { vec![id] } else { vec![] };
            let (repaired, deleted) = futures_util::future::join(repair, mirror.delete(ids)).await;
            assert_eq!(deleted, Ok(()));
            assert_eq!(repaired.map(|repaired| repaired.rebuilt), Some(u64::from(!deletes)), "seed {seed}");
            for target in holders.iter().chain(&others) {
                assert_eq!(target.stat(id).is_some(), !deletes, "seed {seed}: on {}", target.id());
            }
        });
    }
}

/// What a future answers, and how often it was polled for that.
async fn polls_of<T>(future: impl Future<Output = T>) -> (T, usize) {
    let mut polls = 0;
    futures_util::pin_mut!(future);
    let answer = std::future::poll_fn(|context| {
        polls += 1;
        future.as_mut().poll(context)
    });
    (answer.await, polls)
}

/// The most that one poll may work on, and how many polls that makes of so much work.
fn polls_for(bytes: usize) -> usize {
    bytes / (256 << 10)
}

#[test]
fn coding_the_most_that_is_stored_at_once_takes_many_polls_and_gives_the_same_bytes() {
    run(60, |handle| async move {
        let bench = bench(handle, 3).await;
        let shards: Vec<Bytes> = (0..4).map(|seed| random_bytes(seed, (1 << 20) - 100 * seed as usize)).collect();
        let segments = shards.chunks(2).map(|data| bench.store.encode(2, 1, data));
        let (parity, polls) = polls_of(futures_util::future::try_join_all(segments)).await;
        assert!(polls >= polls_for(6 << 20), "{polls} polls");
        for (data, parity) in shards.chunks(2).zip(parity.unwrap()) {
            let mut whole = vec![0; data[0].len()];
            let codec = Erasure::new(Geometry::new(2, 1).unwrap());
            codec.encode(&[&data[0], &data[1]], &mut [&mut whole]).unwrap();
            assert_eq!(parity, [whole]);
        }
    });
}

#[test]
fn storing_and_fetching_the_most_at_once_takes_many_polls() {
    run(61, |handle| async move {
        let bench = bench(handle, 3).await;
        let bytes = random_bytes(61, 4 << 20);
        let (reply, polls) = polls_of(bench.store.store(&call("2+1"), bytes.clone())).await;
        // Coded, and the checksums of all shards.
        assert!(polls >= polls_for(12 << 20), "{polls} polls of store");
        let call = FetchCall { pieces: reply.unwrap().pieces };
        let (fetched, polls) = polls_of(bench.store.fetch(&call)).await;
        assert_eq!(fetched.unwrap(), bytes);
        // Verified, and copied together.
        assert!(polls >= polls_for(8 << 20), "{polls} polls of fetch");
        let Location::Chunk { segment, .. } = call.pieces[0].location else { panic!("a segment was expected") };
        let first = bench.store.describe(segment).await.unwrap().shards[0].target;
        bench.pool.add_absent(first, "lost".into());
        let (fetched, polls) = polls_of(bench.store.fetch(&call)).await;
        assert_eq!(fetched.unwrap(), bytes);
        // A shard is made of two others, which are verified in its place.
        assert!(polls >= polls_for(12 << 20), "{polls} polls of a degraded fetch");
    });
}

#[test]
fn a_put_is_under_way_from_the_first_moment_and_gives_its_space_back_when_nobody_waits() {
    run(62, |handle| async move {
        let bench = bench(handle.clone(), 3).await;
        let target = bench.pool.readable().remove(0);
        let put = |id: u128, seed| {
            let (target, payload) = (target.clone(), random_bytes(seed, 1 << 20));
            let owner = Owner { high: 1, low: 1 };
            async move { target.put(BlobId(id), BlobKind::Log, owner, ShardGeometry::NONE, payload).await }
        };
        // Its checksums take several polls.
        handle.yield_now().await;
        let before = target.free();
        let mut abandoned = Box::pin(put(1, 1));
        assert!(futures_util::poll!(&mut abandoned).is_pending());
        assert!(target.free() < before);
        drop(abandoned);
        assert_eq!((target.free(), target.stat(BlobId(1))), (before, None));
        assert_eq!(put(1, 2).await, Ok(()), "its id takes other bytes");

        handle.yield_now().await;
        let mut waiting = Box::pin(put(2, 3));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        let (put, deleted) = futures_util::future::join(waiting, target.delete(vec![BlobId(2)])).await;
        assert_eq!((put, deleted), (Ok(()), Ok(())));
        assert_eq!(target.stat(BlobId(2)), None, "who deletes what is being put waits for it");
    });
}

#[test]
fn a_segment_is_coded_by_the_back_end_that_was_chosen() {
    run(63, |handle| async move {
        for backend in Backend::available() {
            let bench = bench_with(handle.clone(), 3, SegmentConfig { backend, ..SegmentConfig::default() }).await;
            assert_eq!(bench.store.codec(2, 1).unwrap().backend(), backend);
        }
    });
}

/// Stores bytes of random lengths until they are refused again and again.
async fn fill_with<F: Future<Output = bool>>(random: &mut SplitMix64, store: impl Fn(usize) -> F) {
    let mut refused = 0;
    while refused < 20 {
        let most = 1 << (10 + random.below(11));
        let length = 1 + random.below(most) as usize;
        refused = if store(length).await { 0 } else { refused + 1 };
    }
}

/// Reserves room, fills the targets with what has no reservation, and stores as much as a client would
/// keep of what it has reserved; how much of that found room, and of how much.
async fn filled(handle: Handle, policy: &str, targets: u32, seed: u64, reserves: bool) -> (u64, u64) {
    let bench = bench(handle, targets).await;
    let session = SessionId(7);
    let ask = |number, wanted| {
        let held = if number == 1 { 0 } else { 1 << 40 };
        ReserveCall { session, number, policy: call(policy).policy, held, wanted }
    };
    let granted = (1..10).map(|number| bench.store.reserve(&ask(number, 1 << 40)).granted).sum();
    assert_eq!(bench.store.reserved_bytes(), granted);
    if !reserves {
        bench.store.reserve(&ReserveCall { held: 0, ..ask(10, 0) });
    }
    let mut random = SplitMix64::new(seed);
    let stored = async |claim, length: usize| {
        let call = StoreCall { claim, ..call(policy) };
        bench.store.store(&call, random_bytes(length as u64, length)).await
    };
    fill_with(&mut random, |length| async move { stored(Claim::default(), length).await.is_ok() }).await;
    let chunks = |length: usize| vec![random_bytes(1, length.min(CHUNK_BYTES))];
    let call = call(policy);
    let mover = async |length| bench.store.store_chunks(&call, chunks(length)).await;
    fill_with(&mut random, |length| async move { mover(length).await.is_ok() }).await;
    let (mut charged, mut kept, mut found) = (0, 0, 0);
    loop {
        let most = 1 << (10 + random.below(9));
        let length = 1 + random.below(most);
        // As a client counts.
        charged += length + length / 16 + (17 << 10);
        if charged > granted {
            return (found, kept);
        }
        kept += length;
        let claim = Claim { session, reserved: length, answered: true };
        match stored(claim, length as usize).await {
            Ok(_) => found += length,
            Err(error) => assert_eq!(error, DataError::NoSpace),
        }
    }
}

#[test]
fn what_is_reserved_is_there_when_all_the_rest_is_full() {
    for (policy, targets) in [("2+1", 3), ("2+1", 5), ("2x", 3), ("4+2", 6), ("4+2", 9)] {
        for seed in 80..84 {
            let (found, kept) = run(seed, move |handle| filled(handle, policy, targets, seed, true));
            assert!(kept > 300_000, "{policy}: {kept} bytes are a test of nothing");
            assert_eq!(found, kept, "{policy} on {targets}, seed {seed}");
        }
        let (found, kept) = run(80, move |handle| filled(handle, policy, targets, 80, false));
        assert!(found < kept / 2, "{policy} on {targets}: {found} of {kept} found room that was not reserved");
    }
}

#[test]
fn a_server_that_starts_on_full_targets_lets_writes_wait_until_it_knows_what_was_reserved() {
    run(85, |handle| async move {
        let bench = bench(handle.clone(), 3).await;
        let store = |store: &Rc<SegmentStore>, claim, length| {
            let store = store.clone();
            async move { store.store(&StoreCall { claim, ..call("2+1") }, random_bytes(1, length)).await }
        };
        while store(&bench.store, Claim::default(), 1 << 20).await.is_ok() {}
        let config = SegmentConfig::default();
        let started = SegmentStore::new(&handle, bench.pool.clone(), bench.registrar.clone(), config);
        assert_eq!(store(&started, Claim::default(), 5000).await, Err(DataError::Starting));
        let answered = Claim { session: SessionId(1), reserved: 5000, answered: true };
        assert!(store(&started, answered, 5000).await.is_ok());
        assert!(store(&started, Claim::default(), 2 << 20).await.is_err_and(|error| error == DataError::NoSpace));
        handle.sleep(2 * config.reservation_lifetime).await;
        assert!(store(&started, Claim::default(), 5000).await.is_ok());
    });
}
