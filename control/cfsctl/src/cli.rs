//! The command line.

use cfs_api::AdminCall;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

#[derive(Parser)]
#[command(name = "cfsctl", version, about = "Control a ClaudeFS cluster")]
pub struct Cli {
    /// Address of a server
    #[arg(long, global = true, env = "CFS_ADDRESS", default_value = "127.0.0.1:7400")]
    pub address: String,
    /// Directory of this program's identity (cfs authority), for a server that has one
    #[arg(long, global = true, env = "CFS_IDENTITY")]
    pub identity: Option<PathBuf>,
    /// Print JSON instead of tables, and errors as {"error": "..."}
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Health, versions and counts of the cluster
    Status,
    /// The devices, their state and space
    Targets,
    /// The metadata shards, their leaders and logs
    Shards,
    /// Space, as raw bytes and as what the policy leaves of them
    Df,
    /// What the metadata says of a file
    Stat {
        /// Path inside the volume, such as /dir/file
        path: OsString,
    },
    /// Where the bytes of a file are
    Extents {
        /// Path inside the volume, such as /dir/file
        path: OsString,
    },
    /// How redundantly what is created in a directory is stored
    Policy {
        #[command(subcommand)]
        action: PolicyAction,
    },
    /// Give NVMe controllers of this machine to vfio-pci, for targets `nvme:PCI-ADDRESS`, or back
    Device {
        #[command(subcommand)]
        action: DeviceAction,
    },
    /// What this machine has, what of it is used, and what would improve it; exit code 3 if ClaudeFS cannot run
    Doctor,
    /// Compare all metadata with all data; exit code 3 when something is wrong
    Check {
        /// Restore missing redundancy
        #[arg(long)]
        repair: bool,
        /// Read every byte instead of checking that it is there
        #[arg(long)]
        deep: bool,
    },
    /// Print a completion script
    Completions { shell: clap_complete::Shell },
    /// Write man pages
    Man { dir: PathBuf },
}

#[derive(Subcommand)]
pub enum DeviceAction {
    /// Take a controller from the kernel; refused while anything uses its namespaces
    Bind {
        /// Such as 0000:01:00.0
        address: String,
    },
    /// Give it back to the kernel's driver
    Unbind {
        /// Such as 0000:01:00.0
        address: String,
    },
}

#[derive(Subcommand)]
pub enum PolicyAction {
    /// The policy of a file or directory
    Show {
        /// Path inside the volume, such as /dir
        path: OsString,
    },
    /// Give a directory its own; what is in it already keeps what it has
    Set {
        /// Path inside the volume, such as /dir
        path: OsString,
        /// k+m (such as 2+1, or 1+0 for no redundancy) or copies (such as 3x)
        policy: String,
    },
    /// Go back to the volume's
    Clear {
        /// Path inside the volume, such as /dir
        path: OsString,
    },
}

impl PolicyAction {
    pub fn call(&self) -> AdminCall {
        match self {
            PolicyAction::Show { path } => AdminCall::PolicyShow { path: path_bytes(path) },
            PolicyAction::Set { path, policy } => {
                AdminCall::PolicySet { path: path_bytes(path), policy: Some(policy.clone()) }
            }
            PolicyAction::Clear { path } => AdminCall::PolicySet { path: path_bytes(path), policy: None },
        }
    }
}

pub fn path_bytes(path: &OsString) -> Vec<u8> {
    path.as_bytes().to_vec()
}

/// Whether a command line, also one that can't be understood, asks for JSON.
pub fn asks_for_json(arguments: impl Iterator<Item = OsString>) -> bool {
    arguments.take_while(|argument| argument != "--").any(|argument| argument == "--json")
}
