//! Has threads ask the kernel to drop pages. It lets them go only when the requests that read or
//! write pages of the inode are answered: the executor, which answers these, may not ask, and a
//! thread that waits for one inode's pages leaves the other inodes to the other threads.
//!
//! An inode has at most one drop under way, and one that waits: the latter is for everyone who has
//! asked since the former began. So what is kept here is bounded by the inodes that the kernel knows.

use crate::error::MountError;
use crate::notify::{inval_inode, report};
use cfs_reactor::Handle;
use cfs_reactor::mailbox::{Receiver, Sender, mailbox};
use cfs_reactor::sync::{Notified, Notify};
use cfs_wire::Ino;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

/// Of so many inodes pages may be locked before the others wait. Not more: a thread that waits in
/// the kernel cannot be killed, and while it does the device is not closed.
const THREADS_MAX: usize = 8;

/// Drops the pages of an inode; returns when they are gone.
type DropPages = dyn Fn(Ino) + Send + Sync;

/// The threads, with nothing to do yet.
pub(crate) struct PageThreads {
    threads: Threads,
    ended: Receiver<Ended>,
}

impl PageThreads {
    /// Starts one; the others follow when it does not suffice.
    pub fn start(device: OwnedFd) -> Result<PageThreads, MountError> {
        let drop_pages = move |ino| report(ino, inval_inode(&device, ino));
        PageThreads::that(Arc::new(drop_pages)).map_err(MountError::Thread)
    }

    fn that(drop_pages: Arc<DropPages>) -> io::Result<PageThreads> {
        let (tell, ended) = mailbox(THREADS_MAX);
        let mut threads = Threads { drop_pages, tell, orders: Vec::new(), idle: Vec::new() };
        let first = threads.start()?;
        threads.idle.push(first);
        Ok(PageThreads { threads, ended })
    }
}

/// The kernel's pages of one mount. When nobody has it or waits for it any more, each thread ends
/// with the drop that it has under way; those that wait are not begun.
pub(crate) struct PageDrops(Rc<RefCell<Queue>>);

impl PageDrops {
    pub fn new(handle: &Handle, PageThreads { threads, ended }: PageThreads) -> PageDrops {
        let queue = Queue { threads, under_way: BTreeMap::new(), waiting: BTreeMap::new(), turns: VecDeque::new() };
        let queue = Rc::new(RefCell::new(queue));
        handle.spawn(follow(Rc::downgrade(&queue), ended));
        PageDrops(queue)
    }

    /// Ends when the pages are gone that the kernel keeps now.
    pub fn drop_pages(&self, ino: Ino) -> impl Future<Output = ()> + 'static {
        let ended = self.0.borrow_mut().ask(ino);
        let queue = self.0.clone();
        async move {
            ended.await;
            // Not before: what is asked for is done as long as someone waits for it.
            drop(queue);
        }
    }
}

/// What a thread says after each drop.
struct Ended {
    thread: usize,
    ino: Ino,
}

async fn follow(queue: Weak<RefCell<Queue>>, mut ended: Receiver<Ended>) {
    while let Some(ended) = ended.recv().await {
        let Some(queue) = queue.upgrade() else { return };
        queue.borrow_mut().ended(&ended);
    }
}

/// Which inodes' pages are to be dropped, and who is told when a drop has ended.
struct Queue {
    threads: Threads,
    under_way: BTreeMap<Ino, Rc<Notify>>,
    waiting: BTreeMap<Ino, Rc<Notify>>,
    /// Inodes with a drop that waits for a thread only.
    turns: VecDeque<Ino>,
}

impl Queue {
    fn ask(&mut self, ino: Ino) -> Notified {
        if let Some(told) = self.waiting.get(&ino) {
            return told.notified();
        }
        let told = Notify::new();
        let ended = told.notified();
        self.waiting.insert(ino, told);
        if !self.under_way.contains_key(&ino) {
            self.turns.push_back(ino);
            self.begin();
        }
        ended
    }

    /// Begins what there are threads for.
    fn begin(&mut self) {
        while let Some(ino) = self.turns.front().copied() {
            if !self.threads.order(ino) {
                return;
            }
            self.turns.pop_front();
            if let Some(told) = self.waiting.remove(&ino) {
                self.under_way.insert(ino, told);
            }
        }
    }

    fn ended(&mut self, &Ended { thread, ino }: &Ended) {
        self.threads.idle.push(thread);
        if let Some(told) = self.under_way.remove(&ino) {
            told.notify_all();
        }
        if self.waiting.contains_key(&ino) {
            self.turns.push_back(ino);
        }
        self.begin();
    }
}

struct Threads {
    drop_pages: Arc<DropPages>,
    tell: Sender<Ended>,
    /// To each thread. It gets an order only when it has none, so there is room for it, and for what
    /// it says of the one before.
    orders: Vec<SyncSender<Ino>>,
    idle: Vec<usize>,
}

impl Threads {
    /// Has a thread drop an inode's pages; false if all are at it.
    fn order(&mut self, ino: Ino) -> bool {
        let Some(thread) = self.idle.pop().or_else(|| self.start_another()) else { return false };
        self.orders[thread].try_send(ino).is_ok()
    }

    fn start_another(&mut self) -> Option<usize> {
        if self.orders.len() == THREADS_MAX {
            return None;
        }
        let started = self.start();
        started.inspect_err(|error| tracing::warn!(%error, "pages are dropped by fewer threads")).ok()
    }

    #[allow(clippy::disallowed_methods, reason = "the kernel has who asks wait for the executor")]
    fn start(&mut self) -> io::Result<usize> {
        let (order, orders) = sync_channel(1);
        let (drop_pages, tell, thread) = (self.drop_pages.clone(), self.tell.clone(), self.orders.len());
        let run = move || {
            for ino in orders {
                drop_pages(ino);
                // There is room.
                let _ = tell.try_send(Ended { thread, ino });
            }
        };
        thread::Builder::new().name("cfs-invalidate".to_owned()).spawn(run)?;
        self.orders.push(order);
        Ok(thread)
    }
}

#[cfg(test)]
#[path = "page_drops_tests.rs"]
mod tests;
