//! `cfs dev`: a whole one-node cluster on files in a directory, mounted, in one process.

use crate::cli::DevArgs;
use crate::mount;
use crate::server::{self, Server, Settings};
use crate::signals::Signals;
use anyhow::{Context, Result, bail};
use cfs::format::FormatSpec;
use cfs_wire::TargetId;
use std::io::Write;
use std::path::{Path, PathBuf};

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
        return replace(&args.data, target);
    }
    let Some(mountpoint) = &args.mountpoint else { bail!("give a mountpoint") };
    mount::check_mountpoint(mountpoint)?;
    let targets = prepare(&args)?;
    let signals = Signals::block()?;
    let client_file = args.data.join(CLIENT_FILE);
    let dead_client = std::fs::read_to_string(&client_file).ok();
    let settings = Settings { listen: args.listen.clone(), targets, dead_client, ..Settings::default() };
    let server = Server::start(settings)?;
    let address_file = args.data.join(ADDRESS_FILE);
    std::fs::write(&address_file, server.address())
        .with_context(|| format!("cannot write {}", address_file.display()))?;
    println!("serving {} on {}", args.data.display(), server.address());
    let client = client_name(mountpoint)?;
    write_durably(&client_file, &client)?;
    let mounted = mount::in_background(server.address(), mountpoint, client, signals.waker()?)?;
    println!("mounted at {}; Ctrl-C or umount ends it", mountpoint.display());
    signals.wait()?;
    // First the client, whose dirty bytes the server must still take.
    mounted.unmount()?;
    server.stop()
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
    std::fs::create_dir_all(data).with_context(|| format!("cannot create {}", data.display()))?;
    let layout = data.join(LAYOUT_FILE);
    if layout.exists() {
        return read_layout(&layout).map(|count| (0..count).map(|index| target_path(data, index)).collect());
    }
    let paths: Vec<PathBuf> = (0..u32::from(args.targets)).map(|index| target_path(data, index)).collect();
    clear_unfinished(data, &paths)?;
    let mark = data.join(FORMATTING_FILE);
    write_durably(&mark, "a format that did not finish left this; the next start begins anew\n")?;
    let size = (args.size / u64::from(args.targets.max(1))) & !((1 << 20) - 1);
    let spec =
        FormatSpec { policy: args.ec, tolerate: args.tolerate, shards: args.shards, zone_bytes: None, force: false };
    if let Err(error) = server::format_files(&paths, Some(size), spec) {
        for path in paths.iter().chain([&mark]) {
            let _ = std::fs::remove_file(path);
        }
        return Err(error);
    }
    write_durably(&layout, &format!("targets = {}\n", args.targets))?;
    std::fs::remove_file(&mark).with_context(|| format!("cannot remove {}", mark.display()))?;
    println!("formatted {} targets of {} MiB, policy {}", args.targets, size >> 20, args.ec);
    Ok(paths)
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

/// Writes a small file and makes it and its name durable.
fn write_durably(path: &Path, text: &str) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(parent)?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn read_layout(path: &Path) -> Result<u32> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let table: toml::Table = toml::from_str(&text).with_context(|| format!("{} is damaged", path.display()))?;
    let count = table.get("targets").and_then(toml::Value::as_integer).and_then(|count| u32::try_from(count).ok());
    count.with_context(|| format!("{} does not say how many targets there are", path.display()))
}

fn replace(data: &Path, target: u32) -> Result<()> {
    let layout = data.join(LAYOUT_FILE);
    let count = read_layout(&layout)?;
    if target >= count {
        bail!("{} has targets 0 to {}, not {target}", data.display(), count - 1);
    }
    let survivors = (0..count).filter(|index| *index != target).map(|index| target_path(data, index)).collect();
    server::replace_target(target_path(data, target), survivors, TargetId(target), false)?;
    println!("target {target} is empty now; start again: it is refilled in the background (cfsctl status)");
    Ok(())
}
