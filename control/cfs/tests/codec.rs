//! What codes segments is chosen when a server starts, and the server says what it is.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

mod common;

use common::{Cluster, Running};

#[test]
fn a_server_codes_by_what_it_was_told_and_says_so() {
    let cluster = Cluster::new();
    assert_eq!(Running::start_with(&cluster, &["--codec", "portable"]).status().codec, "scalar");
    #[cfg(target_arch = "x86_64")]
    assert_eq!(Running::start(&cluster).status().codec, "simd");
}

#[cfg(feature = "isal")]
#[test]
fn a_build_with_isa_l_uses_it_when_told() {
    let cluster = Cluster::new();
    assert_eq!(Running::start_with(&cluster, &["--codec", "isal"]).status().codec, "isa-l");
}

#[cfg(not(feature = "isal"))]
#[test]
fn a_build_without_isa_l_says_how_to_get_it() {
    let cluster = Cluster::new();
    let mut arguments = cluster.server_arguments("127.0.0.1:0");
    arguments.extend(["--codec".into(), "isal".into()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let line = common::refused(&common::cfs(&arguments));
    assert!(line.contains("codec = isal is not in this build") && line.contains("--features cfs/isal"), "{line}");
}
