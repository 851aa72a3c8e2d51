"""Rounds of work, kill -9, restart and proof; started by scripts/crash."""
import argparse
import glob
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

WORKLOADS = ["pjdfstest", "fsx", "fio", "stress", "git", "sqlite", "cargo", "rsync", "journal"]
VICTIMS = ["all", "server", "mount"]
HERE = os.path.dirname(os.path.abspath(__file__))
# A server replays its log, waits for leases of the dead, and shares the machine.
UP_WITHIN = 90
# Seconds: the session lease and, well within it, the client's retry window (docs/consistency.md).
OUTAGE_BORNE = 20
# Rounds whose files stay, so that old data lives through several crashes.
ROUNDS_KEPT = 4
# Of the rounds in which a server is killed under a mount: so many go on with that mount, which then
# lives through several servers. The others mount anew before all is looked at; few kill the mount for
# that, since what it was writing then waits for its session's end.
MOUNT_STAYS, MOUNT_KILLED = 0.2, 0.15


class Failed(Exception):
    pass


class Cluster:
    """Targets on files, the processes that serve and mount them."""

    def __init__(self, bin_directory, work):
        self.bin, self.work = bin_directory, work
        self.mnt, self.data = f"{work}/mnt", f"{work}/data"
        self.server = self.mount = self.dev = None
        self.address = None
        os.mkdir(self.mnt)
        self.log = open(f"{work}/log", "ab", buffering=0)

    def spawn(self, *arguments):
        environment = dict(os.environ, CFS_LOG=os.environ.get("CFS_LOG", "info"))
        return subprocess.Popen([f"{self.bin}/cfs", *arguments], stdout=self.log, stderr=self.log, env=environment)

    def processes(self):
        return [process for process in (self.dev, self.server, self.mount) if process]

    def start_dev(self):
        self.dev = self.spawn("dev", "--data", self.data, "--listen", "127.0.0.1:0", "--size", "3G", self.mnt)
        self.await_mount(self.dev)
        with open(f"{self.data}/address") as file:
            self.address = file.read().strip()

    def start_server(self, listen="127.0.0.1:0"):
        mark = os.fstat(self.log.fileno()).st_size
        targets = [argument for path in sorted(glob.glob(f"{self.data}/target-*")) for argument in ("--target", path)]
        self.server = self.spawn("server", "--listen", listen, *targets)
        deadline = time.monotonic() + UP_WITHIN
        while time.monotonic() < deadline:
            with open(f"{self.work}/log", "rb") as log:
                log.seek(mark)
                for line in log.read().decode(errors="replace").splitlines():
                    if line.startswith("serving on "):
                        self.address = line.split()[-1]
                        return
            if self.server.poll() is not None:
                raise Failed(f"the server ended with {self.server.returncode}")
            time.sleep(0.05)
        raise Failed(f"the server did not serve within {UP_WITHIN} s")

    def start_mount(self):
        self.mount = self.spawn("mount", "--foreground", self.address, self.mnt)
        self.await_mount(self.mount)

    def start(self, victim):
        if victim == "all":
            self.start_dev()
        else:
            self.start_server()
            self.start_mount()

    def await_mount(self, process):
        deadline = time.monotonic() + UP_WITHIN
        while time.monotonic() < deadline:
            # The device number changes without a question to the mount itself.
            with open("/proc/self/mountinfo") as table:
                if any(line.split()[4] == self.mnt for line in table):
                    return
            if process.poll() is not None:
                raise Failed(f"the mount's process ended with {process.returncode}")
            time.sleep(0.05)
        raise Failed(f"not mounted within {UP_WITHIN} s")

    def unmount(self):
        subprocess.run(["umount", "-l", self.mnt], stderr=subprocess.DEVNULL, timeout=30)

    def kill(self, victim):
        """kill -9 of the victim; what is left of a dead mount is taken away."""
        process = {"all": self.dev, "server": self.server, "mount": self.mount}[victim]
        process.kill()
        process.wait(30)

    def revive(self, victim):
        if victim == "server":
            self.start_server(self.address)
            return
        self.unmount()
        if victim == "all":
            self.start_dev()
        else:
            self.start_mount()

    def remount(self, killed):
        """A mount with nothing in its caches or the kernel's. One that is killed writes nothing back before."""
        if killed:
            self.kill("mount")
            self.unmount()
        else:
            self.interrupt(self.mount)
        self.start_mount()

    def interrupt(self, process):
        """Ends a process in order; one that does not is a failure."""
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(UP_WITHIN)
        except subprocess.TimeoutExpired:
            raise Failed(f"pid {process.pid} did not end on SIGINT within {UP_WITHIN} s") from None
        if code != 0:
            raise Failed(f"pid {process.pid} ended with {code} on SIGINT")

    def stop(self):
        for process in (self.mount, self.dev, self.server):
            if process:
                self.interrupt(process)
        self.dev = self.server = self.mount = None

    def abandon(self):
        for process in self.processes():
            process.kill()
            process.wait()
        self.unmount()

    def check(self):
        done = run([f"{self.bin}/cfsctl", "--address", self.address, "check", "--deep"], 300, self)
        if done.stdout.strip().splitlines()[-1:] != ["clean"]:
            raise Failed(f"check --deep:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")


def run(command, seconds, cluster):
    """Runs a command; one that hangs is looked into."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        diagnose(cluster)
        raise Failed(f"{' '.join(command)}: no end within {seconds} s") from None


def diagnose(cluster, extra=()):
    """What every process of ours is doing."""
    for pid in [process.pid for process in cluster.processes()] + list(extra):
        print(f"--- pid {pid}")
        for path in glob.glob(f"/proc/{pid}/task/*"):
            try:
                print(open(f"{path}/comm").read().strip(), open(f"{path}/wchan").read(), open(f"{path}/stack").read())
            except OSError:
                pass
        if shutil.which("eu-stack"):
            subprocess.run(["timeout", "60", "eu-stack", "-p", str(pid)])
    for path in glob.glob("/sys/fs/fuse/connections/*/waiting"):
        print(path, open(path).read().strip())
    sys.stdout.flush()


def kill_session(leader):
    """Kills all processes of a session that we started, whatever groups they made."""
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as file:
                pid, rest = path.split("/")[2], file.read().rpartition(")")[2].split()
            if int(rest[3]) == leader:
                os.kill(int(pid), signal.SIGKILL)
        except (OSError, IndexError):
            pass


class Work:
    """One round's programs in the mount."""

    def __init__(self, cluster, name, number):
        self.cluster, self.name, self.number = cluster, name, number
        self.directory = f"{cluster.mnt}/round-{number}"
        os.mkdir(self.directory)
        self.program = self.ledger = None
        self.output = f"{cluster.work}/{name}.out"
        self.writers = [self.writer(f"{number}{index}") for index in (1, 2)]
        if name != "journal":
            self.program = self.start_program()
        if name in ("git", "sqlite"):
            self.ledger = subprocess.Popen([sys.executable, f"{HERE}/crash-ledger.py", name, self.directory,
                                            f"{cluster.work}/ledger-{number}"],
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def writer(self, seed):
        return subprocess.Popen([sys.executable, f"{HERE}/crash-writer.py", "write", self.directory,
                                 f"{self.cluster.work}/journal-{self.number}-{seed}", seed], stdout=subprocess.PIPE,
                                text=True)

    def start_program(self):
        """The workload again and again until it fails; it fails when its file system goes."""
        script = (f'set -euo pipefail; root={HERE}/..; work={self.cluster.work}; quick=1; shuffle=1; . {HERE}/workloads.sh; '
                  f'for turn in $(seq 1000); do mkdir "$0/$turn"; chmod 777 "$0" "$0/$turn"; '
                  f'(cd "$0/$turn"; workload {self.name} crash); rm -rf "$0/$turn"; done')
        environment = dict(os.environ, CFS_FSX_OPS="100000", CARGO_BUILD_JOBS="1")
        with open(self.output, "wb") as output:
            return subprocess.Popen(["bash", "-c", script, f"{self.directory}"], stdout=output, stderr=output,
                                    cwd="/", env=environment, start_new_session=True)

    def program_must_run(self):
        """Before the crash nothing may have failed."""
        if self.program and self.program.poll() is not None:
            with open(self.output, errors="replace") as output:
                raise Failed(f"{self.name} failed before the crash:\n{output.read()[-3000:]}")
        for writer in self.writers:
            if writer.poll() is not None:
                raise Failed(f"a writer failed before the crash: {writer.stdout.read()}")

    def end(self):
        """Stops all programs; one that can't be stopped hangs in the file system."""
        groups = [process for process in (self.program, self.ledger) if process]
        for process in groups:
            # The leader first: a shell that lives to see its child killed ends as if the program had failed.
            process.kill()
            kill_session(process.pid)
        for process in self.writers:
            process.kill()
        for process in [*groups, *self.writers]:
            try:
                process.wait(UP_WITHIN)
            except subprocess.TimeoutExpired:
                diagnose(self.cluster, [process.pid])
                raise Failed(f"{process.args} can't be killed: it hangs in the file system") from None

    def writers_met(self):
        """What the writers were told, of those that ended by an error."""
        return [writer.stdout.read().strip() for writer in self.writers if writer.returncode == 3]

    def verify(self):
        promises = 0
        for journal in glob.glob(f"{self.cluster.work}/journal-{self.number}-*"):
            done = run([sys.executable, f"{HERE}/crash-writer.py", "verify", self.directory, journal], 180, self.cluster)
            if done.returncode != 0:
                raise Failed(f"{os.path.basename(journal)}: {done.stderr[-2000:]}")
            promises += int(done.stdout)
        if self.ledger:
            done = run([sys.executable, f"{HERE}/crash-ledger.py", f"verify-{self.name}", self.directory,
                        f"{self.cluster.work}/ledger-{self.number}"], 180, self.cluster)
            if done.returncode != 0:
                raise Failed(f"{self.name} ledger: {done.stdout[-1000:]}{done.stderr[-2000:]}")
            promises += int(done.stdout.split()[-1])
        return promises

    def remove(self):
        done = run(["rm", "-rf", self.directory], 180, self.cluster)
        if done.returncode != 0:
            raise Failed(f"rm -rf: {done.stderr[-1000:]}")


def crash_round(cluster, victim, name, number, rng):
    """One crash. Answers the work, to be verified again later, and what was seen."""
    work = Work(cluster, name, number)
    try:
        time.sleep(rng.uniform(0.3, 8))
        work.program_must_run()
        cluster.kill(victim)
        killed = time.monotonic()
        outage = 0
        if victim == "server":
            time.sleep(rng.uniform(0, 2))
            cluster.revive(victim)
            outage = time.monotonic() - killed
            # The mount lives on: programs go on, or are told.
            before = journal_lines(cluster, number)
            deadline = time.monotonic() + UP_WITHIN
            while journal_lines(cluster, number) <= before and all(writer.poll() is None for writer in work.writers):
                if time.monotonic() > deadline:
                    diagnose(cluster, [writer.pid for writer in work.writers])
                    raise Failed(f"nothing was written within {UP_WITHIN} s after the server came back")
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 2))
        else:
            cluster.unmount()
    finally:
        work.end()
    met = work.writers_met()
    seen = f"writers met {met} after an outage of {outage:.0f} s" if met and victim == "server" else ""
    if seen and outage < OUTAGE_BORNE:
        raise Failed(f"{seen}: below {OUTAGE_BORNE} s nobody may notice")
    if victim == "server" and work.program and work.program.returncode not in (None, 0, -signal.SIGKILL):
        with open(work.output, errors="replace") as output:
            raise Failed(f"{name} failed under a server that came back:\n{output.read()[-3000:]}")
    if victim != "server":
        cluster.revive(victim)
    return work, seen


def verified(cluster, victim, kept, rng):
    """Looks for every promise of the rounds whose files are there; answers how many there are."""
    if victim != "server" or rng.random() < MOUNT_STAYS:
        return sum(work.verify() for work in kept)
    # What the mount that lived through it shows may be what it has cached; what the targets hold is
    # seen by one that has nothing cached.
    kept[-1].verify()
    cluster.remount(killed=rng.random() < MOUNT_KILLED)
    return sum(work.verify() for work in kept)


def journal_lines(cluster, number):
    return sum(open(path).read().count("\n") for path in glob.glob(f"{cluster.work}/journal-{number}-*"))


def told(kills):
    """Of each workload, how often a server was killed under it (with its mount or alone), how often only the mount."""
    servers = {name: seen["all"] + seen["server"] for name, seen in kills.items()}
    mounts = {name: seen["mount"] for name, seen in kills.items()}
    each = [f"{name} {servers[name]} + {mounts[name]}" for name in kills]
    return (f"killed under each, servers + mounts alone: {', '.join(each)}; "
            f"together {sum(servers.values())} + {sum(mounts.values())}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bin")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--victim", choices=VICTIMS)
    parser.add_argument("workloads", nargs="*")
    arguments = parser.parse_intermixed_args()
    arguments.workloads = arguments.workloads or WORKLOADS
    if unknown := set(arguments.workloads) - set(WORKLOADS):
        parser.error(f"unknown workloads: {unknown}; known: {WORKLOADS}")
    directory = tempfile.mkdtemp(prefix="cfs-crash.", dir=os.environ.get("CFS_WORK", "/tmp"))
    os.chmod(directory, 0o755)
    # Copies: a build meanwhile changes nothing.
    for program in ("cfs", "cfsctl"):
        shutil.copy(f"{arguments.bin}/{program}", f"{directory}/{program}")
    cluster = Cluster(directory, directory)
    rng = random.Random(arguments.seed)
    running, kept, promises = None, [], 0
    kills = {name: dict.fromkeys(VICTIMS, 0) for name in arguments.workloads}
    try:
        cluster.start_dev()
        running = "all"
        for number in range(1, arguments.times + 1):
            turn = number - 1
            name = arguments.workloads[turn % len(arguments.workloads)]
            victim = arguments.victim or VICTIMS[turn // len(arguments.workloads) % len(VICTIMS)]
            if (running == "all") != (victim == "all"):
                cluster.stop()
                cluster.start(victim)
                running = victim
            started = time.monotonic()
            work, seen = crash_round(cluster, victim, name, number, rng)
            revived = time.monotonic() - started
            kept.append(work)
            kills[name][victim] += 1
            kept_promises = verified(cluster, victim, kept, rng)
            cluster.check()
            promises += kept_promises
            if len(kept) > ROUNDS_KEPT:
                kept.pop(0).remove()
            print(f"crash {number} of {arguments.times}: {name}, {victim} killed, {kept_promises} promises kept, check clean "
                  f"({revived:.0f} + {time.monotonic() - started - revived:.0f} s) {seen}", flush=True)
        cluster.stop()
    except Failed as failure:
        print(f"crash: FAILED with seed {arguments.seed}: {failure}")
        print("last lines of the log:")
        subprocess.run(["tail", "-30", f"{directory}/log"])
        if os.environ.get("CFS_KEEP"):
            print(f"left in {directory}")
        return 1
    finally:
        cluster.abandon()
        if not os.environ.get("CFS_KEEP"):
            shutil.rmtree(directory, ignore_errors=True)
    print(f"crash: passed, {arguments.times} crashes, {promises} promises kept; {told(kills)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
