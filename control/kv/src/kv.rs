//! The store of one group: its state and its verbs.

use crate::MARK_BYTES_MAX;
use crate::batch::Batch;
use crate::config::{KvConfig, KvStats};
use crate::error::KvError;
use crate::memtable::{Memtable, Readers};
use crate::parts::SPLIT_BYTES_MIN;
use crate::recovery::{Chosen, Inventory};
use crate::restore::Restore;
use crate::table::{Table, TableReader};
use crate::trash::Trash;
use crate::version::{self, LEVELS_MAX, Run, Version, is_run};
use crate::view::{KvSnapshot, Scan, View, get_from_memtables, get_from_runs};
use crate::writer::Sink;
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_reactor::sync::{Notify, Semaphore};
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobError, MirroredBlobs};
use cfs_wire::limits::BLOB_BYTES_MAX;
use std::cell::{Cell, RefCell};
use std::ops::Bound;
use std::rc::Rc;
use std::time::Duration;

/// The ordered store of one Raft group. Dropping it stops its background work; before opening
/// the same group again in one process, `close` it or kill its domain.
pub struct Kv {
    inner: Rc<Inner>,
}

pub(crate) struct State {
    pub active: Rc<Memtable>,
    /// Being written into runs, oldest first.
    pub frozen: Vec<Rc<Memtable>>,
    pub version: Rc<Version>,
    /// Mark and sequence of the durable manifest.
    pub synced: Bytes,
    pub synced_sequence: u64,
    /// Of the last batch.
    pub sequence: u64,
    pub applied: Bytes,
    /// Counts restores: work begun before one is void after it.
    pub generation: u64,
    pub next_run: u64,
    /// The blobs of the durable manifest, a root before its parts; none before the first.
    pub manifest: Vec<BlobId>,
    /// Of the last manifest put, answered or not.
    pub manifest_version: u64,
    /// Whether this opening has put its first manifest.
    pub announced: bool,
    /// For each level, the highest key last merged out of it.
    pub merged_to: [Bytes; LEVELS_MAX],
    pub checkpoints: u64,
    pub edits: u64,
    pub written_bytes: u64,
}

pub(crate) struct Inner {
    pub group: u64,
    pub config: KvConfig,
    pub handle: Handle,
    pub blobs: Rc<dyn MirroredBlobs>,
    pub reader: Rc<TableReader>,
    pub trash: Rc<Trash>,
    readers: Rc<Readers>,
    pub state: RefCell<State>,
    /// Held by the one checkpoint or restore under way.
    pub flush_turn: Rc<Semaphore>,
    /// Held while a manifest is put.
    pub manifest_turn: Rc<Semaphore>,
    pub compacting: Cell<bool>,
    pub closed: Cell<bool>,
    /// After every change of the durable state and at the end of background work.
    pub changed: Rc<Notify>,
}

impl Kv {
    /// Opens the group's newest complete state, or an empty store.
    ///
    /// The host must check that its log reaches down to [`Kv::applied`] and give the replica up
    /// if not: when more targets are lost than the mirror covers, an older state may be all that
    /// is left, and only the log knows what was cut.
    ///
    /// # Errors
    /// [`KvError::Manifest`] when the state that is on the targets can't be used; a retryable
    /// error when targets are away.
    pub async fn open(
        blobs: Rc<dyn MirroredBlobs>,
        handle: &Handle,
        group: u64,
        config: KvConfig,
    ) -> Result<Rc<Kv>, KvError> {
        let inventory = Inventory::load(&*blobs).await?;
        Kv::open_listed(blobs, handle, group, config, &inventory).await
    }

    /// As [`Kv::open`], from a list of blobs that was taken once for many groups.
    pub async fn open_listed(
        blobs: Rc<dyn MirroredBlobs>,
        handle: &Handle,
        group: u64,
        config: KvConfig,
        inventory: &Inventory,
    ) -> Result<Rc<Kv>, KvError> {
        let mut chosen = inventory.of(group).choose(&*blobs, group).await?;
        let mut unhealed = Vec::new();
        for id in &chosen.manifest {
            // Its put may never have been answered; from now on it is what the log is cut by. Where full
            // targets have no room for its copies it is as good as one that lost a target.
            match blobs.heal(*id).await {
                Err(error) if error.is_retryable() => {
                    tracing::warn!(group, manifest = %id, %error, "a manifest of the ordered store lacks a copy");
                    unhealed.push(*id);
                }
                outcome => outcome?,
            }
        }
        let leftovers = std::mem::take(&mut chosen.leftovers);
        let inner = Inner::new(blobs, handle, group, config, chosen)?;
        if unhealed.is_empty() {
            inner.trash.add(leftovers);
        } else {
            handle.spawn(inner.clone().heal(unhealed, leftovers));
        }
        inner.nudge_compaction();
        Ok(Rc::new(Kv { inner }))
    }

    /// The mark of the last batch written; empty before the first.
    pub fn applied(&self) -> Bytes {
        self.inner.state.borrow().applied.clone()
    }

    /// The mark up to which everything is durable: the log may be cut below it.
    pub fn synced(&self) -> Bytes {
        self.inner.state.borrow().synced.clone()
    }

    pub async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, KvError> {
        let version = {
            let state = self.inner.state.borrow();
            if let Some(found) = get_from_memtables(state.memtables(), state.sequence, key) {
                return Ok(found);
            }
            state.version.clone()
        };
        get_from_runs(&self.inner.reader, &version, key).await
    }

    /// The entries of a range as of now; later writes do not show.
    pub fn scan(&self, range: (Bound<Bytes>, Bound<Bytes>)) -> Scan {
        Scan::new(&self.inner.view(), range)
    }

    /// The whole store as of now.
    pub fn snapshot(&self) -> KvSnapshot {
        KvSnapshot::new(self.inner.view())
    }

    /// Applies a batch and its mark atomically, in memory; durable by the next checkpoint.
    ///
    /// # Panics
    /// When the mark exceeds [`MARK_BYTES_MAX`].
    pub fn write(&self, batch: Batch, applied: Bytes) {
        assert!(applied.len() <= MARK_BYTES_MAX, "a mark of {} bytes", applied.len());
        let mut state = self.inner.state.borrow_mut();
        state.sequence += 1;
        state.applied = applied.clone();
        state.active.write(batch, state.sequence, applied, &self.inner.readers);
    }

    /// Whether it is time to call `checkpoint`.
    pub fn should_checkpoint(&self) -> bool {
        let state = self.inner.state.borrow();
        let due = state.active.bytes() >= self.inner.config.memtable_bytes_max || !state.frozen.is_empty();
        due && !self.inner.is_flushing()
    }

    /// Waits until a write keeps memory and reads bounded: while the memtable is full and the one
    /// before it is still being written out, and while merging is far behind. Does the checkpoint
    /// itself when it is overdue (also after one failed) and nobody else does.
    ///
    /// # Errors
    /// Those of that checkpoint. After a retryable one ask again a little later.
    pub async fn admit(&self) -> Result<(), KvError> {
        loop {
            let changed = self.inner.changed.notified();
            self.inner.check_open()?;
            let limit = self.inner.config.memtable_bytes_max;
            let (bytes, pending, behind) = {
                let state = self.inner.state.borrow();
                let behind = state.version.recent.len() >= self.inner.config.recent_runs_stop;
                (state.active.bytes(), !state.frozen.is_empty(), behind && self.inner.compacting.get())
            };
            let full = bytes >= if pending { limit } else { 2 * limit };
            if full && !self.inner.is_flushing() {
                self.checkpoint().await?;
            } else if full || behind {
                changed.await;
            } else {
                return Ok(());
            }
        }
    }

    /// Makes every batch written so far durable and answers the mark that is synced now. Batches
    /// written meanwhile go on into a new memtable. Goes on when the caller is dropped.
    ///
    /// # Errors
    /// Nothing is lost by an error: the batches stay in memory and the next checkpoint tries again.
    pub async fn checkpoint(&self) -> Result<Bytes, KvError> {
        let inner = self.inner.clone();
        self.inner.handle.spawn(async move { inner.checkpoint().await }).await.map_err(|_| KvError::Closed)?
    }

    /// Starts replacing everything.
    pub fn begin_restore(&self) -> Restore {
        Restore::new(self.inner.clone())
    }

    /// Waits until no merge and no deletion is under way.
    pub async fn settle(&self) {
        self.inner.settle().await;
    }

    /// Stops background work and waits for it. What was not checkpointed is in the log.
    pub async fn close(&self) {
        self.inner.close();
        let _flush = self.inner.flush_turn.acquire(1).await;
        self.inner.settle().await;
        let _manifest = self.inner.manifest_turn.acquire(1).await;
    }

    pub fn stats(&self) -> KvStats {
        let state = self.inner.state.borrow();
        let tables = state.version.tables();
        KvStats {
            entries: tables.map(|table| u64::from(table.shape.entries)).sum::<u64>()
                + state.memtables().map(|memtable| memtable.len() as u64).sum::<u64>(),
            tables: state.version.tables().count(),
            manifest_blobs: state.manifest.len(),
            recent_runs: state.version.recent.len(),
            level_bytes: state.version.levels.iter().map(|run| version::bytes(run)).collect(),
            run_bytes: state.version.runs().map(|run| version::bytes(run)).sum(),
            memtable_bytes: state.memtables().map(|memtable| memtable.bytes()).sum(),
            frozen_memtables: state.frozen.len(),
            checkpoints: state.checkpoints,
            compactions: state.edits,
            written_bytes: state.written_bytes,
        }
    }
}

impl Drop for Kv {
    fn drop(&mut self) {
        self.inner.close();
    }
}

impl State {
    fn new(chosen: &Chosen, version: Version) -> State {
        let header = &chosen.header;
        State {
            active: Memtable::new(header.sequence, header.applied.clone()),
            frozen: Vec::new(),
            version: Rc::new(version),
            synced: header.applied.clone(),
            synced_sequence: header.sequence,
            sequence: header.sequence,
            applied: header.applied.clone(),
            generation: 0,
            next_run: header.next_run,
            manifest: chosen.manifest.clone(),
            manifest_version: ((chosen.version_seen_max >> 32) + 1) << 32,
            announced: false,
            merged_to: Default::default(),
            checkpoints: 0,
            edits: 0,
            written_bytes: 0,
        }
    }

    /// Newest first.
    fn memtables(&self) -> impl Iterator<Item = &Rc<Memtable>> {
        std::iter::once(&self.active).chain(self.frozen.iter().rev())
    }
}

/// Until the copies that an opening found no room for are tried again.
const HEAL_AGAIN: Duration = Duration::from_secs(1);

impl Inner {
    /// Gives parts of the manifest the copies that the opening found no room for. What the manifest
    /// before it names goes only then: until then that is the one that survives the loss of targets.
    async fn heal(self: Rc<Self>, mut parts: Vec<BlobId>, leftovers: Vec<BlobId>) {
        while !parts.is_empty() && !self.closed.get() {
            self.handle.sleep(HEAL_AGAIN).await;
            let mut left = Vec::new();
            for id in parts {
                match self.blobs.heal(id).await {
                    Err(error) if error.is_retryable() => left.push(id),
                    // Replaced meanwhile.
                    Ok(()) | Err(BlobError::NotFound(_)) => {}
                    Err(error) => tracing::error!(%error, "a manifest of the ordered store lacks a copy"),
                }
            }
            parts = left;
        }
        if parts.is_empty() {
            self.trash.add(leftovers);
        }
    }

    fn new(
        blobs: Rc<dyn MirroredBlobs>,
        handle: &Handle,
        group: u64,
        mut config: KvConfig,
        chosen: Chosen,
    ) -> Result<Rc<Inner>, KvError> {
        config.table_bytes_max = config.table_bytes_max.min(BLOB_BYTES_MAX);
        config.manifest_blob_bytes_max = config.manifest_blob_bytes_max.clamp(SPLIT_BYTES_MIN, BLOB_BYTES_MAX);
        let trash = Trash::new(blobs.clone(), handle.clone());
        let version = load_version(group, &chosen, &trash)?;
        let cache = config.cache.clone();
        let reader = TableReader { blobs: blobs.clone(), cache, handle: handle.clone(), group };
        let state = State::new(&chosen, version);
        Ok(Rc::new(Inner {
            group,
            config,
            handle: handle.clone(),
            blobs,
            reader: Rc::new(reader),
            trash,
            readers: Rc::default(),
            state: RefCell::new(state),
            flush_turn: Semaphore::new(1),
            manifest_turn: Semaphore::new(1),
            compacting: Cell::new(false),
            closed: Cell::new(false),
            changed: Notify::new(),
        }))
    }

    pub fn check_open(&self) -> Result<(), KvError> {
        if self.closed.get() { Err(KvError::Closed) } else { Ok(()) }
    }

    fn is_flushing(&self) -> bool {
        self.flush_turn.available() == 0
    }

    fn view(&self) -> Rc<View> {
        let state = self.state.borrow();
        View::new(
            self.reader.clone(),
            state.memtables().cloned().collect(),
            state.version.clone(),
            state.sequence,
            state.applied.clone(),
            self.readers.clone(),
        )
    }

    pub fn sink(&self) -> Sink {
        Sink {
            blobs: self.blobs.clone(),
            handle: self.handle.clone(),
            trash: self.trash.clone(),
            group: self.group,
            block_bytes: self.config.block_bytes,
            table_bytes_max: self.config.table_bytes_max,
        }
    }

    pub fn take_run_number(&self) -> u64 {
        let mut state = self.state.borrow_mut();
        state.next_run += 1;
        state.next_run - 1
    }

    async fn settle(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.compacting.get() {
                break;
            }
            changed.await;
        }
        self.trash.settle().await;
    }

    fn close(&self) {
        self.closed.set(true);
        self.trash.close();
        self.changed.notify_all();
    }
}

/// The version the chosen manifest lists.
fn load_version(group: u64, chosen: &Chosen, trash: &Rc<Trash>) -> Result<Version, KvError> {
    let overlap = || KvError::Manifest {
        group,
        blob: chosen.manifest.first().copied().unwrap_or_default(),
        version: chosen.header.version,
        reason: "tables of one run overlap".to_string(),
    };
    let mut version = Version::default();
    for (level, tables) in &chosen.runs {
        let tables = tables.iter().map(|(id, shape)| Table::new(*id, shape.clone(), false, trash.clone()));
        let run: Run = tables.collect();
        if run.is_empty() || !is_run(&run) {
            return Err(overlap());
        }
        match usize::from(*level) {
            0 => version.recent.push(run),
            level => {
                while version.levels.len() < level {
                    version.levels.push(Run::new());
                }
                if !std::mem::replace(&mut version.levels[level - 1], run).is_empty() {
                    return Err(overlap());
                }
            }
        }
    }
    Ok(version)
}
