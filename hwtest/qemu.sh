# Makes and boots the guest, for scripts/hwtest, which sources this file. Needs $root (the repository),
# $work (a directory that is removed at the end), $limit (seconds for a boot), $verbose (empty: quiet);
# say, fail and skip.
# shellcheck shell=bash
# shellcheck disable=SC2154  # the caller's
# Disks that can't read some places, each with a configuration of blkdebug that says which.
declare -A unreadable=()
# Disks whose controllers have flexible data placement, each with the reclaim unit handles of its namespace,
# of eight.
declare -A handles=()
# What the guest needs beside its disks' modules.
modules=()
# Its network device.
network=()
kernel=${XDG_CACHE_HOME:-$HOME/.cache}/cfs-tools/hwtest/kernel
# Beside it, to be renamed when it is complete.
unpacked=$kernel.$$
qemu='' follower=''

# QEMU 10 of the backports, for what 7.2 lacks (FDP), and because 7.2 conflicts with qemu-utils 10.
# From lists of its own: the host's apt goes on knowing only what it knew.
install_qemu() {
    local codename lists=$work/apt
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release; [ "${ID:-}" = debian ] && echo "${VERSION_CODENAME:-}") || return 1
    mkdir -p "$lists/parts" "$lists/lists/partial"
    cp /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list "$lists/parts" 2>/dev/null || true
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $codename-backports main" \
        >"$lists/parts/hwtest-backports.list"
    local apt=(apt-get -qq -o APT::Update::Error-Mode=any -o "Dir::Etc::SourceParts=$lists/parts" -o "Dir::State::Lists=$lists/lists")
    "${apt[@]}" update &&
        DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends -t "$codename-backports" \
            qemu-system-x86 qemu-system-common qemu-utils
}

# What is missing is installed as root; a guest of QEMU itself needs no rights.
install_tools() {
    local package missing=()
    for package in busybox-static cpio kmod xz-utils zstd binutils fio nvme-cli iproute2 libfabric1 ibverbs-providers; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
    done
    local qemu_packages=()
    { command -v qemu-system-x86_64 && command -v qemu-img; } >/dev/null || qemu_packages=(qemu-system-x86 qemu-utils)
    local all=("${missing[@]}" "${qemu_packages[@]}")
    [ ${#all[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || skip "there is no apt-get to install ${all[*]}"
    [ "$(id -u)" = 0 ] || skip "as root, run: apt-get install --no-install-recommends ${all[*]}"
    say "installing ${all[*]}"
    if [ ${#missing[@]} -gt 0 ]; then
        { apt-get update -qq -o APT::Update::Error-Mode=any &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$work/apt.log" 2>&1 ||
            skip "cannot install ${missing[*]}: $(tail -n 1 "$work/apt.log")"
    fi
    [ ${#qemu_packages[@]} -gt 0 ] || return 0
    install_qemu >"$work/apt.log" 2>&1 || skip "cannot install QEMU: $(tail -n 1 "$work/apt.log")"
    hash -r
    command -v qemu-system-x86_64 >/dev/null || skip 'the QEMU that apt installed has no qemu-system-x86_64'
}

# Debian's kernel and its modules in $kernel, unpacked once: never installed. Remove $kernel for a newer one.
fetch_kernel() {
    local package='' meta offset
    [ ! -d "$kernel" ] || return 0
    mkdir -p "$unpacked"
    # An archive keeps no old kernels: what apt knew of may be gone.
    [ "$(id -u)" != 0 ] || apt-get update -qq >"$work/apt.log" 2>&1 || true
    for meta in linux-image-6.12-amd64 linux-image-amd64; do
        package=$(LC_ALL=C apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p')
        [ -z "$package" ] || break
    done
    [ -n "$package" ] || skip "apt knows no kernel of Debian; as root, run: apt-get update"
    say "downloading $package"
    (cd "$work" && apt-get download -qq "$package") >"$work/apt.log" 2>&1 ||
        skip "cannot download $package: $(tail -n 1 "$work/apt.log")"
    dpkg-deb -x "$work/$package"_*.deb "$unpacked"
    mkdir -p "$unpacked/kernel/lib"
    mv "$unpacked"/boot/vmlinuz-* "$unpacked/kernel/vmlinuz"
    # From Debian 13 on below usr.
    mv "$unpacked"/lib/modules "$unpacked/kernel/lib/" 2>/dev/null || mv "$unpacked"/usr/lib/modules "$unpacked/kernel/lib/"
    # Unpacked by the host instead of in emulation: 3 to 6 s of each boot. Bytes follow the frame.
    offset=$(LC_ALL=C grep -abo -m 1 -P '\x28\xb5\x2f\xfd' "$unpacked/kernel/vmlinuz" | head -n 1 | cut -d: -f1) || true
    if [ -n "$offset" ]; then
        tail -c +$((offset + 1)) "$unpacked/kernel/vmlinuz" | zstd -dcq >"$unpacked/vmlinux" 2>/dev/null || true
        if [ "$(head -c 4 "$unpacked/vmlinux" | tr -d '\177')" = ELF ]; then mv "$unpacked/vmlinux" "$unpacked/kernel/vmlinuz"; fi
    fi
    depmod -b "$unpacked/kernel" "$(ls "$unpacked/kernel/lib/modules")"
    # Or another run was first.
    mv -T "$unpacked/kernel" "$kernel" 2>/dev/null || [ -d "$kernel" ]
    rm -rf "$unpacked" "$work/$package"_*.deb
}

# What a program opens by name while it runs: libfabric, and the part of libibverbs for software devices. Nothing
# where they are missing.
rdma_libraries() {
    local directory=/usr/lib/x86_64-linux-gnu file
    for file in "$directory/libfabric.so.1" "$directory"/libibverbs/librxe-*.so /etc/libibverbs.d/rxe.driver; do
        [ ! -e "$file" ] || echo "$file"
    done
}

# Into $guest, the directory that becomes the initramfs: a program of the host and the libraries it is linked to. A script or a static one has none.
add_program() { # program, its path in the guest
    local library
    install -D "$1" "$guest$2"
    while read -r library; do
        [ -e "$guest$library" ] || install -D "$library" "$guest$library"
    done < <(ldd "$1" 2>/dev/null | grep -o '/[^ ]*')
    if head -c 4 "$1" | grep -q ELF; then strip --strip-debug "$guest$2"; fi
}

# Likewise a module of $release and what it depends on, for busybox, which cannot unpack them.
add_module() { # name
    local kind file
    while read -r kind file _; do
        [ "$kind" = insmod ] || continue
        install -D -m 644 "$file" "$guest/${file#"$kernel"/}"
        case $file in
        *.xz) xz -df "$guest/${file#"$kernel"/}" ;;
        esac
    done < <(modprobe -d "$kernel" -S "$release" --show-depends "$1")
}

# $work/initramfs: busybox, modules, the guest's scripts and the given programs, PROGRAM=NAME for /bin/NAME or
# PATH for where it is on the host.
build_initramfs() { # program...
    local program module guest=$work/guest release
    release=$(ls "$kernel/lib/modules")
    mkdir -p "$guest"/{bin,dev,proc,sys,tmp,hwtest}
    install /bin/busybox "$guest/bin/busybox"
    for program in $(busybox --list); do ln -s busybox "$guest/bin/$program" 2>/dev/null || true; done
    for program in "$root"/hwtest/guest/*; do
        busybox sh -n "$program" || fail "$program: is no shell script"
        install "$program" "$guest/hwtest/"
    done
    mv "$guest/hwtest/init" "$guest/init"
    for module in nvme virtio_blk ext4 crc32c_generic vfio-pci vfio_iommu_type1; do add_module "$module"; done
    for module in "${modules[@]}"; do add_module "$module"; done
    # depmod wants them; what is built in needs no loading.
    touch "$guest/lib/modules/$release"/modules.{order,builtin,builtin.modinfo}
    depmod -b "$guest" "$release"
    for program in "$@"; do
        case $program in
        *=*) add_program "${program%=*}" "/bin/${program#*=}" ;;
        *) add_program "$program" "$program" ;;
        esac
    done
    (cd "$guest" && find . | cpio -o -H newc -R +0:+0 --quiet) >"$work/initramfs"
    rm -rf "$guest"
}

# Sparse disks of 512 MiB, far more than the scenarios write, with a volatile write cache in the
# guest's eyes. What a scenario's killing of QEMU loses depends on their kind:
# nvme      A raw file. What was in the guest's memory is lost, and commands that were under way; every
#           write that was answered is in the host's page cache, and stays, flushed or not. QEMU's NVMe
#           ignores FUA, so nothing that loses unflushed writes can stand behind it.
# volatile  virtio-blk on a qcow2 file, whose table of clusters QEMU keeps in memory until the guest
#           flushes (virtio-blk knows no FUA: the kernel flushes instead). Lost is also every answered
#           write since the last flush, where it was the first to its block.
# Not tested by either: unflushed overwrites that are lost, torn blocks, a crash of the host.
make_disks() { # nvme or volatile, name...
    local kind=$1 name
    shift
    disks=()
    rm -f "$work"/*.disk
    for name in "$@"; do
        local file=$work/$name.disk
        if [ "$kind" = nvme ]; then
            truncate -s 512M "$file"
            local from="file=$file"
            [ -z "${unreadable[$name]:-}" ] || from="file=blkdebug:${unreadable[$name]}:$file"
            local subsystem='' placement=''
            if [ -n "${handles[$name]:-}" ]; then
                # Units that no scenario fills: what room they have left says what each handle has written.
                disks+=(-device "nvme-subsys,id=subsystem-$name,nqn=$name,fdp=on,fdp.runs=1G,fdp.nrg=1,fdp.nruh=8")
                subsystem=,subsys=subsystem-$name placement=",fdp.ruhs=${handles[$name]}"
            fi
            disks+=(-drive "$from,format=raw,if=none,id=$name,cache=writeback,discard=unmap"
                -device "nvme,serial=$name,id=controller-$name$subsystem"
                -device "nvme-ns,drive=$name,bus=controller-$name,nsid=1,logical_block_size=4096,physical_block_size=4096$placement")
        else
            # Clusters as large as a block of the guest: no write shares one with an older write.
            qemu-img create -q -f qcow2 -o cluster_size=4096 "$file" 512M
            disks+=(-drive "file=$file,format=qcow2,if=none,id=$name,cache=writeback,discard=unmap"
                -device "virtio-blk-pci,serial=$name,drive=$name,logical_block_size=4096,physical_block_size=4096")
        fi
    done
}

# One more NVMe controller, with two namespaces.
add_double_disk() { # name
    local number
    disks+=(-device "nvme,serial=$1,id=controller-$1")
    for number in 1 2; do
        truncate -s 512M "$work/$1-$number.disk"
        disks+=(-drive "file=$work/$1-$number.disk,format=raw,if=none,id=$1-$number,cache=writeback,discard=unmap"
            -device "nvme-ns,drive=$1-$number,bus=controller-$1,nsid=$number,logical_block_size=4096,physical_block_size=4096")
    done
}

# One more NVMe controller, which takes little at once, with two namespaces: one with blocks of 512 bytes, one
# whose blocks carry metadata.
add_odd_disk() { # name
    local number
    disks+=(-device "nvme,serial=$1,id=controller-$1,mdts=4")
    local formats=('' 'logical_block_size=512,physical_block_size=512' 'logical_block_size=4096,physical_block_size=4096,ms=8')
    for number in 1 2; do
        truncate -s 64M "$work/$1-$number.disk"
        disks+=(-drive "file=$work/$1-$number.disk,format=raw,if=none,id=$1-$number,cache=writeback,discard=unmap"
            -device "nvme-ns,drive=$1-$number,bus=controller-$1,nsid=$number,${formats[$number]}")
    done
}

# Boots the guest with $disks. Its console is in $work/console, its results are in $work/results.
start_guest() { # scenario, VARIABLE=value...
    local scenario=$1
    shift
    : >"$work/console"
    : >"$work/results"
    # Software emulation even where /dev/kvm is: a host with PVM has it, and runs no such guest.
    # Both processors of the guest by one thread of the host, taking turns: with a thread each the
    # emulation now and then loses a processor's timer, which then sleeps, and waits for RCU with it all.
    # Timers are periodic and unchecked, for it is late with one that is set for once.
    # The IOMMU comes first: what is made before it is not behind it.
    qemu-system-x86_64 -M q35,kernel-irqchip=split -accel tcg,thread=single -cpu max -smp 2 -m 2G \
        -device intel-iommu,intremap=on,caching-mode=on \
        -nodefaults -no-user-config -display none -no-reboot \
        -serial "file:$work/console" -serial "file:$work/results" \
        "${network[@]}" "${disks[@]}" -kernel "$kernel/vmlinuz" -initrd "$work/initramfs" \
        -append "console=ttyS0 no_timer_check nohz=off highres=off loglevel=4 panic=-1 oops=panic intel_iommu=on iommu=pt HWTEST_SCENARIO=$scenario HWTEST_LIMIT_S=$limit $*" \
        </dev/null 2>"$work/qemu.log" &
    qemu=$!
    if [ -n "$verbose" ]; then
        tail -f -n +1 --pid="$qemu" "$work/console" &
        follower=$!
    fi
    deadline=$((SECONDS + limit))
}

end_guest() {
    [ -n "$qemu" ] || return 0
    kill -9 "$qemu" 2>/dev/null || true
    reap_guest 2>/dev/null || true
}

reap_guest() { # the exit code of QEMU
    local status=0
    wait "$qemu" || status=$?
    qemu=
    [ -z "$follower" ] || wait "$follower" || true
    follower=
    return "$status"
}

guest_failed() { # why
    end_guest
    tail -n 200 "$work/console" >&2
    cat "$work/qemu.log" >&2
    fail "$1"
}

# The exit code of a scenario for which the emulation is to blame.
emulation_failed=75

# Fails if the guest can't come to a good end any more.
watch_guest() { # scenario
    # One of the guest's processors sleeps for ever, and with it all that waits for RCU.
    if grep -q 'timer wakeup didn.t happen' "$work/console"; then
        end_guest
        exit "$emulation_failed"
    fi
    if grep -q 'Kernel panic' "$work/console"; then guest_failed "$1: the guest's kernel panicked"; fi
    [ "$SECONDS" -lt "$deadline" ] || guest_failed "$1: not over within $limit s; CFS_HWTEST_LIMIT_S=N waits longer"
}

# The guest's result of a scenario, once it has powered off: $result.
await_result() { # scenario
    while kill -0 "$qemu" 2>/dev/null; do
        watch_guest "$1"
        sleep 0.2
    done
    watch_guest "$1"
    reap_guest || guest_failed "$1: QEMU ended with $?"
    # The command that reached for it was answered with success all the same.
    if grep -q 'DMAR:.*fault' "$work/console"; then guest_failed "$1: a device reached for memory that it may not use"; fi
    result=$(tr -d '\r' <"$work/results" | sed -n "s/^hwtest-result $1 //p")
    [ -n "$result" ] || guest_failed "$1: the guest ended without a result"
}
