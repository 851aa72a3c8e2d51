//! Which crate may depend on which: the list of docs/architecture.md, held against the manifests.

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};
use std::collections::{BTreeMap, BTreeSet};

/// Each crate with all others of the workspace that it may use.
const ALLOWED: [(&str, &[&str]); 18] = [
    ("isa-l-sys", &[]),
    ("libfabric-sys", &[]),
    ("cfs-wire", &[]),
    ("cfs-reactor", &["cfs-wire"]),
    ("cfs-codec", &["cfs-wire", "isa-l-sys"]),
    ("cfs-device", &["cfs-wire", "cfs-reactor"]),
    ("cfs-fabric", &["cfs-wire", "cfs-reactor", "libfabric-sys"]),
    ("cfs-store", &["cfs-wire", "cfs-reactor", "cfs-codec", "cfs-device", "cfs-fabric"]),
    ("cfs-kv", &["cfs-wire", "cfs-reactor"]),
    ("cfs-consensus", &["cfs-wire", "cfs-reactor", "cfs-fabric"]),
    ("cfs-meta", &["cfs-wire", "cfs-reactor", "cfs-fabric", "cfs-kv", "cfs-consensus"]),
    ("cfs-api", &["cfs-wire", "cfs-reactor", "cfs-fabric"]),
    ("cfs-movers", &["cfs-wire", "cfs-reactor", "cfs-store", "cfs-api"]),
    ("cfs-client", &["cfs-wire", "cfs-reactor", "cfs-fabric"]),
    ("cfs-fuse", &["cfs-wire", "cfs-reactor", "cfs-fabric", "cfs-client"]),
    ("cfsctl", &["cfs-wire", "cfs-reactor", "cfs-codec", "cfs-fabric", "cfs-api"]),
    // The only place where all meet.
    ("cfs", ANYTHING),
    ("cfs-sim", ANYTHING),
];

const ANYTHING: &[&str] = &["*"];

/// Arrows of tests only: these clients are tested against the real metadata service, and against what the
/// data endpoint reserves.
const TESTS_ONLY: [(&str, &str); 4] =
    [("cfs-client", "cfs-meta"), ("cfs-client", "cfs-store"), ("cfs-fuse", "cfs-meta"), ("cfs-fuse", "cfs-store")];

/// Every dependency between workspace crates that the list does not allow.
fn forbidden(used: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, dependencies) in used {
        let Some((_, allowed)) = ALLOWED.iter().find(|(listed, _)| listed == name) else {
            wrong.push(format!("{name} is not in the list: say what it may use"));
            continue;
        };
        if *allowed == ANYTHING {
            continue;
        }
        for dependency in dependencies.iter().filter(|dependency| !allowed.contains(&dependency.as_str())) {
            wrong.push(format!("{name} must not use {dependency}"));
        }
    }
    wrong
}

/// Dependencies among workspace crates. Those of tests count too, except in hwtest: a test that
/// reaches upwards has to be listed.
fn used(metadata: &Metadata) -> BTreeMap<String, BTreeSet<String>> {
    let packages = metadata.workspace_packages();
    let names: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let of = |package: &&cargo_metadata::Package| {
        let hwtest = package.manifest_path.as_str().contains("/hwtest/");
        let listed = |name: &str| TESTS_ONLY.contains(&(package.name.as_str(), name));
        let dependencies = package.dependencies.iter().filter(|dependency| {
            dependency.kind != DependencyKind::Development || !(hwtest || listed(&dependency.name))
        });
        let inside = dependencies.map(|dependency| dependency.name.to_string());
        (package.name.to_string(), inside.filter(|name| names.contains(name.as_str())).collect())
    };
    packages.iter().map(of).collect()
}

#[test]
fn no_crate_uses_one_that_the_architecture_does_not_allow() {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml");
    let metadata = MetadataCommand::new().manifest_path(manifest).no_deps().exec().expect("cargo metadata runs");
    let used = used(&metadata);
    assert!(used["cfs"].contains("cfs-meta"), "the manifests were not read: {used:?}");
    assert_eq!(forbidden(&used), Vec::<String>::new());
}

#[test]
fn an_arrow_against_the_stream_is_named() {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let used = BTreeMap::from([
        ("cfs-wire".to_owned(), set(&["cfs-reactor"])),
        ("cfs-kv".to_owned(), set(&["cfs-wire", "cfs-reactor"])),
        ("cfs-new".to_owned(), set(&[])),
    ]);
    let wrong = forbidden(&used);
    assert_eq!(wrong, ["cfs-new is not in the list: say what it may use", "cfs-wire must not use cfs-reactor"]);
}
