#!/usr/bin/env bash
# Prepare what the opt-in device tests need, once, in a cache folder:
#
#   tests/device/prepare.sh aarch64 CACHE   a 64-bit ARM root with Python, numpy and onnxruntime (about 270 MB)
#   tests/device/prepare.sh image CACHE     a base image tagged python:3.11-slim, from this machine's Python (about 300 MB)
#
# Needs root and Debian's packages: apt-get install -y --no-install-recommends buildah debootstrap qemu-user-static
# Done work is kept: CACHE/aarch64/ready and CACHE/image/ready mark it. TEMPER_DEBIAN_MIRROR names another mirror.
set -euo pipefail

what=${1:?aarch64 or image}
cache=$(mkdir -p "${2:?cache folder}" && cd "$2" && pwd)
repository=$(cd "$(dirname "$0")/../.." && pwd)
mirror=${TEMPER_DEBIAN_MIRROR:-}
suite=bookworm

pinned() { grep -E "^$1==" "$repository/constraints.txt"; }

prepare_aarch64() {
    local home=$cache/aarch64 root=$cache/aarch64/root wheels=$cache/aarch64/wheels
    rm -rf "$home" && mkdir -p "$home" "$wheels"
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libstdc++6,libgomp1 $suite "$root" $mirror
    for package in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
    rm -rf "$root/var/cache/apt/archives"
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
        --dest "$wheels" "$(pinned numpy)" "$(pinned onnxruntime)"
    for wheel in "$wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$root/usr/lib/python3/dist-packages"; done
    # onnxruntime reads the kind of processor here; under emulation it would see the host's and crash.
    mkdir -p "$root/proc"
    printf '%s\t: %s\n' processor 0 BogoMIPS 100.00 Features 'fp asimd evtstrm crc32 cpuid asimddp' \
        'CPU implementer' 0x41 'CPU architecture' 8 'CPU variant' 0x3 'CPU part' 0xd0b 'CPU revision' 1 >"$root/proc/cpuinfo"
    touch "$home/ready"
}

prepare_image() {
    local home=$cache/image root=$cache/image/root prefix version
    rm -rf "$home" && mkdir -p "$home/run"
    debootstrap --variant=minbase --include=ca-certificates,libssl3,libffi8,libsqlite3-0,libbz2-1.0,liblzma5,zlib1g,libreadline8,libncursesw6,libuuid1,libexpat1,netbase,tzdata \
        $suite "$root" $mirror
    # The interpreter that runs the tests, without its packages, where the official image has its own.
    prefix=$(python3 -c 'import sys; print(sys.base_prefix)')
    version=$(python3 -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
    cp -a "$prefix/bin/python$version" "$root/usr/local/bin/"
    ln -sf "python$version" "$root/usr/local/bin/python3" && ln -sf python3 "$root/usr/local/bin/python"
    for library in "$prefix"/lib/libpython"$version"*.so*; do [ -e "$library" ] && cp -a "$library" "$root/usr/local/lib/"; done
    cp -a "$prefix/lib/python$version" "$root/usr/local/lib/"
    find "$root/usr/local/lib/python$version/site-packages" -mindepth 1 -maxdepth 1 ! -name 'pip*' ! -name 'setuptools*' -exec rm -rf {} +
    rm -rf "$root/usr/local/lib/python$version/test"
    printf '#!/usr/local/bin/python\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n' >"$root/usr/local/bin/pip"
    chmod +x "$root/usr/local/bin/pip"
    chroot "$root" ldconfig
    # Registries may answer with a certificate that only this machine's bundle knows.
    if [ -f /etc/ssl/certs/ca-certificates.crt ]; then
        cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
    fi
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ndisable-pip-version-check = true\nroot-user-action = ignore\n' >"$home/pip.conf"
    rm -rf "$root/var/cache/apt" "$root/var/lib/apt/lists"
    export BUILDAH_ISOLATION=chroot XDG_RUNTIME_DIR=$home/run
    local store=(--root "$home/store" --runroot "$home/runroot" --storage-driver vfs) container mount
    container=$(buildah "${store[@]}" from scratch)
    mount=$(buildah "${store[@]}" mount "$container")
    cp -a "$root/." "$mount/"
    buildah "${store[@]}" config --cmd python3 --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah "${store[@]}" commit --quiet --rm "$container" python:3.11-slim
    rm -rf "$root"
    touch "$home/ready"
}

case $what in
aarch64 | image) [ -f "$cache/$what/ready" ] || "prepare_$what" ;;
*) echo "expected aarch64 or image, got $what" >&2 && exit 2 ;;
esac
