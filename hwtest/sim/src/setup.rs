//! What a run starts from: directories of each program, shared ones, and the sideline's grounds.

use crate::sideline::{Grounds, LASTING_NAMES, LOGS, PAWNS, PREFIX, ballast_bytes, lasting_name, pawn_name};
use crate::workload::FULL_BELOW;
use cfs_client::{Caller, Client, NewFile, OpenFlags};
use cfs_wire::meta::FileKind;
use cfs_wire::{Errno, Ino};
use std::rc::Rc;

/// Directories each program has of its own; those under the root lie on different shards.
const OWN_DIRECTORIES: usize = 2;
const SHARED_DIRECTORIES: usize = 2;
/// What one write of the ballast brings.
pub(crate) const BALLAST_STEP: usize = 1 << 20;

/// Makes the directories that the programs start from.
pub(crate) struct Setup {
    pub client: Rc<Client>,
    /// Percent of the free space.
    pub ballast: u64,
}

pub(crate) struct Made {
    pub own: Vec<Vec<(String, Ino)>>,
    pub shared: Vec<(String, Ino)>,
    pub grounds: Grounds,
}

pub(crate) fn ground_name(number: usize) -> String {
    format!("{}{number}", String::from_utf8_lossy(PREFIX))
}

impl Setup {
    async fn directory(&self, dir: Ino, name: &[u8]) -> Result<Ino, Errno> {
        let entry = self.client.mkdir(Caller::default(), dir, name, 0o755, 0).await?;
        Ok(entry.attr.ino)
    }

    async fn top(&self, name: String) -> Result<(String, Ino), Errno> {
        let ino = self.directory(self.client.root(), name.as_bytes()).await?;
        Ok((name, ino))
    }

    async fn file(&self, dir: Ino, name: &[u8]) -> Result<Ino, Errno> {
        let (new, flags) = (NewFile::regular(0o644, 0), OpenFlags::default());
        let (entry, file) = self.client.create(Caller::default(), dir, name, new, flags).await?;
        self.client.release(&file);
        Ok(entry.attr.ino)
    }

    pub(crate) async fn make(&self, actors: usize) -> Result<Made, Errno> {
        let mut own = Vec::new();
        for actor in 0..actors {
            let mut roots = Vec::new();
            for index in 0..OWN_DIRECTORIES {
                roots.push(self.top(format!("own{actor}-{index}")).await?);
            }
            own.push(roots);
        }
        let mut shared = Vec::new();
        for index in 0..SHARED_DIRECTORIES {
            shared.push(self.top(format!("shared{index}")).await?);
        }
        Ok(Made { own, shared, grounds: self.grounds().await? })
    }

    async fn grounds(&self) -> Result<Grounds, Errno> {
        let dirs = [self.top(ground_name(0)).await?.1, self.top(ground_name(1)).await?.1];
        let dir = dirs[0];
        let lock = self.file(dir, b"lock").await?;
        let mut logs = Vec::new();
        for log in 0..LOGS {
            logs.push(self.file(dir, format!("log{log}").as_bytes()).await?);
        }
        for number in 0..LASTING_NAMES {
            let new = NewFile { kind: FileKind::Fifo, ..NewFile::regular(0o600, 0) };
            self.client.mknod(Caller::default(), dir, &lasting_name(number), new).await?;
        }
        let mut pawns = Vec::new();
        for pawn in 0..2 * PAWNS {
            let name = pawn_name(pawn);
            pawns.push(if pawn < PAWNS { self.file(dir, &name).await? } else { self.directory(dir, &name).await? });
        }
        let ballast = if self.ballast > 0 { Some(self.load(dirs[1]).await?) } else { None };
        Ok(Grounds { dirs, logs, lock, pawns, ballast })
    }

    async fn load(&self, dir: Ino) -> Result<(Ino, u64), Errno> {
        let mut length = self.client.statfs().await?.bytes_free / 100 * self.ballast;
        let (new, flags) = (NewFile::regular(0o644, 0), OpenFlags::default());
        let (entry, file) = self.client.create(Caller::default(), dir, b"ballast", new, flags).await?;
        for offset in (0..length).step_by(BALLAST_STEP) {
            let part = ballast_bytes(offset, (length - offset).min(BALLAST_STEP as u64) as usize);
            let written = self.client.write(&file, offset, part.into(), false).await;
            // Of few segments some targets may have got so many more that no further one fits.
            if written == Err(Errno::ENOSPC) && self.client.statfs().await?.bytes_free < FULL_BELOW {
                length = offset;
                break;
            }
            written?;
        }
        self.client.fsync(&file, false).await?;
        self.client.release(&file);
        Ok((entry.attr.ino, length))
    }
}
