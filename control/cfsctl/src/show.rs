//! Tables for people; JSON as the API types are.

use crate::device::Bound;
use crate::doctor::{Report, State};
use anyhow::{Context, Result};
use cfs_api::{AdminReply, CheckReport, DeviceHealth, Repair, Target};
use comfy_table::{Table, presets};
use std::io::{ErrorKind, Write};

pub fn reply(reply: &AdminReply, json: bool) -> Result<()> {
    if json {
        let value = match reply {
            AdminReply::Status(value) => serde_json::to_string_pretty(value)?,
            AdminReply::Targets(value) => serde_json::to_string_pretty(value)?,
            AdminReply::Shards(value) => serde_json::to_string_pretty(value)?,
            AdminReply::Df(value) => serde_json::to_string_pretty(value)?,
            AdminReply::Stat(value) => serde_json::to_string_pretty(value)?,
            AdminReply::Extents(value) => serde_json::to_string_pretty(value)?,
            AdminReply::Policy(value) => serde_json::to_string_pretty(value)?,
            AdminReply::Check(value) => serde_json::to_string_pretty(value)?,
        };
        return print(format!("{value}\n").as_bytes());
    }
    print(format!("{}\n", table(reply)).as_bytes())
}

pub fn device(bound: &Bound, json: bool) -> Result<()> {
    if json {
        return print(format!("{}\n", serde_json::to_string_pretty(bound)?).as_bytes());
    }
    let target = bound.target.as_deref().map(|target| format!("; its target is {target}")).unwrap_or_default();
    print(format!("{} is driven by {}{target}\n", bound.address, bound.driver).as_bytes())
}

/// What a machine has; the last line begins with `ClaudeFS can run here` or `ClaudeFS cannot run here`.
pub fn doctor(report: &Report, json: bool) -> Result<()> {
    if json {
        return print(format!("{}\n", serde_json::to_string_pretty(report)?).as_bytes());
    }
    let mut rows = Vec::new();
    for finding in &report.findings {
        let command = finding.improve.as_ref().map(|command| match finding.state {
            State::Prevents => format!("\nneeded: {command}"),
            _ => format!("\nbetter: {command}"),
        });
        let text = format!("{}\n{}{}", finding.found, finding.used, command.unwrap_or_default());
        rows.push((finding.subject.as_str(), text));
    }
    let better = report.findings.iter().filter(|finding| finding.improve.is_some()).count();
    let verdict = match (report.runs, better) {
        (false, _) => format!("ClaudeFS cannot run here: {}", report.reasons.join("; ")),
        (true, 0) => "ClaudeFS can run here".to_owned(),
        (true, better) => format!("ClaudeFS can run here; what would be better: {better}"),
    };
    print(format!("{}\n{verdict}\n", pairs(&rows)).as_bytes())
}

/// One line on stderr: `cfsctl: WHY`, or `{"error":"WHY"}`.
pub fn error(error: &anyhow::Error, json: bool) {
    let why = format!("{error:#}").replace('\n', " ");
    match json {
        true => eprintln!("{}", serde_json::json!({ "error": why })),
        false => eprintln!("cfsctl: {why}"),
    }
}

/// A reader that has seen enough and closed the pipe, like `head`, is no failure.
pub fn print(text: &[u8]) -> Result<()> {
    match std::io::stdout().lock().write_all(text) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("cannot write to standard output"),
        _ => Ok(()),
    }
}

fn table(reply: &AdminReply) -> Table {
    match reply {
        AdminReply::Status(status) => pairs(&[
            ("health", status.health.clone()),
            ("cluster", status.cluster.clone()),
            ("node", format!("n{}", status.node)),
            ("version", status.version.clone()),
            ("policy", status.policy.clone()),
            ("shards led", format!("{} of {}", status.shards_led, status.shards)),
            ("targets up", format!("{} of {}", status.targets_up, status.targets_total)),
            ("sessions", status.sessions.to_string()),
            ("degraded reads", status.degraded_reads.to_string()),
            ("repair", repair(&status.repair)),
            ("codec", status.codec.clone()),
            ("fabric", status.fabric.clone()),
            ("uptime", format!("{} s", status.uptime_seconds)),
        ]),
        AdminReply::Targets(targets) => show_targets(targets),
        AdminReply::Shards(shards) => {
            let header = ["shard", "leader", "term", "applied", "checkpointed", "inodes", "store"];
            rows(
                &header,
                shards.iter().map(|shard| {
                    vec![
                        format!("s{}", shard.id),
                        shard.leader.map_or("none".into(), |node| format!("n{node}")),
                        shard.term.to_string(),
                        shard.applied.to_string(),
                        shard.checkpointed.to_string(),
                        shard.inodes.to_string(),
                        bytes(shard.store_bytes),
                    ]
                }),
            )
        }
        AdminReply::Df(df) => pairs(&[
            ("raw capacity", bytes(df.capacity_bytes)),
            ("raw free", bytes(df.free_bytes)),
            ("usable capacity", bytes(df.usable_total_bytes)),
            ("usable free", bytes(df.usable_free_bytes)),
            ("inodes used", df.inodes.to_string()),
        ]),
        AdminReply::Stat(stat) => pairs(&[
            ("inode", stat.ino.to_string()),
            ("shard", format!("s{}", stat.shard)),
            ("kind", stat.kind.clone()),
            ("mode", stat.mode.clone()),
            ("links", stat.nlink.to_string()),
            ("owner", format!("{}:{}", stat.uid, stat.gid)),
            ("size", stat.size.to_string()),
            ("allocated", stat.allocated.to_string()),
            ("accessed", stat.atime.clone()),
            ("modified", stat.mtime.clone()),
            ("changed", stat.ctime.clone()),
            ("born", stat.btime.clone()),
            ("policy", stat.policy.clone()),
        ]),
        AdminReply::Policy(policy) => pairs(&[
            ("path", policy.path.clone()),
            ("policy", policy.policy.clone()),
            ("survives the loss of", format!("{} targets", policy.survives)),
        ]),
        AdminReply::Extents(extents) => {
            let header = ["offset", "length", "kind", "blob or segment", "targets"];
            rows(
                &header,
                extents.iter().map(|extent| {
                    let targets: Vec<String> = extent.targets.iter().map(|target| format!("t{target}")).collect();
                    vec![
                        extent.offset.to_string(),
                        extent.length.to_string(),
                        extent.kind.clone(),
                        extent.blob.clone(),
                        targets.join(" "),
                    ]
                }),
            )
        }
        AdminReply::Check(state) => pairs(&[
            ("running", state.running.to_string()),
            ("phase", state.phase.clone()),
            ("done", state.done.to_string()),
        ]),
    }
}

fn show_targets(targets: &[Target]) -> Table {
    let any_tells = targets.iter().any(|target| target.health.is_some());
    let mut header =
        vec!["target", "state", "capacity", "live", "free", "log", "metadata", "hot", "segments", "zones free"];
    // Only what the server drives itself tells of its health.
    header.extend(any_tells.then_some("device"));
    header.push("path");
    let row = |target: &Target| {
        let mut row = vec![format!("t{}", target.id), target.state.clone()];
        let sizes = [
            target.capacity_bytes,
            target.live_bytes,
            target.free_bytes,
            target.log_bytes,
            target.run_bytes + target.manifest_bytes,
            target.hot_bytes,
            target.data_bytes + target.parity_bytes,
        ];
        row.extend(sizes.map(bytes));
        row.push(format!("{}/{}", target.zones_free, target.zones));
        row.extend(any_tells.then(|| target.health.as_ref().map_or_else(String::new, device_health)));
        row.push(target.path.clone());
        row
    };
    rows(&header, targets.iter().map(row))
}

/// What a device says of itself: what it warns of, else how worn and warm it is, and whether it places data.
fn device_health(health: &DeviceHealth) -> String {
    let DeviceHealth { warnings, used_percent, temperature_c, media_errors, placement_handles, .. } = health;
    if !warnings.is_empty() {
        return warnings.join("; ");
    }
    let errors = if *media_errors == 0 { String::new() } else { format!(", {media_errors} media errors") };
    let placement = match placement_handles {
        0 => String::new(),
        1 => ", placement 1 handle".to_owned(),
        handles => format!(", placement {handles} handles"),
    };
    format!("{used_percent} % used, {temperature_c} °C{errors}{placement}")
}

fn repair(repair: &Repair) -> String {
    let mut shown = match (repair.running, repair.phase.as_str()) {
        (false, "") => "nothing to do".to_owned(),
        (false, phase) => format!("{phase}: {} repaired, {}", repair.repaired, bytes(repair.bytes)),
        (true, phase) => {
            format!("{phase}: {} to go, {} repaired, {}", repair.queued, repair.repaired, bytes(repair.bytes))
        }
    };
    if repair.waiting > 0 {
        shown += &format!(", {} wait for a target", repair.waiting);
    }
    if repair.lost > 0 {
        shown += &format!(", {} beyond repair", repair.lost);
    }
    if !repair.refilling.is_empty() {
        let targets: Vec<String> = repair.refilling.iter().map(|id| format!("t{id}")).collect();
        shown += &format!(", refilling {}", targets.join(" "));
    }
    shown
}

/// What a check found; the last line begins with `clean` or `not clean`, and tells when stored bytes
/// were only looked for.
pub fn check(report: &CheckReport, deep: bool, json: bool) -> Result<()> {
    if json {
        return print(format!("{}\n", serde_json::to_string_pretty(report)?).as_bytes());
    }
    let counts = pairs(&[
        ("inodes", report.inodes.to_string()),
        ("entries", report.entries.to_string()),
        ("references", report.references.to_string()),
        ("segments", report.segments.to_string()),
        ("replicated blobs", report.blobs.to_string()),
        ("open but unlinked", report.orphans.to_string()),
        ("below redundancy", report.degraded.to_string()),
        ("repaired", report.repaired.to_string()),
        ("problems", report.problems.len().to_string()),
    ]);
    let mut text = format!("{counts}\n");
    for problem in &report.problems {
        text += &format!("problem: {problem}\n");
    }
    let verdict = match (report.is_clean(), deep) {
        (true, true) => "clean",
        (true, false) => "clean; bytes were not read (--deep reads them)",
        (false, _) => "not clean",
    };
    print(format!("{text}{verdict}\n").as_bytes())
}

fn pairs(rows: &[(&str, String)]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in rows {
        table.add_row(vec![(*name).to_owned(), value.clone()]);
    }
    table
}

fn rows(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    table
}

/// Binary units with one decimal, as `df -h` has them.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_have_a_column_for_their_devices_where_one_tells_of_itself() {
        let files: Vec<Target> = (0..2).map(|id| Target { id, path: format!("/data/t{id}"), ..none() }).collect();
        assert!(!show_targets(&files).to_string().contains("device"));
        let health = DeviceHealth {
            warnings: Vec::new(),
            temperature_c: 41,
            spare_percent: 100,
            used_percent: 3,
            media_errors: 2,
            unsafe_shutdowns: 0,
            power_on_hours: 9,
            placement_handles: 0,
        };
        let worn =
            DeviceHealth { warnings: vec!["its spare capacity is 4 %, below 10 %".to_owned()], ..health.clone() };
        let placing = DeviceHealth { placement_handles: 4, media_errors: 0, ..health.clone() };
        let driven = [health, placing, worn].map(|health| Target { health: Some(health), ..none() });
        let shown = show_targets(&[&files[..], &driven[..]].concat()).to_string();
        assert!(shown.lines().next().unwrap().contains("device"), "{shown}");
        assert!(shown.contains("3 % used, 41 °C, 2 media errors "), "{shown}");
        assert!(shown.contains("3 % used, 41 °C, placement 4 handles "), "{shown}");
        assert!(shown.contains("its spare capacity is 4 %, below 10 %"), "{shown}");
    }

    fn none() -> Target {
        Target {
            id: 9,
            path: String::new(),
            state: "up".to_owned(),
            capacity_bytes: 0,
            live_bytes: 0,
            free_bytes: 0,
            zones: 0,
            zones_free: 0,
            log_bytes: 0,
            run_bytes: 0,
            manifest_bytes: 0,
            hot_bytes: 0,
            data_bytes: 0,
            parity_bytes: 0,
            tombstones: 0,
            health: None,
        }
    }
}
