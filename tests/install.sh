#!/usr/bin/env bash
# Installs the Debian packages that the tests need. Does nothing, and asks nobody, when they are there. Called by run-suites.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

# What each is for: the tests of link, store and e2e (namespaces, loss, loop devices, the slow disk, a back-end that others wrote),
# the dissector, lint, counted instructions; g++ builds the fuzzing engine. qemu/install.sh has what the guest and every build need, bench/run.sh the rivals.
packages=(iproute2 ethtool nftables kmod mount e2fsprogs util-linux procps qemu-system-common tshark shellcheck valgrind g++)

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    [ "$(id -u)" = 0 ] || { echo "tests/install.sh: needs root to install: ${missing[*]}" >&2; exit 1; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq -o DPkg::Lock::Timeout=300 update
    apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}" >/dev/null
fi
qemu/install.sh
