//! What the kernel is told and has dropped: names, attributes, pages.

mod common;

use bytes::Bytes;
use cfs_client::{Client, Invalidator, OpenFile, OpenFlags, WriteFlags};
use cfs_reactor::sync::{Mutex, Semaphore};
use cfs_wire::{Errno, Ino};
use common::{ROOT, create, fenced_by_a_writer, open, read, seeds, simulate, write};
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, join};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Counts how often the kernel's names are dropped, and an inode's pages.
#[derive(Default)]
struct Kernel {
    keeps_names: bool,
    drops: Cell<u32>,
    attributes_dropped: Cell<u32>,
    invalidated: Cell<u32>,
    /// Who has the permit has pages locked.
    pages: Option<Rc<Semaphore>>,
    writing: Cell<bool>,
    invalidated_while_writing: Cell<u32>,
}

impl Invalidator for Kernel {
    fn keeps_names(&self) -> bool {
        self.keeps_names
    }

    fn drop_names(&self) {
        self.drops.set(self.drops.get() + 1);
    }

    fn drop_attributes(&self, _ino: Ino) {
        self.attributes_dropped.set(self.attributes_dropped.get() + 1);
    }

    fn invalidate(&self, _ino: Ino) -> LocalBoxFuture<'static, ()> {
        self.invalidated.set(self.invalidated.get() + 1);
        if self.writing.get() {
            self.invalidated_while_writing.set(self.invalidated_while_writing.get() + 1);
        }
        let pages = self.pages.clone();
        async move {
            if let Some(pages) = pages {
                pages.acquire(1).await;
            }
        }
        .boxed_local()
    }
}

/// Has a page that was stored to through a mapping, and writes it back when it is to be dropped.
struct DirtyPage {
    /// How often it is stored to again before it is gone.
    stores: Cell<u32>,
    client: Rc<Client>,
    file: Rc<OpenFile>,
    /// How writing it back ended, each time.
    outcomes: Rc<RefCell<Vec<Result<u32, Errno>>>>,
}

impl Invalidator for DirtyPage {
    fn keeps_names(&self) -> bool {
        false
    }

    fn drop_names(&self) {}

    fn drop_attributes(&self, _ino: Ino) {}

    fn invalidate(&self, ino: Ino) -> LocalBoxFuture<'static, ()> {
        let (client, file, outcomes) = (self.client.clone(), self.file.clone(), self.outcomes.clone());
        let dirty = ino == file.ino() && self.stores.get() > 0;
        self.stores.set(self.stores.get() - u32::from(dirty));
        async move {
            if dirty {
                let written = write_back(&client, &file, &b"page"[..]).await;
                outcomes.borrow_mut().push(written);
            }
        }
        .boxed_local()
    }
}

/// Writes a page of a mapping as the kernel does.
async fn write_back(client: &Rc<Client>, file: &OpenFile, page: impl Into<Bytes>) -> Result<u32, Errno> {
    let how = WriteFlags { mapped: true, ..WriteFlags::default() };
    client.write_with(file, 0, page.into(), how).await
}

/// The first page of a file that a program has mapped.
#[derive(Clone)]
struct MappedPage {
    client: Rc<Client>,
    file: Rc<OpenFile>,
    /// Locked while it is read, written back or dropped.
    page: Rc<Mutex<Page>>,
}

#[derive(Default)]
struct Page {
    bytes: Option<Vec<u8>>,
    dirty: bool,
}

impl MappedPage {
    async fn of(client: &Rc<Client>, name: &str) -> MappedPage {
        let entry = client.lookup(ROOT, name.as_bytes()).await.unwrap();
        let flags = OpenFlags { read_write: true, ..OpenFlags::default() };
        let file = client.open(entry.attr.ino, flags, false).await.unwrap();
        let page = Rc::new(Mutex::new(Page::default()));
        let mapped = MappedPage { client: client.clone(), file, page };
        client.set_invalidator(Rc::new(mapped.clone()));
        mapped
    }

    async fn store(&self, at: usize, byte: u8) {
        let mut page = self.page.lock().await;
        if page.bytes.is_none() {
            page.bytes = Some(self.client.read_for_pages(&self.file, 0, 4096).await.unwrap().to_vec());
        }
        page.bytes.as_mut().unwrap()[at] = byte;
        page.dirty = true;
    }

    /// As write(2): the page is locked until it is answered.
    async fn write(&self, at: usize, byte: u8) {
        let mut page = self.page.lock().await;
        if let Some(bytes) = &mut page.bytes {
            bytes[at] = byte;
        }
        write(&self.client, &self.file, at as u64, &[byte]).await;
    }

    /// As msync, and as the kernel does by itself after a while.
    async fn sync(&self) {
        let mut page = self.page.lock().await;
        if std::mem::take(&mut page.dirty) {
            let bytes = page.bytes.clone().unwrap();
            write_back(&self.client, &self.file, bytes).await.unwrap();
        }
    }
}

impl Invalidator for MappedPage {
    fn keeps_names(&self) -> bool {
        false
    }

    fn drop_names(&self) {}

    fn drop_attributes(&self, _ino: Ino) {}

    fn invalidate(&self, ino: Ino) -> LocalBoxFuture<'static, ()> {
        let mapped = self.clone();
        async move {
            if ino == mapped.file.ino() {
                mapped.sync().await;
                mapped.page.lock().await.bytes = None;
            }
        }
        .boxed_local()
    }
}

/// A page of b's mapping is being written back when a writes into it by write(2); before that, a writes back
/// a page of its own, if at all.
fn write_beside_a_page_that_is_written_back(second_page: bool) {
    for seed in seeds(1, 8) {
        simulate(seed, move |server| async move {
            server.start().await;
            server.disk.proposal_micros_max.set(60_000);
            let (a, b) = (server.client("a").await, server.client("b").await);
            let ours = create(&a, "f").await;
            write(&a, &ours, 0, &[0; 8192]).await;
            a.fsync(&ours, false).await.unwrap();
            let (written, mapped) = (MappedPage::of(&a, "f").await, MappedPage::of(&b, "f").await);
            for round in 1..40u8 {
                mapped.store(0, round).await;
                let under_way = mapped.clone();
                let syncing = server.handle.spawn(async move { under_way.sync().await });
                server.sleep(u64::from(round) % 20).await;
                if second_page {
                    let how = WriteFlags { mapped: true, ..WriteFlags::default() };
                    a.write_with(&ours, 4096, Bytes::from(vec![round; 4096]), how).await.unwrap();
                }
                written.write(5, round).await;
                syncing.await.unwrap();
                let found = read(&a, &ours, 0, 10).await;
                assert_eq!((found[0], found[5]), (round, round), "round {round} of seed {seed}");
            }
        });
    }
}

#[test]
fn a_page_that_is_just_being_written_back_does_not_take_what_another_client_writes_beside_it() {
    write_beside_a_page_that_is_written_back(false);
}

#[test]
fn nor_does_it_after_it_made_way_for_another_clients_page() {
    write_beside_a_page_that_is_written_back(true);
}

#[test]
fn each_commit_says_whether_programs_wrote_it_or_pages_of_mappings_are_written_back() {
    simulate(5, |server| async move {
        server.start().await;
        let a = server.client("a").await;
        let file = create(&a, "f").await;
        // Larger than fits the inode, and more runs than one commit takes.
        for run in 0..700 {
            write(&a, &file, 8192 * (run + 1), b"a run").await;
        }
        a.fsync(&file, false).await.unwrap();
        assert!(server.disk.commits.get() > 2, "{} commits", server.disk.commits.get());
        assert_eq!(server.disk.commits_of_bytes.get(), 0);
        let before = server.disk.commits.get();
        write_back(&a, &file, &b"a page"[..]).await.unwrap();
        a.fsync(&file, false).await.unwrap();
        assert_eq!((server.disk.commits.get() - before, server.disk.commits_of_bytes.get()), (1, 1));
    });
}

#[test]
fn clients_that_write_pages_of_mappings_back_do_not_wait_for_each_other() {
    for seed in seeds(1, 8) {
        simulate(seed, |server| async move {
            server.start().await;
            server.disk.proposal_micros_max.set(5_000);
            let (a, b) = (server.client("a").await, server.client("b").await);
            let ours = create(&a, "f").await;
            write(&a, &ours, 0, &[0; 10]).await;
            a.fsync(&ours, false).await.unwrap();
            let mapped = [MappedPage::of(&a, "f").await, MappedPage::of(&b, "f").await];
            let begun = server.handle.now();
            for round in 1..40u8 {
                let story = |at: usize| {
                    let mapped = mapped[at].clone();
                    async move {
                        mapped.store(at, round).await;
                        mapped.sync().await;
                    }
                };
                join(story(0), story(1)).await;
            }
            let took = server.handle.now() - begun;
            assert!(took < Duration::from_millis(200) * 40, "{took:?} of seed {seed}");
        });
    }
}

#[test]
fn what_was_stored_to_a_mapping_before_a_fence_is_lost_with_an_error_and_not_written_over_what_came_since() {
    simulate(5, |server| async move {
        server.start().await;
        let a = server.client("a").await;
        create(&a, "f").await;
        let flags = OpenFlags { read_write: true, ..OpenFlags::default() };
        let entry = a.lookup(ROOT, b"f").await.unwrap();
        let file = a.open(entry.attr.ino, flags, false).await.unwrap();
        write(&a, &file, 0, b"before").await;
        a.fsync(&file, false).await.unwrap();
        let outcomes = Rc::new(RefCell::new(Vec::new()));
        // Once before the lease ends, which is written back while nobody answers, and once more.
        let stores = Cell::new(2);
        let page = DirtyPage { stores, client: a.clone(), file: file.clone(), outcomes: outcomes.clone() };
        a.set_invalidator(Rc::new(page));
        let (_other, theirs) = fenced_by_a_writer(&server, "a", "f").await;
        assert_eq!(*outcomes.borrow(), [Err(Errno::EIO), Err(Errno::EIO)]);
        assert_eq!(a.fsync(&file, false).await, Err(Errno::EIO));
        assert_eq!(a.fsync(&file, false).await, Ok(()), "it is told once");
        assert_eq!(read(&a, &theirs, 0, 10).await, b"befo!e");
        // What is stored from now on is written back as ever.
        assert_eq!(write_back(&a, &file, &b"new"[..]).await, Ok(3));
        a.fsync(&file, false).await.unwrap();
        assert_eq!(read(&a, &file, 0, 10).await, b"newo!e");
    });
}

#[test]
fn the_kernels_names_are_dropped_once_and_not_given_again_while_another_client_changes_the_directory() {
    simulate(5, |server| async move {
        server.start().await;
        let (a, b) = (server.client("a").await, server.client("b").await);
        let kernel = Rc::new(Kernel { keeps_names: true, ..Kernel::default() });
        b.set_invalidator(kernel.clone());
        create(&a, "f").await;
        assert_eq!(kernel.drops.get(), 0, "no name was given");
        assert!(!b.lookup(ROOT, b"f").await.unwrap().entry_valid.is_zero());
        for round in 0..4 {
            create(&a, &format!("g{round}")).await;
            assert_eq!(kernel.drops.get(), 1, "before the change was answered, and only where names were given");
            assert!(b.lookup(ROOT, b"f").await.unwrap().entry_valid.is_zero());
            assert!(matches!(b.lookup(ROOT, b"absent").await, Err(Ok(negative)) if negative.valid.is_zero()));
            server.sleep(3000).await;
        }
        // Longer than two clients are taken to be at it after the last change.
        server.sleep(3000).await;
        assert!(!b.lookup(ROOT, b"f").await.unwrap().entry_valid.is_zero());
        assert!(matches!(b.lookup(ROOT, b"absent").await, Err(Ok(negative)) if !negative.valid.is_zero()));
        create(&a, "h").await;
        assert_eq!(kernel.drops.get(), 2);
    });
}

#[test]
fn a_change_does_not_wait_for_locked_pages_and_who_uses_them_next_drops_them() {
    simulate(5, |server| async move {
        server.start().await;
        let (a, b) = (server.client("a").await, server.client("b").await);
        let pages = Semaphore::new(1);
        let kernel = Rc::new(Kernel { pages: Some(pages.clone()), ..Kernel::default() });
        b.set_invalidator(kernel.clone());
        let file = create(&a, "f").await;
        write(&a, &file, 0, b"old").await;
        a.fsync(&file, false).await.unwrap();
        let theirs = open(&b, "f").await;
        b.pages_are_current(&theirs);
        b.getattr_for_pages(theirs.ino()).await.unwrap();
        assert!(!b.getattr_for_pages(theirs.ino()).await.unwrap().valid.is_zero());
        let locked = pages.acquire(1).await;
        let (dropped, begun) = (kernel.attributes_dropped.get(), server.handle.now());
        a.unlink(ROOT, b"f").await.unwrap();
        let took = server.handle.now() - begun;
        assert!(took < Duration::from_millis(200), "{took:?} of a lease of 10 s");
        assert_eq!(kernel.attributes_dropped.get(), dropped + 2, "of the file and of its directory");

        let true_time = b.getattr(theirs.ino()).await.unwrap().attr.mtime;
        let told = b.getattr_for_pages(theirs.ino()).await.unwrap();
        assert_eq!((told.attr.nlink, told.valid), (0, Duration::ZERO));
        assert_ne!(told.attr.mtime, true_time);
        assert_eq!(b.getattr_for_pages(theirs.ino()).await.unwrap().attr.mtime, true_time);
        drop(locked);
    });
}

#[test]
fn the_kernel_is_asked_to_drop_pages_when_it_has_none_locked_for_a_write() {
    simulate(6, |server| async move {
        server.start().await;
        server.disk.proposal_micros_max.set(50_000);
        let (a, b) = (server.client("a").await, server.client("b").await);
        let kernel = Rc::new(Kernel::default());
        b.set_invalidator(kernel.clone());
        let ours = create(&a, "f").await;
        let theirs = open(&b, "f").await;
        for round in 0..40u8 {
            // A grant, which the other's write ends.
            b.getattr_for_pages(theirs.ino()).await.unwrap();
            let (other, other_file) = (a.clone(), ours.clone());
            let writing = server.handle.spawn(async move { write(&other, &other_file, 0, &[round; 10]).await });
            kernel.writing.set(true);
            write(&b, &theirs, 10, &[round; 10]).await;
            kernel.writing.set(false);
            writing.await.unwrap();
        }
        assert!(kernel.invalidated.get() > 10, "{} times", kernel.invalidated.get());
        assert_eq!(kernel.invalidated_while_writing.get(), 0);
    });
}

#[test]
fn a_kernel_that_cannot_drop_names_at_once_is_given_none() {
    simulate(5, |server| async move {
        server.start().await;
        let (a, b) = (server.client("a").await, server.client("b").await);
        let kernel = Rc::new(Kernel::default());
        b.set_invalidator(kernel.clone());
        create(&a, "f").await;
        let found = b.lookup(ROOT, b"f").await.unwrap();
        assert!(found.entry_valid.is_zero() && !found.attr_valid.is_zero());
        assert!(matches!(b.lookup(ROOT, b"absent").await, Err(Ok(negative)) if negative.valid.is_zero()));
        let reads = server.disk.reads.get();
        b.lookup(ROOT, b"f").await.unwrap();
        assert_eq!(server.disk.reads.get(), reads, "served from the client's own cache");
        a.rename(ROOT, b"f", ROOT, b"g", 0).await.unwrap();
        assert!(matches!(b.lookup(ROOT, b"f").await, Err(Ok(_))));
        assert_eq!(kernel.drops.get(), 0);
    });
}

#[test]
fn the_kernels_pages_stay_over_a_lapsed_grant_unless_the_file_changed_meanwhile() {
    const LAPSE_MS: u64 = 15_000;
    simulate(5, |server| async move {
        server.start().await;
        let (a, b) = (server.client("a").await, server.client("b").await);
        let kernel = Rc::new(Kernel::default());
        b.set_invalidator(kernel.clone());
        let written = create(&a, "f").await;
        write(&a, &written, 0, b"one").await;
        a.fsync(&written, false).await.unwrap();
        let rewrite = async || {
            write(&a, &written, 0, b"two").await;
            a.fsync(&written, false).await.unwrap();
        };
        let reopen = async || {
            let file = open(&b, "f").await;
            let current = b.pages_are_current(&file);
            b.release(&file);
            current
        };
        assert_eq!((reopen().await, reopen().await), (false, true), "none are known at first");
        server.sleep(LAPSE_MS).await;
        assert!(reopen().await, "nobody changed it");
        server.sleep(LAPSE_MS).await;
        rewrite().await;
        assert_eq!((reopen().await, reopen().await), (false, true));

        let file = open(&b, "f").await;
        assert!(b.pages_are_current(&file));
        server.sleep(LAPSE_MS).await;
        let before = kernel.invalidated.get();
        b.getattr_for_pages(file.ino()).await.unwrap();
        assert_eq!(kernel.invalidated.get(), before);
        server.sleep(LAPSE_MS).await;
        rewrite().await;
        let before = kernel.invalidated.get();
        assert!(b.getattr(file.ino()).await.unwrap().valid.is_zero(), "pages are to be asked about");
        let told = b.getattr_for_pages(file.ino()).await.unwrap();
        let after = b.getattr_for_pages(file.ino()).await.unwrap();
        assert_ne!(told.attr.mtime, after.attr.mtime, "another time has them dropped");
        assert!(told.valid.is_zero() && !after.valid.is_zero());
        assert_eq!(kernel.invalidated.get(), before);
    });
}

/// Read after a change, and cut off before they were found current.
#[test]
fn pages_whose_grant_ends_before_they_are_found_current_are_dropped() {
    simulate(6, |server| async move {
        server.start().await;
        let (a, b) = (server.client("a").await, server.client("b").await);
        let kernel = Rc::new(Kernel::default());
        b.set_invalidator(kernel.clone());
        let written = create(&a, "f").await;
        let rewrite = async |bytes| {
            write(&a, &written, 0, bytes).await;
            a.fsync(&written, false).await.unwrap();
        };
        rewrite(b"one").await;
        let file = open(&b, "f").await;
        b.read_for_pages(&file, 0, 10).await.unwrap();
        server.sleep(1000).await;
        // The change has waited until the other client knew.
        rewrite(b"two").await;
        assert_eq!(b.read_for_pages(&file, 0, 10).await.unwrap(), "two");
        server.network.partition("b", "server", true);
        let before = kernel.invalidated.get();
        server.sleep(12_000).await;
        assert_eq!(kernel.invalidated.get(), before + 1, "dropped once, before the change");
        rewrite(b"six").await;
        server.network.heal();
        server.sleep(1000).await;
        assert_eq!(b.read_for_pages(&file, 0, 10).await.unwrap(), "six");
        server.sleep(15_000).await;
        assert_eq!(kernel.invalidated.get(), before + 1, "these are found current");
    });
}

#[test]
fn a_client_that_was_given_up_goes_on_though_pages_are_locked() {
    simulate(7, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let pages = Semaphore::new(1);
        client.set_invalidator(Rc::new(Kernel { pages: Some(pages.clone()), ..Kernel::default() }));
        let file = create(&client, "f").await;
        write(&client, &file, 0, b"kept").await;
        client.fsync(&file, false).await.unwrap();
        let _locked = pages.acquire(1).await;
        let _others = fenced_by_a_writer(&server, "a", "f").await;
        let begun = server.handle.now();
        assert_eq!(read(&client, &file, 0, 10).await, b"kept!");
        let took = server.handle.now() - begun;
        assert!(took < Duration::from_secs(2), "{took:?}");
    });
}
