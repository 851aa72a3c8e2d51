# Real programs that work in the present directory, for scripts that source this file:
# `workload NAME SIDE`. SIDE tells two runs apart. Needs $root (the repository), $work (a directory
# outside the file system under test), $quick (empty: full size) and $shuffle (empty: the same order
# each time, else short turns at random).
# shellcheck shell=bash
all_workloads=(pjdfstest fsx fio stress git sqlite cargo rsync shapes)
tools=${CFS_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/cfs-tools}

workload() { "workload_$1" "$2"; }

# Ends the caches of a side: those of the kernel and of the client. For scripts that can mount anew.
remount() { :; }

# Before what verifies: what it reads comes from the disk or the targets then. It leaves the present
# directory meanwhile, which would keep the mount busy. Dropping the kernel's caches alone would not
# do: the client has its own.
cold() { # side
    local here=$PWD
    cd /
    remount "$1"
    cd "$here"
}

in_order() { if [ -n "${shuffle:-}" ]; then shuf -e -- "$@"; else printf '%s\n' "$@"; fi; }

# Installs what the workloads use, with a line on each thing that takes time.
install_workload_tools() {
    local package user
    local missing=()
    for package in fio stress-ng sqlite3 rsync git attr acl e2fsprogs python3 passwd diffutils util-linux; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        if [ "$(id -u)" != 0 ]; then
            echo "as root, run: apt-get install ${missing[*]}" >&2
            return 1
        fi
        echo "installing ${missing[*]}"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    fi
    install_crate pjdfstest 0.2.2
    install_crate fsx 0.3.2
    for user in tests fsgqa; do id "$user" >/dev/null 2>&1 || useradd "$user"; done
}

install_crate() { # name version
    [ ! -x "$tools/bin/$1" ] || return 0
    echo "installing $1 $2 from crates.io into $tools"
    command cargo install -q --locked "$1" --version "$2" --root "$tools"
}

# stdout is the program's own report; fails unless the summary says that nothing failed.
workload_pjdfstest() {
    cat >"$work/pjdfstest.toml" <<TOML
[features]
posix_fallocate = {}
utimensat = {}
utime_now = {}
stat_st_birthtime = {}
rename_ctime = {}
nfsv4_acls = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["tests", "tests"], ["fsgqa", "fsgqa"]]
TOML
    "$tools/bin/pjdfstest" -c "$work/pjdfstest.toml" -p "$PWD" | tee "$work/pjdfstest.$1"
    grep -q '^Summary: 0 failed' "$work/pjdfstest.$1"
    # What ran must have run: of 398 cases some are skipped on every file system.
    [ "$(grep -o '[0-9]* passed' "$work/pjdfstest.$1" | cut -d' ' -f1)" -ge 380 ]
    # And what ran on ext4 in this run must run here, but for making as many links of a file as there
    # may be: how many that is on a FUSE file system, pathconf does not know (shapes makes 70,000).
    awk '$NF == "skipped" {print $1}' "$work/pjdfstest.$1" | grep -vx link::link_count_max | sort >"$work/skipped.$1"
    if [ "$1" = cfs ] && [ -e "$work/skipped.ext4" ]; then
        [ -z "$(comm -13 "$work/skipped.ext4" "$work/skipped.cfs" | tee /dev/stderr)" ]
    fi
}

workload_fsx() {
    local operations=${CFS_FSX_OPS:-1000000} part=2500 seed at mapread
    [ -z "$quick" ] || operations=5000
    for mapread in 0 1; do
        cat >"$work/fsx.$mapread.toml" <<TOML
[weights]
invalidate = 1
truncate = 1
mapread = $mapread
mapwrite = 1
read = 2
write = 2
punch_hole = 1
posix_fallocate = 1
copy_file_range = 1
fsync = 0.1
fdatasync = 0.1
[opsize]
min = 1
TOML
    done
    # Reserving no bytes is EINVAL everywhere, which fsx takes for a failure: hence the smallest size.
    # It never unmaps what it maps to read, and the kernel goes through all mappings each time: with
    # such reads a million operations would take many times as long, and more mappings than a process
    # may have. So each seed runs in one go without them, then in parts, each on a new file, with them.
    for seed in 1 2 3; do
        "$tools/bin/fsx" -q -f "$work/fsx.0.toml" -N "$operations" -S "$seed" -P "$work" "file-$seed"
        echo "seed $seed: $operations operations on one file"
        for ((at = 0; at < operations; at += part)); do
            "$tools/bin/fsx" -q -f "$work/fsx.1.toml" -N $((operations - at < part ? operations - at : part)) \
                -S $((seed * 1000 + at / part)) -P "$work" "file-$seed"
        done
        echo "seed $seed: $operations operations in parts of $part, with reads through mappings"
    done
}

workload_fio() {
    local size=256m job checked
    [ -z "$quick" ] || size=32m
    in_order '--rw=randwrite --bs=4k' '--rw=write --bs=1m' '--rw=randrw --bsrange=512-256k' \
        '--rw=randwrite --bs=16k --direct=1 --ioengine=io_uring --iodepth=16' >"$work/fio.jobs"
    while read -r job; do
        checked="--name=verify --size=$size --ioengine=psync $job --verify=crc32c --verify_fatal=1 --verify_state_save=0"
        # shellcheck disable=SC2086
        fio </dev/null $checked --do_verify=0 --fsync_on_close=1 --output-format=terse
        cold "$1"
        # shellcheck disable=SC2086
        fio </dev/null $checked --verify_only --output-format=terse
        rm -f verify.*
    done <"$work/fio.jobs"
}

workload_stress() {
    local seconds=20 status stressor codes=$work/stress.codes
    [ "$1" != ext4 ] || : >"$codes"
    [ -z "$quick" ] || seconds=3
    [ -z "${shuffle:-}" ] || seconds=1
    # The class "filesystem" of stress-ng 0.15 without what is not about files, and a few of other classes.
    for stressor in $(in_order \
        access aio chattr chdir chmod chown copy-file dentry dir dirdeep dirmany dnotify dup fallocate \
        fanotify fcntl fiemap file-ioctl filename flock fpunch fsize fstat getdent handle hdd inode-flags inotify \
        io iomix lease link locka lockf lockofd mknod open readahead rename revio seek sendfile splice \
        symlink sync-file touch utime xattr); do
        status=0
        # A stressor that does not end when it is told to is a failure too.
        timeout --kill-after=10 $((seconds * 4 + 60)) stress-ng --"$stressor" 2 --timeout "$seconds" --verify \
            --temp-path "$PWD" >"$work/stress.$stressor.$1" 2>&1 || status=$?
        # 3: not implemented by the kernel, or by the file system: then ext4, if it ran before, says so too.
        [ "$1" != ext4 ] || echo "$stressor $status" >>"$codes"
        if [ "$status" = 3 ] && ! grep -q "^$stressor 0$" "$codes" 2>/dev/null; then continue; fi
        [ "$status" = 0 ] || { cat "$work/stress.$stressor.$1"; echo "$stressor: exit code $status"; return 1; }
    done
}

workload_git() {
    local files=5000
    [ -z "$quick" ] || files=300
    mkdir source
    python3 - "$files" <<'PY'
import base64, os, sys
for index in range(1, int(sys.argv[1]) + 1):
    os.makedirs(f"source/{index % 50}", exist_ok=True)
    with open(f"source/{index % 50}/{index}", "w") as file:
        file.write(f"file {index}\n{base64.b64encode(os.urandom(300)).decode()}\n")
PY
    (cd source && git init -q . && git add -A && git -c user.name=c -c user.email=c@c commit -qm one)
    git clone -q source clone
    cold "$1"
    (cd clone && git fsck --full && git gc -q)
    cold "$1"
    (cd clone && git fsck --full && [ -z "$(git status --porcelain)" ])
    diff -r --exclude=.git source clone
}

workload_sqlite() {
    local rows=20000
    [ -z "$quick" ] || rows=1000
    sqlite3 data.db "PRAGMA journal_mode=WAL; CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB);
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<$rows) INSERT INTO t SELECT i, randomblob(500) FROM n;
        DELETE FROM t WHERE k%3=0; UPDATE t SET v=randomblob(900) WHERE k%5=0; VACUUM;"
    cold "$1"
    [ "$(sqlite3 data.db 'PRAGMA integrity_check')" = ok ]
    [ "$(sqlite3 data.db 'SELECT count(*) FROM t')" = $((rows - rows / 3)) ]
}

workload_cargo() {
    local modules=200 index
    [ -z "$quick" ] || modules=20
    cargo new -q --lib probe --vcs none
    cd probe
    for index in $(seq $modules); do
        echo "pub fn f$index() -> usize { $index }" >"src/m$index.rs"
        echo "pub mod m$index;"
    done >src/lib.rs
    echo '#[test] fn works() { assert_eq!(probe::m1::f1(), 1); }' >src/main_test.rs
    printf '\n[[test]]\nname = "works"\npath = "src/main_test.rs"\n' >>Cargo.toml
    CARGO_TARGET_DIR=$PWD/target cargo build -q
    CARGO_TARGET_DIR=$PWD/target cargo test -q
}

workload_rsync() {
    local files=20000
    [ -z "$quick" ] || files=500
    rm -rf "$work/tree.$1" "$work/back.$1"
    mkdir "$work/tree.$1"
    python3 - "$work/tree.$1" "$files" <<'PY'
import os, sys
for index in range(1, int(sys.argv[2]) + 1):
    os.makedirs(f"{sys.argv[1]}/{index % 100}", exist_ok=True)
    with open(f"{sys.argv[1]}/{index % 100}/{index}", "w") as file:
        file.write(f"{index}\n")
PY
    (cd "$work/tree.$1/1" && ln 101 hard && ln -s 101 soft && setfattr -n user.k -v v 201 && setfacl -m u:nobody:r 301 && chmod 6711 401)
    rsync -aHAX --checksum "$work/tree.$1/" here/
    cold "$1"
    rsync -aHAX --checksum --delete here/ "$work/back.$1/"
    [ -z "$(rsync -aHAXni --checksum "$work/tree.$1/" "$work/back.$1/")" ]
    diff -r "$work/tree.$1" "$work/back.$1"
    rm -rf "$work/tree.$1" "$work/back.$1"
}

# Sizes and shapes at the edges. ext4 ends at 65,000 links.
workload_shapes() {
    local many=100000 deep=1000 links=70000
    if [ -n "$quick" ]; then many=2000 deep=50 links=500; fi
    if [ "$1" = ext4 ] && [ "$links" -gt 60000 ]; then links=60000; fi
    python3 "$root/scripts/shapes.py" make $many $deep $links
    cold "$1"
    python3 "$root/scripts/shapes.py" look $many $deep $links
}
