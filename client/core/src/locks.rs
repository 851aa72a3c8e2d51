//! Byte-range and whole-file locks, kept by the inode's shard.

use crate::Client;
use crate::cache::unexpected;
use crate::calls::CallError;
use cfs_wire::meta::{LockFamily, LockRange, MetaOp, MetaReply};
use cfs_wire::{Errno, Ino};
use futures_util::future::{Either, select};
use std::rc::Rc;
use std::time::Duration;

/// A lock as it is asked for: `flock` is one of family `Flock` over the whole file.
pub type LockRequest = LockRange;

/// A server that answers a wait without the lock is asked again after this.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// The answer to a lock that is in another's way names what is in its way.
fn is_refused(reply: &MetaReply) -> bool {
    matches!(reply, MetaReply::Conflict(Some(_)))
}

impl Client {
    /// F_GETLK: what would keep this lock out.
    pub async fn getlk(self: &Rc<Self>, ino: Ino, lock: LockRequest) -> Result<Option<LockRequest>, Errno> {
        match self.read_call(MetaOp::TestLock { ino, lock }).await?.reply {
            MetaReply::Conflict(conflict) => Ok(conflict),
            other => Err(unexpected(&other)),
        }
    }

    /// F_SETLK, LOCK_NB: EAGAIN if another owner is in the way.
    pub async fn setlk(self: &Rc<Self>, ino: Ino, lock: LockRequest) -> Result<(), Errno> {
        let answer = self.change(MetaOp::Lock { ino, lock, wait: false }).await?;
        if is_refused(&answer.reply) { Err(Errno::EAGAIN) } else { Ok(()) }
    }

    /// F_SETLKW, flock without LOCK_NB: waits. EINTR after [`Client::cancel_lock`].
    pub async fn setlkw(self: &Rc<Self>, ino: Ino, lock: LockRequest) -> Result<(), Errno> {
        loop {
            let session = self.session().await?;
            let pressed = session.pressed();
            let asking = self.change_in(&session, MetaOp::Lock { ino, lock, wait: true });
            futures_util::pin_mut!(asking);
            let (mut ours, outcome) = match select(asking, pressed).await {
                Either::Left(((outcome, _), _)) => (false, outcome),
                Either::Right(((), asking)) => {
                    // The oldest unanswered request holds all others up: this one asks anew.
                    let (cancelled, _) = self.change_in(&session, MetaOp::CancelLock { ino, owner: lock.owner }).await;
                    let (outcome, _) = asking.await;
                    (cancelled.is_ok(), outcome)
                }
            };
            ours &= !session.is_fenced();
            match outcome {
                Ok(answer) if is_refused(&answer.reply) => self.handle.sleep(REFUSED_PAUSE).await,
                Ok(_) => return Ok(()),
                Err(CallError::Errno(Errno::EINTR | Errno::ECANCELED)) if ours => {}
                Err(CallError::Errno(Errno::ECANCELED)) => return Err(Errno::EINTR),
                Err(CallError::Fenced { executed: false }) => {}
                Err(error) => return Err(error.errno()),
            }
        }
    }

    /// Ends the waits of an owner on an inode: each answers EINTR.
    pub async fn cancel_lock(self: &Rc<Self>, ino: Ino, owner: u64) -> Result<(), Errno> {
        self.change(MetaOp::CancelLock { ino, owner }).await.map(|_| ())
    }

    /// F_UNLCK over a range.
    pub async fn unlock(self: &Rc<Self>, ino: Ino, lock: LockRequest) -> Result<(), Errno> {
        self.change(MetaOp::Unlock { ino, lock }).await.map(|_| ())
    }

    /// An owner closed the file: all its locks of a family go.
    pub async fn unlock_owner(self: &Rc<Self>, ino: Ino, family: LockFamily, owner: u64) -> Result<(), Errno> {
        self.change(MetaOp::UnlockOwner { ino, family, owner }).await.map(|_| ())
    }
}
