//! What must hold when the programs rest.

use crate::history::History;
use crate::model::Model;
use crate::observe::{Tree, View, observe, read_all, reconcile};
use crate::op::Op;
use crate::report::{Checker, Violation};
use crate::workload::SidelineFiles;
use crate::world::{Mounted, World};
use cfs_api::CheckReport;
use cfs_wire::blobs::BlobKind;
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
/// when their client died may have left.
pub async fn check_tree(
    world: &World,
    history: &History,
    mounted: &Mounted,
    viewer: Option<usize>,
    uncertain: &[(usize, Op)],
) -> Result<(), Violation> {
    let dead: Vec<usize> = uncertain.iter().map(|(client, _)| *client).collect();
    let client = mounted.client.clone();
    let tree = within(world, mounted, "reading the tree", async move { observe(&client).await }).await??;
    let candidates = candidates(&history.model.borrow(), uncertain);
    let chosen = choose(candidates, &tree, View { viewer, dead: &dead });
    match chosen {
        Ok(model) => {
            *history.model.borrow_mut() = model;
            history.fold(&format!("{} inodes", tree.len()));
            Ok(())
        }
        Err(violation) => {
            let detail = format!("as {} sees it: {}", mounted.name, violation.detail);
            Err(Violation { detail, ..violation })
        }
    }
}

/// The model without and with each of the operations nobody was told the end of.
fn candidates(model: &Model, uncertain: &[(usize, Op)]) -> Vec<Model> {
    let mut found = vec![model.clone()];
    for (client, op) in uncertain {
        if is_read(op) {
            continue;
        }
        for index in 0..found.len() {
            let mut done = found[index].clone();
            if done.apply(*client, op).is_ok() {
                found.push(done);
            }
        }
    }
    for model in &mut found {
        for (client, _) in uncertain {
            model.client_died(*client);
        }
    }
    found
}

fn is_read(op: &Op) -> bool {
    use Op::*;
    let reads = matches!(
        op,
        Read { .. } | Stat { .. } | Lookup { .. } | List { .. } | GetXattr { .. } | ListXattrs { .. } | ReadLink { .. }
    );
    // Nothing that these do outlives their client.
    reads || matches!(op, Open { .. } | Close { .. } | Tmpfile { .. } | Fsync { .. })
}

fn choose(candidates: Vec<Model>, tree: &Tree, view: View<'_>) -> Result<Model, Violation> {
    let mut first = None;
    for mut model in candidates {
        match reconcile(&mut model, tree, view) {
            Ok(()) => return Ok(model),
            Err(violation) => {
                first.get_or_insert(violation);
            }
        }
    }
    Err(first.unwrap_or_else(|| Violation::new(Checker::Tree, "no candidate")))
}

/// The common log.
pub async fn check_sideline(
    world: &World,
    history: &History,
    mounted: &Mounted,
    files: SidelineFiles,
) -> Result<(), Violation> {
    let client = mounted.client.clone();
    let bytes = within(world, mounted, "reading the common log", async move { read_all(&client, files.log).await });
    let bytes = bytes
        .await?
        .map_err(|errno| Violation::new(Checker::Append, format!("the common log cannot be read: {errno}")))?;
    history.sideline.check_log(&bytes)
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
