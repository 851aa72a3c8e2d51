//! One seed from an empty cluster to an empty cluster.

use crate::checker::{
    check_clean, check_node, check_sideline, check_tree, file_blobs, live_by_kind, metadata_bytes, within,
};
use crate::content::difference;
use crate::history::{ActorId, History};
use crate::ledger::Trust;
use crate::model::Model;
use crate::observe::read_all;
use crate::op::{NodeId, Op};
use crate::plan::{BadDisk, Crash, Cut, Fault, Phase, Plan};
use crate::report::{Checker, Failure, Summary, Toll, Violation};
use crate::ruin::ruin;
use crate::setup::{BALLAST_STEP, Made, Setup, ground_name};
use crate::sideline::{Grounds, ballast_bytes, is_race_directory};
use crate::workload::{Actor, list, remove_all};
use crate::world::{Death, Mounted, SERVER, Started, World};
use cfs_api::CheckReport;
use cfs_client::OpenFile;
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
use std::rc::{Rc, Weak};
use std::time::Duration;

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

/// Runs a seed and compares everything after each of its crashes.
pub fn run_thoroughly(seed: u64) -> Result<Summary, Box<Failure>> {
    run_plan(seed, Plan { thorough: true, ..Plan::draw(seed) })
}

/// Runs a given plan under a seed.
pub fn run_plan(seed: u64, plan: Plan) -> Result<Summary, Box<Failure>> {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    let shown: Rc<RefCell<Option<Rc<History>>>> = Rc::default();
    let toll: Rc<std::cell::Cell<Toll>> = Rc::default();
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let (inner, shown, toll) = (handle.clone(), shown.clone(), toll.clone());
        executor.run_simulated(&handle, async move {
            let run = Run::begin(&inner, seed, plan, &shown).await?;
            let outcome = run.all_phases().await;
            toll.set(run.world.toll());
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
            toll: toll.get(),
            trace_hash: executor.trace_hash(),
            digest: history.as_ref().map_or(0, |history| history.digest()),
        }),
        Err(violation) => {
            let lines = history.as_ref().map(|history| history.lines()).unwrap_or_default();
            Err(Box::new(Failure { seed, violation, history: lines, operations }))
        }
    }
}

/// A file that a client had open when nobody heard of it any more, and the bytes it had then.
struct KeptOpen {
    node: NodeId,
    file: Rc<OpenFile>,
    bytes: Vec<u8>,
}

/// A run under way.
struct Run {
    plan: Plan,
    world: Rc<World>,
    history: Rc<History>,
    clients: RefCell<BTreeMap<usize, Mounted>>,
    /// The programs of each client; they end with it.
    actors: RefCell<BTreeMap<usize, Vec<Weak<Actor>>>>,
    own: Vec<Vec<NodeId>>,
    shared: Vec<NodeId>,
    grounds: Rc<Grounds>,
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
        let setup = Setup { client: first.client.clone(), ballast: plan.ballast };
        let actors = plan.actors.len();
        let made = within(&world, &first, "setting up", async move { setup.make(actors).await }).await?;
        let Made { own, shared, grounds } = made.map_err(|errno| {
            let detail = format!("setting up: {errno}; there are: {}", live_by_kind(&world));
            Violation::new(Checker::Reply, detail)
        })?;
        let mut adopt = |(name, ino): &(String, Ino)| {
            let new = crate::op::Properties {
                kind: FileKind::Directory,
                mode: 0o755,
                umask: 0,
                uid: 0,
                gid: 0,
                target: vec![],
            };
            let op = Op::Make { dir: crate::model::ROOT, name: name.clone().into_bytes(), new };
            let id = model.next_id();
            model.apply(0, &op).expect("the names differ");
            model.node_mut(id).ino = Some(*ino);
            id
        };
        let own = own.iter().map(|roots| roots.iter().map(&mut adopt).collect()).collect();
        let shared = shared.iter().map(&mut adopt).collect();
        let opaque: Vec<NodeId> = (0..).zip(grounds.dirs).map(|(at, ino)| adopt(&(ground_name(at), ino))).collect();
        opaque.into_iter().for_each(|id| model.node_mut(id).opaque = true);
        let history = History::new(handle, model);
        *shown.borrow_mut() = Some(history.clone());
        let run = Run {
            plan,
            world,
            history,
            clients: RefCell::default(),
            actors: RefCell::default(),
            own,
            shared,
            grounds: Rc::new(grounds),
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
        let mut actors = Vec::new();
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
                grounds: self.grounds.clone(),
                mix: plan.mix,
                shared_one_in: self.plan.shared_one_in,
                games: self.plan.games,
                write_bytes_max: self.plan.write_bytes_max,
                think: self.plan.think,
                random: RefCell::new(SplitMix64::new(self.random.borrow_mut().next_u64())),
                open: RefCell::default(),
                is_full: std::cell::Cell::new(false),
            };
            self.history.reborn(actor.id);
            let actor = Rc::new(actor);
            actors.push(Rc::downgrade(&actor));
            mounted.handle.spawn(actor.run());
        }
        self.actors.borrow_mut().insert(index, actors);
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
        if self.plan.ruin {
            let random = SplitMix64::new(self.random.borrow_mut().next_u64());
            return ruin(&self.world, &self.history, random).await;
        }
        self.empty().await
    }

    async fn phase(&self, phase: &Phase) -> Result<(), Violation> {
        let killed = self.inflict(phase).await?;
        self.history.verdict()?;
        self.world.ledger.verdict()?;
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
        if phase.thorough || self.plan.thorough {
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
            Fault::Crashes(crashes) => {
                for crash in crashes {
                    world.halt_disk_after(crash.disk, crash.write);
                    self.work_until_halt(phase.operations / crashes.len() as u64, crash).await?;
                    if self.plan.thorough {
                        self.survey("after a crash").await?;
                    }
                }
            }
            Fault::Restart => {
                self.work(phase.operations).await?;
                world.stop_server().await;
                self.start().await?;
            }
            Fault::ClientDies { client, after_operations, synced, node } => {
                self.history.grant(phase.operations);
                self.catch(*client, *after_operations, *synced).await?;
                self.kill_client(*client);
                if let Some(death) = node {
                    self.crash(*death);
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
            Fault::ShortPartitions { client, cuts } => {
                for cut in cuts {
                    self.history.grant(phase.operations / cuts.len() as u64);
                    self.work_until_cut(*client, cut).await?;
                }
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

    fn crash(&self, death: Death) {
        let wanted = !self.history.pending.borrow().is_empty();
        self.world.crash_server_at_work(death, wanted);
    }

    async fn start(&self) -> Result<(), Violation> {
        match self.world.start_server().await? {
            Started::Serving => Ok(()),
            Started::Halted => Err(Violation::new(Checker::Hang, "a disk halted that nobody armed")),
        }
    }

    async fn work_until_halt(&self, operations: u64, crash: &Crash) -> Result<(), Violation> {
        let (world, Crash { death, stalled, again, lost, .. }) = (&self.world, *crash);
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
            None => {
                self.history.note("a disk halted".to_owned());
                world.handle.sleep(stalled).await;
            }
        }
        self.crash(death);
        if let Some(disk) = lost {
            self.history.note(format!("disk {disk} is lost with it"));
            world.disk(disk).fail();
            world.disk_harmed(1);
        }
        self.pause_within(Duration::from_millis(500)).await;
        self.start_after(death, again).await?;
        self.history.note("the node serves again".to_owned());
        self.finish().await?;
        if let Some(disk) = lost {
            // Whatever was answered before bears it.
            let auditor = self.auditor().await?;
            check_tree(world, &self.history, &auditor, None, &[]).await?;
            auditor.kill();
            self.mend(disk, &BadDisk::Gone { replaced: false }).await?;
        }
        Ok(())
    }

    /// Starts the node, which dies once more on its way, at a write of the first disk, if `again`
    /// says so.
    async fn start_after(&self, death: Death, again: Option<u64>) -> Result<(), Violation> {
        let world = &self.world;
        if let Some(write) = again {
            world.halt_disk_after(0, write);
            if world.start_server().await? == Started::Serving && !world.disarm_halts() {
                return Ok(());
            }
            self.history.note("a disk halted during the start".to_owned());
            self.crash(death);
        }
        self.start().await
    }

    async fn work_until_cut(&self, client: usize, cut: &Cut) -> Result<(), Violation> {
        let network = &self.world.network;
        let begun = network.partition_at_call(&self.client_name(client), SERVER, cut.call);
        let finish = Box::pin(self.finish());
        match select(finish, begun).await {
            Either::Left((finished, _)) => finished?,
            Either::Right(_) => {
                self.history.note(format!("client {client} and the node are apart for {:?}", cut.length));
                self.world.handle.sleep(cut.length).await;
            }
        }
        network.heal();
        self.finish().await
    }

    fn programs_of(&self, client: usize) -> Vec<ActorId> {
        let actors = self.plan.actors.iter().enumerate().filter(|(_, plan)| plan.client == client);
        actors.map(|(actor, _)| ActorId(actor)).collect()
    }

    async fn corner(&self, index: usize) -> Result<(), Violation> {
        let dying = self.programs_of(index);
        match self.world.handle.timeout(PHASE_MAX, self.history.corner(&dying)).await {
            Some(()) => self.history.verdict(),
            None => self.finish().await,
        }
    }

    /// Waits for the moment in which a client's programs have ended so many operations; `synced`: and
    /// the last one was told that something is durable.
    async fn catch(&self, index: usize, operations: u64, synced: bool) -> Result<(), Violation> {
        let dying = self.programs_of(index);
        match self.world.handle.timeout(PHASE_MAX, self.history.catch_after(&dying, operations, synced)).await {
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
            self.world.client_deaths.set(self.world.client_deaths.get() + 1);
            mounted.kill();
        }
        for actor in self.programs_of(index) {
            self.history.died(actor);
            self.history.sideline.died(actor);
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
        world.handle.sleep(self.plan.shape.tuning.session_lease * 2).await;
        for actor in self.programs_of(index) {
            // Its operations under way end after its death, as far as anyone can tell.
            self.history.died(actor);
            self.history.sideline.died(actor);
        }
        self.finish().await?;
        let uncertain = self.uncertain(&[index]);
        let kept = self.kept_open(index, &uncertain);
        let undone = check_tree(world, &self.history, &auditor, None, &uncertain).await?;
        // Back again, it must neither commit what it kept nor show anyone its old caches. Only a
        // call that still waits, and was not carried out before, may be in its next session.
        let mounted = self.clients.borrow_mut().remove(&index);
        world.network.heal();
        self.history.note(format!("{name} is back"));
        world.handle.sleep(self.plan.shape.tuning.session_lease).await;
        let undone = check_tree(world, &self.history, &auditor, None, &undone).await?;
        auditor.kill();
        if let Some(mounted) = mounted {
            check_tree(world, &self.history, &mounted, None, &undone).await?;
            self.check_loss_reported(&mounted, kept).await?;
            mounted.kill();
        }
        Ok(())
    }

    /// What a client's programs have open of their own that no operation under way touches.
    fn kept_open(&self, index: usize, uncertain: &[(usize, Op)]) -> Vec<KeptOpen> {
        let model = self.history.model.borrow();
        let mut kept = Vec::new();
        for actor in self.actors.borrow().get(&index).into_iter().flatten().filter_map(Weak::upgrade) {
            for (node, opened) in actor.open.borrow().iter() {
                let touched = uncertain.iter().any(|(_, op)| op.nodes().contains(node));
                if !opened.shared && !touched && model.holds(*node) {
                    let bytes = model.node(*node).content.now().to_vec();
                    kept.push(KeptOpen { node: *node, file: opened.file.clone(), bytes });
                }
            }
        }
        kept
    }

    /// Through a file that lost bytes with its session the next fsync says so, and only that one.
    async fn check_loss_reported(&self, mounted: &Mounted, kept: Vec<KeptOpen>) -> Result<(), Violation> {
        for KeptOpen { node, file, bytes } in kept {
            let lost = {
                let model = self.history.model.borrow();
                if !model.holds(node) || model.nlink(node) == 0 {
                    continue;
                }
                model.node(node).content.now() != bytes
            };
            let client = mounted.client.clone();
            let synced = async move { [client.fsync(&file, false).await, client.fsync(&file, false).await] };
            let answers = within(&self.world, mounted, "fsync after a fence", synced).await?;
            // Where nothing is missing it may still not know that its last commit got through.
            if answers != [Err(Errno::EIO), Ok(())] && (lost || answers != [Ok(()), Ok(())]) {
                let lost = if lost { "lost bytes" } else { "lost nothing" };
                let detail = format!("node {} of {} {lost}, fsync answers {answers:?}", node.0, mounted.name);
                return Err(Violation::new(Checker::Reply, detail));
            }
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
                world.disk_harmed(1);
            }
            BadDisk::Refusing { from_bytes, .. } => {
                self.history.grant(operations);
                self.pause_within(Duration::from_millis(5)).await;
                let faults = self.plan.shape.tuning.disk_faults(index);
                disk.set_faults(DiskFaults { write_error: 1.0, write_error_from: *from_bytes, ..faults });
            }
            BadDisk::Rot { places } => {
                world.distrust(index, Trust::Rotten);
                world.disk_harmed(*places);
                for _ in 0..*places {
                    let mut random = self.random.borrow_mut();
                    let length = 1 + random.below(5000);
                    let offset = random.below(disk.size() - length);
                    disk.corrupt(offset, length as usize, random.next_u64());
                }
                self.history.grant(operations);
            }
            BadDisk::Flaky { lost, misdirected, torn, read_error, write_error, bit_flip } => {
                world.distrust(index, Trust::Faulty);
                disk.set_faults(DiskFaults {
                    lost_write: *lost,
                    misdirected_write: *misdirected,
                    torn_write: *torn,
                    read_error: *read_error,
                    write_error: *write_error,
                    bit_flip_on_read: *bit_flip,
                    ..self.plan.shape.tuning.disk_faults(index)
                });
                self.history.grant(operations);
            }
        }
        if let Some(death) = crash {
            self.pause_within(Duration::from_millis(30)).await;
            self.crash(death);
            self.start().await?;
        }
        self.finish().await?;
        if let BadDisk::Refusing { other, .. } = bad {
            disk.set_faults(self.plan.shape.tuning.disk_faults(index));
            self.lose_for_a_while(*other).await?;
        } else if self.random.borrow_mut().one_in(2) {
            // Redundancy must hide it from whoever reads everything.
            let auditor = self.auditor().await?;
            check_tree(world, &self.history, &auditor, None, &[]).await?;
            auditor.kill();
        }
        disk.set_faults(self.plan.shape.tuning.disk_faults(index));
        self.mend(index, bad).await
    }

    /// Whatever was answered while one disk refused writes must bear the loss of another.
    async fn lose_for_a_while(&self, index: usize) -> Result<(), Violation> {
        let world = &self.world;
        world.stop_server().await;
        world.disk(index).fail();
        world.disk_harmed(1);
        self.start().await?;
        self.history.note(format!("disk {index} is lost for a while"));
        let auditor = self.auditor().await?;
        check_tree(world, &self.history, &auditor, None, &[]).await?;
        auditor.kill();
        world.stop_server().await;
        world.disk(index).restore();
        self.start().await
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
        self.world.handle.sleep(self.plan.shape.tuning.session_lease * 2).await;
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
        let (client, dir) = (auditor.client.clone(), self.grounds.dirs[0]);
        let names = within(&self.world, auditor, "listing", async move { list(&client, dir).await }).await?;
        let names = names.map_err(|errno| Violation::new(Checker::Reply, format!("listing the sideline: {errno}")))?;
        self.history.sideline.check_race(&names.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>())?;
        for (name, _) in names {
            let number = name.strip_prefix(b"race").and_then(|digits| String::from_utf8_lossy(digits).parse().ok());
            let Some(number) = number.filter(|number| self.history.sideline.owner(*number).is_none()) else { continue };
            self.history.sideline.removing(number);
            let client = auditor.client.clone();
            let removed = within(&self.world, auditor, "unlinking", async move {
                match is_race_directory(number) {
                    true => client.rmdir(dir, &name).await,
                    false => client.unlink(dir, &name).await,
                }
            });
            removed
                .await?
                .map_err(|errno| Violation::new(Checker::Reply, format!("unlink in the sideline: {errno}")))?;
        }
        self.history.sideline.cleared();
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
        check_sideline(&self.world, &self.history, &auditor, &self.grounds).await?;
        auditor.kill();
        self.world.ledger.verdict()?;
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
        self.survey("after the last power cut").await?;
        self.weigh_ballast().await
    }

    /// The file that nobody touched is what it was, wherever its bytes were moved.
    async fn weigh_ballast(&self) -> Result<(), Violation> {
        let Some((ino, length)) = self.grounds.ballast else { return Ok(()) };
        let auditor = self.auditor().await?;
        let client = auditor.client.clone();
        let read = within(&self.world, &auditor, "reading the ballast", async move { read_all(&client, ino).await });
        let wrong = |what: String| Violation::new(Checker::Contents, format!("the ballast: {what}"));
        let bytes = read.await?.map_err(|errno| wrong(errno.to_string()))?;
        if bytes.len() as u64 != length {
            return Err(wrong(format!("{} bytes instead of {length}", bytes.len())));
        }
        for (index, part) in bytes.chunks(BALLAST_STEP).enumerate() {
            let expected = ballast_bytes((index * BALLAST_STEP) as u64, part.len());
            if part != expected {
                return Err(wrong(format!("from {}: {}", index * BALLAST_STEP, difference(&expected, part))));
            }
        }
        auditor.kill();
        Ok(())
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
        let mut left = String::new();
        for _ in 0..ROUNDS {
            self.world.handle.sleep(Duration::from_secs(2)).await;
            if file_blobs(&self.world) > 0 || metadata_bytes(&self.world) > METADATA_MAX {
                left = live_by_kind(&self.world);
                continue;
            }
            // The root alone; what dead clients had open goes with their leases.
            let CheckReport { inodes, entries, orphans, segments, references, .. } =
                check_node(&self.world, false, false).await?;
            if (inodes, entries, orphans, segments, references) == (1, 0, 0, 0, 0) {
                return check_clean(&self.world, "emptied").await;
            }
            left = format!(
                "{inodes} inodes, {entries} entries, {orphans} orphans, {segments} segments, {references} references"
            );
        }
        Err(Violation::new(Checker::Space, format!("with no file left there are: {left}")))
    }
}
