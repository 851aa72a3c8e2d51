//! The command line of `cfs`.

use crate::config::{self, DEFAULT_LISTEN};
use cfs_wire::Policy;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

#[derive(Parser)]
#[command(name = "cfs", version, about = "ClaudeFS: a distributed POSIX file system")]
pub struct Cli {
    /// Log filter, such as info or cfs_store=debug
    #[arg(long, global = true, env = "CFS_LOG")]
    pub log: Option<String>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Create a one-node cluster on files or devices
    Format(FormatArgs),
    /// Put an empty device in the place of a lost target; no server may be running
    Replace(ReplaceArgs),
    /// Run a storage node in the foreground
    Server(ServerArgs),
    /// Mount a cluster (also as mount.cfs, for mount -t cfs and fstab)
    Mount(MountArgs),
    /// A whole one-node cluster on files in a directory, mounted, in one process
    Dev(DevArgs),
    /// Make what servers and clients prove by who they are, on one machine, to be copied to the others
    Authority {
        #[command(subcommand)]
        action: AuthorityAction,
    },
    /// Print a completion script
    Completions { shell: clap_complete::Shell },
    /// Write man pages
    Man { dir: PathBuf },
}

#[derive(Subcommand)]
pub enum AuthorityAction {
    /// Make a cluster's authority; whoever has its ca.key makes identities
    Create {
        /// A directory for it
        authority: PathBuf,
    },
    /// Make an identity: a directory to be copied to one machine, where only root may read it
    Issue {
        /// The authority's directory
        authority: PathBuf,
        /// What it is for
        #[arg(long, value_enum)]
        role: Role,
        /// Whom it is for: lower-case letters, digits and hyphens
        #[arg(long)]
        name: String,
        /// A directory for it
        identity: PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Role {
    /// To serve, and to call other servers
    Server,
    /// To mount, and for cfsctl
    Client,
}

#[derive(Args)]
pub struct FormatArgs {
    /// Targets: block devices, /dev/ngXnY, nvme:PCI-ADDRESS, or files (created with --size)
    #[arg(required = true)]
    pub targets: Vec<PathBuf>,
    /// Redundancy: k+m (such as 2+1) or copies (such as 3x, which is 1+2); on k+m targets and no fewer
    /// than 2m+1
    #[arg(long, default_value = "2+1", env = "CFS_EC")]
    pub ec: Policy,
    /// Lost targets that the metadata survives: the most that any directory's policy may promise, on
    /// twice as many targets and one (default: what --ec promises)
    #[arg(long, env = "CFS_TOLERATE", value_parser = clap::value_parser!(u8).range(0..=8))]
    pub tolerate: Option<u8>,
    /// Size of each file target that does not exist yet
    #[arg(long, env = "CFS_SIZE", value_parser = config::parse_size)]
    pub size: Option<u64>,
    /// Metadata shards; fixed for ever
    #[arg(long, default_value_t = 256, env = "CFS_SHARDS")]
    pub shards: u16,
    /// Erase whatever the targets hold
    #[arg(long)]
    pub force: bool,
}

#[derive(Args)]
pub struct ReplaceArgs {
    /// Number of the lost target (cfsctl targets)
    pub id: u32,
    /// The new target: a block device, or a file that does not exist yet
    pub path: PathBuf,
    /// Another target of the node; repeat for each that is left
    #[arg(long = "target", required = true, env = "CFS_TARGETS", value_delimiter = ',')]
    pub targets: Vec<PathBuf>,
    /// Erase whatever the block device holds
    #[arg(long)]
    pub force: bool,
}

#[derive(Args)]
pub struct ServerArgs {
    /// Configuration file (TOML)
    #[arg(long, env = "CFS_CONFIG")]
    pub config: Option<PathBuf>,
    /// Address to listen on; loopback only without an identity
    #[arg(long, env = "CFS_LISTEN")]
    pub listen: Option<String>,
    /// A target of this node; repeat for each
    #[arg(long = "target", env = "CFS_TARGETS", value_delimiter = ',')]
    pub targets: Vec<PathBuf>,
    #[command(flatten)]
    pub tuning: TuningArgs,
}

/// What every server can be told, alone or in `cfs dev`.
#[derive(Args, Clone)]
pub struct TuningArgs {
    /// Microseconds a reactor polls before it sleeps
    #[arg(long, env = "CFS_SPIN_US")]
    pub spin_us: Option<u64>,
    /// Milliseconds after which a silent client loses its leases
    #[arg(long, env = "CFS_SESSION_LEASE_MS")]
    pub session_lease_ms: Option<u32>,
    /// Milliseconds for which a client may serve an inode from its cache
    #[arg(long, env = "CFS_READ_LEASE_MS")]
    pub read_lease_ms: Option<u32>,
    /// MiB per second at which what lost targets held is rebuilt
    #[arg(long, env = "CFS_REPAIR_MIB_S")]
    pub repair_mib_s: Option<u32>,
    /// Directory of this server's identity (cfs authority): peers prove by TLS 1.3 who they are
    #[arg(long, env = "CFS_IDENTITY")]
    pub identity: Option<PathBuf>,
    /// What codes segments: auto, isal (Intel's ISA-L) or portable [default: auto]
    #[arg(long, env = "CFS_CODEC")]
    pub codec: Option<String>,
    /// What carries messages: auto, tcp, or ofi:PROVIDER for a provider of libfabric [default: auto]
    #[arg(long, env = "CFS_FABRIC")]
    pub fabric: Option<String>,
}

#[derive(Args)]
pub struct MountArgs {
    /// Address of a server: its port behind localhost or an IP address, such as 127.0.0.1:7400
    pub address: String,
    pub mountpoint: PathBuf,
    /// Directory of this client's identity (cfs authority), for a server that has one; also -o identity=DIR
    #[arg(long, env = "CFS_IDENTITY")]
    pub identity: Option<PathBuf>,
    /// What carries messages: auto, tcp, or ofi:PROVIDER for a provider of libfabric; also -o fabric=NAME
    /// [default: auto]
    #[arg(long, env = "CFS_FABRIC")]
    pub fabric: Option<String>,
    /// Mount options, comma separated
    #[arg(short = 'o', value_delimiter = ',')]
    pub options: Vec<String>,
    /// Stay in the foreground
    #[arg(long, short = 'f')]
    pub foreground: bool,
    /// For the process that stays when the command ends: tell it when the mount is there
    #[arg(long, hide = true, requires = "foreground")]
    pub detached: bool,
    /// Look at the arguments, but mount nothing (mount -f)
    #[arg(long)]
    pub fake: bool,
    /// The mount namespace that mount(8) was told (mount -N): refused
    #[arg(long, hide = true)]
    pub namespace: Option<PathBuf>,
}

#[derive(Args)]
pub struct DevArgs {
    /// Directory for the targets
    #[arg(long, env = "CFS_DATA")]
    pub data: PathBuf,
    /// Where to mount; not with --replace
    #[arg(required_unless_present = "replace", conflicts_with = "replace")]
    pub mountpoint: Option<PathBuf>,
    /// Targets to create [default: 3]
    #[arg(long, env = "CFS_DEV_TARGETS")]
    pub targets: Option<u16>,
    /// Redundancy: k+m (such as 2+1) or copies (such as 3x, which is 1+2); on k+m targets and no fewer
    /// than 2m+1 [default: 2+1]
    #[arg(long, env = "CFS_EC")]
    pub ec: Option<Policy>,
    /// Lost targets that the metadata survives: the most that any directory's policy may promise, on
    /// twice as many targets and one (default: what --ec promises)
    #[arg(long, env = "CFS_TOLERATE", value_parser = clap::value_parser!(u8).range(0..=8))]
    pub tolerate: Option<u8>,
    /// Size of all targets together [default: 10G]
    #[arg(long, env = "CFS_SIZE", value_parser = config::parse_size)]
    pub size: Option<u64>,
    /// Metadata shards; fixed for ever [default: 8]
    #[arg(long, env = "CFS_SHARDS")]
    pub shards: Option<u16>,
    /// Address to listen on
    #[arg(long, default_value = DEFAULT_LISTEN, env = "CFS_LISTEN")]
    pub listen: String,
    #[command(flatten)]
    pub tuning: TuningArgs,
    /// Instead of running: put an empty target in the place of a lost one
    #[arg(long, value_name = "TARGET")]
    pub replace: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_key_of_the_file_is_a_flag_and_an_environment_variable() {
        let command = Cli::command();
        let server = command.find_subcommand("server").expect("there is a server");
        for (key, _) in config::KEYS {
            let flag = if key == "targets" { "target".to_owned() } else { key.replace('_', "-") };
            let argument =
                server.get_arguments().chain(command.get_arguments()).find(|one| one.get_long() == Some(&flag));
            let argument = argument.unwrap_or_else(|| panic!("--{flag} is no flag"));
            let variable = argument.get_env().unwrap_or_else(|| panic!("--{flag} has no environment variable"));
            assert_eq!(variable.to_str(), Some(&*format!("CFS_{}", key.to_uppercase())));
        }
    }
}
