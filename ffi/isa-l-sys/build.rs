//! Finds libisal by pkg-config. An absent library is a warning and an empty crate, never a failed
//! build: the callers' portable path gives the same bytes.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(isal_found)");
    println!("cargo::rerun-if-changed=build.rs");
    // 2.30 is the oldest release the bindings and the byte-for-byte tests have been run against.
    match pkg_config::Config::new().atleast_version("2.30").probe("libisal") {
        Ok(_library) => {
            println!("cargo::rustc-cfg=isal_found");
            // Read by dependents' build scripts as DEP_ISAL_FOUND.
            println!("cargo::metadata=found=1");
            #[cfg(feature = "bindgen")]
            generate(&_library);
        }
        Err(_) => {
            println!("cargo::warning=pkg-config finds no libisal 2.30 or later (libisal-dev): isa-l-sys is empty")
        }
    }
}

/// Writes `src/bindings.rs`, only if it changes, so that a build without news leaves the tree alone.
#[cfg(feature = "bindgen")]
fn generate(library: &pkg_config::Library) {
    const BINDINGS: &str = "src/bindings.rs";
    let text = bindgen::Builder::default()
        .header_contents("wrapper.h", "#include <isa-l/erasure_code.h>\n")
        .clang_args(library.include_paths.iter().map(|path| format!("-I{}", path.display())))
        .allowlist_function("ec_init_tables|ec_encode_data|ec_encode_data_update")
        .allowlist_function("gf_gen_cauchy1_matrix|gf_invert_matrix|gf_mul|gf_inv")
        .rust_edition(bindgen::RustEdition::Edition2024)
        .generate_comments(false)
        .generate()
        .expect("bindgen reads isa-l/erasure_code.h")
        .to_string();
    if std::fs::read_to_string(BINDINGS).ok().as_deref() != Some(text.as_str()) {
        std::fs::write(BINDINGS, text).expect("src/bindings.rs is writable");
    }
}
