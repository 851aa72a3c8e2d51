"""Real programs that promise: a git repository and a sqlite database, with a note outside the file
system of each commit that was acknowledged.

crash-ledger.py git|sqlite DIR LEDGER                  until an error
crash-ledger.py verify-git|verify-sqlite DIR LEDGER    every noted commit is there, the rest is sound
"""
import os
import sqlite3
import subprocess
import sys

IDENTITY = ["-c", "user.name=c", "-c", "user.email=c@c", "-c", "core.fsync=all"]


def git(repository, *arguments):
    done = subprocess.run(["git", "-C", repository, *IDENTITY, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(done.stderr)
    return done.stdout.strip()


def write_git(repository, ledger):
    os.makedirs(repository)
    git(repository, "init", "-q", ".")
    for turn in range(100000):
        for index in range(5):
            with open(f"{repository}/{turn % 50}-{index}", "wb") as file:
                file.write(os.urandom(3000))
        git(repository, "add", "-A")
        git(repository, "commit", "-qm", str(turn))
        note(ledger, git(repository, "rev-parse", "HEAD"))


def verify_git(repository, ledger):
    noted = read(ledger)
    if not noted:
        return 0
    # What a killed git leaves for the next to see.
    for lock in ("index.lock", "HEAD.lock", "refs/heads/master.lock"):
        if os.path.exists(f"{repository}/.git/{lock}"):
            os.unlink(f"{repository}/.git/{lock}")
    git(repository, "fsck", "--full")
    for commit in noted:
        git(repository, "merge-base", "--is-ancestor", commit, "HEAD")
    return len(noted)


def write_sqlite(database, ledger):
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)")
    connection.commit()
    for key in range(1000000):
        connection.execute("INSERT INTO t VALUES(?, ?)", (key, os.urandom(2000)))
        connection.commit()
        note(ledger, key)


def verify_sqlite(database, ledger):
    noted = read(ledger)
    if not noted:
        return 0
    connection = sqlite3.connect(database)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    found = connection.execute("SELECT count(*), max(k) FROM t").fetchone()
    last = int(noted[-1])
    assert found in ((last + 1, last), (last + 2, last + 1)), f"{found}, promised was {last}"
    return len(noted)


def note(ledger, text):
    with open(ledger, "a") as file:
        file.write(f"{text}\n")


def read(ledger):
    return open(ledger).read().split() if os.path.exists(ledger) else []


if __name__ == "__main__":
    way, directory, ledger = sys.argv[1:]
    if way == "git":
        write_git(f"{directory}/ledger.git", ledger)
    elif way == "sqlite":
        write_sqlite(f"{directory}/ledger.db", ledger)
    elif way == "verify-git":
        print(verify_git(f"{directory}/ledger.git", ledger))
    else:
        print(verify_sqlite(f"{directory}/ledger.db", ledger))
