//! Whether a namespace can be reached now: the states of the controllers it is behind.
//!
//! Where the kernel's multipath is on, a character device stands for all controllers of a subsystem. While
//! none of them is ready, as during a reset, Linux answers a command with EINVAL (nvme_ns_head_chr_uring_cmd),
//! just as one that is wrong; with multipath off the command waits, or EAGAIN is answered.

use std::fs::{read_dir, read_to_string};
use std::path::{Path, PathBuf};

/// The best state of any controller.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Reach {
    /// None is there, or what is there goes away.
    Gone,
    /// One is being brought up or reset.
    Coming,
    /// One takes commands, or will within moments.
    Live,
}

/// Where sysfs shows the controllers: below the one controller itself, or below its subsystem.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Paths(pub PathBuf);

impl Paths {
    pub fn reach(&self) -> Reach {
        if let Some(reach) = state(&self.0) {
            return reach;
        }
        // A subsystem has a link to each of its controllers.
        let below = read_dir(&self.0).into_iter().flatten().flatten();
        below.filter_map(|entry| state(&entry.path())).max().unwrap_or(Reach::Gone)
    }
}

/// None where no controller is.
fn state(controller: &Path) -> Option<Reach> {
    // Namespaces have no state, and a subsystem has none either.
    let state = read_to_string(controller.join("state")).ok()?;
    match state.trim() {
        "live" => Some(Reach::Live),
        "new" | "resetting" | "connecting" => Some(Reach::Coming),
        _ => Some(Reach::Gone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, remove_dir_all, write};
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    #[test]
    fn a_namespace_is_reached_while_any_of_its_controllers_is_live() {
        let sys = TempDir::new().unwrap();
        let (first, second) = (sys.path().join("pci/nvme0"), sys.path().join("pci/nvme1"));
        let subsystem = sys.path().join("nvme-subsys0");
        for directory in [&first, &second, &subsystem.join("nvme0n1")] {
            create_dir_all(directory).unwrap();
        }
        symlink(&first, subsystem.join("nvme0")).unwrap();
        symlink(&second, subsystem.join("nvme1")).unwrap();
        let (alone, both) = (Paths(first.clone()), Paths(subsystem));
        assert_eq!((alone.reach(), both.reach()), (Reach::Gone, Reach::Gone), "no controller says anything");
        for (one, other, reach) in [
            ("live", "resetting", Reach::Live),
            ("dead", "live", Reach::Live),
            ("connecting", "deleting", Reach::Coming),
            ("new", "deleting (no IO)", Reach::Coming),
            ("resetting", "dead", Reach::Coming),
            ("dead", "deleting", Reach::Gone),
        ] {
            write(first.join("state"), format!("{one}\n")).unwrap();
            write(second.join("state"), format!("{other}\n")).unwrap();
            assert_eq!(both.reach(), reach, "{one}, {other}");
        }
        assert_eq!(alone.reach(), Reach::Gone);
        write(first.join("state"), "live\n").unwrap();
        assert_eq!(alone.reach(), Reach::Live);
        remove_dir_all(&first).unwrap();
        assert_eq!((alone.reach(), both.reach()), (Reach::Gone, Reach::Gone), "a removed one is a dangling link");
    }
}
