//! Damage beyond what redundancy can bear. Much may be lost then, and the node may refuse to
//! start; but whatever is still answered is right: an error, never older or other contents.

use crate::checker::within;
use crate::content::difference;
use crate::history::History;
use crate::ledger::Trust;
use crate::model::ROOT;
use crate::observe::{read_all, read_xattrs};
use crate::op::{NodeId, shown};
use crate::report::{Checker, Violation};
use crate::workload::list;
use crate::world::{Death, Mounted, Started, World};
use cfs_reactor::clock::SplitMix64;
use cfs_wire::blobs::{BlobInfo, BlobKind};
use cfs_wire::meta::FileKind;
use cfs_wire::{BlobId, Errno, Ino};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A client gives up what it gets no answer to after its retry window: so long for everything.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// Destroys a part of what all disks hold while the node is stopped; then everything is read.
pub async fn ruin(world: &World, history: &History, mut random: SplitMix64) -> Result<(), Violation> {
    let lost = if random.one_in(2) {
        let lost = lose_blobs(world, history, &mut random).await?;
        world.crash_server(Death::Power);
        lost
    } else {
        destroy_blocks(world, history, &mut random).await;
        Loss::Anything
    };
    look_at_ruins(world, history, lost).await
}

/// What may be lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Loss {
    /// Bytes of files: the node starts, and all but the bytes is answered.
    Contents,
    Anything,
}

/// A few blobs of one kind are gone from all targets.
async fn lose_blobs(world: &World, history: &History, random: &mut SplitMix64) -> Result<Loss, Violation> {
    const KINDS: [BlobKind; 6] =
        [BlobKind::Log, BlobKind::Log, BlobKind::Run, BlobKind::Manifest, BlobKind::Hot, BlobKind::Data];
    let kind = KINDS[random.below(KINDS.len() as u64) as usize];
    let targets = world.node().pool().writable();
    let known: BTreeMap<BlobId, BlobInfo> =
        targets.iter().flat_map(|target| target.list(kind)).map(|blob| (blob.id, blob)).collect();
    let lost: BTreeSet<BlobId> = match kind {
        BlobKind::Log if random.one_in(2) => all_but_the_newest(&known, random),
        _ => {
            let some = 0..(1 + random.below(3)).min(known.len() as u64);
            some.filter_map(|_| known.keys().nth(random.below(known.len() as u64) as usize)).copied().collect()
        }
    };
    history.note(format!("{} blobs of kind {kind:?} are lost on all targets", lost.len()));
    world.disk_harmed(lost.len() as u64);
    for target in &targets {
        let held: Vec<BlobId> = lost.iter().copied().filter(|blob| target.stat(*blob).is_some()).collect();
        let deleted = target.delete(held).await;
        deleted.map_err(|error| Violation::new(Checker::Store, format!("losing blobs: {error}")))?;
    }
    Ok(if matches!(kind, BlobKind::Hot | BlobKind::Data) { Loss::Contents } else { Loss::Anything })
}

/// The batches of the log from a drawn one on, without the last, which alone tells that there were
/// others.
fn all_but_the_newest(known: &BTreeMap<BlobId, BlobInfo>, random: &mut SplitMix64) -> BTreeSet<BlobId> {
    let sequences: BTreeSet<u64> = known.values().map(|blob| blob.owner.low).collect();
    let Some(newest) = sequences.last().copied() else { return BTreeSet::new() };
    let first = sequences.iter().nth(random.below(sequences.len() as u64) as usize).copied().unwrap_or(newest);
    known.values().filter(|blob| (first..newest).contains(&blob.owner.low)).map(|blob| blob.id).collect()
}

/// Some in a thousand blocks of every disk.
async fn destroy_blocks(world: &World, history: &History, random: &mut SplitMix64) {
    let per_mille = [2, 10, 50, 200][random.below(4) as usize];
    history.note(format!("{per_mille} in a thousand blocks of every disk are destroyed"));
    // What a shutdown would have checkpointed is then in the log only.
    match random.one_in(2) {
        true => world.stop_server().await,
        false => world.crash_server(Death::Power),
    }
    for (index, disk) in world.disks().iter().enumerate() {
        world.distrust(index, Trust::Faulty);
        world.disk_harmed(disk.corrupt_written(per_mille, random.next_u64()));
    }
}

async fn look_at_ruins(world: &World, history: &History, loss: Loss) -> Result<(), Violation> {
    match world.start_server().await {
        Ok(Started::Serving) => {}
        Ok(Started::Halted) => return Err(Violation::new(Checker::Hang, "a disk halted that nobody armed")),
        Err(refused) if refused.checker == Checker::Restart && loss == Loss::Anything => {
            history.note(format!("the node refuses: {}", refused.detail));
            return Ok(());
        }
        Err(violation) => return Err(violation),
    }
    let mounting = world.mount("witness");
    let witness = match world.handle.timeout(PATIENCE, Box::pin(mounting)).await {
        Some(Ok(witness)) => witness,
        Some(Err(refused)) if loss == Loss::Contents => return Err(refused),
        Some(Err(refused)) => {
            history.note(format!("nobody can mount: {}", refused.detail));
            return Ok(());
        }
        None => return Err(Violation::new(Checker::Hang, "a mount of ruined disks does not end")),
    };
    let outcome = world.handle.timeout(PATIENCE, Box::pin(look(world, history, &witness, loss))).await;
    witness.kill();
    world.ledger.verdict()?;
    outcome.unwrap_or_else(|| Err(Violation::new(Checker::Hang, "reading ruined disks does not end")))
}

/// What was lost shows as this.
fn is_loss(errno: Errno) -> bool {
    errno == Errno::EIO
}

/// Takes an answer apart: `None` if what was asked for is lost, which it must be allowed to be.
fn answered<T>(what: &str, answer: Result<T, Errno>, loss: Loss) -> Result<Option<T>, Violation> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(errno) if is_loss(errno) && loss == Loss::Anything => Ok(None),
        Err(errno) => Err(Violation::new(Checker::Tree, format!("{what}, which was there, answers {errno}"))),
    }
}

async fn look(world: &World, history: &History, witness: &Mounted, loss: Loss) -> Result<(), Violation> {
    let mut waiting: Vec<(NodeId, String)> = vec![(ROOT, "/".to_owned())];
    let mut seen: Vec<NodeId> = Vec::new();
    while let Some((id, path)) = waiting.pop() {
        if seen.contains(&id) {
            continue;
        }
        seen.push(id);
        let node = history.model.borrow().node(id).clone();
        let Some(ino) = node.ino.filter(|_| !node.opaque) else { continue };
        look_at(world, history, witness, (id, ino), &path, loss).await?;
        let names = node.names.iter().map(|(name, child)| (*child, format!("{path}{}/", shown(name))));
        waiting.extend(names);
    }
    Ok(())
}

async fn look_at(
    world: &World,
    history: &History,
    witness: &Mounted,
    (id, ino): (NodeId, Ino),
    path: &str,
    loss: Loss,
) -> Result<(), Violation> {
    let wrong = |checker, detail: String| Err(Violation::new(checker, format!("{path} of ruined disks: {detail}")));
    let node = history.model.borrow().node(id).clone();
    let client = witness.client.clone();
    let attr = within(world, witness, "getattr", async move { client.getattr(ino).await }).await?;
    if let Some(located) = answered(path, attr, loss)?
        && let Err(detail) = history.model.borrow().check_attr(id, &located.attr)
    {
        return wrong(Checker::Tree, detail);
    }
    let client = witness.client.clone();
    let xattrs = within(world, witness, "extended attributes", async move { read_xattrs(&client, ino).await }).await?;
    if let Some(found) = answered(path, xattrs, loss)?
        && found != node.all_xattrs()
    {
        return wrong(Checker::Tree, format!("extended attributes {found:?}, not {:?}", node.all_xattrs()));
    }
    let client = witness.client.clone();
    match node.new.kind {
        FileKind::File => {
            let bytes = within(world, witness, "reading", async move { read_all(&client, ino).await }).await?;
            match answered(path, bytes, Loss::Anything)? {
                Some(bytes) if bytes != node.content.now() => {
                    wrong(Checker::Contents, difference(node.content.now(), &bytes))
                }
                _ => Ok(()),
            }
        }
        FileKind::Directory => {
            let names = within(world, witness, "listing", async move { list(&client, ino).await }).await?;
            let Some(found) = answered(path, names, loss)? else { return Ok(()) };
            let found: Vec<_> = found.iter().map(|(name, _)| name).collect();
            let expected: Vec<_> = node.names.keys().collect();
            if found == expected { Ok(()) } else { wrong(Checker::Tree, format!("lists {found:?}, not {expected:?}")) }
        }
        FileKind::Symlink => {
            let target = within(world, witness, "readlink", async move { client.readlink(ino).await }).await?;
            match answered(path, target, loss)? {
                Some(target) if target != node.new.target => wrong(Checker::Contents, "another target".to_owned()),
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    }
}
