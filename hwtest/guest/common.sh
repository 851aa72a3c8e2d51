# What scenarios share. fail WHY ends one; WHY is in its result. Descriptor 3 is the host's. Of a scenario that
# runs on real hardware the files are in HWTEST_TMP, and the server listens on HWTEST_ADDRESS.
# shellcheck shell=dash
tmp=${HWTEST_TMP:-/tmp}
address=${HWTEST_ADDRESS:-127.0.0.1:7400}
mnt=$tmp/mnt
server='' mount=''

say() { echo "hwtest: $1"; }

fail() {
    for log in "$tmp/server.log" "$tmp/mount.log"; do
        [ ! -e "$log" ] || tail -n 20 "$log"
    done
    echo "$1" >"$tmp/why"
    exit 1
}

# The first tenth of a second at which a command succeeds, 60 s at most: emulation is slow.
await() { # what it is for, command...
    what=$1
    shift
    for _ in $(seq 600); do
        ! "$@" >/dev/null 2>&1 || return 0
        sleep 0.1
    done
    fail "$what: not within 60 s"
}

# Controllers have other numbers at each boot; their serial numbers stay.
controller() { # serial number; its directory in /sys
    for found in /sys/class/nvme/nvme*; do
        [ "$(tr -d ' ' <"$found/serial")" != "$1" ] || { echo "$found"; return; }
    done
    return 1
}

# The kernel's multipath hides the namespace of a controller behind another, which has the device file.
disk() { # serial number; the block device
    for found in /sys/block/nvme*n1 /sys/block/vd*; do
        [ -b "/dev/${found##*/}" ] || continue
        serial=$found/device/serial
        [ -e "$serial" ] || serial=$found/serial
        [ "$(tr -d ' ' <"$serial")" != "$1" ] || { echo "/dev/${found##*/}"; return; }
    done
    return 1
}

load_drivers() {
    modprobe nvme || fail 'the module nvme cannot be loaded'
    modprobe virtio_blk || fail 'the module virtio_blk cannot be loaded'
    for name in "$@"; do await "the disk $name" disk "$name"; done
}

# Gives the three controllers to vfio-pci: as $targets, and $addresses.
bind_targets() {
    modprobe vfio_iommu_type1
    modprobe vfio-pci
    targets='' addresses=''
    for serial in cfs0 cfs1 cfs2; do
        pci=$(cat "$(controller $serial)/address")
        addresses="$addresses $pci"
        targets="$targets nvme:$pci"
    done
    for pci in $addresses; do cfsctl device bind "$pci" || fail "cfsctl device bind $pci"; done
}

# The three disks of the cluster, as $targets; with HWTEST_DRIVEN their controllers, which cfs drives.
find_targets() {
    load_drivers cfs0 cfs1 cfs2
    [ -z "${HWTEST_DRIVEN:-}" ] || { bind_targets; return; }
    targets="$(disk cfs0) $(disk cfs1) $(disk cfs2)"
    for target in $targets; do
        # Without a volatile cache nothing here would depend on flushes.
        cache=$(cat "/sys/block/${target##*/}/queue/write_cache")
        [ "$cache" = 'write back' ] || fail "$target has the write cache '$cache'"
    done
}

format() {
    # shellcheck disable=SC2086  # one word for each target
    cfs format --ec 2+1 $targets || fail 'cfs format'
}

serving() { grep -q '^serving on ' "$tmp/server"; }
mounted() { grep -q " $mnt fuse" /proc/mounts; }

refused() { # what it says, command...
    says=$1
    shift
    if "$@" >"$tmp/said" 2>&1; then fail "was not refused: $*"; fi
    grep -q -- "$says" "$tmp/said" || { cat "$tmp/said"; fail "says something else: $*"; }
}

start() {
    flags=
    for target in $targets; do flags="$flags --target $target"; done
    # shellcheck disable=SC2086
    cfs server --listen "$address" $flags >"$tmp/server" 2>>"$tmp/server.log" 3>&- &
    server=$!
    await 'cfs server' serving
    mkdir -p "$mnt"
    cfs mount --foreground "$address" "$mnt" >>"$tmp/mount.log" 2>&1 3>&- &
    mount=$!
    await 'cfs mount' mounted
}

stop() {
    umount "$mnt" || fail 'umount'
    wait "$mount" || fail "cfs mount ended with $?"
    kill -TERM "$server"
    wait "$server" || fail "cfs server ended with $?"
}

check() {
    cfsctl --address "$address" check --deep >"$tmp/check" 2>&1 || { cat "$tmp/check"; fail 'check --deep'; }
    [ "$(tail -n 1 "$tmp/check")" = clean ] || { cat "$tmp/check"; fail 'check --deep is not clean'; }
}

# What file N of the crash scenario holds: some fit an inode, some are cut into segments.
content() { # N
    yes "the content of file $1" | head -c $(($1 * 7919 % 200000 + 1))
}
