"""Promises and what became of them: writes in four ways and notes outside the file system what was
intended, then, once an fsync or an O_DSYNC write has returned, what was promised.

crash-writer.py write DIR JOURNAL SEED    until an error; exit code 3 with the error on stdout
crash-writer.py verify DIR JOURNAL        fails at the first promise that was not kept
"""
import hashlib
import os
import random
import sys

RECORD = 512
# Of one writer; afterwards it writes small files only.
BYTES_MAX = 60 << 20
RECORDS = 64


def record(index, version):
    head = f"{index} {version} ".encode()
    body = hashlib.sha256(head).hexdigest().encode()
    return (head + body * 8)[: RECORD - 1] + b"\n"


def line(number):
    return f"{number} {hashlib.sha256(str(number).encode()).hexdigest()} end\n".encode()


class Writer:
    def __init__(self, directory, journal, seed):
        self.directory, self.rng = directory, random.Random(seed)
        self.journal = os.open(journal, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.tag = f"s{seed}"
        self.versions = [0] * RECORDS
        self.lines = self.bytes = 0

    def note(self, *words):
        os.write(self.journal, (" ".join(str(word) for word in words) + "\n").encode())

    def path(self, name):
        return os.path.join(self.directory, name)

    def blob(self):
        sizes = [10, 3000, 4097, 70000, 300000, 2500000] if self.bytes < BYTES_MAX else [10, 3000, 4097]
        size = self.rng.choice(sizes)
        self.bytes += size
        return self.rng.randbytes(size)

    def fill(self, path, data):
        """Writes in steps of many sizes, then fsyncs."""
        with open(path, "wb", buffering=0) as file:
            at = 0
            step = self.rng.choice([len(data), 1000, 65536])
            while at < len(data):
                at += file.write(data[at : at + step])
            os.fsync(file.fileno())

    def new_file(self, turn):
        name, data = f"{self.tag}-new-{turn}", self.blob()
        self.fill(self.path(name), data)
        self.note("new", name, hashlib.sha256(data).hexdigest())

    def replaced_file(self, turn):
        name, data = f"{self.tag}-over-{turn % 3}", self.blob()
        sha = hashlib.sha256(data).hexdigest()
        self.fill(self.path(name + ".tmp"), data)
        self.note("replacing", name, sha)
        os.rename(self.path(name + ".tmp"), self.path(name))
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self.note("replaced", name, sha)

    def records(self, _turn):
        name = f"{self.tag}-records"
        file = os.open(self.path(name), os.O_CREAT | os.O_RDWR)
        try:
            touched = self.rng.sample(range(RECORDS), 5)
            for index in touched:
                self.versions[index] += 1
                self.note("writing", name, index, self.versions[index])
                os.pwrite(file, record(index, self.versions[index]), index * RECORD)
            os.fdatasync(file)
            for index in touched:
                self.note("wrote", name, index, self.versions[index])
        finally:
            os.close(file)

    def appended(self, _turn):
        name = f"{self.tag}-lines"
        file = os.open(self.path(name), os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_DSYNC)
        try:
            for _ in range(3):
                os.write(file, line(self.lines))
                self.lines += 1
                self.note("appended", name, self.lines)
        finally:
            os.close(file)

    def run(self):
        ways = [self.new_file, self.replaced_file, self.records, self.appended]
        for turn in range(1000000):
            ways[turn % len(ways)](turn // len(ways))


def verify(directory, journal):
    new, replaced, replacing, wrote, writing, appended = {}, {}, {}, {}, {}, {}
    with open(journal) as notes:
        for words in (note.split() for note in notes if note.endswith("\n")):
            kind, name, rest = words[0], words[1], words[2:]
            if kind == "new":
                new[name] = rest[0]
            elif kind == "replacing":
                replacing.setdefault(name, []).append(rest[0])
            elif kind == "replaced":
                replaced[name] = rest[0]
                replacing[name] = []
            elif kind == "writing":
                writing[name, int(rest[0])] = int(rest[1])
            elif kind == "wrote":
                wrote[name, int(rest[0])] = int(rest[1])
            elif kind == "appended":
                appended[name] = int(rest[0])

    def content(name):
        with open(os.path.join(directory, name), "rb") as file:
            return file.read()

    for name, sha in new.items():
        found = hashlib.sha256(content(name)).hexdigest()
        assert found == sha, f"{name}: {found}, fsynced was {sha}"
    for name, sha in replaced.items():
        found = hashlib.sha256(content(name)).hexdigest()
        assert found in [sha, *replacing[name]], f"{name}: {found}, fsynced was {sha}, then {replacing[name]}"
    whole = {name: content(name) for name in {name for name, _ in wrote}}
    for (name, index), version in wrote.items():
        found = whole[name][index * RECORD : (index + 1) * RECORD]
        allowed = [record(index, at) for at in range(version, writing[name, index] + 1)]
        assert found in allowed, f"{name} record {index}: {found[:20]!r}, fsynced was version {version}"
    for name, lines in appended.items():
        found = content(name).splitlines(keepends=True)
        # One line may have been on its way.
        assert len(found) in (lines, lines + 1), f"{name}: {len(found)} lines, {lines} were promised"
        for number, text in enumerate(found):
            assert text == line(number), f"{name} line {number}: {text!r}"
    print(len(new) + len(replaced) + len(wrote) + sum(appended.values()))


if __name__ == "__main__":
    if sys.argv[1] == "verify":
        verify(sys.argv[2], sys.argv[3])
    else:
        try:
            Writer(sys.argv[2], sys.argv[3], int(sys.argv[4])).run()
        except OSError as error:
            print(f"{error}")
            sys.exit(3)
