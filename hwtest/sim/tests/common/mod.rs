//! What the stories of a simulated cluster share: a run under a seed, a formatted cluster that
//! serves, whole files.
#![allow(dead_code, reason = "no test uses all of it")]

use bytes::Bytes;
use cfs_client::{Caller, Client, NewFile, OpenFile, OpenFlags};
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_reactor::{Executor, Handle};
use cfs_sim::world::{Shape, Started, World};
use cfs_wire::{Errno, Ino};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

/// What one write call of a program brings.
const WRITE_BYTES: usize = 128 << 10;

/// Runs a story to its end; its outcome.
pub fn simulated<T: 'static, F: Future<Output = T> + 'static>(seed: u64, body: impl FnOnce(Handle) -> F) -> T {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    executor.run_simulated(&handle, body(handle.clone())).expect("it goes on").expect("it ends")
}

pub fn pattern(seed: u64, length: usize) -> Bytes {
    let mut random = SplitMix64::new(seed);
    (0..length.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes()).take(length).collect()
}

pub async fn cluster(handle: &Handle, shape: Shape, seed: u64) -> Rc<World> {
    let world = World::new(handle, shape, seed);
    world.format().await.unwrap();
    assert_eq!(world.start_server().await.unwrap(), Started::Serving);
    world
}

/// Makes a file with these bytes and syncs it.
pub async fn write_file(client: &Rc<Client>, dir: Ino, name: &[u8], bytes: &Bytes) -> Ino {
    let new = NewFile::regular(0o644, 0o022);
    let (entry, file) = client.create(Caller::default(), dir, name, new, OpenFlags::default()).await.unwrap();
    for (index, part) in bytes.chunks(WRITE_BYTES).enumerate() {
        let offset = (index * WRITE_BYTES) as u64;
        let written = client.write(&file, offset, Bytes::copy_from_slice(part), false).await.unwrap();
        assert_eq!(written as usize, part.len());
    }
    client.fsync(&file, false).await.unwrap();
    client.release(&file);
    entry.attr.ino
}

/// Creates a file and writes to it until the file system is full or `most` bytes are in.
pub async fn fill(client: &Rc<Client>, name: &str, most: usize) -> (Rc<OpenFile>, bool) {
    let new = NewFile::regular(0o644, 0o022);
    let root = client.root();
    let created = client.create(Caller::default(), root, name.as_bytes(), new, OpenFlags::default()).await;
    let (_, file) = created.expect("a file is created");
    let piece = Bytes::from(vec![7; most.min(256 << 10)]);
    let mut offset = 0;
    while offset < most {
        match client.write(&file, offset as u64, piece.clone(), false).await {
            Ok(written) => offset += written as usize,
            Err(Errno::ENOSPC) => return (file, true),
            Err(error) => panic!("{name}: {error}"),
        }
    }
    match client.fsync(&file, false).await {
        Ok(()) => (file, false),
        Err(Errno::ENOSPC) => (file, true),
        Err(error) => panic!("{name}: {error}"),
    }
}

/// A whole file, looked up by its name.
pub async fn read_file(client: &Rc<Client>, dir: Ino, name: &[u8]) -> Result<Vec<u8>, Errno> {
    let ino = client.lookup(dir, name).await.expect("the name is there").attr.ino;
    let file = client.open(ino, OpenFlags::default(), false).await?;
    let mut bytes = Vec::new();
    let outcome = loop {
        match client.read(&file, bytes.len() as u64, 256 << 10).await {
            Ok(part) if part.is_empty() => break Ok(bytes),
            Ok(part) => bytes.extend_from_slice(&part),
            Err(error) => break Err(error),
        }
    };
    client.release(&file);
    outcome
}

/// Some that go to segments, some to replicated blobs.
pub const LENGTHS: [usize; 6] = [900_000, 20_000, 300_000, 30_000, 2_000_000, 5000];

fn content(length: usize) -> Bytes {
    pattern(length as u64, length)
}

/// A file of this length, called by it.
pub async fn write_length(client: &Rc<Client>, length: usize) {
    write_file(client, client.root(), length.to_string().as_bytes(), &content(length)).await;
}

/// A cluster with a file of each length.
pub async fn filled_cluster(handle: &Handle, shape: Shape, seed: u64) -> Rc<World> {
    let world = cluster(handle, shape, seed).await;
    let writer = world.mount("writer").await.unwrap();
    for length in LENGTHS {
        write_length(&writer.client, length).await;
    }
    writer.kill();
    world
}

/// Reads every one of them.
pub async fn expect_files(world: &World, context: &str) {
    let reader = world.mount("reader").await.unwrap();
    let client = &reader.client;
    for length in LENGTHS {
        let bytes = read_file(client, client.root(), length.to_string().as_bytes()).await;
        let bytes = bytes.unwrap_or_else(|error| panic!("{context}: file {length}: {error:?}"));
        assert!(bytes == content(length), "{context}: file {length} has other bytes");
    }
    reader.kill();
}

/// Waits until nothing is being rebuilt and no replacement lacks anything.
pub async fn refilled(world: &World) {
    for _ in 0..600 {
        let progress = world.node().movers().rebuild.progress();
        if !progress.running && progress.refilling.is_empty() && progress.phase == "done" {
            return;
        }
        world.handle.sleep(Duration::from_secs(1)).await;
    }
    panic!("it is not refilled after ten minutes: {:?}", world.node().movers().rebuild.progress());
}

/// How much has less redundancy than it was promised; nothing may be wrong.
pub async fn degraded(world: &World) -> u64 {
    let report = world.node().check(false, true).await;
    assert_eq!(report.problems, Vec::<String>::new());
    report.degraded
}
