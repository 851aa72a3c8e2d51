//! Which devices a server takes for its targets: each by what it is, wherever it is given, and
//! none that was replaced.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

mod common;

use common::{CFS, Cluster, Running, cfs, fingerprint, refused};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

fn serve(targets: &[&str]) -> Output {
    let flags = targets.iter().flat_map(|target| ["--target", target]);
    cfs(&["server", "--listen", "127.0.0.1:0"].into_iter().chain(flags).collect::<Vec<_>>())
}

fn replace(id: &str, path: &str, survivors: &[&str]) -> Output {
    let flags = survivors.iter().flat_map(|target| ["--target", target]);
    cfs(&["replace", id, path].into_iter().chain(flags).collect::<Vec<_>>())
}

fn accepted(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_replaced_target_is_refused_in_the_place_of_its_replacement_and_beside_it() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    let old = cluster.path("old").display().to_string();
    fs::rename(&targets[1], &old).unwrap();
    accepted(&replace("1", &targets[1], &[&targets[0], &targets[2]]));
    let before = fingerprint(Path::new(&old));
    for given in [vec![&*targets[0], &old, &targets[2]], vec![&*targets[0], &targets[1], &targets[2], &old]] {
        let line = refused(&serve(&given));
        assert!(line.contains(&format!("{old} is not target t1 any more")), "{line}");
        assert!(line.contains("give the path of the replacement"), "{line}");
    }
    assert!(fingerprint(Path::new(&old)) == before, "the old target was changed");
    // The twin: the replacement is served.
    drop(Running::start(&cluster));
}

#[test]
fn a_target_that_was_only_away_is_taken_back() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    let away = cluster.path("away");
    fs::rename(&targets[1], &away).unwrap();
    drop(Running::start(&cluster));
    fs::rename(&away, &targets[1]).unwrap();
    drop(Running::start(&cluster));
}

/// Whoever has a deleted file open reads and writes it as before; the next start would do without.
#[test]
fn a_target_that_is_deleted_or_cut_off_under_its_server_is_told_of() {
    for delete in [true, false] {
        let cluster = Cluster::new();
        let server = Running::start(&cluster);
        let status = server.status();
        assert_eq!((status.health.as_str(), status.targets_up), ("ok", 3));
        let target = &cluster.targets()[1];
        match delete {
            true => fs::remove_file(target).unwrap(),
            false => fs::File::options().write(true).open(target).unwrap().set_len(1 << 20).unwrap(),
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        let status = loop {
            let status = server.status();
            if status.health != "ok" || Instant::now() > deadline {
                break status;
            }
            thread::sleep(Duration::from_millis(100));
        };
        assert_eq!((status.health.as_str(), status.targets_up), ("degraded", 2), "deleted: {delete}");
    }
}

#[test]
fn targets_in_each_others_places_are_told_apart() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    let between = cluster.path("between");
    fs::rename(&targets[0], &between).unwrap();
    fs::rename(&targets[2], &targets[0]).unwrap();
    fs::rename(&between, &targets[2]).unwrap();
    drop(Running::start(&cluster));
    // Where target 2 was configured is target 0 now: replacing 0 would erase nothing but lose it.
    let path = cluster.path("new").display().to_string();
    let line = refused(&replace("0", &path, &[&targets[1], &targets[2]]));
    assert!(line.contains("target t0 is not lost") && line.contains(&targets[2]), "{line}");
    assert!(!Path::new(&path).exists(), "an unfinished target was left behind");
}

#[test]
fn one_target_given_twice_is_named() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    let link = cluster.path("link").display().to_string();
    std::os::unix::fs::symlink(&targets[1], &link).unwrap();
    let line = refused(&serve(&[&targets[0], &targets[1], &link]));
    assert!(line.contains(&targets[1]) && line.contains(&link) && line.contains("give it once"), "{line}");
    // A copy is another file, and the same target.
    let copy = cluster.path("copy").display().to_string();
    fs::copy(&targets[1], &copy).unwrap();
    let line = refused(&serve(&[&targets[0], &targets[1], &copy]));
    assert!(line.contains(&copy) && line.contains("one is a copy of the other"), "{line}");
}

#[test]
fn a_target_that_the_cluster_still_needs_is_not_replaced() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    fs::rename(&targets[1], cluster.path("lost-1")).unwrap();
    fs::rename(&targets[2], cluster.path("lost-2")).unwrap();
    let line = refused(&replace("1", &targets[1], &[&targets[0], &targets[2]]));
    assert!(line.contains("replacing t1 now would lose data") && line.contains("bring the others back"), "{line}");
    assert!(!Path::new(&targets[1]).exists(), "an unfinished target was left behind");
    // With the other one back it is.
    fs::rename(cluster.path("lost-2"), &targets[2]).unwrap();
    accepted(&replace("1", &targets[1], &[&targets[0], &targets[2]]));
    // And until it is filled nothing else may be missing.
    fs::remove_file(&targets[2]).unwrap();
    let line = refused(&cluster.server("127.0.0.1:0"));
    assert!(line.contains("the replacement t1 was not refilled yet") && line.contains(&targets[2]), "{line}");
}

#[test]
fn nothing_is_replaced_under_a_running_server_nor_a_file_overwritten() {
    let cluster = Cluster::new();
    let targets = cluster.targets();
    let line = refused(&replace("1", &targets[1], &[&targets[0], &targets[2]]));
    assert!(line.contains(&format!("{} exists", targets[1])), "{line}");
    fs::rename(&targets[1], cluster.path("lost")).unwrap();
    let running = Running::start(&cluster);
    let line = refused(&replace("1", &targets[1], &[&targets[0], &targets[2]]));
    assert!(line.contains("another server uses it"), "{line}");
    drop(running);
    let line = refused(&replace("7", &targets[1], &[&targets[0], &targets[2]]));
    assert!(line.contains("targets t0 to t2, not t7"), "{line}");
}

/// Its terminal is closed, its disk is full: what a server has to say can't be written.
#[test]
fn a_server_that_nobody_can_hear_serves() {
    let cluster = Cluster::new();
    fs::remove_file(&cluster.targets()[2]).unwrap();
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    let mut server = Command::new(CFS);
    server.args(["--log", "info"]).args(cluster.server_arguments("127.0.0.1:0"));
    let mut child = server.stdout(Stdio::piped()).stderr(full()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let _ = child.kill();
    let _ = child.wait();
    assert!(line.starts_with("serving on "), "{line:?}");

    let target = cluster.path("new");
    let mut format = Command::new(CFS);
    format.args(["format", "--ec", "1+0", "--size", "64M"]).arg(&target);
    assert!(format.stdout(full()).stderr(full()).status().unwrap().success(), "it was made");
    // A second one is refused; whoever asked can't be told why, but that.
    assert_eq!(format.stdout(full()).stderr(full()).status().unwrap().code(), Some(1));
}
