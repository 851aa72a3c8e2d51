//! Configuration of a server: a TOML file, every key also a flag and an environment variable.
//! A flag beats the environment, the environment beats the file, the file beats the default.

use serde::Deserialize;
use std::path::{Path, PathBuf};

/// The address a server listens on unless told otherwise.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:7400";

/// Keys of the file, with their meaning; the one list that the error for unknown keys,
/// the documentation and the decoder agree on.
pub const KEYS: [(&str, &str); 10] = [
    ("listen", "address to listen on, host:port; loopback only without an identity"),
    (
        "targets",
        "this node's targets, formatted by `cfs format`: paths of files, block devices or /dev/ngXnY, or nvme:PCI-ADDRESS",
    ),
    ("log", "log filter, such as info or cfs_store=debug"),
    ("spin_us", "microseconds a reactor polls before it sleeps; 0 sleeps at once"),
    ("session_lease_ms", "milliseconds after which a silent client loses its leases"),
    ("read_lease_ms", "milliseconds for which a client may serve an inode from its cache"),
    ("repair_mib_s", "MiB per second at which what lost targets held is rebuilt"),
    ("identity", "directory of this server's identity, made by `cfs authority`; peers must have one, too"),
    ("codec", "what codes segments: auto, isal (Intel's ISA-L) or portable; all give the same bytes"),
    ("fabric", "what carries messages: auto (RDMA devices where both ends have one), tcp, ofi:verbs or ofi:tcp"),
];

/// A server's settings as given; what is absent takes its default.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
pub struct FileConfig {
    pub listen: Option<String>,
    pub targets: Option<Vec<PathBuf>>,
    pub log: Option<String>,
    pub spin_us: Option<u64>,
    pub session_lease_ms: Option<u32>,
    pub read_lease_ms: Option<u32>,
    pub repair_mib_s: Option<u32>,
    pub identity: Option<PathBuf>,
    pub codec: Option<String>,
    pub fabric: Option<String>,
}

/// A configuration file that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read configuration {path}: {error}")]
    Read { path: String, error: std::io::Error },
    #[error("configuration {path}: {detail}")]
    Syntax { path: String, detail: String },
    #[error("configuration {path}: unknown key '{key}'; did you mean '{nearest}'? (known: {known})")]
    UnknownKey { path: String, key: String, nearest: String, known: String },
}

impl FileConfig {
    pub fn read(path: &Path) -> Result<FileConfig, ConfigError> {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: shown.clone(), error })?;
        FileConfig::parse(&text, &shown)
    }

    pub fn parse(text: &str, shown: &str) -> Result<FileConfig, ConfigError> {
        let syntax = |error: toml::de::Error| ConfigError::Syntax {
            path: shown.to_owned(),
            detail: error.to_string().trim_end().replace('\n', " "),
        };
        let table: toml::Table = toml::from_str(text).map_err(syntax)?;
        for key in table.keys() {
            if !KEYS.iter().any(|(known, _)| known == key) {
                return Err(unknown_key(shown, key));
            }
        }
        toml::from_str(text).map_err(syntax)
    }
}

fn unknown_key(shown: &str, key: &str) -> ConfigError {
    let similarity = |known: &str| strsim::jaro_winkler(known, key);
    let nearest = KEYS.iter().map(|(known, _)| *known).max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    ConfigError::UnknownKey {
        path: shown.to_owned(),
        key: key.to_owned(),
        nearest: nearest.unwrap_or_default().to_owned(),
        known: KEYS.map(|(known, _)| known).join(", "),
    }
}

/// A size with an optional binary suffix: `10G`, `512M`, `65536`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let digits = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match trimmed[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("'{text}' is no size; write bytes or a suffix K, M, G, T, such as 10G")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("'{text}' is no size; write a whole number, such as 10G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is larger than 16 EiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_key_is_refused_with_the_nearest_name() {
        let error = FileConfig::parse("lisen = \"127.0.0.1:1\"", "a.toml").unwrap_err();
        let shown = error.to_string();
        assert!(shown.starts_with("configuration a.toml: unknown key 'lisen'; did you mean 'listen'?"), "{shown}");
        let good = FileConfig::parse("listen = \"127.0.0.1:1\"\ntargets = [\"/a\"]", "a.toml").unwrap();
        assert_eq!(good.listen.as_deref(), Some("127.0.0.1:1"));
        assert_eq!(good.targets, Some(vec![PathBuf::from("/a")]));
    }

    #[test]
    fn a_wrong_type_names_the_file_and_the_key() {
        let shown = FileConfig::parse("spin_us = \"soon\"", "a.toml").unwrap_err().to_string();
        assert!(shown.contains("a.toml") && shown.contains("spin_us"), "{shown}");
        assert_eq!(shown.lines().count(), 1);
    }

    #[test]
    fn every_known_key_decodes() {
        let text = "listen = \"a\"\ntargets = []\nlog = \"x\"\nspin_us = 1\nsession_lease_ms = 2\nread_lease_ms = 3\nrepair_mib_s = 4\nidentity = \"/i\"\ncodec = \"auto\"\nfabric = \"tcp\"";
        assert_eq!(text.lines().count(), KEYS.len());
        FileConfig::parse(text, "a.toml").unwrap();
    }

    #[test]
    fn sizes_take_binary_suffixes_and_name_what_is_wrong() {
        assert_eq!(parse_size("10G"), Ok(10 << 30));
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert!(parse_size("ten").unwrap_err().contains("'ten'"));
        assert!(parse_size("1Q").unwrap_err().contains("suffix"));
        assert!(parse_size("99999999T").unwrap_err().contains("16 EiB"));
    }
}
