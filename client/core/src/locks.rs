//! Byte-range and whole-file locks, kept by the inode's shard.

use crate::Client;
use crate::cache::unexpected;
use crate::calls::CallError;
use crate::session::Session;
use cfs_wire::meta::{LockFamily, LockRange, MetaOp, MetaReply};
use cfs_wire::{Errno, Ino};
use futures_util::future::{Either, select};
use std::rc::Rc;
use std::time::Duration;

/// A lock as it is asked for: `flock` is one of family `Flock` over the whole file.
pub type LockRequest = LockRange;

/// A server that answers a wait without the lock is asked again after this.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// A cancellation that was not followed by its lock's answer is repeated after this.
const CANCEL_PAUSE: Duration = Duration::from_millis(100);

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
        if is_refused(&answer.reply) {
            return Err(Errno::EAGAIN);
        }
        self.locked(ino, lock, &answer.session);
        Ok(())
    }

    /// F_SETLKW, flock without LOCK_NB: waits as long as it takes.
    pub async fn setlkw(self: &Rc<Self>, ino: Ino, lock: LockRequest) -> Result<(), Errno> {
        self.setlkw_until(ino, lock, std::future::pending()).await
    }

    /// The same until `given_up` ends: then the owner's waits on the inode are cancelled. EINTR, or
    /// success if the lock was granted at that moment. EINTR also where another wait of the same
    /// owner was given up.
    pub async fn setlkw_until(
        self: &Rc<Self>,
        ino: Ino,
        lock: LockRequest,
        given_up: impl Future<Output = ()>,
    ) -> Result<(), Errno> {
        let waiting = self.wait_for_lock(ino, lock);
        futures_util::pin_mut!(waiting, given_up);
        match select(waiting, given_up).await {
            Either::Left((outcome, _)) => outcome,
            Either::Right(((), waiting)) => self.cancel_locks(ino, lock.owner, waiting).await,
        }
    }

    /// Cancels an owner's waits on an inode until `waiting`, one of them, ends. Repeated: a cancellation
    /// may overtake the call it is to cancel, which then waits all the same.
    async fn cancel_locks<T>(self: &Rc<Self>, ino: Ino, owner: u64, mut waiting: impl Future<Output = T> + Unpin) -> T {
        loop {
            let cancelling = self.change(MetaOp::CancelLock { ino, owner });
            futures_util::pin_mut!(cancelling);
            let (outcome, cancelled) = match select(waiting, cancelling).await {
                // Left alone, it could come late and cancel the owner's next wait.
                Either::Left((outcome, cancelling)) => (Either::Left(outcome), cancelling.await),
                Either::Right((cancelled, still)) => (Either::Right(still), cancelled),
            };
            if let Err(errno) = cancelled {
                tracing::debug!(%ino, %errno, "a lock wait could not be cancelled");
            }
            waiting = match outcome {
                Either::Left(outcome) => return outcome,
                Either::Right(still) => still,
            };
            let pause = self.handle.sleep(CANCEL_PAUSE);
            futures_util::pin_mut!(pause);
            waiting = match select(waiting, pause).await {
                Either::Left((outcome, _)) => return outcome,
                Either::Right(((), still)) => still,
            };
        }
    }

    async fn wait_for_lock(self: &Rc<Self>, ino: Ino, lock: LockRequest) -> Result<(), Errno> {
        loop {
            let session = self.session().await?;
            let pressed = session.pressed();
            let asking = self.change_in(&session, MetaOp::Lock { ino, lock, wait: true });
            futures_util::pin_mut!(asking);
            let (cancelled, (outcome, _)) = match select(asking, pressed).await {
                Either::Left((answered, _)) => (false, answered),
                // The oldest unanswered request holds all others up: this one asks anew.
                Either::Right(((), asking)) => (true, self.cancel_locks(ino, lock.owner, asking).await),
            };
            let ours = cancelled && !session.is_fenced();
            match outcome {
                Ok(answer) if is_refused(&answer.reply) => self.handle.sleep(REFUSED_PAUSE).await,
                Ok(_) => {
                    self.locked(ino, lock, &session);
                    return Ok(());
                }
                Err(CallError::Errno(Errno::EINTR | Errno::ECANCELED)) if ours => {}
                Err(CallError::Errno(Errno::ECANCELED)) => return Err(Errno::EINTR),
                Err(CallError::Fenced { executed: false }) => {}
                Err(error) => return Err(error.errno()),
            }
        }
    }

    /// An owner was granted a lock in a session.
    fn locked(&self, ino: Ino, lock: LockRequest, session: &Session) {
        let inode = self.inode(ino);
        let mut state = inode.state();
        let owner = (lock.family, lock.owner);
        if session.is_fenced() {
            state.locks_lost.insert(owner);
            state.fail(Errno::EIO);
        } else {
            state.lock_owners.insert(owner);
        }
    }

    /// F_UNLCK over a range.
    pub async fn unlock(self: &Rc<Self>, ino: Ino, lock: LockRequest) -> Result<(), Errno> {
        // Of a part of the file it may hold another.
        if lock.start == 0 && lock.end == u64::MAX {
            self.inode(ino).state().forget_locks((lock.family, lock.owner));
        }
        self.change(MetaOp::Unlock { ino, lock }).await.map(|_| ())
    }

    /// An owner closed the file: all its locks of a family go.
    pub async fn unlock_owner(self: &Rc<Self>, ino: Ino, family: LockFamily, owner: u64) -> Result<(), Errno> {
        self.inode(ino).state().forget_locks((family, owner));
        self.change(MetaOp::UnlockOwner { ino, family, owner }).await.map(|_| ())
    }
}
