//! Passes on whether isa-l-sys found its library (`DEP_ISAL_FOUND`, set only with feature `isal`).

fn main() {
    println!("cargo::rustc-check-cfg=cfg(isal_found)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=DEP_ISAL_FOUND");
    if std::env::var_os("DEP_ISAL_FOUND").is_some() {
        println!("cargo::rustc-cfg=isal_found");
    }
}
