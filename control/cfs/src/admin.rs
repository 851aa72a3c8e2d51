//! Answers the admin API from the node's own state.

use crate::node::Node;
use cfs_api::{
    AdminCall, AdminError, AdminReply, DeviceHealth, Df, FileExtent, FileStat, PathPolicy, Shard, Status, Target,
};
use cfs_movers::rebuild::Refills;
use cfs_store::segment::TargetState;
use cfs_wire::blobs::BlobKind;
use cfs_wire::data::Location;
use cfs_wire::limits::NAME_BYTES_MAX;
use cfs_wire::meta::{Attr, FileKind, MetaError, MetaOp, MetaReply, Name, ShardOp};
use cfs_wire::{Errno, Ino, Policy, PolicyError, ShardId, Timestamp};
use futures_util::future::join_all;
use std::rc::Rc;

/// Extents fetched at once when listing a file's.
const EXTENTS_BATCH: u32 = 1024;

pub async fn answer(node: &Rc<Node>, call: AdminCall) -> Result<AdminReply, AdminError> {
    match call {
        AdminCall::Status => Ok(AdminReply::Status(status(node))),
        AdminCall::Targets => Ok(AdminReply::Targets(targets(node).await)),
        AdminCall::Shards => shards(node).await.map(AdminReply::Shards),
        AdminCall::Df => df(node).await.map(AdminReply::Df),
        AdminCall::Stat { path } => {
            let ino = resolve(node, &path).await?;
            Ok(AdminReply::Stat(file_stat(&attributes(node, ino, &path).await?)))
        }
        AdminCall::Extents { path } => extents(node, &path).await.map(AdminReply::Extents),
        AdminCall::PolicyShow { path } => policy_of(node, &path).await.map(AdminReply::Policy),
        AdminCall::PolicySet { path, policy } => {
            set_policy(node, &path, policy.as_deref()).await?;
            policy_of(node, &path).await.map(AdminReply::Policy)
        }
        AdminCall::CheckStart { repair, deep } => node.start_check(repair, deep).map(AdminReply::Check),
        AdminCall::CheckPoll => Ok(AdminReply::Check(node.check_state())),
    }
}

fn status(node: &Node) -> Status {
    let states = node.pool().states();
    let up = states.iter().filter(|(_, state)| *state == TargetState::Up).count();
    let repair = node.movers().rebuild.progress();
    let (shards, shards_led) = (node.parameters().shards, node.shards_led());
    let rebuilt = repair.refilling.is_empty() && repair.waiting == 0 && repair.lost == 0;
    let whole = up == states.len() && rebuilt && shards_led == shards && !node.was_check_unclean();
    let health = if whole { "ok" } else { "degraded" };
    Status {
        cluster: node.cluster().to_string(),
        node: node.id().0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        policy: node.parameters().policy.to_string(),
        shards,
        shards_led,
        targets_up: up as u32,
        targets_total: states.len() as u32,
        sessions: node.sessions(),
        degraded_reads: node.store().degraded_reads(),
        uptime_seconds: node.uptime().as_secs(),
        health: health.to_owned(),
        repair,
        codec: node.config().segments.backend.to_string(),
        fabric: [vec!["tcp".to_owned()], node.offers()].concat().join(", "),
    }
}

async fn targets(node: &Node) -> Vec<Target> {
    let labels = node.target_labels();
    let lacking = node.membership().lacking();
    let describe = async |(id, state): (cfs_wire::TargetId, TargetState)| {
        let target = node.pool().get(id);
        let space = target.as_ref().map(|target| target.space());
        let health = match &target {
            Some(target) => target.device_health().await,
            None => None,
        };
        let payload = |kind| space.map_or(0, |space| space.payload_of(kind));
        let state = match state {
            TargetState::Up if lacking.contains_key(&id) => "up, being refilled".to_owned(),
            TargetState::Up => "up".to_owned(),
            TargetState::Failed(reason) => format!("failed: {reason}"),
            TargetState::Absent(reason) => format!("absent: {reason}"),
        };
        Target {
            id: id.0,
            path: labels.get(&id).cloned().unwrap_or_default(),
            state,
            capacity_bytes: space.map_or(0, |space| space.capacity),
            live_bytes: space.map_or(0, |space| space.live),
            free_bytes: space.map_or(0, |space| space.free),
            zones: space.map_or(0, |space| space.zones_total),
            zones_free: space.map_or(0, |space| space.zones_free),
            log_bytes: payload(BlobKind::Log),
            run_bytes: payload(BlobKind::Run),
            manifest_bytes: payload(BlobKind::Manifest),
            hot_bytes: payload(BlobKind::Hot),
            data_bytes: payload(BlobKind::Data),
            parity_bytes: payload(BlobKind::Parity),
            tombstones: space.map_or(0, |space| space.tombstones),
            health: health.as_ref().map(health_in_words),
        }
    };
    join_all(node.pool().states().into_iter().map(describe)).await
}

fn health_in_words(health: &cfs_device::DeviceHealth) -> DeviceHealth {
    let cfs_device::DeviceHealth { warnings, spare_percent, spare_percent_min, .. } = health;
    let low = format!("its spare capacity is {spare_percent} %, below {spare_percent_min} %");
    let said = [
        (warnings.spare_is_low, low.as_str()),
        (warnings.temperature, "its temperature is out of bounds"),
        (warnings.unreliable, "it has become unreliable"),
        (warnings.read_only, "it is read-only"),
        (warnings.backup_failed, "its volatile memory is not backed up any more"),
    ];
    DeviceHealth {
        warnings: said.into_iter().filter(|(warns, _)| *warns).map(|(_, text)| text.to_owned()).collect(),
        temperature_c: health.temperature_c,
        spare_percent: *spare_percent,
        used_percent: health.used_percent,
        media_errors: health.media_errors,
        unsafe_shutdowns: health.unsafe_shutdowns,
        power_on_hours: health.power_on_hours,
        placement_handles: health.placement_handles,
    }
}

async fn shards(node: &Node) -> Result<Vec<Shard>, AdminError> {
    let mut shards = Vec::new();
    for id in (0..node.parameters().shards).map(ShardId) {
        let facts = node.shard_facts(id);
        shards.push(Shard {
            id: id.0,
            leader: facts.leader.map(|leader| leader.0),
            term: facts.term,
            applied: facts.applied,
            checkpointed: facts.checkpointed,
            inodes: inodes_used(node, id).await?,
            store_bytes: facts.store.run_bytes,
            recent_runs: facts.store.recent_runs as u64,
            level_bytes: facts.store.level_bytes,
            entries: facts.store.entries,
        });
    }
    Ok(shards)
}

async fn inodes_used(node: &Node, shard: ShardId) -> Result<u64, AdminError> {
    match node.meta().inspect(shard, &MetaOp::StatFs { count_inodes: false }).await {
        Ok(MetaReply::StatFs(stat)) => Ok(stat.inodes_used),
        Ok(other) => Err(AdminError::Unavailable(format!("unexpected answer {other:?}"))),
        Err(error) => Err(AdminError::Unavailable(error.to_string())),
    }
}

async fn df(node: &Node) -> Result<Df, AdminError> {
    let mut inodes = 0;
    for shard in (0..node.parameters().shards).map(ShardId) {
        inodes += inodes_used(node, shard).await?;
    }
    let spaces: Vec<_> = node.pool().readable().iter().map(|target| target.space()).collect();
    let (usable_total_bytes, usable_free_bytes) = node.usable_space();
    Ok(Df {
        capacity_bytes: spaces.iter().map(|space| space.capacity).sum(),
        free_bytes: spaces.iter().map(|space| space.free).sum(),
        usable_free_bytes,
        usable_total_bytes,
        inodes,
    })
}

fn path_error(path: &[u8], detail: impl ToString) -> AdminError {
    AdminError::Path { path: String::from_utf8_lossy(path).into_owned(), detail: detail.to_string() }
}

/// Walks a path from the root of the volume; symlinks are not followed.
async fn resolve(node: &Node, path: &[u8]) -> Result<Ino, AdminError> {
    let mut ino = Ino::ROOT;
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".") {
        let op = MetaOp::Lookup { dir: ino, name: Name::from_slice(name) };
        ino = match node.meta().inspect(ino.shard(), &op).await {
            Ok(MetaReply::Entry(entry)) => entry.attr.ino,
            Ok(MetaReply::Remote { ino, .. }) => ino,
            Ok(other) => return Err(path_error(path, format!("unexpected answer {other:?}"))),
            Err(MetaError::Errno(Errno::ENOENT)) => {
                let detail = "not found; give the path inside the volume, not that of the mount";
                return Err(path_error(path, detail));
            }
            Err(MetaError::Errno(Errno::ENOTDIR)) => {
                return Err(path_error(path, "something on the way is not a directory; symlinks are not followed"));
            }
            Err(MetaError::Errno(Errno::ENAMETOOLONG)) => {
                let detail = format!("a name of {} bytes; {NAME_BYTES_MAX} is the longest", name.len());
                return Err(path_error(path, detail));
            }
            Err(error) => return Err(path_error(path, error)),
        };
    }
    Ok(ino)
}

async fn attributes(node: &Node, ino: Ino, path: &[u8]) -> Result<Attr, AdminError> {
    match node.meta().inspect(ino.shard(), &MetaOp::GetAttr { ino }).await {
        Ok(MetaReply::Attr { attr, .. }) => Ok(attr),
        Ok(other) => Err(path_error(path, format!("unexpected answer {other:?}"))),
        Err(error) => Err(path_error(path, error)),
    }
}

fn file_stat(attr: &Attr) -> FileStat {
    FileStat {
        ino: attr.ino.as_u64(),
        shard: attr.ino.shard().0,
        kind: kind_name(attr.kind).to_owned(),
        mode: format!("{:04o}", attr.mode),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        size: attr.size,
        allocated: attr.allocated,
        atime: time_text(attr.atime),
        mtime: time_text(attr.mtime),
        ctime: time_text(attr.ctime),
        btime: time_text(attr.btime),
        policy: attr.policy.to_string(),
    }
}

async fn policy_of(node: &Node, path: &[u8]) -> Result<PathPolicy, AdminError> {
    let ino = resolve(node, path).await?;
    let policy = attributes(node, ino, path).await?.policy;
    let path = String::from_utf8_lossy(path).into_owned();
    Ok(PathPolicy { path, policy: policy.to_string(), survives: policy.parity() as u32 })
}

/// Refuses by name what the metadata would refuse by number.
async fn set_policy(node: &Node, path: &[u8], policy: Option<&str>) -> Result<(), AdminError> {
    let policy: Option<Policy> = policy.map(str::parse).transpose().map_err(|error: PolicyError| refused(error))?;
    if let Some(policy) = policy {
        policy.check_kept(node.parameters().tolerated, node.parameters().targets).map_err(refused)?;
    }
    let ino = resolve(node, path).await?;
    match node.meta().shard_call(ino.shard(), ShardOp::SetPolicy { ino, policy }).await {
        Ok(_) => Ok(()),
        Err(MetaError::Errno(Errno::ENOTDIR)) => {
            Err(path_error(path, "not a directory; a file keeps the policy it was made with"))
        }
        Err(error) => Err(path_error(path, error)),
    }
}

fn refused(reason: impl ToString) -> AdminError {
    AdminError::Policy(reason.to_string())
}

fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharDevice => "character device",
        FileKind::BlockDevice => "block device",
    }
}

/// Seconds since the epoch with nanoseconds, as `stat -c %.9Y` prints them.
fn time_text(time: Timestamp) -> String {
    format!("{}.{:09}", time.secs, time.nanos)
}

async fn extents(node: &Node, path: &[u8]) -> Result<Vec<FileExtent>, AdminError> {
    let ino = resolve(node, path).await?;
    let mut listed = Vec::new();
    let mut offset = 0;
    loop {
        let op = MetaOp::GetExtents { ino, offset, length: u64::MAX - offset, extents_max: EXTENTS_BATCH };
        let reply = match node.meta().inspect(ino.shard(), &op).await {
            Ok(MetaReply::Extents(reply)) => reply,
            Ok(other) => return Err(path_error(path, format!("unexpected answer {other:?}"))),
            Err(error) => return Err(path_error(path, error)),
        };
        if let Some(inline) = reply.inline.filter(|inline| !inline.is_empty() && offset == 0) {
            listed.push(FileExtent {
                offset: 0,
                length: inline.len() as u64,
                kind: "inline".into(),
                blob: String::new(),
                targets: Vec::new(),
            });
        }
        for extent in &reply.extents {
            listed.push(describe(node, extent).await);
        }
        if reply.covered >= reply.attr.size || reply.covered <= offset {
            return Ok(listed);
        }
        offset = reply.covered;
    }
}

async fn describe(node: &Node, extent: &cfs_wire::data::Extent) -> FileExtent {
    let (kind, blob, targets) = match &extent.location {
        Location::Hot { blob, targets, .. } => ("hot", blob.to_string(), targets.iter().map(|id| id.0).collect()),
        Location::Chunk { segment, slot, .. } => {
            let registration = node.store().describe(*segment).await;
            let places = registration.map(|found| found.shards.iter().map(|place| place.target.0).collect());
            ("segment", format!("{segment}/{slot}"), places.unwrap_or_default())
        }
    };
    FileExtent { offset: extent.offset, length: extent.length.into(), kind: kind.into(), blob, targets }
}
