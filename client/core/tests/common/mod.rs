//! One server for these tests: the real metadata state and service without Raft (entries are
//! applied directly), and a data plane that is a map. What it stored survives its death.
#![allow(dead_code, reason = "each test file uses its part")]

use bytes::Bytes;
use cfs_client::{Caller, Client, ClientConfig, NewFile, OpenFile, OpenFlags};
use cfs_fabric::mem::MemNetwork;
use cfs_fabric::{Address, Fabric, Listener, Message, Peer, Service};
use cfs_meta::service::applied::decode_entry;
use cfs_meta::service::{Applied, MetaService, NoPeers, ProposeError, Proposer, ServiceConfig, ShardHandle};
use cfs_meta::state::{self, Init, LogEntry, MemoryState, Reader};
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_reactor::sync::{Notify, Semaphore};
use cfs_reactor::{Executor, Handle};
use cfs_store::segment::{Reservable, Reservations};
use cfs_wire::data::{
    DataError, FetchCall, Location, OP_FETCH, OP_RESERVE, OP_STORE, Piece, ReserveCall, StoreCall, StoreReply,
};
use cfs_wire::limits::CHUNK_BYTES;
use cfs_wire::meta::{
    FileWrite, MetaCall, MetaError, MetaOp, MetaResult, MountReply, MountResult, OP_META, OP_MOUNT, ShardOp,
};
use cfs_wire::{BlobId, Epoch, Ino, NodeId, Policy, SessionId, ShardId, VolumeId, body};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

pub const SHARDS: u16 = 2;
const RESERVABLE_MOST: u64 = 1 << 30;

/// Runs a story on virtual time; a failure names its seed.
pub fn simulate<F: Future<Output = ()> + 'static>(seed: u64, story: impl FnOnce(Rc<Server>) -> F) {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    let run = story(Server::new(&handle, seed));
    executor.run_simulated(&handle, run).unwrap_or_else(|error| panic!("seed {seed}: {error}")).unwrap();
}

/// Seeds from `first` on: a few by default, CFS_SEEDS of them when that is set.
pub fn seeds(first: u64, count: u64) -> std::ops::Range<u64> {
    let count = std::env::var("CFS_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(count);
    first..first + count
}

struct Replica {
    state: RefCell<Rc<MemoryState>>,
    turn: Rc<Semaphore>,
}

/// What survives the node.
pub struct Disk {
    shards: BTreeMap<ShardId, Replica>,
    blobs: RefCell<BTreeMap<u128, Bytes>>,
    pub entries: Cell<u64>,
    /// So many further commits are answered with StaleReference.
    pub stale_commits: Cell<u32>,
    /// So many further commits are answered with Busy.
    pub busy_commits: Cell<u32>,
    /// While it is there, commits that come are held, until it is notified.
    pub held_commits: RefCell<Option<Rc<Notify>>>,
    /// So many further fetches are answered with Gone.
    pub gone_fetches: Cell<u32>,
    /// Bytes that may still be stored.
    pub room: Cell<u64>,
    /// How long a change may take to be applied.
    pub proposal_micros_max: Cell<u64>,
    /// Calls seen, by what they were.
    pub stores: Cell<u32>,
    pub reserves: Cell<u32>,
    pub fetches: Cell<u32>,
    pub reads: Cell<u32>,
    pub changes: Cell<u32>,
    /// Commits, and those of them that say nothing but which bytes.
    pub commits: Cell<u32>,
    pub commits_of_bytes: Cell<u32>,
}

pub struct Server {
    pub handle: Handle,
    pub network: Rc<MemNetwork>,
    pub disk: Rc<Disk>,
    pub seed: u64,
    pub config: RefCell<ServiceConfig>,
    node: RefCell<Option<(Handle, Box<dyn Listener>)>>,
    /// Of the node that was started last.
    meta: RefCell<Option<MetaService>>,
}

pub const ROOT: Ino = Ino::ROOT;

pub async fn create(client: &Rc<Client>, name: &str) -> Rc<OpenFile> {
    let new = NewFile::regular(0o644, 0o022);
    client.create(Caller::default(), ROOT, name.as_bytes(), new, OpenFlags::default()).await.unwrap().1
}

pub async fn open(client: &Rc<Client>, name: &str) -> Rc<OpenFile> {
    let entry = client.lookup(ROOT, name.as_bytes()).await.unwrap();
    client.open(entry.attr.ino, OpenFlags::default(), false).await.unwrap()
}

/// Cuts a client off until it is fenced because another one, which is answered, wrote "!" to a file at
/// offset 4; then it hears of that.
pub async fn fenced_by_a_writer(server: &Rc<Server>, cut_off: &str, name: &str) -> (Rc<Client>, Rc<OpenFile>) {
    server.network.partition(cut_off, "server", true);
    // Longer than the session's lease, which the server then ends for another client.
    server.sleep(40_000).await;
    let other = server.client("b").await;
    let theirs = open(&other, name).await;
    write(&other, &theirs, 4, b"!").await;
    other.fsync(&theirs, false).await.unwrap();
    server.network.heal();
    server.sleep(10_000).await;
    (other, theirs)
}

pub async fn write(client: &Rc<Client>, file: &OpenFile, offset: u64, data: &[u8]) {
    let written = client.write(file, offset, Bytes::copy_from_slice(data), false).await.unwrap();
    assert_eq!(written as usize, data.len());
}

pub async fn read(client: &Rc<Client>, file: &OpenFile, offset: u64, length: u32) -> Vec<u8> {
    client.read(file, offset, length).await.unwrap().to_vec()
}

pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut random = SplitMix64::new(seed);
    (0..length).map(|_| random.next_u64() as u8).collect()
}

pub fn address() -> Address {
    Address("server".to_owned())
}

impl Server {
    pub fn new(handle: &Handle, seed: u64) -> Rc<Server> {
        let replica = |shard| (ShardId(shard), Replica { state: RefCell::default(), turn: Semaphore::new(1) });
        let disk = Disk {
            shards: (0..SHARDS).map(replica).collect(),
            blobs: RefCell::default(),
            entries: Cell::new(0),
            stale_commits: Cell::new(0),
            busy_commits: Cell::new(0),
            held_commits: RefCell::new(None),
            gone_fetches: Cell::new(0),
            room: Cell::new(1 << 39),
            proposal_micros_max: Cell::new(500),
            stores: Cell::new(0),
            reserves: Cell::new(0),
            fetches: Cell::new(0),
            reads: Cell::new(0),
            changes: Cell::new(0),
            commits: Cell::new(0),
            commits_of_bytes: Cell::new(0),
        };
        Rc::new(Server {
            handle: handle.clone(),
            network: MemNetwork::new(seed),
            disk: Rc::new(disk),
            seed,
            config: RefCell::new(ServiceConfig::default()),
            node: RefCell::new(None),
            meta: RefCell::new(None),
        })
    }

    /// Initialises the shards and starts the node.
    pub async fn start(&self) {
        self.format().await;
        self.restart();
    }

    pub async fn format(&self) {
        let init = Init {
            shards: SHARDS,
            volume: VolumeId(1),
            root: Ino::ROOT,
            root_mode: 0o755,
            root_uid: 0,
            root_gid: 0,
            policy: Policy::new(1, 0).unwrap(),
            tolerated: 1,
            targets: 3,
            name_key: [7; 32],
            feature_level: state::entry::FEATURE_LEVEL,
            now: self.handle.wall(),
        };
        for (id, replica) in &self.disk.shards {
            replica.apply(*id, &LogEntry::Init(init.clone())).await;
        }
    }

    /// Lets the shards refuse references handed out before that epoch, as those of all stores here.
    pub async fn advance_epoch(&self, minimum: Epoch) {
        for (id, replica) in &self.disk.shards {
            replica
                .apply(
                    *id,
                    &LogEntry::Shard { op: ShardOp::AdvanceEpoch { minimum, after: None }, now: self.handle.wall() },
                )
                .await;
        }
    }

    pub fn restart(&self) {
        self.kill();
        let handle = self.handle.new_domain();
        let endpoint = self.endpoint(&handle);
        let listener = self.network.endpoint("server", &handle).listen(&address(), endpoint).unwrap();
        *self.node.borrow_mut() = Some((handle, listener));
    }

    /// A node on the disk, for whatever fabric.
    pub fn endpoint(&self, handle: &Handle) -> Rc<dyn Service> {
        let proposer = LocalProposer { handle: handle.clone(), disk: self.disk.clone(), applied: RefCell::default() };
        let mut shards = Vec::new();
        for shard in self.disk.shards.keys().copied() {
            let (disk, applied) = (self.disk.clone(), Applied::new());
            proposer.applied.borrow_mut().insert(shard, applied.clone());
            let view = Rc::new(move || disk.shards[&shard].state.borrow().clone() as Rc<dyn Reader>);
            shards.push(ShardHandle { shard, view, applied });
        }
        let config = self.config.borrow().clone();
        let config_lease = config.session_lease;
        let lease_ms = config_lease.as_millis() as u32;
        let disk = self.disk.clone();
        let space = Rc::new(move || (1 << 40, disk.room.get()));
        let meta = MetaService::new(handle, NodeId(1), shards, Rc::new(proposer), Rc::new(NoPeers), config, space);
        *self.meta.borrow_mut() = Some(meta.clone());
        let reservations = RefCell::new(Reservations::new(handle.now(), config_lease));
        Rc::new(Endpoint { handle: handle.clone(), disk: self.disk.clone(), meta, lease_ms, reservations })
    }

    pub fn kill(&self) {
        let node = self.node.borrow_mut().take();
        if let Some((handle, listener)) = node {
            handle.kill();
            drop(listener);
            self.network.reset("server");
        }
    }

    /// Fences a client though it lives.
    pub async fn fence(&self, client: &str) {
        let meta = self.meta.borrow().clone().expect("the node runs");
        meta.fence_client(client).await.unwrap();
    }

    /// A client on a node of its own.
    pub async fn client(&self, name: &str) -> Rc<Client> {
        self.client_with(name, ClientConfig::default()).await
    }

    pub async fn client_with(&self, name: &str, config: ClientConfig) -> Rc<Client> {
        let config = ClientConfig { name: name.to_owned(), ..config };
        let fabric = self.network.endpoint(name, &self.handle);
        Client::connect(&self.handle, fabric, &address(), config).await.unwrap()
    }

    pub async fn sleep(&self, millis: u64) {
        self.handle.sleep(Duration::from_millis(millis)).await;
    }
}

impl Replica {
    async fn apply(&self, shard: ShardId, entry: &LogEntry) -> state::Outcome {
        let view = self.state.borrow().clone();
        let outcome = state::apply(&*view, shard, entry).await.expect("a sound state");
        drop(view);
        Rc::make_mut(&mut *self.state.borrow_mut()).write(&outcome);
        outcome
    }
}

struct Endpoint {
    handle: Handle,
    disk: Rc<Disk>,
    meta: MetaService,
    lease_ms: u32,
    reservations: RefCell<Reservations>,
}

impl Service for Endpoint {
    fn handle(&self, _peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        async move {
            match request.opcode {
                OP_MOUNT => {
                    let session = SessionId(self.handle.random_u64());
                    let (volume, root, lease_ms) = (VolumeId(1), Ino::ROOT, self.lease_ms);
                    answer::<MountReply, MetaError>(MountResult::Ok(MountReply {
                        volume,
                        root,
                        shards: SHARDS,
                        lease_ms,
                        session,
                        policy: Policy::new(1, 0).unwrap(),
                    }))
                }
                OP_STORE => answer(self.store(request)),
                OP_RESERVE => {
                    self.disk.reserves.set(self.disk.reserves.get() + 1);
                    let call: ReserveCall = body::decode(&request.body).unwrap();
                    let room = Reservable { rooms: vec![self.disk.room.get()], most: RESERVABLE_MOST };
                    let reply = self.reservations.borrow_mut().reserve(self.handle.now(), &call, &room);
                    answer::<_, DataError>(Ok(reply))
                }
                OP_FETCH => {
                    let outcome = self.fetch(&request);
                    let bulk = outcome.clone().unwrap_or_default();
                    Message { bulk, ..answer(outcome.map(|_| ())) }
                }
                OP_META => {
                    let call: MetaCall = body::decode(&request.body).unwrap();
                    let count = if call.op.is_read() { &self.disk.reads } else { &self.disk.changes };
                    count.set(count.get() + 1);
                    if let MetaOp::Commit(commit) = &call.op {
                        let is_bytes =
                            |write: &FileWrite| matches!(write, FileWrite::Data { .. } | FileWrite::Inline { .. });
                        let bytes_alone = commit.writes.iter().all(is_bytes);
                        self.disk.commits.set(self.disk.commits.get() + 1);
                        self.disk.commits_of_bytes.set(self.disk.commits_of_bytes.get() + u32::from(bytes_alone));
                    }
                    let stale = self.disk.stale_commits.get();
                    if stale > 0 && matches!(call.op, MetaOp::Commit(_)) {
                        self.disk.stale_commits.set(stale - 1);
                        return answer(MetaResult::Err(MetaError::StaleReference));
                    }
                    let held = self.disk.held_commits.borrow().as_ref().map(|held| held.notified());
                    if let Some(held) = held.filter(|_| matches!(call.op, MetaOp::Commit(_))) {
                        held.await;
                    }
                    let busy = self.disk.busy_commits.get();
                    if busy > 0 && matches!(call.op, MetaOp::Commit(_)) {
                        self.disk.busy_commits.set(busy - 1);
                        return answer(MetaResult::Err(MetaError::Busy("a test".to_owned())));
                    }
                    MetaService::handle(&self.meta, request).await
                }
                _ => MetaService::handle(&self.meta, request).await,
            }
        }
        .boxed_local()
    }
}

fn answer<T: serde::Serialize, E: serde::Serialize>(result: Result<T, E>) -> Message {
    Message { opcode: 0, body: body::encode(&result).unwrap(), bulk: Bytes::new() }
}

impl Endpoint {
    fn store(&self, request: Message) -> Result<StoreReply, DataError> {
        let call: StoreCall = body::decode(&request.body).unwrap();
        self.disk.stores.set(self.disk.stores.get() + 1);
        let room = self.disk.room.get().checked_sub(request.bulk.len() as u64).ok_or(DataError::NoSpace)?;
        let mut reservations = self.reservations.borrow_mut();
        let kept = reservations.kept_from(self.handle.now(), &call.claim, RESERVABLE_MOST);
        if room < kept.known {
            return Err(DataError::NoSpace);
        }
        if room < kept.known + kept.unknown {
            return Err(DataError::Starting);
        }
        reservations.used(&call.claim);
        self.disk.room.set(room);
        let mut pieces = Vec::new();
        let mut rest = request.bulk;
        while !rest.is_empty() {
            let chunk = rest.split_to(rest.len().min(CHUNK_BYTES));
            let blob = self.handle.random_u128();
            let location = Location::Hot { blob: BlobId(blob), targets: Default::default(), offset: 0 };
            pieces.push(Piece { length: chunk.len() as u32, location });
            self.disk.blobs.borrow_mut().insert(blob, chunk);
        }
        Ok(StoreReply { epoch: Epoch(1), pieces })
    }

    fn fetch(&self, request: &Message) -> Result<Bytes, DataError> {
        let call: FetchCall = body::decode(&request.body).unwrap();
        self.disk.fetches.set(self.disk.fetches.get() + 1);
        let gone = self.disk.gone_fetches.get();
        if gone > 0 {
            self.disk.gone_fetches.set(gone - 1);
            return Err(DataError::Gone);
        }
        let mut bulk = Vec::new();
        for piece in &call.pieces {
            let Location::Hot { blob, offset, .. } = &piece.location else { return Err(DataError::Gone) };
            let blobs = self.disk.blobs.borrow();
            let blob = blobs.get(&blob.0).ok_or(DataError::Gone)?;
            bulk.extend_from_slice(&blob[*offset as usize..*offset as usize + piece.length as usize]);
        }
        Ok(bulk.into())
    }
}

struct LocalProposer {
    handle: Handle,
    disk: Rc<Disk>,
    applied: RefCell<BTreeMap<ShardId, Rc<Applied>>>,
}

impl Proposer for LocalProposer {
    fn propose(&self, shard: ShardId, bytes: Bytes) -> LocalBoxFuture<'_, Result<Bytes, ProposeError>> {
        async move {
            let replica = self.disk.shards.get(&shard).ok_or(ProposeError::NotLeader { hint: None })?;
            let _turn = replica.turn.acquire(1).await;
            self.handle
                .sleep(Duration::from_micros(self.handle.random_u64() % self.disk.proposal_micros_max.get()))
                .await;
            let (nonce, entry) = decode_entry(&bytes).expect("the service's own encoding");
            let outcome = replica.apply(shard, &entry).await;
            self.disk.entries.set(self.disk.entries.get() + 1);
            let applied = self.applied.borrow()[&shard].clone();
            applied.publish(nonce, outcome);
            Ok(Bytes::new())
        }
        .boxed_local()
    }

    fn read_barrier(&self, _shard: ShardId) -> LocalBoxFuture<'_, Result<(), ProposeError>> {
        async { Ok(()) }.boxed_local()
    }

    fn leads(&self, _shard: ShardId) -> Option<u64> {
        Some(1)
    }
}
