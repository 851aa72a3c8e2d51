//! `cfs mount`, and `mount.cfs` as `mount -t cfs` and fstab call it.

use crate::cli::MountArgs;
use crate::signals::Signals;
use crate::{load_identity, say};
use anyhow::{Context, Result, bail};
use cfs_api::progress::Progress;
use cfs_fabric::Address;
use cfs_fabric::identity::Identity;
use cfs_fabric::network::Transport;
use cfs_fuse::{MountConfig, MountOptions, Unmounter, run_mount};
use rustix::fs::FileType;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

/// Names under which mount(8) finds this program: by the type that is asked for, and by the type
/// that the kernel shows, which is what a remount goes by.
const HELPER_NAMES: [&str; 2] = ["mount.cfs", "mount.fuse.cfs"];

/// A mount option, for fstab.
const IDENTITY_OPTION: &str = "identity=";
const FABRIC_OPTION: &str = "fabric=";

/// Under the name of a mount helper the arguments are `ADDRESS MOUNTPOINT [-sfnv] [-N NAMESPACE]
/// [-o OPTIONS] [-t TYPE]` (mount(8), "external helpers"); there `-f` asks for everything but the mount.
pub fn helper_arguments(arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments.first().map(|program| Path::new(program).file_name().unwrap_or_default().to_owned());
    if !name.is_some_and(|name| HELPER_NAMES.iter().any(|helper| name == *helper)) {
        return arguments;
    }
    let mut ours = Vec::new();
    let mut arguments = arguments.into_iter();
    ours.extend(arguments.next());
    ours.push("mount".into());
    while let Some(argument) = arguments.next() {
        let flags = argument.to_str().and_then(|text| text.strip_prefix('-')).unwrap_or_default();
        if flags == "t" {
            // It is ours, or we would not have been called.
            arguments.next();
        } else if flags == "N" {
            ours.push("--namespace".into());
        } else if !flags.is_empty() && flags.bytes().all(|flag| b"sfnv".contains(&flag)) {
            ours.extend(flags.contains('f').then(|| OsString::from("--fake")));
        } else {
            ours.push(argument);
        }
    }
    ours
}

/// Refuses before anything is started what could not be mounted on.
pub fn check_mountpoint(mountpoint: &Path) -> Result<()> {
    if !Path::new("/dev/fuse").exists() {
        bail!("/dev/fuse is missing; load the kernel module with: modprobe fuse");
    }
    // Asked of the kernel: of a dead mount, or one whose server is away, there is no answer.
    if cfs_fuse::is_mounted(mountpoint) {
        bail!(
            "a cfs file system is mounted on {0} already: umount {0} (umount -l {0} if it is dead and busy), or give \
             another directory",
            mountpoint.display()
        );
    }
    match std::fs::metadata(mountpoint) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => bail!("mountpoint {} is not a directory", mountpoint.display()),
        Err(error) => bail!("mountpoint {}: {error}; create it, or unmount what is left there", mountpoint.display()),
    }
}

/// Mounts in this process, or in a child that outlives it, as mount helpers do.
pub fn run(args: MountArgs) -> Result<()> {
    if let Some(namespace) = &args.namespace {
        let namespace = namespace.display();
        bail!("mount namespace {namespace}: not supported here; use: nsenter --mount={namespace} mount ...");
    }
    let (remounts, options) = args.options.into_iter().partition::<Vec<_>, _>(|option| option == "remount");
    let (directories, options) =
        options.into_iter().partition::<Vec<_>, _>(|option| option.starts_with(IDENTITY_OPTION));
    let given = directories.last().and_then(|option| option.strip_prefix(IDENTITY_OPTION)).map(PathBuf::from);
    let (fabrics, options) = options.into_iter().partition::<Vec<_>, _>(|option| option.starts_with(FABRIC_OPTION));
    let fabric = fabrics.last().and_then(|option| option.strip_prefix(FABRIC_OPTION)).map(String::from);
    let mut config = configure(&args.address, &args.mountpoint, &options)?;
    config.identity = load_identity(args.identity.or(given).as_deref())?;
    config.transport = transport(args.fabric.or(fabric).as_deref())?;
    if remounts.is_empty() {
        check_mountpoint(&args.mountpoint)?;
    }
    if args.fake {
        return Ok(());
    }
    if !remounts.is_empty() {
        return Ok(cfs_fuse::remount(&args.mountpoint, &config.options)?);
    }
    if !args.foreground {
        return detach();
    }
    let signals = Signals::catch()?;
    if args.detached {
        // Not what the terminal tells whoever has it then.
        rustix::process::setsid().context("cannot begin a session")?;
        // Whoever waits for the mount may be ended; then it is not to come any more.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
            .context("cannot follow the process that waits for the mount")?;
    }
    let mounted = spawn(config, signals.waker()?)?;
    signals.end_in_order();
    if args.detached {
        if let Err(error) = report() {
            return both(Err(error), mounted.unmount());
        }
    } else {
        say(&format!("mounted at {}", args.mountpoint.display()));
    }
    signals.wait()?;
    mounted.unmount()
}

/// Tells the process that waits for the mount that it is there, and lets go of all that it shares
/// with it: whoever reads what that one prints would wait for the end of the mount.
fn report() -> Result<()> {
    rustix::process::set_parent_process_death_signal(None).context("cannot leave the process that started this")?;
    writeln!(std::io::stdout(), "mounted").context("whoever waited for the mount is gone")?;
    let nowhere = File::options().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdout(&nowhere).context("cannot let go of stdout")?;
    let stderr = rustix::fs::fstat(std::io::stderr()).map(|found| FileType::from_raw_mode(found.st_mode));
    if matches!(stderr, Ok(FileType::Fifo | FileType::Socket)) {
        rustix::stdio::dup2_stderr(&nowhere).context("cannot let go of stderr")?;
    }
    std::env::set_current_dir("/").context("cannot leave the working directory")
}

/// Runs this very command again in the foreground of a session of its own, and waits until it has
/// mounted; if it fails, it has said why, and its exit code is this process's.
fn detach() -> Result<()> {
    use std::io::BufRead;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};
    let program = std::env::current_exe().context("cannot find this program")?;
    let arguments = helper_arguments(std::env::args_os().collect());
    let mut command = Command::new(program);
    command.args(&arguments[1..]).args(["--foreground", "--detached"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start the mount process")?;
    let output = child.stdout.take().context("the mount process has no output")?;
    let mut line = String::new();
    std::io::BufReader::new(output).read_line(&mut line).context("cannot hear from the mount process")?;
    if line.is_empty() {
        let status = child.wait().context("cannot wait for the mount process")?;
        if let Some(signal) = status.signal() {
            bail!("the mount process was ended by signal {signal} before it had mounted");
        }
        std::process::exit(status.code().filter(|code| *code != 0).unwrap_or(1));
    }
    Ok(())
}

/// A mount that runs on its own threads.
pub struct Mounted {
    unmounter: Unmounter,
    thread: JoinHandle<Result<()>>,
}

impl Mounted {
    /// Unmounts, waits until everything written is committed, and tells of failures.
    pub fn unmount(self) -> Result<()> {
        let _progress = Progress::of("unmounting: committing what was written");
        let freed = self.unmounter.unmount().map_err(anyhow::Error::from);
        let ended = self.thread.join();
        both(ended.unwrap_or_else(|_| bail!("the mount's thread panicked; its message is above")), freed)
    }
}

/// Succeeds where both did, and tells of both where both failed.
pub fn both(one: Result<()>, other: Result<()>) -> Result<()> {
    match (one, other) {
        (Err(one), Err(other)) => bail!("{one:#}; and {other:#}"),
        (one, other) => one.and(other),
    }
}

/// What carries messages, if that was said.
pub fn transport(fabric: Option<&str>) -> Result<Transport> {
    Ok(fabric.map(str::parse).transpose()?.unwrap_or_default())
}

/// Mounts `address` at `mountpoint` as the client `name`; whoever unmounts it wakes `ended`.
pub fn in_background(
    address: &str,
    mountpoint: &Path,
    (identity, transport): (Option<Arc<Identity>>, Transport),
    name: String,
    ended: UnixStream,
) -> Result<Mounted> {
    let mut config = configure(address, mountpoint, &[])?;
    config.identity = identity;
    config.transport = transport;
    config.client.name = name;
    spawn(config, ended)
}

#[allow(clippy::disallowed_methods, reason = "a mount has threads; nothing here is simulated")]
fn spawn(config: MountConfig, mut ended: UnixStream) -> Result<Mounted> {
    let (ready, mounted) = mpsc::channel();
    let progress = Progress::of(format!("mounting: connecting to {}", config.address.0));
    let thread = std::thread::Builder::new()
        .name("cfs-mount".into())
        .spawn(move || {
            let outcome = run_mount(config, |unmounter| {
                let _ = ready.send(unmounter);
            });
            // The main thread may be past waiting already.
            let _ = ended.write_all(&[0]);
            outcome.map_err(anyhow::Error::from)
        })
        .context("cannot start a thread")?;
    let mounted = mounted.recv();
    drop(progress);
    match mounted {
        Ok(unmounter) => Ok(Mounted { unmounter, thread }),
        Err(_) => match thread.join() {
            Ok(Err(error)) => Err(error),
            _ => bail!("the mount ended at once"),
        },
    }
}

fn configure(address: &str, mountpoint: &Path, options: &[String]) -> Result<MountConfig> {
    let mut config = MountConfig::new(mountpoint, Address(address.to_owned()));
    config.client.name = format!("mount {} (pid {})", mountpoint.display(), std::process::id());
    parse_options(&mut config.options, options)?;
    Ok(config)
}

/// Mount options known to fstab; those that are the kernel's own or mean nothing here pass.
fn parse_options(parsed: &mut MountOptions, options: &[String]) -> Result<()> {
    for option in options {
        match option.as_str() {
            "ro" => parsed.read_only = true,
            "rw" => parsed.read_only = false,
            "suid" => parsed.suid = true,
            "nosuid" => parsed.suid = false,
            "dev" => parsed.dev = true,
            "nodev" => parsed.dev = false,
            "exec" => parsed.exec = true,
            "noexec" => parsed.exec = false,
            "noatime" => parsed.noatime = true,
            "atime" => parsed.noatime = false,
            "allow_other" => parsed.allow_other = Some(true),
            "defaults"
            | "relatime"
            | "norelatime"
            | "strictatime"
            | "nostrictatime"
            | "lazytime"
            | "nolazytime"
            | "diratime"
            | "nodiratime"
            | "async"
            | "silent"
            | "loud"
            | "iversion"
            | "noiversion"
            | "owner"
            | "group"
            | "_netdev"
            | "auto"
            | "noauto"
            | "nofail"
            | "user"
            | "users"
            | "nouser"
            | "default_permissions" => {}
            other => match other.split_once('=') {
                Some(("read_ahead_kib", count)) => {
                    parsed.read_ahead_kib =
                        count.parse().with_context(|| format!("mount option {other}: not a number"))?;
                }
                // What the kernel shows of a mount comes back to us for a remount.
                Some(("user_id" | "group_id" | "max_read" | "comment", _)) => {}
                _ if other.starts_with("x-") => {}
                _ => bail!(
                    "mount option '{other}' is unknown; known: ro, nosuid, nodev, noexec, noatime, allow_other, read_ahead_kib=N, identity=DIR, \
                     fabric=NAME"
                ),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn helped(arguments: &[&str]) -> Vec<String> {
        let arguments = helper_arguments(arguments.iter().map(OsString::from).collect());
        arguments.into_iter().map(|argument| argument.into_string().unwrap()).collect()
    }

    #[test]
    fn what_mount_passes_to_its_helper_becomes_our_own_arguments() {
        assert_eq!(
            helped(&["/sbin/mount.cfs", "host:1", "/mnt", "-n", "-v", "-o", "rw,noatime"]),
            ["/sbin/mount.cfs", "mount", "host:1", "/mnt", "-o", "rw,noatime"]
        );
        assert_eq!(helped(&["mount.cfs", "host:1", "/mnt", "-fn"]), ["mount.cfs", "mount", "host:1", "/mnt", "--fake"]);
        assert_eq!(
            helped(&["/sbin/mount.fuse.cfs", "host:1", "/mnt", "-o", "remount,ro", "-t", "fuse.cfs", "-N", "/ns"]),
            ["/sbin/mount.fuse.cfs", "mount", "host:1", "/mnt", "-o", "remount,ro", "--namespace", "/ns"]
        );
        // Under its own name -f is --foreground, and nothing is touched.
        assert_eq!(helped(&["cfs", "mount", "host:1", "/mnt", "-f"]), ["cfs", "mount", "host:1", "/mnt", "-f"]);
    }

    #[test]
    fn options_of_fstab_are_taken_and_an_unknown_one_is_named() {
        let parse = |options: &[&str]| {
            let mut parsed = MountOptions::default();
            let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
            parse_options(&mut parsed, &options).map(|()| parsed).map_err(|error| format!("{error:#}"))
        };
        let parsed =
            parse(&["ro", "nosuid", "nodev", "noexec", "noatime", "allow_other", "read_ahead_kib=64"]).unwrap();
        assert!(parsed.read_only && !parsed.suid && !parsed.dev && !parsed.exec && parsed.noatime);
        assert_eq!((parsed.allow_other, parsed.read_ahead_kib), (Some(true), 64));
        let passed = parse(&["defaults", "_netdev", "nofail", "x-systemd.automount", "comment=a"]).unwrap();
        assert!(!passed.read_only);
        assert!(!parse(&["noatime", "atime"]).unwrap().noatime);
        assert!(parse(&["rw", "noatme"]).unwrap_err().contains("mount option 'noatme' is unknown; known: ro,"));
        assert!(parse(&["read_ahead_kib=much"]).unwrap_err().contains("read_ahead_kib=much: not a number"));
    }
}
