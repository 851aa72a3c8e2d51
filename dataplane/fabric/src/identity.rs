//! Who a process is to its peers: a certificate of the cluster's authority and the key to it.
//!
//! An identity is a directory of three files in PEM: `ca.pem`, the authority's certificate; `cert.pem`, what
//! it issued for this process; `key.pem`, the secret key. `cfs authority` makes them. Servers and clients
//! have different ones (extended key usage, RFC 5280 section 4.2.1.12), so that no client can pass for a
//! server.

pub mod authority;

use crate::Peer;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub const AUTHORITY_FILE: &str = "ca.pem";
pub const CERTIFICATE_FILE: &str = "cert.pem";
pub const KEY_FILE: &str = "key.pem";
/// A name of each server's certificate: clients look for it instead of an address, which may change.
pub const SERVER_NAME: &str = "server.cfs.internal";
/// Behind the name of whom a certificate was issued for.
pub const NAME_SUFFIX: &str = ".name.cfs.internal";
/// What is spoken, as the handshake calls it (ALPN, RFC 7301).
const PROTOCOL: &[u8] = b"cfs";

/// Why there is no identity in a directory.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("cannot read {}: {error}; make an identity with: cfs authority issue", path.display())]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{} can be read by others than its owner; restrict it with: chmod 600 {}", path.display(), path.display())]
    Exposed { path: PathBuf },
    #[error("{} does not hold what it should: {detail}", path.display())]
    Malformed { path: PathBuf, detail: String },
    #[error("the identity in {} is of no use: {detail}", path.display())]
    Unusable { path: PathBuf, detail: String },
}

/// What a process needs to prove who it is, and to check who others are.
pub struct Identity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing of what is secret.
        f.write_str("Identity")
    }
}

impl Identity {
    /// Reads the files of a directory.
    pub fn load(directory: &Path) -> Result<Identity, IdentityError> {
        let path = |name: &str| directory.join(name);
        let authority = certificates(&path(AUTHORITY_FILE))?;
        let chain = certificates(&path(CERTIFICATE_FILE))?;
        let key_path = path(KEY_FILE);
        let text = read(&key_path)?;
        let metadata =
            fs::metadata(&key_path).map_err(|error| IdentityError::Read { path: key_path.clone(), error })?;
        if metadata.permissions().mode() & 0o077 != 0 {
            return Err(IdentityError::Exposed { path: key_path });
        }
        let key = PrivateKeyDer::from_pem_slice(&text)
            .map_err(|error| IdentityError::Malformed { path: key_path, detail: error.to_string() })?;
        configure(authority, chain, key)
            .map_err(|detail| IdentityError::Unusable { path: directory.to_owned(), detail })
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        self.client.clone()
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    fs::read(path).map_err(|error| IdentityError::Read { path: path.to_owned(), error })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let malformed = |detail: String| IdentityError::Malformed { path: path.to_owned(), detail };
    let text = read(path)?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let parsed = parsed.map_err(|error| malformed(error.to_string()))?;
    if parsed.is_empty() {
        return Err(malformed("there is no certificate in it".to_owned()));
    }
    Ok(parsed)
}

fn configure(
    authority: Vec<CertificateDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Identity, String> {
    let text = |error: rustls::Error| error.to_string();
    let provider: Arc<CryptoProvider> = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in authority {
        roots.add(certificate).map_err(text)?;
    }
    let roots = Arc::new(roots);
    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(text)?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .map_err(text)?;
    client.alpn_protocols = vec![PROTOCOL.to_vec()];
    // A connection lives for long, and a ticket would be one more secret.
    client.resumption = Resumption::disabled();
    client.enable_secret_extraction = true;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|error| error.to_string())?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(text)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(text)?;
    server.alpn_protocols = vec![PROTOCOL.to_vec()];
    server.send_tls13_tickets = 0;
    server.enable_secret_extraction = true;
    Ok(Identity { client: Arc::new(client), server: Arc::new(server) })
}

/// The name that clients look for in a server's certificate.
pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("it is a DNS name")
}

/// Whom a certificate, already found to be the authority's, was issued for.
pub(crate) fn peer(certificate: &CertificateDer<'_>) -> Result<Peer, String> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|error| error.to_string())?;
    let name = parsed.valid_dns_names().find_map(|name| name.strip_suffix(NAME_SUFFIX));
    let name = name.ok_or_else(|| format!("the peer's certificate has no name that ends with {NAME_SUFFIX}"))?;
    Ok(Peer::Certified(name.to_owned()))
}
