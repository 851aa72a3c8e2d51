//! The other tests' checks can fail: each deliberate bug of the client is found by one of them.
#![cfg(feature = "planted")]

mod common;

use bytes::Bytes;
use cfs_client::{Caller, Client, ClientConfig, NewFile, OpenFile, OpenFlags};
use cfs_wire::Ino;
use cfs_wire::meta::AttrChanges;
use cfs_wire::planted::{Bug, activate};
use common::{Server, simulate};
use std::rc::Rc;
use std::time::Duration;

async fn create(client: &Rc<Client>) -> Rc<OpenFile> {
    let new = NewFile::regular(0o644, 0);
    client.create(Caller::default(), Ino::ROOT, b"f", new, OpenFlags::default()).await.unwrap().1
}

async fn write(client: &Rc<Client>, file: &OpenFile, data: &'static [u8]) {
    client.write(file, 0, Bytes::from_static(data), false).await.unwrap();
}

async fn content(server: &Server) -> Vec<u8> {
    let other = server.client("other").await;
    let entry = other.lookup(Ino::ROOT, b"f").await.unwrap();
    let file = other.open(entry.attr.ino, OpenFlags::default(), false).await.unwrap();
    other.read(&file, 0, 100).await.unwrap().to_vec()
}

/// Whether a story ends well; a panic in it is a bug found.
fn holds<F: Future<Output = bool> + 'static>(
    bug: Option<Bug>,
    story: impl Fn(Rc<Server>) -> F + Copy + 'static,
) -> bool {
    activate(bug);
    let verdict = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let verdict = Rc::new(std::cell::Cell::new(false));
        let seen = verdict.clone();
        simulate(1, |server| async move { seen.set(story(server).await) });
        verdict.get()
    }));
    activate(None);
    verdict.unwrap_or(false)
}

fn found<F: Future<Output = bool> + 'static>(bug: Bug, story: impl Fn(Rc<Server>) -> F + Copy + 'static) {
    assert!(holds(None, story), "without {} the story ends well", bug.name());
    assert!(!holds(Some(bug), story), "{} is not found", bug.name());
}

fn patient() -> ClientConfig {
    ClientConfig { write_back_after: Duration::from_secs(3600), ..ClientConfig::default() }
}

#[test]
fn an_early_fsync_loses_what_a_client_that_dies_had_synced() {
    found(Bug::ClientFsyncEarly, |server| async move {
        server.start().await;
        let client = server.client_with("a", patient()).await;
        let file = create(&client).await;
        write(&client, &file, b"synced").await;
        client.fsync(&file, false).await.unwrap();
        client.dirty_bytes() == 0
    });
}

#[test]
fn a_new_number_for_a_repeated_change_runs_it_twice() {
    found(Bug::ClientRenumberRetry, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        client.getattr(Ino::ROOT).await.unwrap();
        let faults = cfs_fabric::mem::Faults { reply_loss: 400_000, ..cfs_fabric::mem::Faults::default() };
        server.network.set_faults(faults);
        let mut fine = true;
        for _ in 0..10 {
            fine &= client.mkdir(Caller::default(), Ino::ROOT, b"d", 0o755, 0).await.is_ok();
            fine &= client.rmdir(Ino::ROOT, b"d").await.is_ok();
        }
        fine
    });
}

#[test]
fn a_lease_returned_dirty_shows_old_bytes_to_the_next_reader() {
    found(Bug::ClientReturnLeaseDirty, |server| async move {
        server.start().await;
        let client = server.client_with("a", patient()).await;
        let file = create(&client).await;
        write(&client, &file, b"new").await;
        content(&server).await == b"new"
    });
}

#[test]
fn what_is_kept_after_an_invalidation_is_stale() {
    found(Bug::ClientKeepInvalidated, |server| async move {
        server.start().await;
        let (a, b) = (server.client("a").await, server.client("b").await);
        let file = create(&a).await;
        b.getattr(file.ino()).await.unwrap();
        let changes = AttrChanges { mode: Some(0o600), ..AttrChanges::default() };
        a.setattr(file.ino(), changes).await.unwrap();
        b.getattr(file.ino()).await.unwrap().attr.mode == 0o600
    });
}

#[test]
fn a_truncate_that_overtakes_a_write_leaves_its_bytes() {
    found(Bug::ClientTruncateEarly, |server| async move {
        server.start().await;
        let client = server.client_with("a", patient()).await;
        let file = create(&client).await;
        write(&client, &file, b"to be cut").await;
        let changes = AttrChanges { size: Some(2), ..AttrChanges::default() };
        client.setattr(file.ino(), changes).await.unwrap();
        content(&server).await == b"to"
    });
}

#[test]
fn a_rename_that_overtakes_a_write_leaves_a_name_without_its_bytes() {
    found(Bug::ClientRenameDirty, |server| async move {
        server.start().await;
        let client = server.client_with("a", patient()).await;
        let file = create(&client).await;
        write(&client, &file, b"new").await;
        client.rename(Ino::ROOT, b"f", Ino::ROOT, b"g", 0).await.unwrap();
        client.dirty_bytes() == 0
    });
}

/// The client cannot reach the server for longer than its session lives.
async fn fenced_with_dirty_data(server: &Rc<Server>) -> (Rc<Client>, Rc<OpenFile>) {
    server.start().await;
    let client = server.client_with("a", patient()).await;
    let file = create(&client).await;
    write(&client, &file, b"old").await;
    client.fsync(&file, false).await.unwrap();
    write(&client, &file, b"mine").await;
    server.network.partition("a", "server", true);
    server.sleep(40_000).await;
    (client, file)
}

#[test]
fn data_of_a_fenced_session_that_is_kept_overwrites_later_writes() {
    found(Bug::ClientKeepFencedData, |server| async move {
        let (client, file) = fenced_with_dirty_data(&server).await;
        let before = content(&server).await;
        server.network.heal();
        server.sleep(10_000).await;
        let reported = client.fsync(&file, false).await.is_err();
        before == b"old" && reported && content(&server).await == b"old"
    });
}

#[test]
fn a_cache_used_after_the_lease_shows_what_others_have_replaced() {
    found(Bug::ClientIgnoreExpiry, |server| async move {
        let (client, file) = fenced_with_dirty_data(&server).await;
        let other = server.client("other").await;
        let changes = AttrChanges { mode: Some(0o600), ..AttrChanges::default() };
        other.setattr(file.ino(), changes).await.unwrap();
        // Still cut off: no answer is right, an old one is not.
        client.getattr(file.ino()).await.is_err()
    });
}

#[test]
fn bytes_kept_without_room_for_them_are_lost_after_the_write_was_answered() {
    found(Bug::ClientOverdrawSpace, |server| async move {
        server.start().await;
        let client = server.client_with("a", patient()).await;
        let file = create(&client).await;
        // What a predecessor of the server may have promised is over.
        server.sleep(25_000).await;
        server.disk.room.set(5);
        let written = client.write(&file, 0, Bytes::from_static(b"too much"), false).await;
        written.is_err() || client.fsync(&file, false).await.is_ok()
    });
}
