//! Completions and man pages are generated and name every command.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

#[path = "common/pages.rs"]
mod pages;

#[test]
fn completions_and_man_pages_name_every_command() {
    pages::name_every_command(env!("CARGO_BIN_EXE_cfs"), "cfs");
}
