#!/usr/bin/env bash
# Measures our disk beside other ways to the same bytes and writes docs/PERFORMANCE.md. Called by `make bench`.
#
#   tests/bench/run.sh [flags of cirro-bench]      see tests/bench/run.sh --help
set -euo pipefail
cd "$(dirname "$0")/../.."

# What each is for: the wire, the rivals.
packages=(iproute2 ethtool nftables util-linux git nbdkit qemu-system-common qemu-utils vblade)
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq -o DPkg::Lock::Timeout=300 update
    apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}" >/dev/null
fi

cargo build --release --locked --quiet -p cirro-node -p cirro-backend -p cirro-ctl
exec cargo run --release --locked --quiet -p cirro-tests --bin cirro-bench -- --write docs/PERFORMANCE.md "$@"
