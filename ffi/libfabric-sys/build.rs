//! Nothing is linked and nothing is looked for, unless the bindings are to be written anew.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "bindgen")]
    generate();
}

/// Writes `src/bindings.rs`, only if it changes, so that a build without news leaves the tree alone.
#[cfg(feature = "bindgen")]
fn generate() {
    const BINDINGS: &str = "src/bindings.rs";
    const HEADERS: &str = "#include <rdma/fabric.h>\n#include <rdma/fi_errno.h>\n#include <rdma/fi_domain.h>\n\
                           #include <rdma/fi_endpoint.h>\n#include <rdma/fi_eq.h>\n#include <rdma/fi_cm.h>\n\
                           #include <rdma/fi_rma.h>\n";
    // 1.17 is the oldest release the bindings and the tests have been run against.
    let library = pkg_config::Config::new().atleast_version("1.17").probe("libfabric").expect("libfabric-dev 1.17");
    let constants = [
        "FI_(SUCCESS|EAGAIN|EAVAIL|ENODATA|ENOSYS|VERSION|MAJOR_VERSION|MINOR_VERSION)",
        "FI_(MSG|RMA|READ|WRITE|RECV|SEND|TRANSMIT|REMOTE_READ|REMOTE_WRITE|SOURCE|NUMERICHOST|CONTEXT|CONTEXT2)",
        "FI_(MR_LOCAL|MR_VIRT_ADDR|MR_ALLOCATED|MR_PROV_KEY|MR_ENDPOINT|MR_RAW|MR_RMA_EVENT|MR_HMEM|MR_COLLECTIVE)",
        "FI_(ORDER_SAW|ORDER_SAS|ADDR_UNSPEC|OPT_CM_DATA_SIZE|OPT_ENDPOINT|SOCKADDR_IN|SOCKADDR_IN6)",
        "FI_(GETWAIT|ENABLE|WAIT_FD|CQ_FORMAT_MSG|EP_MSG|CONNREQ|CONNECTED|SHUTDOWN|THREAD_DOMAIN|PROGRESS_MANUAL)",
    ];
    let text = bindgen::Builder::default()
        .header_contents("wrapper.h", HEADERS)
        .clang_args(library.include_paths.iter().map(|path| format!("-I{}", path.display())))
        .allowlist_function("fi_(getinfo|freeinfo|dupinfo|fabric|strerror|version)")
        .allowlist_type("fi_(info|fabric_attr|eq_attr|cq_attr|cq_msg_entry|cq_err_entry|eq_cm_entry|eq_err_entry)")
        .allowlist_type("fi_context2|fid_(fabric|domain|mr|eq|cq|ep|pep)|fi_ops_(cm|msg|rma)")
        .allowlist_var(constants.join("|"))
        // Seen through pointers only that are never followed.
        .opaque_type("fid_(av|nic|cntr|wait|poll|stx|mc)|fi_ops_(atomic|tagged|collective|av)|fi_mr_attr|fi_mr_map_raw")
        .dynamic_library_name("Functions")
        .dynamic_link_require_all(true)
        .wrap_unsafe_ops(true)
        .prepend_enum_name(false)
        .layout_tests(true)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .generate_comments(false)
        .generate()
        .expect("bindgen reads the headers of libfabric")
        .to_string();
    if std::fs::read_to_string(BINDINGS).ok().as_deref() != Some(text.as_str()) {
        std::fs::write(BINDINGS, text).expect("src/bindings.rs is writable");
    }
}
