"""Sizes and shapes at the edges, in the present directory: shapes.py make|look FILES DEEP LINKS.
Made by one run and looked at by another, between which caches can be ended."""
import os
import sys
import time

many, deep, links = map(int, sys.argv[2:])
NAMES = (b"\xff\xfe\x80", b"n" * 255, "ü".encode() * 127)
started = time.monotonic()


def done(what):
    global started
    now = time.monotonic()
    print(f"{what}: {now - started:.1f} s", flush=True)
    started = now


def deep_path(top):
    return f"deep{top}/" + "/".join("d" * 2 for _ in range(100))


def make():
    os.mkdir("many")
    for i in range(many):
        os.close(os.open(f"many/{i:06}", os.O_CREAT | os.O_WRONLY))
    done(f"{many} files in one directory")

    for top in range(deep):
        os.makedirs(deep_path(top))
    done(f"{deep} directories of depth 100")

    fd = os.open("sparse", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"end", 100 << 30)
    os.close(fd)
    done("a sparse file of 100 GiB")

    for name in NAMES:
        os.close(os.open(name, os.O_CREAT))
    try:
        os.close(os.open(b"n" * 256, os.O_CREAT))
        raise AssertionError("a name of 256 bytes was taken")
    except OSError as error:
        assert error.errno == 36, error
    done("names")

    os.close(os.open("one", os.O_CREAT))
    os.mkdir("links")
    for i in range(links):
        os.link("one", f"links/{i}")
    assert os.stat("one").st_nlink == links + 1
    done(f"{links} hard links")


def look():
    names = os.listdir("many")
    assert len(names) == many and set(names) == {f"{i:06}" for i in range(many)}, len(names)
    done(f"the names of {many} files")
    assert sum(entry.stat().st_size for entry in os.scandir("many")) == 0
    done("their attributes")

    for top in range(deep):
        assert os.path.isdir(deep_path(top))
    done(f"{deep} directories of depth 100 found")

    fd = os.open("sparse", os.O_RDWR)
    assert os.fstat(fd).st_size == (100 << 30) + 3 and os.pread(fd, 4, 50 << 30) == b"\0" * 4
    assert 0 < os.lseek(fd, 0, os.SEEK_DATA) <= 100 << 30
    assert os.pread(fd, 10, 100 << 30) == b"end"
    os.close(fd)
    assert os.stat("sparse").st_blocks * 512 < 1 << 20
    done("the sparse file")

    found = os.listdir(b".")
    assert all(name in found for name in NAMES), found
    done("the names")

    assert os.stat("one").st_nlink == links + 1
    assert len(os.listdir("links")) == links
    os.unlink("one")
    for i in range(links - 1):
        os.unlink(f"links/{i}")
    assert os.stat(f"links/{links - 1}").st_nlink == 1
    done(f"all but one of {links} links removed")


{"make": make, "look": look}[sys.argv[1]]()
