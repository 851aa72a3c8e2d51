//! Files that a command makes as targets: a command that fails takes its own away again, and no
//! others.

use anyhow::{Context, Result, anyhow};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What this process made, in the order in which it did.
#[derive(Default)]
pub struct Created(Vec<PathBuf>);

impl Created {
    /// Makes an empty file. One that is there, if only since a moment ago, is refused.
    pub fn create(&mut self, path: &Path) -> Result<()> {
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        self.0.push(path.to_owned());
        Ok(())
    }

    /// Keeps the files if `outcome` is a success, and removes them if not. What can't be removed is
    /// told behind why that was to be.
    pub fn kept_by<T>(self, outcome: Result<T>) -> Result<T> {
        let error = match outcome {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let left: Vec<String> = self.0.iter().filter_map(|path| not_removed(path)).collect();
        if left.is_empty() {
            return Err(error);
        }
        Err(anyhow!("{error:#}; what was made before that is still there: {}", left.join("; ")))
    }
}

/// Why a file is still there; `None`: it is not.
fn not_removed(path: &Path) -> Option<String> {
    let error = std::fs::remove_file(path).err()?;
    (error.kind() != ErrorKind::NotFound).then(|| format!("cannot remove {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn failed() -> Result<()> {
        Err(anyhow!("no room").context("cannot format"))
    }

    #[test]
    fn only_what_was_made_is_removed_and_only_after_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("theirs"), "theirs").unwrap();
        for outcome in [failed(), Ok(())] {
            let succeeds = outcome.is_ok();
            let mut created = Created::default();
            created.create(&at("ours")).unwrap();
            let refused = created.create(&at("theirs")).unwrap_err();
            assert!(format!("{refused:#}").starts_with(&format!("cannot create {}: ", at("theirs").display())));
            let told = created.kept_by(outcome).map_err(|error| format!("{error:#}"));
            assert_eq!(told, if succeeds { Ok(()) } else { Err("cannot format: no room".to_owned()) });
            assert_eq!(at("ours").exists(), succeeds);
            assert_eq!(fs::read(at("theirs")).unwrap(), b"theirs");
        }
    }

    #[test]
    fn what_cannot_be_removed_is_told_after_the_first_error_and_the_rest_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut created = Created::default();
        for name in ["stuck", "gone", "ours"] {
            created.create(&at(name)).unwrap();
        }
        // Somebody has put a directory in the place of one, and has removed another.
        fs::remove_file(at("stuck")).unwrap();
        fs::create_dir(at("stuck")).unwrap();
        fs::remove_file(at("gone")).unwrap();
        let told = format!("{:#}", created.kept_by(failed()).unwrap_err());
        let left = format!("what was made before that is still there: cannot remove {}: ", at("stuck").display());
        assert!(told.starts_with(&format!("cannot format: no room; {left}")) && !told.contains("gone"), "{told}");
        assert!(!at("ours").exists());
    }
}
