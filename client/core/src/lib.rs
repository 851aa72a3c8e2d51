//! The POSIX client: operations on inodes, caches under leases, write-behind, retries.
//!
//! [`Client`] turns what FUSE or a gateway asks into calls of the metadata service and of the
//! data plane. It owns the client's session, every cache above the wire, and the written bytes
//! until their commit is acknowledged. It never checks permissions (the kernel or the gateway
//! does, with the attributes it is given), never reads a clock but the executor's, and never
//! keeps a change it was not allowed to keep: everything cached hangs on a grant whose end is
//! counted from when the request was sent.
//!
//! Start at [`Client::connect`]; then `calls` (request ids, repetition, sessions), `cache`
//! (grants and invalidation), `write`, `reservation` and `flush` (write-behind), `read`, `mapped`
//! (pages that programs use without asking), and `events` (what the server asks of us).
#![forbid(unsafe_code)]

mod cache;
mod calls;
mod config;
mod copy;
mod dirty;
mod events;
mod extents;
mod fetch;
mod files;
mod flush;
mod inode;
mod link;
mod locks;
mod mapped;
mod namespace;
mod nodes;
mod pages;
mod read;
mod reservation;
mod session;
mod space;
mod stamps;
mod upkeep;
mod write;
mod xattrs;

pub use cache::{DirEntries, Invalidator, Located, LocatedEntry, Negative};
pub use config::ClientConfig;
pub use files::{OpenFile, OpenFlags};
pub use locks::LockRequest;
pub use nodes::{Caller, NewFile};
pub use read::Whence;
pub use write::WriteFlags;

use calls::NotMounted;
use cfs_fabric::{Address, Fabric, FabricError};
use cfs_reactor::Handle;
use cfs_reactor::collections::HashMap;
use cfs_reactor::sync::{Notify, Semaphore};
use cfs_wire::{Ino, VolumeId};
use inode::Inode;
use link::Link;
use pages::Pages;
use reservation::Reservation;
use session::Session;
use stamps::Stamps;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

/// Why there is no client.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    Fabric(#[from] FabricError),
    #[error("no answer from {address} within {seconds} s, at last: {detail}")]
    Unanswered { address: Address, seconds: u64, detail: String },
    #[error("{address} refuses the mount: {detail}")]
    Refused { address: Address, detail: String },
}

/// A mounted file system. Lives on one executor.
pub struct Client {
    handle: Handle,
    config: ClientConfig,
    meta: Link,
    data: Link,
    /// The long poll has its own, so that bulk bytes never hold up a heartbeat.
    event_link: Link,
    /// For waits for locks: they may take every place for calls, those of whoever is to unlock too.
    wait_link: Link,
    session: RefCell<Rc<Session>>,
    session_replaced: Rc<Notify>,
    /// While polls are not answered.
    outage: Cell<Option<events::Outage>>,
    stamps: Stamps,
    inodes: RefCell<HashMap<Ino, Rc<Inode>>>,
    pages: RefCell<Pages>,
    dirty_inodes: RefCell<BTreeSet<Ino>>,
    dirty_bytes: Cell<usize>,
    /// Something that was written could not be committed, ever.
    has_lost: Cell<bool>,
    reservation: RefCell<Reservation>,
    /// Whose turn it is to ask for more.
    reserving: Rc<Semaphore>,
    /// Inodes that nobody has open and that may still hold something at the server.
    lingering: RefCell<BTreeSet<Ino>>,
    /// Dirty bytes came or went.
    dirty_changed: Rc<Notify>,
    /// The nanoseconds of the last time that was made up for who keeps pages.
    times_given: Cell<u32>,
    /// Directory entries in `inodes`, or more: counted anew by each sweep.
    entries_kept: Cell<usize>,
    /// The last write of some inode that was under way was answered.
    writes_ended: Rc<Notify>,
    invalidator: RefCell<Option<Rc<dyn Invalidator>>>,
    /// Fetches for read-ahead at once.
    read_ahead_turns: Rc<Semaphore>,
    upkeep_wanted: Rc<Notify>,
    /// Nobody reads any more.
    quiet: Rc<Notify>,
    open_inodes: RefCell<BTreeSet<Ino>>,
    page_care_wanted: Rc<Notify>,
    closed: Cell<bool>,
}

impl Client {
    /// Opens a session at `address` and starts the client's own tasks on `handle`.
    pub async fn connect(
        handle: &Handle,
        fabric: Rc<dyn Fabric>,
        address: &Address,
        config: ClientConfig,
    ) -> Result<Rc<Client>, ConnectError> {
        let meta = Link::new(handle, &fabric, address);
        let session = Client::first_session(&meta, handle, address, &config).await?;
        let reservation = Reservation::new(session.policy);
        let client = Rc::new(Client {
            handle: handle.clone(),
            meta,
            data: Link::new(handle, &fabric, address),
            event_link: Link::new(handle, &fabric, address),
            wait_link: Link::new(handle, &fabric, address),
            session: RefCell::new(session),
            session_replaced: Notify::new(),
            outage: Cell::new(None),
            stamps: Stamps::default(),
            inodes: RefCell::new(HashMap::default()),
            pages: RefCell::new(Pages::new(config.cache_bytes_max)),
            dirty_inodes: RefCell::new(BTreeSet::new()),
            dirty_bytes: Cell::new(0),
            has_lost: Cell::new(false),
            reservation: RefCell::new(reservation),
            reserving: Semaphore::new(1),
            lingering: RefCell::new(BTreeSet::new()),
            dirty_changed: Notify::new(),
            times_given: Cell::new(0),
            entries_kept: Cell::new(0),
            writes_ended: Notify::new(),
            invalidator: RefCell::new(None),
            read_ahead_turns: Semaphore::new(config.stores_in_flight.max(1)),
            upkeep_wanted: Notify::new(),
            quiet: Notify::new(),
            open_inodes: RefCell::default(),
            page_care_wanted: Notify::new(),
            closed: Cell::new(false),
            config,
        });
        client.spawn_events();
        client.spawn_upkeep();
        client.spawn_page_care();
        Ok(client)
    }

    async fn first_session(
        link: &Link,
        handle: &Handle,
        address: &Address,
        config: &ClientConfig,
    ) -> Result<Rc<Session>, ConnectError> {
        let deadline = handle.now() + config.retry_window;
        let mut told = false;
        loop {
            match calls::mount(link, handle, config).await {
                Ok(session) => return Ok(session),
                Err(NotMounted::Refused(error)) => return Err(error),
                Err(NotMounted::Unanswered(detail)) if handle.now() >= deadline => {
                    let seconds = config.retry_window.as_secs();
                    return Err(ConnectError::Unanswered { address: address.clone(), seconds, detail });
                }
                Err(NotMounted::Unanswered(detail)) => {
                    if !std::mem::replace(&mut told, true) {
                        let window = config.retry_window;
                        tracing::warn!(%address, detail, ?window, "no server answers yet: it is tried for so long");
                    }
                    handle.sleep(std::time::Duration::from_millis(200)).await;
                }
            }
        }
    }

    pub fn root(&self) -> Ino {
        self.session.borrow().root
    }

    pub fn volume(&self) -> VolumeId {
        self.session.borrow().volume
    }

    /// Who drops the kernel's copies when ours are dropped.
    pub fn set_invalidator(&self, invalidator: Rc<dyn Invalidator>) {
        *self.invalidator.borrow_mut() = Some(invalidator);
        self.page_care_wanted.notify_all();
    }

    /// The kernel keeps nothing any more.
    pub fn forget_invalidator(&self) {
        self.invalidator.borrow_mut().take();
    }

    /// Written bytes that are not committed yet.
    pub fn dirty_bytes(&self) -> usize {
        self.dirty_bytes.get()
    }
}
