//! What programs do at the same time, against the rules of [`crate::sideline`].

use crate::report::Checker;
use crate::sideline::{LOGS, PAWNS, RACE_NAMES, is_race_directory, pawn_name, race_name};
use crate::workload::{Actor, list};
use cfs_client::{Caller, LockRequest, NewFile, OpenFlags};
use cfs_wire::meta::{FileKind, LockFamily, LockKind, RENAME_NOREPLACE};
use cfs_wire::{Errno, Ino};
use std::time::Duration;

/// How long a lock is held: some outlive a restart of the node. Less than the shortest session
/// lease, after which a client that was not heard of loses them.
const LOCK_HELD_MS: [u64; 5] = [0, 1, 3, 200, 2000];

const FIFO: NewFile = NewFile { kind: FileKind::Fifo, mode: 0o600, umask: 0, rdev: 0 };

/// The game whose players seek each other.
const RACE: u64 = 2;

impl Actor {
    pub(crate) async fn play(&self) {
        // Two that want one name at one time are rare unless the second joins the first.
        let joined = self.history.sideline.raced_for().filter(|_| self.below(2) == 0);
        let game = if joined.is_some() { RACE } else { self.below(6) };
        let outcome = match game {
            0 => self.append_record().await,
            1 => self.hold_lock().await,
            RACE => self.race(joined).await,
            3 => self.move_file().await,
            4 => self.move_directory().await,
            _ => self.list_grounds().await,
        };
        self.outlive().await;
        if let Err(detail) = outcome {
            self.history.fail_with(Checker::Reply, format!("{}@{} {detail}", self.id.0, self.client_index));
        }
    }

    async fn append_record(&self) -> Result<(), String> {
        let error = |errno: Errno| format!("append to a common log: {errno}");
        let log = self.below(LOGS as u64) as usize;
        let flags = OpenFlags { append: true, ..OpenFlags::default() };
        let file = self.client.open(self.grounds.logs[log], flags, false).await.map_err(error)?;
        let (number, record) = self.history.sideline.next_record(log, self.id);
        let written = self.client.write(&file, 0, record, false).await;
        let synced = self.client.fsync(&file, false).await;
        self.client.release(&file);
        if matches!(written, Err(Errno::ENOSPC)) && self.may_be_full() {
            return Ok(());
        }
        written.map_err(error)?;
        synced.map_err(error)?;
        self.outlive().await;
        self.history.sideline.record_synced(log, self.id, number);
        self.history.note(format!("{}@{} record {number} of log {log} synced", self.id.0, self.client_index));
        Ok(())
    }

    fn draw_lock(&self) -> LockRequest {
        let owner = self.id.0 as u64 + 1;
        let kind = self.pick(&[LockKind::Read, LockKind::Write, LockKind::Write]);
        let lock = LockRequest { family: LockFamily::Flock, kind, start: 0, end: u64::MAX, owner, pid: owner as u32 };
        if self.below(2) == 0 {
            return lock;
        }
        let start = self.below(6) * 10;
        let end = if self.below(4) == 0 { u64::MAX } else { start + 10 * self.below(3) + 4 };
        LockRequest { family: LockFamily::Posix, start, end, ..lock }
    }

    async fn hold_lock(&self) -> Result<(), String> {
        let lock = self.draw_lock();
        let wait = self.below(2) == 0;
        let locked = match wait {
            true => self.client.setlkw(self.grounds.lock, lock).await,
            false => self.client.setlk(self.grounds.lock, lock).await,
        };
        match locked {
            Err(Errno::EAGAIN) if !wait => return Ok(()),
            Err(errno) => return Err(format!("lock: {errno}")),
            Ok(()) => {}
        }
        self.outlive().await;
        if let Err(violation) = self.history.sideline.locked(self.id, lock) {
            self.history.fail(violation);
        }
        self.handle.sleep(Duration::from_millis(self.pick(&LOCK_HELD_MS))).await;
        self.history.sideline.unlocking(self.id);
        self.client.unlock(self.grounds.lock, lock).await.map_err(|errno| format!("unlock: {errno}"))
    }

    /// Creates a name, or removes it if it is this program's own.
    async fn race(&self, joined: Option<u64>) -> Result<(), String> {
        let number = joined.unwrap_or_else(|| self.below(RACE_NAMES));
        let name = race_name(number);
        let dir = self.grounds.dirs[0];
        self.history.sideline.racing(self.id, number);
        if self.history.sideline.owner(number) == Some(self.id) {
            self.history.sideline.removing(number);
            let removed = match is_race_directory(number) {
                true => self.client.rmdir(dir, &name).await,
                false => self.client.unlink(dir, &name).await,
            };
            self.outlive().await;
            self.history.sideline.raced(self.id);
            return removed.map_err(|errno| format!("unlink of its own name {number}: {errno}"));
        }
        let made = match is_race_directory(number) {
            true => self.client.mkdir(Caller::default(), dir, &name, 0o700, 0).await.map(drop),
            false if self.below(2) == 0 => self.create_elsewhere_and_move(dir, &name).await,
            false => self.client.mknod(Caller::default(), dir, &name, FIFO).await.map(drop),
        };
        self.outlive().await;
        self.history.sideline.raced(self.id);
        match made {
            Err(Errno::EEXIST) => Ok(()),
            Err(Errno::ENOSPC) if self.may_be_full() => Ok(()),
            Err(errno) => Err(format!("create of name {number}: {errno}")),
            Ok(()) => {
                if let Err(violation) = self.history.sideline.created(self.id, number) {
                    self.history.fail(violation);
                }
                Ok(())
            }
        }
    }

    /// As programs take a name that must not be theirs before it is whole; from another shard, where
    /// there are several.
    async fn create_elsewhere_and_move(&self, dir: Ino, name: &[u8]) -> Result<(), Errno> {
        let (own_dir, own_name) = (self.grounds.dirs[1], format!("new{}", self.id.0).into_bytes());
        match self.client.mknod(Caller::default(), own_dir, &own_name, FIFO).await {
            // Left when this program's mount died.
            Err(Errno::EEXIST) => {}
            made => _ = made?,
        }
        let moved = self.client.rename(own_dir, &own_name, dir, name, RENAME_NOREPLACE).await;
        if moved.is_err() {
            self.client.unlink(own_dir, &own_name).await?;
        }
        moved
    }

    /// Moves a file between the grounds, as others may be doing.
    async fn move_file(&self) -> Result<(), String> {
        let pawn = self.below(PAWNS as u64) as usize;
        let to = self.below(2) as usize;
        let [from_dir, to_dir] = [self.grounds.dirs[1 - to], self.grounds.dirs[to]];
        let (name, flags) = (pawn_name(pawn), self.pick(&[0, RENAME_NOREPLACE]));
        self.history.sideline.moving(self.id, pawn);
        let moved = self.client.rename(from_dir, &name, to_dir, &name, flags).await;
        self.outlive().await;
        self.history.sideline.moved(self.id, pawn, moved.is_ok().then_some(to));
        self.history.note(format!("{}@{} moves pawn {pawn} to {to}: {moved:?}", self.id.0, self.client_index));
        match moved {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(format!("move of pawn {pawn} to {to}: {errno}")),
        }
    }

    /// Moves a directory into another that may itself be on its way, even into this one.
    async fn move_directory(&self) -> Result<(), String> {
        let directories = &self.grounds.pawns[PAWNS..];
        let places: Vec<_> = self.grounds.dirs.iter().chain(directories).copied().collect();
        let pawn = PAWNS + self.below(directories.len() as u64) as usize;
        let name = pawn_name(pawn);
        let (from_dir, to_dir) = (self.pick(&places), self.pick(&places));
        let moved = self.client.rename(from_dir, &name, to_dir, &name, 0).await;
        self.history.note(format!("{}@{} moves pawn {pawn} to {to_dir}: {moved:?}", self.id.0, self.client_index));
        match moved {
            Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => Ok(()),
            Err(errno) => Err(format!("move of pawn {pawn} to {to_dir}: {errno}")),
        }
    }

    async fn list_grounds(&self) -> Result<(), String> {
        let names = list(&self.client, self.grounds.dirs[0]).await.map_err(|errno| format!("listing: {errno}"))?;
        self.outlive().await;
        let names: Vec<Vec<u8>> = names.into_iter().map(|(name, _)| name).collect();
        if let Err(violation) = self.history.sideline.check_listing(&names) {
            self.history.fail(violation);
        }
        Ok(())
    }
}
