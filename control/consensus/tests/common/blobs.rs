//! The mirrored store's double. The medium outlives the node; its steps can be counted and cut.

use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_wire::blobs::{BlobError, BlobInfo, BlobKind, MirroredBlobs, Owner, ShardGeometry};
use cfs_wire::ids::BlobId;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

#[derive(Clone)]
pub enum Content {
    Good(Bytes),
    /// Every copy fails its checksum.
    Damaged(u32),
}

/// What a put that is cut in the middle leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Torn {
    Nothing,
    Damaged,
    Whole,
}

pub struct Medium {
    pub blobs: RefCell<BTreeMap<BlobId, (Owner, Content)>>,
    next: Cell<u128>,
    /// Steps taken: each put and each delete is one.
    pub steps: Cell<u64>,
    halt_at: Cell<Option<u64>>,
    pub torn: Cell<Torn>,
    pub halted: Rc<cfs_reactor::sync::Notify>,
    is_halted: Cell<bool>,
    /// Deletions find no space.
    pub refuses_deletes: Cell<bool>,
    /// Copies find no room.
    pub refuses_heals: Cell<bool>,
    pub puts: Cell<u64>,
    pub heals: RefCell<Vec<BlobId>>,
}

impl Medium {
    pub fn new() -> Rc<Medium> {
        Rc::new(Medium {
            blobs: RefCell::default(),
            next: Cell::new(1),
            steps: Cell::new(0),
            halt_at: Cell::new(None),
            torn: Cell::new(Torn::Nothing),
            halted: cfs_reactor::sync::Notify::new(),
            is_halted: Cell::new(false),
            refuses_deletes: Cell::new(false),
            refuses_heals: Cell::new(false),
            puts: Cell::new(0),
            heals: RefCell::default(),
        })
    }

    /// At step `at` (counted from now) the power goes.
    pub fn halt_at(&self, at: Option<u64>, torn: Torn) {
        self.steps.set(0);
        self.halt_at.set(at);
        self.torn.set(torn);
        self.is_halted.set(false);
    }

    pub fn open(self: &Rc<Self>, handle: &Handle) -> Rc<MemBlobs> {
        Rc::new(MemBlobs { medium: self.clone(), handle: handle.clone() })
    }

    /// The log's batches: sequence, blob.
    pub fn batches(&self) -> Vec<(u64, BlobId)> {
        let mut all: Vec<_> = self.blobs.borrow().iter().map(|(id, (owner, _))| (owner.low, *id)).collect();
        all.sort();
        all
    }

    pub fn batch(&self, sequence: u64) -> BlobId {
        self.batches().into_iter().find(|(at, _)| *at == sequence).expect("the batch exists").1
    }

    pub fn damage(&self, id: BlobId) {
        let mut blobs = self.blobs.borrow_mut();
        let (_, content) = blobs.get_mut(&id).expect("the blob exists");
        if let Content::Good(bytes) = content {
            *content = Content::Damaged(bytes.len() as u32);
        }
    }

    /// True when this step is where the power goes, or it went before.
    fn step(&self) -> bool {
        if self.is_halted.get() {
            return true;
        }
        self.steps.set(self.steps.get() + 1);
        if self.halt_at.get() == Some(self.steps.get()) {
            self.is_halted.set(true);
            self.halted.notify_all();
            return true;
        }
        false
    }

    fn add(&self, owner: Owner, content: Content) -> BlobId {
        // Ids in an order unlike that of the puts: nobody may rely on it.
        let number = self.next.get();
        self.next.set(number + 1);
        let id = BlobId(number.wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835));
        self.blobs.borrow_mut().insert(id, (owner, content));
        id
    }
}

pub struct MemBlobs {
    medium: Rc<Medium>,
    handle: Handle,
}

impl MirroredBlobs for MemBlobs {
    fn put(&self, kind: BlobKind, owner: Owner, payload: Bytes) -> LocalBoxFuture<'_, Result<BlobId, BlobError>> {
        assert_eq!(kind, BlobKind::Log);
        assert!(payload.len() <= 1 << 20, "a blob of {} bytes", payload.len());
        async move {
            let fresh = !self.medium.is_halted.get();
            if self.medium.step() {
                if fresh {
                    match self.medium.torn.get() {
                        Torn::Nothing => {}
                        Torn::Damaged => drop(self.medium.add(owner, Content::Damaged(payload.len() as u32))),
                        Torn::Whole => drop(self.medium.add(owner, Content::Good(payload))),
                    }
                }
                return std::future::pending().await;
            }
            // Puts overtake each other.
            self.handle.sleep(Duration::from_micros(50 + self.handle.random_u64() % 200)).await;
            if self.medium.is_halted.get() {
                return std::future::pending().await;
            }
            self.medium.puts.set(self.medium.puts.get() + 1);
            Ok(self.medium.add(owner, Content::Good(payload)))
        }
        .boxed_local()
    }

    fn get(&self, id: BlobId, offset: u32, length: u32) -> LocalBoxFuture<'_, Result<Bytes, BlobError>> {
        async move {
            match self.medium.blobs.borrow().get(&id) {
                None => Err(BlobError::NotFound(id)),
                Some((_, Content::Damaged(_))) => Err(BlobError::Unreadable { id, detail: "checksum".into() }),
                Some((_, Content::Good(bytes))) => Ok(bytes.slice(offset as usize..(offset + length) as usize)),
            }
        }
        .boxed_local()
    }

    fn delete(&self, ids: Vec<BlobId>) -> LocalBoxFuture<'_, Result<(), BlobError>> {
        async move {
            if self.medium.refuses_deletes.get() {
                return Err(BlobError::NoSpace { kind: BlobKind::Log, needed: 4096 });
            }
            for id in ids {
                // One step each: a crash may interrupt a delete of many.
                if self.medium.step() {
                    return std::future::pending().await;
                }
                self.medium.blobs.borrow_mut().remove(&id);
            }
            self.handle.sleep(Duration::from_micros(50)).await;
            if self.medium.is_halted.get() {
                return std::future::pending().await;
            }
            Ok(())
        }
        .boxed_local()
    }

    fn list(&self, kind: BlobKind) -> LocalBoxFuture<'_, Result<Vec<BlobInfo>, BlobError>> {
        async move {
            let mut all: Vec<BlobInfo> = self
                .medium
                .blobs
                .borrow()
                .iter()
                .map(|(id, (owner, content))| {
                    let length = match content {
                        Content::Good(bytes) => bytes.len() as u32,
                        Content::Damaged(length) => *length,
                    };
                    BlobInfo { id: *id, kind, owner: *owner, geometry: ShardGeometry::NONE, length }
                })
                .collect();
            all.sort_by_key(|info| (info.owner, info.id));
            Ok(all)
        }
        .boxed_local()
    }

    fn heal(&self, id: BlobId) -> LocalBoxFuture<'_, Result<(), BlobError>> {
        if self.medium.refuses_heals.get() {
            return async { Err(BlobError::TooFewTargets { up: 1, needed: 2 }) }.boxed_local();
        }
        self.medium.heals.borrow_mut().push(id);
        async { Ok(()) }.boxed_local()
    }
}
