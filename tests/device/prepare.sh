#!/usr/bin/env bash
# Prepare what the opt-in device tests need and print its folder:
#
#   tests/device/prepare.sh aarch64   a 64-bit ARM root with Python, numpy and onnxruntime, run by qemu (about 250 MB)
#   tests/device/prepare.sh image     a buildah store whose base image is tagged python:3.11-slim (about 350 MB)
#
# Needs root and Debian's packages buildah, debootstrap and qemu-user-static; run.sh installs them. Done work is kept in
# TEMPER_DEVICE_CACHE (default: temper-device in the user's cache folder) under a key of this script and the pinned
# versions. Exit status 75 where Debian's archive does not answer. TEMPER_DEBIAN_MIRROR names another mirror.
set -euo pipefail

what=${1:?aarch64 or image}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
suite=bookworm
cache=${TEMPER_DEVICE_CACHE:-${XDG_CACHE_HOME:-${HOME:-$repository/build}/.cache}/temper-device}
mkdir -p "$cache" && cache=$(cd "$cache" && pwd)
certificates=${PIP_CERT:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}

pinned() { grep -E "^$1==" "$repository/constraints.txt"; }

# The mirror that this machine's apt uses where it is of the same suite, else debootstrap's own.
mirror() {
    local found=${TEMPER_DEBIAN_MIRROR:-}
    [ -n "$found" ] || found=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(SITE)' 2>/dev/null |
        sed -n "s/^$suite main \(https\?:.*\)/\1/p" | head -n 1)
    echo "$found"
}

# debian ARCHITECTURE ROOT PACKAGES: packages unpacked and not configured, so that nothing foreign has to run.
debian() {
    local debs="$home/debs" root=$2 folder
    # shellcheck disable=SC2046  # no mirror is no argument
    debootstrap --download-only --arch="$1" --variant=minbase --include="$3" $suite "$debs" $(mirror) >"$home/log" 2>&1 ||
        { tail -n 3 "$home/log" >&2 && exit 75; }
    for folder in bin sbin lib lib64; do mkdir -p "$root/usr/$folder" && ln -s "usr/$folder" "$root/$folder"; done
    for package in "$debs"/var/cache/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --keep-directory-symlink \
            --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*'
    done
    rm -rf "$debs"
}

prepare_aarch64() {
    local root=$home/root wheels=$home/wheels
    mkdir -p "$root" "$wheels"
    debian arm64 "$root" python3,libstdc++6,libgomp1
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
        --dest "$wheels" "$(pinned numpy)" "$(pinned onnxruntime)"
    for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$root/usr/lib/python3/dist-packages"; done
    # onnxruntime reads the kind of processor here; under emulation it would see the host's and crash.
    mkdir -p "$root/proc"
    printf '%s\t: %s\n' processor 0 BogoMIPS 100.00 Features 'fp asimd evtstrm crc32 cpuid asimddp' \
        'CPU implementer' 0x41 'CPU architecture' 8 'CPU variant' 0x3 'CPU part' 0xd0b 'CPU revision' 1 >"$root/proc/cpuinfo"
    rm -rf "$wheels"
}

prepare_image() {
    local container root file
    mkdir -p "$home/run"
    export BUILDAH_ISOLATION=chroot XDG_RUNTIME_DIR=$home/run
    local buildah=(buildah --root "$home/store" --runroot "$home/runroot" --storage-driver vfs)
    container=$("${buildah[@]}" from scratch)
    root=$("${buildah[@]}" mount "$container")
    debian "$(dpkg --print-architecture)" "$root" python3,python3-venv,ca-certificates,netbase
    # What the packages' configuration would have done, as far as a build needs it.
    for file in passwd group; do cp "$root/usr/share/base-passwd/$file.master" "$root/etc/$file"; done
    mkdir -p "$root/usr/local/bin"
    ln -s /usr/bin/python3 "$root/usr/local/bin/python3" && ln -s python3 "$root/usr/local/bin/python"
    # Registries may answer with a certificate that only this machine's bundle knows.
    cp -L "$certificates" "$root/etc/ssl/certs/ca-certificates.crt"
    "${buildah[@]}" config --cmd python3 --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    "${buildah[@]}" commit --quiet --rm "$container" python:3.11-slim >/dev/null
}

# pip inside the image: the index that this machine's pip asks, and the bundle above.
pip_conf() {
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ndisable-pip-version-check = true\nroot-user-action = ignore\n'
    "$python" -m pip config list 2>/dev/null | sed -n "s/^[^=]*\.\(index-url\|trusted-host\)='\(.*\)'$/\1 = \2/p"
}

case $what in
aarch64) key=$( (cat "${BASH_SOURCE[0]}" && pinned numpy && pinned onnxruntime) | sha256sum) ;;
image) key=$(cat "${BASH_SOURCE[0]}" "$certificates" | sha256sum) ;;
*) echo "expected aarch64 or image, got $what" >&2 && exit 2 ;;
esac
home=$cache/$what-${key:0:12}
exec 9>"$cache/$what.lock" && flock 9
if [ ! -f "$home/ready" ]; then
    rm -rf "$home" && mkdir -p "$home"
    "prepare_$what"
fi
touch "$home" "$home/ready"
[ "$what" = aarch64 ] || (umask 077 && pip_conf >"$home/pip.conf")
find "$cache" -mindepth 1 -maxdepth 1 -name "$what-*" -mtime +14 -exec rm -rf {} +
echo "$home"
