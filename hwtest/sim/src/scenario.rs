//! One seed from an empty cluster to an empty cluster.

use crate::checker::{
    check_clean, check_node, check_sideline, check_tree, file_blobs, live_by_kind, metadata_bytes, within,
};
use crate::history::{ActorId, History};
use crate::model::Model;
use crate::observe::OPAQUE;
use crate::op::{NodeId, Op};
use crate::plan::{BadDisk, Fault, Phase, Plan};
use crate::report::{Checker, Failure, Summary, Violation};
use crate::workload::{Actor, SidelineFiles, list};
use crate::world::{Death, Mounted, SERVER, Started, World};
use cfs_client::{Caller, Client, NewFile, OpenFlags};
use cfs_device::mem::Faults as DiskFaults;
use cfs_fabric::mem::Faults as NetworkFaults;
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_reactor::{Executor, Handle};
use cfs_wire::meta::FileKind;
use cfs_wire::{Errno, Ino};
use futures_util::future::{Either, select};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;

/// Directories each program has of its own; those under the root lie on different shards.
const OWN_DIRECTORIES: usize = 2;
const SHARED_DIRECTORIES: usize = 2;
/// Longer than a lease: a commit may have to wait for a dead reader's to end.
const WRITTEN_BACK_WITHIN: Duration = Duration::from_secs(10);
/// The longest that the programs may take for one phase.
const PHASE_MAX: Duration = Duration::from_secs(900);
/// What the log and the ordered stores may keep of an empty file system, on all targets.
const METADATA_MAX: u64 = 24 << 20;

/// Runs a seed.
pub fn run(seed: u64) -> Result<Summary, Box<Failure>> {
    run_plan(seed, Plan::draw(seed))
}

/// Runs a given plan under a seed.
pub fn run_plan(seed: u64, plan: Plan) -> Result<Summary, Box<Failure>> {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    let shown: Rc<RefCell<Option<Rc<History>>>> = Rc::default();
    let crashes = Rc::new(std::cell::Cell::new(0));
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let (inner, shown, crashes) = (handle.clone(), shown.clone(), crashes.clone());
        executor.run_simulated(&handle, async move {
            let run = Run::begin(&inner, seed, plan, &shown).await?;
            let outcome = run.all_phases().await;
            crashes.set(run.world.crashes.get());
            outcome
        })
    }));
    let verdict = match ran {
        Ok(Ok(Ok(verdict))) => verdict,
        Ok(Ok(Err(cancelled))) => Err(Violation::new(Checker::Hang, format!("the scenario: {cancelled}"))),
        Ok(Err(stalled)) => Err(Violation::new(Checker::Hang, stalled.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(Violation::new(Checker::Panic, text.unwrap_or_else(|| "panicked".to_owned())))
        }
    };
    let history = shown.borrow().clone();
    let operations = history.as_ref().map_or(0, |history| history.operations());
    match verdict {
        Ok(()) => Ok(Summary {
            operations,
            crashes: crashes.get(),
            trace_hash: executor.trace_hash(),
            digest: history.as_ref().map_or(0, |history| history.digest()),
        }),
        Err(violation) => {
            let lines = history.as_ref().map(|history| history.lines()).unwrap_or_default();
            Err(Box::new(Failure { seed, violation, history: lines, operations }))
        }
    }
}

/// A run under way.
struct Run {
    plan: Plan,
    world: Rc<World>,
    history: Rc<History>,
    clients: RefCell<BTreeMap<usize, Mounted>>,
    own: Vec<Vec<NodeId>>,
    shared: Vec<NodeId>,
    sideline: SidelineFiles,
    random: RefCell<SplitMix64>,
    /// Mounts so far: no two have one name.
    mounts: std::cell::Cell<u64>,
}

impl Run {
    async fn begin(
        handle: &Handle,
        seed: u64,
        plan: Plan,
        shown: &RefCell<Option<Rc<History>>>,
    ) -> Result<Run, Violation> {
        let world = World::new(handle, plan.shape.clone(), seed);
        world.format().await?;
        if world.start_server().await? == Started::Halted {
            return Err(Violation::new(Checker::Restart, "halted before anything was asked"));
        }
        let first = world.mount("first").await?;
        let mut model = Model::new(first.client.root());
        let setup = Setup { client: first.client.clone() };
        let actors = plan.actors.len();
        let made = within(&world, &first, "setting up", async move { setup.make(actors).await }).await?;
        let Made { own, shared, sideline } =
            made.map_err(|errno| Violation::new(Checker::Reply, format!("setting up: {errno}")))?;
        let mut adopt = |(name, ino): &(String, Ino)| {
            let new = crate::op::Properties { kind: FileKind::Directory, mode: 0o755, uid: 0, gid: 0, target: vec![] };
            let op = Op::Make { dir: crate::model::ROOT, name: name.clone().into_bytes(), new };
            let id = model.next_id();
            model.apply(0, &op).expect("the names differ");
            model.node_mut(id).ino = Some(*ino);
            id
        };
        let own = own.iter().map(|roots| roots.iter().map(&mut adopt).collect()).collect();
        let shared = shared.iter().map(&mut adopt).collect();
        let opaque = adopt(&(String::from_utf8_lossy(OPAQUE).into_owned(), sideline.dir));
        model.node_mut(opaque).opaque = true;
        let history = History::new(handle, model);
        *shown.borrow_mut() = Some(history.clone());
        let run = Run {
            plan,
            world,
            history,
            clients: RefCell::default(),
            own,
            shared,
            sideline,
            random: RefCell::new(SplitMix64::new(seed ^ 0x5343_454E)),
            mounts: std::cell::Cell::new(0),
        };
        first.kill();
        for index in 0..run.plan.clients {
            run.mount(index).await?;
        }
        Ok(run)
    }

    /// Mounts a client and starts its programs.
    async fn mount(&self, index: usize) -> Result<(), Violation> {
        let number = self.mounts.get() + 1;
        self.mounts.set(number);
        let mounted = self.world.mount(&format!("client{index}.{number}")).await?;
        for (actor, plan) in self.plan.actors.iter().enumerate() {
            if plan.client != index {
                continue;
            }
            let actor = Actor {
                id: ActorId(actor),
                client_index: index,
                client: mounted.client.clone(),
                handle: mounted.handle.clone(),
                history: self.history.clone(),
                world: self.world.clone(),
                own: self.own[actor].clone(),
                shared: self.shared.clone(),
                sideline: self.sideline,
                shared_one_in: self.plan.shared_one_in,
                write_bytes_max: self.plan.write_bytes_max,
                think: self.plan.think,
                random: RefCell::new(SplitMix64::new(self.random.borrow_mut().next_u64())),
                open: RefCell::default(),
            };
            self.history.reborn(actor.id);
            mounted.handle.spawn(Rc::new(actor).run());
        }
        self.clients.borrow_mut().insert(index, mounted);
        Ok(())
    }

    /// A client that looks on.
    async fn auditor(&self) -> Result<Mounted, Violation> {
        let number = self.mounts.get() + 1;
        self.mounts.set(number);
        self.world.mount(&format!("auditor{number}")).await
    }

    async fn all_phases(&self) -> Result<(), Violation> {
        for index in 0..self.plan.phases.len() {
            let phase = self.plan.phases[index].clone();
            self.history.note(format!("== phase {index}: {:?}, {} operations", phase.fault, phase.operations));
            self.phase(&phase).await?;
            self.history.verdict()?;
        }
        self.final_check().await?;
        self.empty().await
    }

    async fn phase(&self, phase: &Phase) -> Result<(), Violation> {
        let killed = self.inflict(phase).await?;
        self.history.verdict()?;
        if !killed.is_empty() {
            self.recover_clients(&killed).await?;
        }
        self.world.handle.sleep(phase.rest).await;
        if phase.rest >= WRITTEN_BACK_WITHIN {
            for mounted in self.clients.borrow().values() {
                let dirty = mounted.client.dirty_bytes();
                if dirty > 0 {
                    let detail = format!("{} keeps {dirty} bytes unwritten for {:?}", mounted.name, phase.rest);
                    return Err(Violation::new(Checker::Hang, detail));
                }
            }
        }
        if phase.thorough {
            self.survey("after the phase").await?;
        }
        Ok(())
    }

    /// Lets the programs run and does the phase's harm. Answers the clients that died with what
    /// they had under way.
    async fn inflict(&self, phase: &Phase) -> Result<Vec<usize>, Violation> {
        let world = &self.world;
        match &phase.fault {
            Fault::None => self.work(phase.operations).await?,
            Fault::Crash { death, disk, write, again } => {
                world.halt_disk_after(*disk, *write);
                self.work_until_halt(phase.operations, *death, *again).await?;
            }
            Fault::Restart => {
                self.work(phase.operations).await?;
                world.stop_server().await;
                self.start().await?;
            }
            Fault::ClientDies { client, after, node } => {
                self.history.grant(phase.operations);
                world.handle.sleep(*after).await;
                self.corner(*client).await?;
                self.kill_client(*client);
                if let Some(death) = node {
                    world.crash_server(*death);
                    self.start().await?;
                }
                self.finish().await?;
                return Ok(vec![*client]);
            }
            Fault::ClientCutOff { client } => {
                self.history.grant(phase.operations);
                self.pause_within(Duration::from_millis(50)).await;
                self.cut_off(*client).await?;
                return Ok(vec![*client]);
            }
            Fault::Network { request_loss, reply_loss, reset, delay_max } => {
                let delay = (Duration::from_micros(10), Duration::from_micros(20) + *delay_max);
                let lost_after = Duration::from_millis(200);
                let (request_loss, reply_loss, reset) = (*request_loss, *reply_loss, *reset);
                world.network.set_faults(NetworkFaults { delay, request_loss, reply_loss, reset, lost_after });
                let worked = self.work(phase.operations).await;
                world.network.set_faults(NetworkFaults::default());
                worked?;
            }
            Fault::ShortPartition { client, length } => {
                self.history.grant(phase.operations);
                self.pause_within(Duration::from_millis(20)).await;
                let name = self.client_name(*client);
                world.network.partition(&name, SERVER, true);
                world.handle.sleep(*length).await;
                world.network.heal();
                self.finish().await?;
            }
            Fault::Disk { disk, bad, crash } => self.bad_disk(*disk, bad, *crash, phase.operations).await?,
            Fault::Skew { nanos } => {
                world.skew_server(*nanos);
                self.work(phase.operations).await?;
                world.skew_server(0);
            }
        }
        Ok(Vec::new())
    }

    /// Lets the programs go on for a short, drawn time.
    async fn pause_within(&self, most: Duration) {
        let micros = self.random.borrow_mut().below(most.as_micros() as u64 + 1);
        self.world.handle.sleep(Duration::from_micros(micros)).await;
    }

    fn client_name(&self, index: usize) -> String {
        self.clients.borrow().get(&index).map(|mounted| mounted.name.clone()).unwrap_or_default()
    }

    async fn work(&self, operations: u64) -> Result<(), Violation> {
        self.history.grant(operations);
        self.finish().await
    }

    /// Waits until the programs have done what they were granted.
    async fn finish(&self) -> Result<(), Violation> {
        match self.world.handle.timeout(PHASE_MAX, self.history.idle()).await {
            Some(()) => self.history.verdict(),
            None => {
                let pending = format!("{:?}", self.history.pending.borrow());
                Err(Violation::new(Checker::Hang, format!("operations do not end: {pending}")))
            }
        }
    }

    async fn start(&self) -> Result<(), Violation> {
        match self.world.start_server().await? {
            Started::Serving => Ok(()),
            Started::Halted => Err(Violation::new(Checker::Hang, "a disk halted that nobody armed")),
        }
    }

    async fn work_until_halt(&self, operations: u64, death: Death, again: Option<u64>) -> Result<(), Violation> {
        let world = &self.world;
        self.history.grant(operations);
        let finished = {
            let finish = Box::pin(self.finish());
            let halted = Box::pin(world.halted());
            match select(finish, halted).await {
                Either::Left((finished, _)) => Some(finished),
                Either::Right(_) => None,
            }
        };
        match finished {
            Some(finished) => {
                finished?;
                // The halt may still come with a flush in the background: not as a surprise.
                if !world.disarm_halts() {
                    return Ok(());
                }
            }
            None => self.history.note("a disk halted".to_owned()),
        }
        world.crash_server(death);
        self.pause_within(Duration::from_millis(500)).await;
        if let Some(write) = again {
            world.halt_disk_after(0, write);
            if world.start_server().await? == Started::Serving && !world.disarm_halts() {
                return self.finish().await;
            }
            self.history.note("a disk halted during the start".to_owned());
            world.crash_server(death);
        }
        self.start().await?;
        self.history.note("the node serves again".to_owned());
        self.finish().await
    }

    async fn corner(&self, index: usize) -> Result<(), Violation> {
        let actors = self.plan.actors.iter().enumerate().filter(|(_, plan)| plan.client == index);
        let dying: Vec<ActorId> = actors.map(|(actor, _)| ActorId(actor)).collect();
        match self.world.handle.timeout(PHASE_MAX, self.history.corner(&dying)).await {
            Some(()) => self.history.verdict(),
            None => self.finish().await,
        }
    }

    /// The client and its programs are gone from one moment to the next.
    fn kill_client(&self, index: usize) {
        let mounted = self.clients.borrow_mut().remove(&index);
        if let Some(mounted) = mounted {
            self.history.pause();
            self.history.note(format!("{} dies", mounted.name));
            mounted.kill();
        }
        for (actor, plan) in self.plan.actors.iter().enumerate() {
            if plan.client == index {
                self.history.died(ActorId(actor));
                self.history.sideline.died(ActorId(actor));
            }
        }
    }

    /// A client that nobody hears of is fenced; what it had not committed is lost, and it knows.
    async fn cut_off(&self, index: usize) -> Result<(), Violation> {
        let world = &self.world;
        self.corner(index).await?;
        let name = self.client_name(index);
        self.history.note(format!("{name} is cut off"));
        world.network.partition(&name, SERVER, true);
        // Others that want what it holds get it once it is fenced: the auditor reads everything.
        let auditor = self.auditor().await?;
        world.handle.sleep(self.plan.shape.session_lease * 2).await;
        for (actor, plan) in self.plan.actors.iter().enumerate() {
            if plan.client == index {
                // Its operations under way end after its death, as far as anyone can tell.
                self.history.died(ActorId(actor));
                self.history.sideline.died(ActorId(actor));
            }
        }
        self.finish().await?;
        let uncertain = self.uncertain(&[index]);
        check_tree(world, &self.history, &auditor, None, &uncertain).await?;
        // Back again, it must neither commit what it kept nor show anyone its old caches.
        let mounted = self.clients.borrow_mut().remove(&index);
        world.network.heal();
        self.history.note(format!("{name} is back"));
        world.handle.sleep(self.plan.shape.session_lease).await;
        check_tree(world, &self.history, &auditor, None, &[]).await?;
        auditor.kill();
        if let Some(mounted) = mounted {
            mounted.kill();
        }
        Ok(())
    }

    async fn bad_disk(
        &self,
        index: usize,
        bad: &BadDisk,
        crash: Option<Death>,
        operations: u64,
    ) -> Result<(), Violation> {
        let world = &self.world;
        let disk = world.disk(index);
        match bad {
            BadDisk::Gone { .. } => {
                self.history.grant(operations);
                self.pause_within(Duration::from_millis(5)).await;
                disk.fail();
            }
            BadDisk::Rot { places } => {
                for _ in 0..*places {
                    let mut random = self.random.borrow_mut();
                    let length = 1 + random.below(5000);
                    let offset = random.below(disk.size() - length);
                    disk.corrupt(offset, length as usize, random.next_u64());
                }
                self.history.grant(operations);
            }
            BadDisk::Flaky { lost, misdirected, torn, read_error, write_error, bit_flip } => {
                disk.set_faults(DiskFaults {
                    lost_write: *lost,
                    misdirected_write: *misdirected,
                    torn_write: *torn,
                    read_error: *read_error,
                    write_error: *write_error,
                    bit_flip_on_read: *bit_flip,
                    ..DiskFaults::default()
                });
                self.history.grant(operations);
            }
        }
        if let Some(death) = crash {
            self.pause_within(Duration::from_millis(30)).await;
            world.crash_server(death);
            self.start().await?;
        }
        self.finish().await?;
        if self.random.borrow_mut().one_in(2) {
            // Redundancy must hide it from whoever reads everything.
            let auditor = self.auditor().await?;
            check_tree(world, &self.history, &auditor, None, &[]).await?;
            auditor.kill();
        }
        disk.set_faults(DiskFaults::default());
        self.mend(index, bad).await
    }

    /// The operator takes care of the disk: redundancy is whole again afterwards.
    async fn mend(&self, index: usize, bad: &BadDisk) -> Result<(), Violation> {
        let world = &self.world;
        world.stop_server().await;
        match bad {
            BadDisk::Gone { replaced: true } => world.replace_disk(index).await?,
            _ => world.disk(index).restore(),
        }
        self.start().await?;
        self.history.note("repairing".to_owned());
        check_node(world, true, true).await.map_err(|violation| {
            let detail = format!("repair: {}", violation.detail);
            Violation { detail, ..violation }
        })?;
        check_clean(world, "after repair").await
    }

    /// What clients that died had under way.
    fn uncertain(&self, killed: &[usize]) -> Vec<(usize, Op)> {
        let mut pending = self.history.pending.borrow_mut();
        let of = |actor: &ActorId| self.plan.actors[actor.0].client;
        let found = pending.iter().map(|(actor, op)| (of(actor), op.clone()));
        let mut found: Vec<(usize, Op)> = found.filter(|(client, _)| killed.contains(client)).collect();
        pending.retain(|actor, _| !killed.contains(&of(actor)));
        // A client without anything under way still lost what it had open.
        for client in killed {
            if !found.iter().any(|(other, _)| other == client) {
                found.push((*client, Op::List { dir: crate::model::ROOT }));
            }
        }
        found
    }

    /// Finds out what clients that died left, and starts them anew.
    async fn recover_clients(&self, killed: &[usize]) -> Result<(), Violation> {
        let uncertain = self.uncertain(killed);
        let auditor = self.auditor().await?;
        // What they had sent may be carried out until they are fenced.
        self.world.handle.sleep(self.plan.shape.session_lease * 2).await;
        check_tree(&self.world, &self.history, &auditor, None, &uncertain).await?;
        self.clear_races(&auditor).await?;
        auditor.kill();
        for index in killed {
            self.mount(*index).await?;
        }
        Ok(())
    }

    /// Removes the names of the sideline that their creators can no longer account for.
    async fn clear_races(&self, auditor: &Mounted) -> Result<(), Violation> {
        let (client, dir) = (auditor.client.clone(), self.sideline.dir);
        let names = within(&self.world, auditor, "listing", async move { list(&client, dir).await }).await?;
        let names = names.map_err(|errno| Violation::new(Checker::Reply, format!("listing the sideline: {errno}")))?;
        for (name, _) in names {
            let number = name.strip_prefix(b"race").and_then(|digits| String::from_utf8_lossy(digits).parse().ok());
            let Some(number) = number.filter(|number| self.history.sideline.owner(*number).is_none()) else { continue };
            self.history.sideline.removing(number);
            let client = auditor.client.clone();
            let removed = within(&self.world, auditor, "unlinking", async move { client.unlink(dir, &name).await });
            removed
                .await?
                .map_err(|errno| Violation::new(Checker::Reply, format!("unlink in the sideline: {errno}")))?;
        }
        Ok(())
    }

    /// Compares the tree as every client sees it and checks the node.
    async fn survey(&self, context: &str) -> Result<(), Violation> {
        self.history.note(format!("survey {context}"));
        let indices: Vec<usize> = self.clients.borrow().keys().copied().collect();
        for index in indices {
            let mounted = self.clients.borrow_mut().remove(&index);
            let Some(mounted) = mounted else { continue };
            let outcome = check_tree(&self.world, &self.history, &mounted, Some(index), &[]).await;
            self.clients.borrow_mut().insert(index, mounted);
            outcome?;
        }
        let auditor = self.auditor().await?;
        check_tree(&self.world, &self.history, &auditor, None, &[]).await?;
        check_sideline(&self.world, &self.history, &auditor, self.sideline).await?;
        auditor.kill();
        check_clean(&self.world, context).await
    }

    /// Everything is committed; the power goes; everything is there.
    async fn final_check(&self) -> Result<(), Violation> {
        self.survey("at the end").await?;
        let indices: Vec<usize> = self.clients.borrow().keys().copied().collect();
        for index in indices {
            self.kill_client(index);
        }
        self.world.crash_server(Death::Power);
        self.start().await?;
        for index in 0..self.plan.clients {
            self.history.model.borrow_mut().client_died(index);
        }
        self.survey("after the last power cut").await
    }

    /// Deletes everything: the space comes back.
    async fn empty(&self) -> Result<(), Violation> {
        let auditor = self.auditor().await?;
        let client = auditor.client.clone();
        let deleted =
            within(
                &self.world,
                &auditor,
                "deleting everything",
                async move { remove_all(&client, client.root()).await },
            );
        deleted.await?.map_err(|errno| Violation::new(Checker::Reply, format!("deleting everything: {errno}")))?;
        auditor.kill();
        const ROUNDS: u32 = 60;
        for _ in 0..ROUNDS {
            self.world.handle.sleep(Duration::from_secs(2)).await;
            if file_blobs(&self.world) == 0 && metadata_bytes(&self.world) <= METADATA_MAX {
                break;
            }
        }
        if file_blobs(&self.world) > 0 || metadata_bytes(&self.world) > METADATA_MAX {
            let detail = format!("with no file left there are: {}", live_by_kind(&self.world));
            return Err(Violation::new(Checker::Space, detail));
        }
        check_clean(&self.world, "emptied").await
    }
}

/// Removes everything beneath a directory.
async fn remove_all(client: &Rc<Client>, dir: Ino) -> Result<(), Errno> {
    for (name, ino) in list(client, dir).await? {
        if client.getattr(ino).await?.attr.kind == FileKind::Directory {
            Box::pin(remove_all(client, ino)).await?;
            client.rmdir(dir, &name).await?;
        } else {
            client.unlink(dir, &name).await?;
        }
    }
    Ok(())
}

/// Makes the directories that the programs start from.
struct Setup {
    client: Rc<Client>,
}

struct Made {
    own: Vec<Vec<(String, Ino)>>,
    shared: Vec<(String, Ino)>,
    sideline: SidelineFiles,
}

impl Setup {
    async fn directory(&self, name: String) -> Result<(String, Ino), Errno> {
        let root = self.client.root();
        let entry = self.client.mkdir(Caller::default(), root, name.as_bytes(), 0o755, 0).await?;
        Ok((name, entry.attr.ino))
    }

    async fn make(&self, actors: usize) -> Result<Made, Errno> {
        let mut own = Vec::new();
        for actor in 0..actors {
            let mut roots = Vec::new();
            for index in 0..OWN_DIRECTORIES {
                roots.push(self.directory(format!("own{actor}-{index}")).await?);
            }
            own.push(roots);
        }
        let mut shared = Vec::new();
        for index in 0..SHARED_DIRECTORIES {
            shared.push(self.directory(format!("shared{index}")).await?);
        }
        let (_, dir) = self.directory(String::from_utf8_lossy(OPAQUE).into_owned()).await?;
        let mut files = Vec::new();
        for name in ["log", "lock"] {
            let new = NewFile::regular(0o644, 0);
            let flags = OpenFlags::default();
            let (entry, file) = self.client.create(Caller::default(), dir, name.as_bytes(), new, flags).await?;
            self.client.release(&file);
            files.push(entry.attr.ino);
        }
        let sideline = SidelineFiles { dir, log: files[0], lock: files[1] };
        Ok(Made { own, shared, sideline })
    }
}
