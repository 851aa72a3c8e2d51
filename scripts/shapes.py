"""Sizes and shapes at the edges, made and looked at in the present directory: shapes.py FILES DEEP LINKS."""
import os
import sys
import time

many, deep, links = map(int, sys.argv[1:])
started = time.monotonic()


def done(what):
    global started
    now = time.monotonic()
    print(f"{what}: {now - started:.1f} s", flush=True)
    started = now


os.mkdir("many")
for i in range(many):
    os.close(os.open(f"many/{i:06}", os.O_CREAT | os.O_WRONLY))
done(f"{many} files in one directory")
names = os.listdir("many")
assert len(names) == many and set(names) == {f"{i:06}" for i in range(many)}, len(names)
done("their names")
assert sum(entry.stat().st_size for entry in os.scandir("many")) == 0
done("their attributes")

for top in range(deep):
    path = f"deep{top}/" + "/".join("d" * 2 for _ in range(100))
    os.makedirs(path)
    assert os.path.isdir(path)
done(f"{deep} directories of depth 100")

fd = os.open("sparse", os.O_CREAT | os.O_RDWR)
os.pwrite(fd, b"end", 100 << 30)
assert os.fstat(fd).st_size == (100 << 30) + 3 and os.pread(fd, 4, 50 << 30) == b"\0" * 4
assert 0 < os.lseek(fd, 0, os.SEEK_DATA) <= 100 << 30
assert os.pread(fd, 10, 100 << 30) == b"end"
os.close(fd)
assert os.stat("sparse").st_blocks * 512 < 1 << 20
done("a sparse file of 100 GiB")

for name in (b"\xff\xfe\x80", b"n" * 255, "ü".encode() * 127):
    os.close(os.open(name, os.O_CREAT))
    assert name in os.listdir(b".")
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
os.unlink("one")
for i in range(links - 1):
    os.unlink(f"links/{i}")
assert os.stat(f"links/{links - 1}").st_nlink == 1
done("all but one of them removed")
