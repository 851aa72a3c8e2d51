//! Valid bytes: what a small cluster sent and stored while its client did one of everything.

use crate::world::{SERVER, Shape, World};
use bytes::{Buf, Bytes};
use cfs_api::AdminCall;
use cfs_client::{Caller, Client, NewFile, OpenFlags};
use cfs_fabric::{Address, Connection, Fabric, FabricError, Listener, Message, Service};
use cfs_meta::service::applied::decode_entry;
use cfs_meta::state::{self, LogEntry, MemoryState};
use cfs_reactor::clock::SimClock;
use cfs_reactor::{Executor, Handle};
use cfs_store::segment::Mirror;
use cfs_wire::blobs::{BlobInfo, BlobKind, MirroredBlobs};
use cfs_wire::data::Referent;
use cfs_wire::meta::{AttrChanges, FileKind, LockFamily, LockKind, LockRange, ShardOp, ShardReply};
use cfs_wire::{Epoch, Errno, RequestId, SessionId, ShardId, Timestamp};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

const SEED: u64 = 7;
/// Of a batch of the Raft log, and of a record in it.
const BATCH_HEADER_BYTES: usize = 64;
const RECORD_BYTES: usize = 32;
/// In a record.
const LENGTH_AT: usize = 4;
const INDEX_AT: usize = 24;
const KIND_ENTRY: u8 = 1;
const PAYLOAD_PROPOSAL: u8 = 1;
const OPCODE_BYTES: usize = 2;

/// What was recorded.
pub struct Recorded {
    /// Requests and their replies.
    pub calls: Vec<(Message, Message)>,
    /// The batches of the Raft log.
    pub log: Vec<(BlobInfo, Bytes)>,
    /// What was proposed in them, in the order of each shard.
    pub entries: Vec<(ShardId, Bytes)>,
    /// What the superblocks say of the cluster.
    pub parameters: Bytes,
}

/// Runs the cluster.
pub fn recorded() -> Recorded {
    let executor = Executor::new(Rc::new(SimClock::new(SEED)));
    let handle = executor.domain();
    let story = story(handle.clone());
    executor.run_simulated(&handle, story).expect("the cluster goes on").expect("the story ends")
}

/// A fabric on which every call is written down.
struct Tapped {
    fabric: Rc<dyn Fabric>,
    calls: Calls,
}

struct TappedConnection {
    connection: Rc<dyn Connection>,
    calls: Calls,
}

type Calls = Rc<RefCell<Vec<(Message, Message)>>>;

impl Fabric for Tapped {
    fn listen(&self, address: &Address, service: Rc<dyn Service>) -> Result<Box<dyn Listener>, FabricError> {
        self.fabric.listen(address, service)
    }

    fn connect(&self, address: &Address) -> LocalBoxFuture<'_, Result<Rc<dyn Connection>, FabricError>> {
        let address = address.clone();
        Box::pin(async move {
            let connection = self.fabric.connect(&address).await?;
            Ok(Rc::new(TappedConnection { connection, calls: self.calls.clone() }) as Rc<dyn Connection>)
        })
    }
}

impl Connection for TappedConnection {
    fn call(&self, request: Message) -> LocalBoxFuture<'_, Result<Message, FabricError>> {
        Box::pin(async move {
            let reply = self.connection.call(request.clone()).await?;
            self.calls.borrow_mut().push((request, reply.clone()));
            Ok(reply)
        })
    }

    fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    fn peer_address(&self) -> Address {
        self.connection.peer_address()
    }

    fn carrier(&self) -> String {
        self.connection.carrier()
    }
}

async fn story(handle: Handle) -> Recorded {
    let world = World::new(&handle, Shape::default(), SEED);
    world.format().await.expect("formats");
    world.start_server().await.expect("starts");
    let calls = Calls::default();
    let fabric: Rc<dyn Fabric> =
        Rc::new(Tapped { fabric: world.network.endpoint("client", &handle), calls: calls.clone() });
    let (config, server) = (world.shape.tuning.client("client"), Address(SERVER.to_owned()));
    let client = Client::connect(&handle, fabric.clone(), &server, config).await.expect("mounts");
    use_files(&client).await.expect("everything that is asked for is possible");
    let connection = fabric.connect(&server).await.expect("connects");
    ask_admin(&*connection).await;
    client.shutdown().await.expect("unmounts");
    let mirror = Mirror::new(&handle, world.node().pool().clone(), 2);
    let mut log = Vec::new();
    for info in mirror.list(BlobKind::Log).await.expect("lists") {
        log.push((info, mirror.get(info.id, 0, info.length).await.expect("reads")));
    }
    // What is copied to the end of the log is there twice.
    let entries: BTreeMap<(ShardId, u64), Bytes> = log.iter().flat_map(|(_, batch)| proposals(batch)).collect();
    let entries = entries.into_iter().map(|((shard, _), entry)| (shard, entry)).collect();
    let parameters = world.node().parameters().encode().into();
    world.stop_server().await;
    Recorded { calls: calls.take(), log, entries, parameters }
}

/// The proposals in a batch of the Raft log, by shard and index, as docs/on-disk.md draws it.
fn proposals(batch: &Bytes) -> Vec<((ShardId, u64), Bytes)> {
    let mut rest = batch.slice(BATCH_HEADER_BYTES..);
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (mut fields, shard) = (&rest[..RECORD_BYTES], ShardId(u16::from_le_bytes([rest[2], rest[3]])));
        fields.advance(LENGTH_AT);
        let length = fields.get_u32_le() as usize;
        fields.advance(INDEX_AT - LENGTH_AT - 4);
        let payload = rest.slice(RECORD_BYTES..RECORD_BYTES + length);
        if rest[0] == KIND_ENTRY && payload.first() == Some(&PAYLOAD_PROPOSAL) {
            found.push(((shard, fields.get_u64_le()), payload.slice(1..)));
        }
        rest = rest.slice(RECORD_BYTES + length..);
    }
    found
}

/// The golden bytes of all bodies, with an opcode in front or without: also of those that a cluster
/// of one node never sends.
pub fn golden() -> Vec<Vec<u8>> {
    let files = [
        include_str!("../../../../control/api/tests/golden/admin.txt"),
        include_str!("../../../../control/consensus/tests/golden/rpc.txt"),
        include_str!("../../../../control/meta/tests/golden/entries.txt"),
        include_str!("../../../../control/meta/tests/golden/peers.txt"),
        include_str!("../../../../dataplane/wire/tests/golden/data.txt"),
        include_str!("../../../../dataplane/wire/tests/golden/ops.txt"),
        include_str!("../../../../dataplane/wire/tests/golden/replies.txt"),
        include_str!("../../../../dataplane/wire/tests/golden/shard.txt"),
    ];
    let lines = files.iter().flat_map(|file| file.lines()).filter_map(|line| line.split_once(' '));
    let bodies = lines.map(|(name, hex)| {
        let byte = |at: usize| hex.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        let bytes: Option<Vec<u8>> = (0..hex.len()).step_by(2).map(byte).collect();
        bytes.unwrap_or_else(|| panic!("the golden bytes of {name} are no bytes"))
    });
    bodies.flat_map(|body| [body.get(OPCODE_BYTES..).unwrap_or_default().to_vec(), body]).collect()
}

/// A shard as one entry of its log left it.
pub struct Step {
    pub shard: ShardId,
    pub entry: LogEntry,
    pub state: MemoryState,
}

/// Every state that the recorded shards went through, then some that a longer life would bring.
pub fn steps() -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for (shard, entry) in recorded().entries {
        let (_, entry) = decode_entry(&entry).expect("what was proposed is read");
        step(&mut steps, shard, entry);
    }
    let shards: BTreeSet<ShardId> = steps.iter().map(|step| step.shard).collect();
    for shard in shards {
        for op in collection(&steps, shard) {
            step(&mut steps, shard, LogEntry::Shard { op, now: Timestamp::default() });
        }
        let holder = RequestId { session: SessionId(1), sequence: 1 };
        step(&mut steps, shard, LogEntry::TakeRenameLock { holder, steal: false });
        step(&mut steps, shard, LogEntry::Fence { session: holder.session });
        step(&mut steps, shard, LogEntry::Dispossess { session: holder.session });
    }
    steps
}

fn step(steps: &mut Vec<Step>, shard: ShardId, entry: LogEntry) {
    let last = steps.iter().rev().find(|step| step.shard == shard);
    let mut state = last.map_or_else(MemoryState::default, |step| step.state.clone());
    let applied = state::apply(&state, shard, &entry).now_or_never().expect("a state in memory never waits");
    let outcome = applied.expect("what was applied once is applied again");
    state.write(&outcome);
    steps.push(Step { shard, entry, state });
}

/// What the collector asks of a shard for everything that the shard released or has registered.
fn collection(steps: &[Step], shard: ShardId) -> Vec<ShardOp> {
    let state = steps.iter().rev().find(|step| step.shard == shard).map(|step| &step.state).expect("it has a state");
    let ask = |op: &ShardOp| state::read_shard(state, shard, op).now_or_never();
    let max = 10;
    let Some(Ok(Some(ShardReply::Released(released)))) = ask(&ShardOp::ListReleased { max }) else { return Vec::new() };
    let registered = ask(&ShardOp::ListRegistrations { after: None, max });
    let Some(Ok(Some(ShardReply::Registrations { list, .. }))) = registered else { return Vec::new() };
    let referents: Vec<Referent> = released.into_iter().map(|(referent, _)| referent).collect();
    let slots = list.iter().map(|(registration, _)| (registration.segment, 0)).collect();
    vec![
        ShardOp::Freeze { referents: referents.clone(), epoch: Epoch(5) },
        ShardOp::MarkDead { slots },
        ShardOp::Thaw { referents: referents.iter().take(1).copied().collect() },
        ShardOp::Resolve { referents },
        ShardOp::AdvanceEpoch { minimum: Epoch(3), after: None },
    ]
}

/// One of everything that a program can ask for.
async fn use_files(client: &Rc<Client>) -> Result<(), Errno> {
    let caller = Caller::default();
    let root = client.root();
    let new = NewFile::regular(0o644, 0o022);
    let dir = client.mkdir(caller, root, b"directory", 0o755, 0).await?.attr.ino;
    let other = client.mkdir(caller, root, b"other", 0o700, 0).await?.attr.ino;
    let mut inos = Vec::new();
    // Inline, one segment, several.
    for (name, length) in [(&b"small"[..], 700), (b"middle", 60_000), (b"large", 1_500_000)] {
        let (entry, file) = client.create(caller, dir, name, new, OpenFlags::default()).await?;
        let bytes: Bytes = (0..length).map(|byte: u32| (byte % 251) as u8).collect();
        for (at, part) in (0u64..).step_by(128 << 10).zip(bytes.chunks(128 << 10)) {
            client.write(&file, at, Bytes::copy_from_slice(part), false).await?;
        }
        client.fsync(&file, false).await?;
        client.release(&file);
        let file = client.open(entry.attr.ino, OpenFlags::default(), false).await?;
        client.read(&file, 100, 5000).await?;
        client.fallocate(&file, 3, 4096, 8192, false).await?;
        client.flush(&file).await?;
        client.release(&file);
        inos.push(entry.attr.ino);
    }
    let (ino, large) = (inos[0], inos[2]);
    client.symlink(caller, dir, b"symlink", b"small/or/not").await?;
    client.mknod(caller, dir, b"pipe", NewFile { kind: FileKind::Fifo, ..new }).await?;
    client.link(ino, other, b"second name").await?;
    client.setxattr(ino, b"user.color", b"blue", 0).await?;
    client.getxattr(ino, b"user.color").await?;
    client.listxattr(ino).await?;
    client.setattr(large, AttrChanges { size: Some(9_000), mode: Some(0o600), ..AttrChanges::default() }).await?;
    let (family, kind) = (LockFamily::Posix, LockKind::Write);
    let lock = LockRange { family, kind, start: 10, end: u64::MAX, owner: 3, pid: 4 };
    client.setlk(ino, lock).await?;
    client.getlk(ino, LockRange { owner: 9, ..lock }).await?;
    client.unlock(ino, lock).await?;
    client.rename(dir, b"middle", other, b"moved", 0).await?;
    client.rename(dir, b"symlink", other, b"moved", 2).await?;
    client.opendir(dir).await?;
    client.readdir(dir, 0, 100, true).await?;
    client.statfs_counted().await?;
    client.unlink(other, b"second name").await?;
    client.unlink(dir, b"large").await?;
    assert_eq!(client.rmdir(root, b"other").await, Err(Errno::ENOTEMPTY));
    client.syncfs().await
}

async fn ask_admin(connection: &dyn Connection) {
    let path = || b"/directory/small".to_vec();
    let calls = [
        AdminCall::Status,
        AdminCall::Targets,
        AdminCall::Shards,
        AdminCall::Df,
        AdminCall::Stat { path: path() },
        AdminCall::Extents { path: b"/other/moved".to_vec() },
        AdminCall::PolicySet { path: b"/other".to_vec(), policy: Some("2x".to_owned()) },
        AdminCall::PolicyShow { path: path() },
        AdminCall::CheckPoll,
    ];
    for call in calls {
        // Refusals are bodies too.
        let _ = cfs_api::client::call(connection, &call).await;
    }
}
