//! `cfs dev`: a whole one-node cluster on files in a directory, mounted, in one process.

use crate::cli::DevArgs;
use crate::server::{self, Server, Settings};
use crate::signals::Signals;
use crate::{load_identity, mount, say};
use anyhow::{Context, Result, anyhow, bail};
use cfs::format::FormatSpec;
use cfs_wire::{Policy, TargetId};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

const TARGETS_DEFAULT: u16 = 3;
const SIZE_DEFAULT: u64 = 10 << 30;
const SHARDS_DEFAULT: u16 = 8;
/// Where tools find the address that was bound.
const ADDRESS_FILE: &str = "address";
/// The name under which the last start mounted. That client ended with its process, so the next
/// start gives away what it held instead of waiting for its lease to end.
const CLIENT_FILE: &str = "client";
/// How many targets and what they were made for; a later start needs no flags.
const LAYOUT_FILE: &str = "cluster.toml";
/// There from before the first target is made until the layout is written.
const FORMATTING_FILE: &str = "formatting";

pub fn run(args: DevArgs) -> Result<()> {
    if let Some(target) = args.replace {
        let _alone = lock(&args.data)?;
        return replace(&args.data, target);
    }
    let Some(mountpoint) = &args.mountpoint else { bail!("give a mountpoint") };
    mount::check_mountpoint(mountpoint)?;
    std::fs::create_dir_all(&args.data).with_context(|| {
        format!("cannot create {}; give a --data directory that this user may write to", args.data.display())
    })?;
    let _alone = lock(&args.data)?;
    let targets = prepare(&args)?;
    let signals = Signals::catch()?;
    let client_file = args.data.join(CLIENT_FILE);
    let dead_client = std::fs::read_to_string(&client_file).ok();
    let identity = load_identity(args.tuning.identity.as_deref())?;
    let settings = Settings {
        listen: args.listen.clone(),
        targets,
        spin_us: args.tuning.spin_us,
        session_lease_ms: args.tuning.session_lease_ms,
        read_lease_ms: args.tuning.read_lease_ms,
        repair_mib_s: args.tuning.repair_mib_s,
        identity: identity.clone(),
        codec: args.tuning.codec.clone(),
        fabric: args.tuning.fabric.clone(),
        dead_client,
    };
    let server = Server::start(settings)?;
    let address_file = args.data.join(ADDRESS_FILE);
    write_durably(&address_file, server.address())?;
    signals.end_in_order();
    say(&format!("serving {} on {}", args.data.display(), server.address()));
    let client = client_name(mountpoint)?;
    write_durably(&client_file, &client)?;
    let transport = mount::transport(args.tuning.fabric.as_deref())?;
    let mounted = mount::in_background(server.address(), mountpoint, (identity, transport), client, signals.waker()?)?;
    say(&format!("mounted at {}; Ctrl-C or umount ends it", mountpoint.display()));
    signals.wait()?;
    // First the client, whose dirty bytes the server must still take.
    let unmounted = mounted.unmount();
    mount::both(unmounted, server.stop())
}

/// Keeps every other `cfs dev` out of a data directory: one that begins would take the targets that
/// another one is still making for left behind.
fn lock(data: &Path) -> Result<File> {
    let directory = File::open(data).with_context(|| format!("cannot open {}", data.display()))?;
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(directory),
        Err(Errno::WOULDBLOCK) => bail!("another cfs dev uses {}; stop it, or give another --data", data.display()),
        Err(error) => Err(error).with_context(|| format!("cannot lock {}", data.display())),
    }
}

/// A name that no other client has or had.
fn client_name(mountpoint: &Path) -> Result<String> {
    const UNIQUE: &str = "/proc/sys/kernel/random/uuid";
    let unique = std::fs::read_to_string(UNIQUE).with_context(|| format!("cannot read {UNIQUE}"))?;
    Ok(format!("dev {} ({})", mountpoint.display(), unique.trim()))
}

fn target_path(data: &Path, index: u32) -> PathBuf {
    data.join(format!("target-{index}"))
}

/// The paths of the targets, formatted if the directory is new.
fn prepare(args: &DevArgs) -> Result<Vec<PathBuf>> {
    let data = &args.data;
    let layout = data.join(LAYOUT_FILE);
    if layout.exists() {
        let count = read_layout(&layout)?;
        let paths: Vec<PathBuf> = (0..count).map(|index| target_path(data, index)).collect();
        check_made_so(args, &paths)?;
        return Ok(paths);
    }
    let targets = args.targets.unwrap_or(TARGETS_DEFAULT);
    // What three targets bear: any one may be lost.
    let policy = args.ec.map_or_else(|| Policy::new(2, 1), Ok)?;
    let paths: Vec<PathBuf> = (0..u32::from(targets)).map(|index| target_path(data, index)).collect();
    clear_unfinished(data, &paths)?;
    let mark = data.join(FORMATTING_FILE);
    write_durably(&mark, "a format that did not finish left this; the next start begins anew\n")?;
    let size = target_bytes(args.size.unwrap_or(SIZE_DEFAULT), targets.into());
    let shards = args.shards.unwrap_or(SHARDS_DEFAULT);
    let spec = FormatSpec { policy, tolerate: args.tolerate, shards, zone_bytes: None, force: false };
    if let Err(error) = server::format_files(&paths, Some(size), spec) {
        return Err(unmarked(&mark, &paths, error));
    }
    if let Err(error) = write_durably(&layout, &format!("targets = {targets}\n")) {
        // Made here, and nobody has them yet. One that stays keeps the mark.
        paths.iter().for_each(|path| drop(std::fs::remove_file(path)));
        return Err(unmarked(&mark, &paths, error));
    }
    std::fs::remove_file(&mark).with_context(|| format!("cannot remove {}", mark.display()))?;
    say(&format!("formatted {targets} targets of {} MiB, policy {policy}", size >> 20));
    Ok(paths)
}

/// Takes the mark of a format that failed away, unless it left targets: the next start is to remove
/// those. That it can't be is told behind why the format failed.
fn unmarked(mark: &Path, paths: &[PathBuf], error: anyhow::Error) -> anyhow::Error {
    if paths.iter().any(|path| path.exists()) {
        return error;
    }
    match std::fs::remove_file(mark) {
        Ok(()) => error,
        Err(stays) => anyhow!("{error:#}; cannot remove {}: {stays}", mark.display()),
    }
}

/// Of one target: whole MiB.
fn target_bytes(all: u64, targets: u64) -> u64 {
    (all / targets.max(1)) & !((1 << 20) - 1)
}

/// What a cluster was made with stays: a flag that says otherwise is refused, not dropped.
fn check_made_so(args: &DevArgs, paths: &[PathBuf]) -> Result<()> {
    let differs = |flag: &str, asked: String, made: String| -> Result<()> {
        if asked == made {
            return Ok(());
        }
        bail!(
            "{} was made with {flag} {made}, not {asked}, and keeps it: leave {flag} out, or give another --data",
            args.data.display()
        )
    };
    if let Some(targets) = args.targets {
        differs("--targets", targets.to_string(), paths.len().to_string())?;
    }
    let found = paths.iter().find_map(|path| std::fs::metadata(path).ok().filter(|found| found.is_file()));
    if let (Some(size), Some(found)) = (args.size, found) {
        let asked = target_bytes(size, paths.len() as u64);
        differs("--size", shown_size(asked, paths.len()), shown_size(found.len(), paths.len()))?;
    }
    if args.ec.is_none() && args.tolerate.is_none() && args.shards.is_none() {
        return Ok(());
    }
    // Where nothing can be read the start says so.
    let Some(made) = server::parameters_of(paths)? else { return Ok(()) };
    if let Some(policy) = args.ec {
        differs("--ec", policy.to_string(), made.policy.to_string())?;
    }
    if let Some(tolerate) = args.tolerate {
        differs("--tolerate", tolerate.to_string(), made.tolerated.to_string())?;
    }
    if let Some(shards) = args.shards {
        differs("--shards", shards.to_string(), made.shards.to_string())?;
    }
    Ok(())
}

fn shown_size(target: u64, targets: usize) -> String {
    format!("{}M", (target >> 20) * targets as u64)
}

/// Removes what a format cut by a crash left behind; targets without its mark may hold files.
fn clear_unfinished(data: &Path, paths: &[PathBuf]) -> Result<()> {
    let unfinished = data.join(FORMATTING_FILE).exists();
    for path in paths.iter().filter(|path| path.exists()) {
        if !unfinished {
            bail!(
                "{} exists but {} does not: move the targets away to begin anew, or write the line \
                 'targets = N' into that file to use them",
                path.display(),
                data.join(LAYOUT_FILE).display()
            );
        }
        std::fs::remove_file(path).with_context(|| format!("cannot remove unfinished {}", path.display()))?;
    }
    Ok(())
}

/// Writes a small file and makes it and its name durable. Where that fails, as on a full disk, what
/// was there before stays, and nothing else does.
fn write_durably(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(parent)?.sync_all()
    };
    write().inspect_err(|_| drop(std::fs::remove_file(&new))).with_context(|| {
        format!("cannot write {}; free some space, or give a --data directory that can be written to", path.display())
    })
}

fn read_layout(path: &Path) -> Result<u32> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let table: toml::Table = toml::from_str(&text).with_context(|| format!("{} is damaged", path.display()))?;
    let count = table.get("targets").and_then(toml::Value::as_integer).and_then(|count| u16::try_from(count).ok());
    let count = count.filter(|count| *count > 0).map(u32::from);
    count.with_context(|| {
        format!("{} does not say how many targets there are: 'targets = N', 1 to 65535", path.display())
    })
}

fn replace(data: &Path, target: u32) -> Result<()> {
    let layout = data.join(LAYOUT_FILE);
    let count = read_layout(&layout)?;
    if target >= count {
        bail!("{} has targets 0 to {}, not {target}", data.display(), count - 1);
    }
    let survivors = (0..count).filter(|index| *index != target).map(|index| target_path(data, index)).collect();
    server::replace_target(target_path(data, target), survivors, TargetId(target), false)?;
    say(&format!("target {target} is empty now; start again: it is refilled in the background (cfsctl status)"));
    Ok(())
}
