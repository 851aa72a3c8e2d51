//! Locks of the programs on this mount: kept by the inode's shard, and given up here when a
//! program closes its file.
//!
//! A lock belongs to an owner, a number the kernel makes up: of a process for fcntl locks, of an
//! open file for flock and OFD locks. FLUSH names the process that closes a file; with it go all
//! its fcntl locks on the inode. RELEASE is the end of an open file, and of what was locked
//! through it; the kernel does not name the owner of OFD locks, so what each file was used for is
//! remembered.

use crate::interrupts::Interruption;
use crate::operation::Handle;
use cfs_client::Client;
use cfs_reactor::sync::Semaphore;
use cfs_wire::meta::{LockFamily, LockRange};
use cfs_wire::{Errno, Ino};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Whose locks on what.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Holding {
    ino: Ino,
    family: LockFamily,
    owner: u64,
}

impl Holding {
    fn of(ino: Ino, lock: &LockRange) -> Holding {
        Holding { ino, family: lock.family, owner: lock.owner }
    }
}

pub(crate) struct Locks {
    client: Rc<Client>,
    /// What may be held, and through which open files it was locked.
    holdings: RefCell<BTreeMap<Holding, BTreeSet<Handle>>>,
    /// A lock that a program asks for after another has closed the file comes after what that
    /// close gave up.
    orders: RefCell<BTreeMap<Ino, Rc<Semaphore>>>,
}

impl Locks {
    pub fn new(client: &Rc<Client>) -> Locks {
        Locks { client: client.clone(), holdings: RefCell::default(), orders: RefCell::default() }
    }

    /// F_GETLK.
    pub async fn test(&self, ino: Ino, lock: LockRange) -> Result<Option<LockRange>, Errno> {
        self.pass_order(ino).await;
        self.client.getlk(ino, lock).await
    }

    /// F_SETLK, or with `interruption` F_SETLKW; flock with and without LOCK_NB.
    pub async fn set(
        &self,
        ino: Ino,
        handle: Handle,
        lock: LockRange,
        interruption: Option<Interruption>,
    ) -> Result<(), Errno> {
        let holding = Holding::of(ino, &lock);
        let known = self.holdings.borrow().contains_key(&holding);
        self.holdings.borrow_mut().entry(holding).or_default().insert(handle);
        self.pass_order(ino).await;
        let Some(interruption) = interruption else { return self.client.setlk(ino, lock).await };
        if known && lock.family == LockFamily::Flock {
            // flock(2): a lock is given up before its conversion is waited for. Else two that
            // share it and both want it alone would wait for each other.
            match self.client.setlk(ino, lock).await {
                Err(Errno::EAGAIN) => self.client.unlock(ino, lock).await?,
                other => return other,
            }
        }
        loop {
            match self.client.setlkw_until(ino, lock, interruption.raised()).await {
                // Another wait of this owner was interrupted, and with it all of them.
                Err(Errno::EINTR) if !interruption.is_raised() => {}
                other => return other,
            }
        }
    }

    /// F_UNLCK, LOCK_UN.
    pub async fn unlock(&self, ino: Ino, lock: LockRange) -> Result<(), Errno> {
        // Though nothing may be left locked: another thread of the owner may be locking just now.
        self.client.unlock(ino, lock).await
    }

    /// A process closes a file: its fcntl locks on the inode go.
    pub async fn closed_by(&self, ino: Ino, owner: u64) {
        let holding = Holding { ino, family: LockFamily::Posix, owner };
        if self.holdings.borrow_mut().remove(&holding).is_some() {
            self.give_up(ino, [holding]).await;
        }
    }

    /// An open file has ended: what was locked through it goes. `flock_owner`: it was locked by
    /// flock.
    pub async fn ended(&self, ino: Ino, handle: Handle, flock_owner: Option<u64>) {
        let through: Vec<Holding> = {
            let holdings = self.holdings.borrow();
            let first = Holding { ino, family: LockFamily::Posix, owner: 0 };
            let of_inode = holdings.range(first..).take_while(|(holding, _)| holding.ino == ino);
            of_inode.filter(|(_, handles)| handles.contains(&handle)).map(|(holding, _)| *holding).collect()
        };
        let flock = flock_owner.map(|owner| Holding { ino, family: LockFamily::Flock, owner });
        let over: BTreeSet<Holding> = through.into_iter().chain(flock).collect();
        if over.is_empty() {
            return;
        }
        for holding in &over {
            self.holdings.borrow_mut().remove(holding);
        }
        self.give_up(ino, over).await;
    }

    async fn give_up(&self, ino: Ino, holdings: impl IntoIterator<Item = Holding>) {
        let order = self.order(ino);
        let turn = order.acquire(1).await;
        for Holding { ino, family, owner } in holdings {
            if let Err(errno) = self.client.unlock_owner(ino, family, owner).await {
                // It ends with the session, if not before.
                tracing::warn!(%ino, %errno, "a lock of a closed file could not be given up");
            }
        }
        drop(turn);
        drop(order);
        self.orders.borrow_mut().retain(|_, order| Rc::strong_count(order) > 1);
    }

    fn order(&self, ino: Ino) -> Rc<Semaphore> {
        self.orders.borrow_mut().entry(ino).or_insert_with(|| Semaphore::new(1)).clone()
    }

    /// Waits for what closes before this moment give up.
    async fn pass_order(&self, ino: Ino) {
        let order = self.orders.borrow().get(&ino).cloned();
        if let Some(order) = order {
            drop(order.acquire(1).await);
        }
    }
}
