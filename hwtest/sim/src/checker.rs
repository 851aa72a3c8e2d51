//! What must hold when the programs rest.

use crate::history::History;
use crate::model::Model;
use crate::observe::{Tree, View, observe, read_all, reconcile};
use crate::op::Op;
use crate::report::{Checker, Violation};
use crate::sideline::{Grounds, PAWNS, pawn_name};
use crate::workload::list;
use crate::world::{Mounted, World};
use cfs_api::CheckReport;
use cfs_client::Client;
use cfs_wire::blobs::BlobKind;
use cfs_wire::meta::FileKind;
use cfs_wire::{Errno, Ino};
use std::rc::Rc;
use std::time::Duration;

/// The longest that anything may take while the node serves.
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs something in a client's domain, within reason.
pub async fn within<T: 'static>(
    world: &World,
    mounted: &Mounted,
    what: &str,
    work: impl Future<Output = T> + 'static,
) -> Result<T, Violation> {
    let running = mounted.handle.spawn(work);
    match world.handle.timeout(PATIENCE, running).await {
        Some(Ok(value)) => Ok(value),
        Some(Err(cancelled)) => Err(Violation::new(Checker::Hang, format!("{what}: {cancelled}"))),
        None => Err(Violation::new(Checker::Hang, format!("{what} did not end in {PATIENCE:?}"))),
    }
}

/// The tree as this client sees it, compared with every state that the operations under way
/// when their client died may have left. Answers those of them that have left nothing yet.
pub async fn check_tree(
    world: &World,
    history: &History,
    mounted: &Mounted,
    viewer: Option<usize>,
    uncertain: &[(usize, Op)],
) -> Result<Vec<(usize, Op)>, Violation> {
    let dead: Vec<usize> = uncertain.iter().map(|(client, _)| *client).collect();
    let client = mounted.client.clone();
    let tree = within(world, mounted, "reading the tree", async move { observe(&client).await }).await??;
    let candidates = candidates(&history.model.borrow(), uncertain);
    let chosen = choose(candidates, &tree, View { viewer, dead: &dead });
    match chosen {
        Ok(Candidate { model, undone }) => {
            *history.model.borrow_mut() = model;
            history.fold(&format!("{} inodes", tree.len()));
            Ok(undone)
        }
        Err(violation) => {
            let detail = format!("as {} sees it: {}", mounted.name, violation.detail);
            Err(Violation { detail, ..violation })
        }
    }
}

/// What may have become of operations nobody was told the end of.
struct Candidate {
    model: Model,
    /// Those of them that were not carried out.
    undone: Vec<(usize, Op)>,
}

/// The model without and with each of the operations nobody was told the end of.
fn candidates(model: &Model, uncertain: &[(usize, Op)]) -> Vec<Candidate> {
    let mut found = vec![Candidate { model: model.clone(), undone: Vec::new() }];
    for (client, op) in uncertain {
        if is_read(op) {
            continue;
        }
        for index in 0..found.len() {
            let mut model = found[index].model.clone();
            // What it works on may have gone with a client that had it open.
            if op.nodes().into_iter().all(|node| model.holds(node)) && model.apply(*client, op).is_ok() {
                let undone = found[index].undone.clone();
                found.push(Candidate { model, undone });
            }
            found[index].undone.push((*client, op.clone()));
        }
    }
    for candidate in &mut found {
        for (client, _) in uncertain {
            candidate.model.client_died(*client);
        }
    }
    found
}

fn is_read(op: &Op) -> bool {
    use Op::*;
    let reads = matches!(
        op,
        Read { .. }
            | Seek { .. }
            | StatFs
            | SyncAll
            | Reserve { .. }
            | Stat { .. }
            | Lookup { .. }
            | List { .. }
            | GetXattr { .. }
            | ListXattrs { .. }
            | ReadLink { .. }
    );
    // Nothing that these do outlives their client.
    let opens = matches!(op, Open { how, .. } if !how.truncate);
    reads || opens || matches!(op, Close { .. } | Tmpfile { .. } | Fsync { .. })
}

fn choose(candidates: Vec<Candidate>, tree: &Tree, view: View<'_>) -> Result<Candidate, Violation> {
    let mut first = None;
    for mut candidate in candidates {
        match reconcile(&mut candidate.model, tree, view) {
            Ok(()) => return Ok(candidate),
            Err(violation) => {
                first.get_or_insert(violation);
            }
        }
    }
    Err(first.unwrap_or_else(|| Violation::new(Checker::Tree, "no candidate")))
}

/// The games, now that nobody plays: logs whole, every pawn where it was left.
pub async fn check_sideline(
    world: &World,
    history: &History,
    mounted: &Mounted,
    grounds: &Grounds,
) -> Result<(), Violation> {
    for (log, ino) in grounds.logs.iter().enumerate() {
        let (client, ino) = (mounted.client.clone(), *ino);
        let bytes = within(world, mounted, "reading a common log", async move { read_all(&client, ino).await });
        let bytes = bytes
            .await?
            .map_err(|errno| Violation::new(Checker::Append, format!("a common log cannot be read: {errno}")))?;
        history.sideline.check_log(log, &bytes)?;
    }
    let (client, dirs) = (mounted.client.clone(), grounds.dirs);
    let listed = within(world, mounted, "listing the grounds", async move { walk(&client, dirs).await }).await?;
    let listed = listed.map_err(|errno| Violation::new(Checker::Reply, format!("listing the grounds: {errno}")))?;
    let places = |pawn: usize| -> Vec<usize> {
        listed.iter().filter(|(_, _, ino)| *ino == grounds.pawns[pawn]).map(|(place, _, _)| *place).collect()
    };
    let in_first: Vec<Vec<u8>> =
        listed.iter().filter(|(place, _, _)| *place == 0).map(|(_, name, _)| name.clone()).collect();
    history.sideline.check_race(&in_first)?;
    let misnamed = listed.iter().find(|(_, name, ino)| {
        let known = grounds.pawns.iter().position(|pawn| pawn == ino);
        known.is_some_and(|pawn| pawn_name(pawn) != *name)
    });
    if let Some((_, name, ino)) = misnamed {
        let detail = format!("'{}' stands for {ino}, which has another name", String::from_utf8_lossy(name));
        return Err(Violation::new(Checker::Exclusion, detail));
    }
    for pawn in PAWNS..grounds.pawns.len() {
        let found = places(pawn).len();
        if found != 1 {
            return Err(Violation::new(Checker::Exclusion, format!("directory pawn{pawn} is in {found} places")));
        }
    }
    history.sideline.check_moves(&(0..PAWNS).map(places).collect::<Vec<_>>())
}

/// Everything beneath two directories: the one it is under, name, inode.
async fn walk(client: &Rc<Client>, dirs: [Ino; 2]) -> Result<Vec<(usize, Vec<u8>, Ino)>, Errno> {
    let mut found = Vec::new();
    for (place, dir) in dirs.into_iter().enumerate() {
        let mut waiting = vec![dir];
        while let Some(dir) = waiting.pop() {
            for (name, ino) in list(client, dir).await? {
                if client.getattr(ino).await?.attr.kind == FileKind::Directory {
                    waiting.push(ino);
                }
                found.push((place, name, ino));
            }
        }
    }
    Ok(found)
}

/// The node's own check.
pub async fn check_node(world: &World, repair: bool, deep: bool) -> Result<CheckReport, Violation> {
    let node = world.node();
    let Some(report) = world.handle.timeout(PATIENCE, node.check(repair, deep)).await else {
        return Err(Violation::new(Checker::Hang, "the check does not end"));
    };
    match report.problems.first() {
        None => Ok(report),
        Some(problem) => {
            let count = report.problems.len();
            Err(Violation::new(Checker::Check, format!("check found {count} problems, the first: {problem}")))
        }
    }
}

/// Nothing wrong and all redundancy there.
pub async fn check_clean(world: &World, context: &str) -> Result<(), Violation> {
    let report = check_node(world, false, true).await.map_err(|violation| {
        let detail = format!("{context}: {}", violation.detail);
        Violation { detail, ..violation }
    })?;
    if report.degraded > 0 {
        let detail = format!("{context}: {} blobs or segments lack redundancy", report.degraded);
        return Err(Violation::new(Checker::Check, detail));
    }
    Ok(())
}

const METADATA: [BlobKind; 3] = [BlobKind::Log, BlobKind::Manifest, BlobKind::Run];
const FILES: [BlobKind; 3] = [BlobKind::Hot, BlobKind::Data, BlobKind::Parity];

/// Live blobs of a kind on all targets, and their bytes.
fn live(world: &World, kind: BlobKind) -> (u64, u64) {
    let targets = world.node().pool().readable();
    let infos = targets.iter().flat_map(|target| target.list(kind));
    infos.fold((0, 0), |(count, bytes), info| (count + 1, bytes + u64::from(info.length)))
}

/// Blobs that hold files' bytes.
pub fn file_blobs(world: &World) -> u64 {
    FILES.map(|kind| live(world, kind).0).iter().sum()
}

/// Bytes of the log and the ordered stores.
pub fn metadata_bytes(world: &World) -> u64 {
    METADATA.map(|kind| live(world, kind).1).iter().sum()
}

/// What is live, for messages.
pub fn live_by_kind(world: &World) -> String {
    let of = |kind| {
        let (count, bytes) = live(world, kind);
        format!("{kind:?} {count} with {bytes} bytes")
    };
    METADATA.map(of).into_iter().chain(FILES.map(of)).collect::<Vec<_>>().join(", ")
}
