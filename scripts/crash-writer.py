"""Writes files and records each only after its fsync returned; or verifies what was recorded."""
import hashlib
import os
import random
import sys


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def verify(mount, journal):
    expected = {}
    if os.path.exists(journal):
        with open(journal) as lines:
            for line in lines:
                # A line cut by the crash of its writer was never promised.
                if line.endswith("\n"):
                    name, sha, _ = line.split()
                    expected[name] = sha
    for name, sha in expected.items():
        found = digest(os.path.join(mount, name))
        assert found == sha, f"{name}: {found}, fsynced was {sha}"


def write(mount, journal, round_number):
    rng = random.Random(round_number)
    log = os.open(journal, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for index in range(100000):
        name = f"r{round_number}-{index}"
        size = rng.choice([10, 3000, 4097, 70000, 300000, 2500000])
        data = rng.randbytes(size)
        try:
            with open(os.path.join(mount, name), "wb") as file:
                at = 0
                while at < size:
                    step = rng.choice([size, 1000, 65536])
                    file.write(data[at : at + step])
                    at += step
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return
        os.write(log, f"{name} {hashlib.sha256(data).hexdigest()} end\n".encode())


if sys.argv[1] == "--verify":
    verify(sys.argv[2], sys.argv[3])
else:
    write(sys.argv[1], sys.argv[2], int(sys.argv[3]))
