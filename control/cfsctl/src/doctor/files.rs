//! Small files of /proc and /sys, whatever is in them.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::str::FromStr;

/// The table of mounts is the longest file read: some 100 bytes for each of 100,000 mounts.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// No name or model is longer; what is belongs to something else.
const LINE_CHARACTERS_MAX: usize = 200;

pub fn text(path: &Path) -> Option<String> {
    // Opening a pipe would wait for its writer.
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The first line, if there is something on it.
pub fn line(path: &Path) -> Option<String> {
    text(path)?.lines().next().map(printable).filter(|line| !line.is_empty())
}

pub fn number<T: FromStr>(path: &Path) -> Option<T> {
    line(path)?.parse().ok()
}

/// What stands behind a word that begins a line, as in `MemTotal: 16 kB`.
pub fn behind<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(word)).map(str::trim)
}

/// The names in a directory, sorted: none where `base` lacks it, `None` where that can't be known.
pub fn names(base: &Path, directory: &str) -> Option<Vec<String>> {
    if !base.is_dir() {
        return None;
    }
    let entries = match fs::read_dir(base.join(directory)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Some(Vec::new()),
        Err(_) => return None,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.ok()?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Some(names)
}

/// Text of others without what would move a terminal's cursor.
pub fn printable(text: &str) -> String {
    let shown: String = text.chars().filter(|character| !character.is_control()).take(LINE_CHARACTERS_MAX).collect();
    shown.trim().to_owned()
}
