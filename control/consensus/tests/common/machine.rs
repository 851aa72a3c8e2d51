//! A state machine that keeps the list of what it was told. Its disk outlives the node and
//! holds only what was checkpointed.

use bytes::Bytes;
use cfs_consensus::host::{AppliedEntry, SnapshotSink, SnapshotSource, StateError, StateMachine};
use cfs_reactor::Handle;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Contents {
    pub mark: Option<Bytes>,
    pub list: Vec<Bytes>,
}

/// What survives a crash.
#[derive(Default)]
pub struct Disk {
    synced: RefCell<Contents>,
    pub checkpoints: Cell<u64>,
    pub restores: Cell<u64>,
    /// Every entry is refused as damaged.
    pub damaged: Cell<bool>,
}

pub struct List {
    disk: Rc<Disk>,
    handle: Handle,
    pub now: Rc<RefCell<Contents>>,
}

impl List {
    pub fn open(disk: &Rc<Disk>, handle: &Handle) -> Rc<List> {
        let now = disk.synced.borrow().clone();
        Rc::new(List { disk: disk.clone(), handle: handle.clone(), now: Rc::new(RefCell::new(now)) })
    }

    pub fn list(&self) -> Vec<Bytes> {
        self.now.borrow().list.clone()
    }
}

impl StateMachine for List {
    fn applied(&self) -> Option<Bytes> {
        self.now.borrow().mark.clone()
    }

    /// Replies with the item's number in the list, as eight bytes.
    fn apply(&self, entries: Vec<AppliedEntry>) -> LocalBoxFuture<'_, Result<Vec<Bytes>, StateError>> {
        async move {
            if self.disk.damaged.get() {
                return Err(StateError::Corrupt { detail: "as the test wants it".into() });
            }
            let mut now = self.now.borrow_mut();
            let mut replies = Vec::new();
            for entry in entries {
                now.mark = Some(entry.mark);
                replies.push(match entry.payload {
                    Some(item) => {
                        now.list.push(item);
                        Bytes::copy_from_slice(&(now.list.len() as u64 - 1).to_le_bytes())
                    }
                    None => Bytes::new(),
                });
            }
            Ok(replies)
        }
        .boxed_local()
    }

    fn checkpoint(&self) -> LocalBoxFuture<'_, Result<Bytes, StateError>> {
        async move {
            let seen = self.now.borrow().clone();
            self.handle.sleep(Duration::from_micros(300)).await;
            let mark = seen.mark.clone().ok_or(StateError::Closed)?;
            *self.disk.synced.borrow_mut() = seen;
            self.disk.checkpoints.set(self.disk.checkpoints.get() + 1);
            Ok(mark)
        }
        .boxed_local()
    }

    fn synced(&self) -> Option<Bytes> {
        self.disk.synced.borrow().mark.clone()
    }

    fn snapshot(&self) -> LocalBoxFuture<'_, Result<Box<dyn SnapshotSource>, StateError>> {
        async move {
            let view = self.now.borrow().clone();
            let source = Source { mark: view.mark.ok_or(StateError::Closed)?, list: view.list, at: 0 };
            Ok(Box::new(source) as Box<dyn SnapshotSource>)
        }
        .boxed_local()
    }

    fn restore(&self) -> LocalBoxFuture<'_, Result<Box<dyn SnapshotSink>, StateError>> {
        let sink = Sink { disk: self.disk.clone(), now: self.now.clone(), list: Vec::new() };
        async move { Ok(Box::new(sink) as Box<dyn SnapshotSink>) }.boxed_local()
    }
}

struct Source {
    mark: Bytes,
    list: Vec<Bytes>,
    at: usize,
}

impl SnapshotSource for Source {
    fn mark(&self) -> Bytes {
        self.mark.clone()
    }

    /// A few items a chunk, each with its length before it.
    fn next(&mut self) -> LocalBoxFuture<'_, Result<Option<Bytes>, StateError>> {
        let some = &self.list[self.at..(self.at + 7).min(self.list.len())];
        self.at += some.len();
        let mut chunk = Vec::new();
        for item in some {
            chunk.extend((item.len() as u32).to_le_bytes());
            chunk.extend(item);
        }
        async move { Ok((!chunk.is_empty()).then(|| chunk.into())) }.boxed_local()
    }
}

struct Sink {
    disk: Rc<Disk>,
    now: Rc<RefCell<Contents>>,
    list: Vec<Bytes>,
}

impl SnapshotSink for Sink {
    fn push(&mut self, mut chunk: Bytes) -> LocalBoxFuture<'_, Result<(), StateError>> {
        while !chunk.is_empty() {
            let length = u32::from_le_bytes(chunk.split_to(4)[..].try_into().expect("four bytes"));
            self.list.push(chunk.split_to(length as usize));
        }
        async { Ok(()) }.boxed_local()
    }

    fn finish(self: Box<Self>, mark: Bytes) -> LocalBoxFuture<'static, Result<(), StateError>> {
        async move {
            let contents = Contents { mark: Some(mark), list: self.list };
            *self.disk.synced.borrow_mut() = contents.clone();
            *self.now.borrow_mut() = contents;
            self.disk.restores.set(self.disk.restores.get() + 1);
            Ok(())
        }
        .boxed_local()
    }
}
