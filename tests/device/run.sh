#!/usr/bin/env bash
# Run the opt-in device tests: bundles on emulated 64-bit ARM, and the Dockerfile built and serving a prediction.
#
#   tests/device/run.sh [PYTHON]   as root, where Debian's packages can be installed; says why not elsewhere, with status 0
#
# What was prepared is kept between runs (see prepare.sh). TEMPER_DEVICE_TESTS=0 leaves these tests out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${1:-.venv/bin/python}
export PYTHON TEMPER_DEVICE_TESTS=${TEMPER_DEVICE_TESTS:-1}
log=$(mktemp) && trap 'rm -f "$log"' EXIT

leave() { echo "device tests left out: $1" && exit 0; }

# have TOOLS: the same names as their Debian packages, but for qemu-user-static's qemu-aarch64-static.
# One by one: asked about several, `command -v` is content with any of them.
have() {
    local tool
    for tool in buildah debootstrap qemu-aarch64-static dpkg-deb; do command -v "$tool" >/dev/null || return 1; done
}

install() {
    export DEBIAN_FRONTEND=noninteractive
    local packages=(buildah debootstrap qemu-user-static debian-archive-keyring)
    timeout 120 apt-get install -y --no-install-recommends "${packages[@]}" >"$log" 2>&1 ||
        { timeout 120 apt-get update && timeout 180 apt-get install -y --no-install-recommends "${packages[@]}"; } >"$log" 2>&1
}

# prepare WHAT: status 75 is an archive that does not answer, which is no fault of ours; anything else is.
prepare() {
    local status=0
    timeout 300 bash tests/device/prepare.sh "$1" >/dev/null || status=$?
    return $status
}

[ "$TEMPER_DEVICE_TESTS" = 1 ] || leave "TEMPER_DEVICE_TESTS is $TEMPER_DEVICE_TESTS"
[ "$(id -u)" = 0 ] || leave "they need root"
have || command -v apt-get >/dev/null || leave "buildah, debootstrap and qemu-user-static come with Debian's apt-get"
have || install || leave "apt-get: $(grep -m 1 '^E:' "$log" || tail -n 1 "$log")"

prepare aarch64 & first=$!
prepare image & second=$!
status=0
for job in $first $second; do
    wait "$job" || status=$?
    [ $status != 75 ] || { wait && leave "Debian's archive does not answer"; }
    [ $status = 0 ] || { wait && echo "device tests: preparing failed with status $status" >&2 && exit "$status"; }
done

# None may be skipped here: everything that they need is there.
OMP_NUM_THREADS=1 timeout 600 "$PYTHON" -m pytest -p no:xdist -rs tests/device | tee "$log"
! grep -qE '[0-9]+ skipped' "$log" || { echo "device tests: skipped although prepared" >&2 && exit 1; }
