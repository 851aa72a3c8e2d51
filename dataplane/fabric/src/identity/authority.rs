//! The cluster's authority: a key that says whose certificates count. Its directory holds [`AUTHORITY_FILE`],
//! of which every identity has a copy, and `ca.key`, which nothing needs but to issue the next identity.

use super::{AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, NAME_SUFFIX, SERVER_NAME};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};

const AUTHORITY_KEY_FILE: &str = "ca.key";
const AUTHORITY_DAYS: i64 = 30 * 365;
const IDENTITY_DAYS: i64 = 10 * 365;
/// Clocks of other machines may be behind.
const SKEW: Duration = Duration::days(1);
/// Of a DNS label (RFC 1035 section 2.3.4).
const NAME_BYTES_MAX: usize = 63;

/// Why an authority was not made, or did not issue.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("{} exists already and is kept; give another directory", .0.display())]
    Exists(PathBuf),
    #[error("cannot write {}: {error}", path.display())]
    Write { path: PathBuf, error: std::io::Error },
    #[error("cannot read {}: {error}; make an authority with: cfs authority create", path.display())]
    Read { path: PathBuf, error: std::io::Error },
    #[error(
        "'{0}' is no name: give 1 to {NAME_BYTES_MAX} lower-case letters, digits and hyphens, no hyphen first or last"
    )]
    Name(String),
    #[error("{}: {error}", path.display())]
    Malformed { path: PathBuf, error: rcgen::Error },
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// What an identity is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Serves, and calls other servers.
    Server,
    /// Calls servers.
    Client,
}

/// Makes an authority in a directory.
///
/// # Errors
/// There is one already; nothing is overwritten.
pub fn create(directory: &Path) -> Result<(), AuthorityError> {
    let key = KeyPair::generate()?;
    let certificate = authority(&key, OffsetDateTime::now_utc()).self_signed(&key)?;
    make_directory(directory)?;
    write_new(&directory.join(AUTHORITY_KEY_FILE), &key.serialize_pem(), 0o600)?;
    write_new(&directory.join(AUTHORITY_FILE), &certificate.pem(), 0o644)
}

/// Makes an identity of the authority in `directory`, in a directory of its own.
///
/// # Errors
/// There is one already; nothing is overwritten.
pub fn issue(directory: &Path, role: Role, name: &str, into: &Path) -> Result<(), AuthorityError> {
    if !is_name(name) {
        return Err(AuthorityError::Name(name.to_owned()));
    }
    let read =
        |path: &Path| fs::read_to_string(path).map_err(|error| AuthorityError::Read { path: path.to_owned(), error });
    let key_path = directory.join(AUTHORITY_KEY_FILE);
    let authority_key = KeyPair::from_pem(&read(&key_path)?)
        .map_err(|error| AuthorityError::Malformed { path: key_path.clone(), error })?;
    let authority_certificate = read(&directory.join(AUTHORITY_FILE))?;
    let now = OffsetDateTime::now_utc();
    let key = KeyPair::generate()?;
    let mut names = vec![format!("{name}{NAME_SUFFIX}")];
    let mut purposes = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if role == Role::Server {
        names.push(SERVER_NAME.to_owned());
        purposes.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    let mut parameters = CertificateParams::new(names)?;
    parameters.distinguished_name = called(&format!("ClaudeFS {name}"));
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = purposes;
    parameters.use_authority_key_identifier_extension = true;
    (parameters.not_before, parameters.not_after) = (now - SKEW, now + Duration::days(IDENTITY_DAYS));
    let issuer = Issuer::new(authority(&authority_key, now), authority_key);
    let certificate = parameters.signed_by(&key, &issuer)?;
    make_directory(into)?;
    write_new(&into.join(KEY_FILE), &key.serialize_pem(), 0o600)?;
    write_new(&into.join(AUTHORITY_FILE), &authority_certificate, 0o644)?;
    write_new(&into.join(CERTIFICATE_FILE), &certificate.pem(), 0o644)
}

/// What the authority's certificate says. Its name follows from its key, so that two never share one.
fn authority(key: &KeyPair, now: OffsetDateTime) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    let mark: String = key.public_key_raw().iter().rev().take(8).map(|byte| format!("{byte:02x}")).collect();
    parameters.distinguished_name = called(&format!("ClaudeFS authority {mark}"));
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    (parameters.not_before, parameters.not_after) = (now - SKEW, now + Duration::days(AUTHORITY_DAYS));
    parameters
}

fn called(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn is_name(name: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(is_inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn make_directory(path: &Path) -> Result<(), AuthorityError> {
    fs::create_dir_all(path).map_err(|error| AuthorityError::Write { path: path.to_owned(), error })
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), AuthorityError> {
    let write = |mut file: File| file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    let written = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).and_then(write);
    written.map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => AuthorityError::Exists(path.to_owned()),
        _ => AuthorityError::Write { path: path.to_owned(), error },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Identity, IdentityError};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_identity_is_made_read_and_never_overwritten() {
        let home = tempfile::tempdir().unwrap();
        let (ca, one) = (home.path().join("ca"), home.path().join("one"));
        assert!(matches!(issue(&ca, Role::Client, "a", &one), Err(AuthorityError::Read { .. })));
        create(&ca).unwrap();
        assert!(matches!(create(&ca), Err(AuthorityError::Exists(_))));
        issue(&ca, Role::Client, "a", &one).unwrap();
        assert!(matches!(issue(&ca, Role::Client, "a", &one), Err(AuthorityError::Exists(_))));
        Identity::load(&one).unwrap();
        for name in ["", "-a", "a-", "A", "a.b", "ä", &"a".repeat(64)] {
            let error = issue(&ca, Role::Client, name, &home.path().join("other")).unwrap_err().to_string();
            assert!(error.starts_with(&format!("'{name}' is no name: give 1 to 63")), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_with_an_identity_is_said() {
        let home = tempfile::tempdir().unwrap();
        let (ca, one, other) = (home.path().join("ca"), home.path().join("one"), home.path().join("other"));
        let load = || Identity::load(&one).map(|_| ()).unwrap_err();
        assert!(load().to_string().contains("make an identity with: cfs authority issue"), "{}", load());
        create(&ca).unwrap();
        issue(&ca, Role::Server, "a", &one).unwrap();
        issue(&ca, Role::Server, "b", &other).unwrap();
        let key = one.join(KEY_FILE);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load(), IdentityError::Exposed { .. }));
        assert!(load().to_string().contains("chmod 600"), "{}", load());
        // Another's key; then a certificate in its place; then nothing.
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        fs::copy(other.join(KEY_FILE), &key).unwrap();
        assert!(matches!(load(), IdentityError::Unusable { .. }), "{}", load());
        for name in [KEY_FILE, CERTIFICATE_FILE, AUTHORITY_FILE] {
            fs::write(one.join(name), "").unwrap();
            assert!(matches!(load(), IdentityError::Malformed { .. }), "{}", load());
        }
    }
}
