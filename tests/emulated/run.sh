#!/usr/bin/env bash
# Runs the engine's tests, or any static binary, on an emulated CPU with AVX-512 and AMX: a bare Linux with that one
# program as its only process, inside Bochs. README.md beside this file says what has to be installed.
#
#   run.sh [FILTER...]           builds the engine's library tests and runs those whose names match
#   run.sh ./BINARY [ARGS...]    runs a static binary (the argument has to contain a slash)
#
# Prints what the program prints and exits with its exit code; 125: the program did not come to its end.
#
#   EMULATOR      folder with `bochs`, its BIOS images and `vmlinuz` (target/emulator)
#   EMULATED_CPU  a Bochs CPU model (sapphire_rapids); corei7_icelake_u has AVX-512 but no AMX
#   EMULATED_MIB  memory of the emulated machine in MiB (1024)
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
target=${CARGO_TARGET_DIR:-$repository/target}
emulator=$(realpath -m "${EMULATOR:-$repository/target/emulator}")
scratch=$(mktemp -d)
bochs_pid=
trap '[[ -z $bochs_pid ]] || kill "$bochs_pid" 2> /dev/null || true; rm -rf "$scratch"' EXIT

fail() { printf '%s\n' "error: $1" "${@:2}" >&2; exit 125; }

# Every file the emulated machine is made of, or the package that brings it.
need() { [[ -e $1 ]] || fail "no \`$1\`" "hint: $2; see tests/emulated/README.md"; }
need "$emulator/bochs" 'build Bochs, or set EMULATOR to its folder'
need "$emulator/BIOS-bochs-latest" 'copy it from the `bios` folder of Bochs'
need "$emulator/VGABIOS-lgpl-latest.bin" 'copy it from the `bios/VGABIOS-lgpl` folder of Bochs'
need "$emulator/vmlinuz" 'unpack a kernel of 5.16 or later'
need /bin/busybox 'install `busybox-static`'
need /usr/lib/ISOLINUX/isolinux.bin 'install `isolinux`'
need /usr/lib/syslinux/modules/bios/ldlinux.c32 'install `syslinux-common`'

# A static test binary: the emulated machine has no C library. Prints its path.
build_tests() {
    RUSTFLAGS='-C target-feature=+crt-static' cargo test --quiet --release --locked --no-run \
        --manifest-path "$repository/Cargo.toml" --package tunesmith-engine --lib \
        --target x86_64-unknown-linux-gnu --target-dir "$target/emulated" --message-format json |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
}

# The file system in memory: busybox, the program, and the golden files where the tests look for them.
make_initramfs() {
    local root=$scratch/root binary=$1
    shift
    mkdir -p "$root"/{bin,dev,proc,sys,tmp} "$root$repository"/{src/engine,tests} "$scratch/cd"
    cp -L /bin/busybox "$root/bin/busybox"
    strip --strip-debug -o "$root/program" "$binary"
    cp -r "$repository/tests/golden" "$root$repository/tests/golden"
    cat > "$root/init" << END
#!/bin/busybox sh
busybox() { /bin/busybox "\$@"; }
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs tmp /tmp
exec < /dev/null > /dev/console 2>&1
export HOME=/tmp RUST_BACKTRACE=1 RUST_TEST_THREADS=1
cd $(printf %q "$repository")/src/engine
/program $(printf '%q ' "$@")
echo "exit code of the emulated program: \$?"
exec busybox sleep 1000000
END
    chmod +x "$root/init"
    (cd "$root" && find . | cpio --quiet --create --format newc > "$scratch/cd/initramfs")
}

# The boot disc. `clearcpuid=fsrm`: Bochs has no switch for fast string moves, so Linux takes them for switched off but
# still trusts short ones, and its `memmove` then runs away.
make_disc() {
    cp "$emulator/vmlinuz" /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$scratch/cd/"
    cat > "$scratch/cd/isolinux.cfg" << END
default linux
label linux
    kernel vmlinuz
    append initrd=initramfs console=ttyS0,115200 loglevel=1 nokaslr mitigations=off tsc=reliable random.trust_cpu=on clearcpuid=fsrm
END
    xorriso -as mkisofs -quiet -o "$scratch/boot.iso" -b isolinux.bin -c boot.cat \
        -no-emul-boot -boot-load-size 4 -boot-info-table "$scratch/cd" 2> "$scratch/xorriso.log" ||
        fail "$(< "$scratch/xorriso.log")"
}

boot() {
    mkfifo "$scratch/console"
    cat > "$scratch/bochsrc" << END
display_library: nogui
log: $scratch/bochs.log
panic: action=fatal
error: action=report
info: action=ignore
cpu: model=${EMULATED_CPU:-sapphire_rapids}, ips=100000000, cpuid_freq=ips
memory: guest=${EMULATED_MIB:-1024}, host=${EMULATED_MIB:-1024}
romimage: file=$emulator/BIOS-bochs-latest
vgaromimage: file=$emulator/VGABIOS-lgpl-latest.bin
ata0-master: type=cdrom, path=$scratch/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$scratch/console
clock: sync=none, time0=utc
END
    "$emulator/bochs" -q -f "$scratch/bochsrc" < /dev/null > "$scratch/bochs.out" 2>&1 &
    bochs_pid=$!
}

if [[ ${1-} == */* ]]; then
    binary=$1
    shift
else
    binary=$(build_tests)
fi
make_initramfs "$binary" "$@"
make_disc
boot

while IFS= read -r line; do
    line=${line%$'\r'}
    case $line in
        'exit code of the emulated program: '*) exit "${line##* }" ;;
        *'Kernel panic'*) fail "$line" ;;
        *) printf '%s\n' "$line" ;;
    esac
done < "$scratch/console"
tail -n 20 "$scratch/bochs.log" "$scratch/bochs.out" >&2
fail 'Bochs ended before the program did'
