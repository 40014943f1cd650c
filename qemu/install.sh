#!/usr/bin/env bash
# Installs what the demo and the guest tests need on a Debian 12 machine, from Debian's own packages only.
#
# Says what it installs and is done at once when everything is there. Any QEMU from 7.2 on will do, so one that is
# installed already, from backports too, is left as it is. The guest's kernel is not installed here: guest-image.sh unpacks it
# into its cache. Rust is not Debian's: rust-toolchain.toml names the version and rustup brings it. Arguments are further packages, for
# a test that needs more. Called by demo.sh and the tests beside it.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# To build: gcc, libc6-dev. The wire: iproute2, nftables. The guest: the next two lines. e2fsprogs also looks into the node's file.
PACKAGES=(gcc libc6-dev make iproute2 nftables
  qemu-system-x86 busybox-static e2fsprogs fio util-linux coreutils
  cpio lz4 xz-utils zstd "$@")

missing_packages() {
  local package
  for package in "${PACKAGES[@]}"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || say "$package"
  done
}

# apt ARGUMENTS: as root, waiting for another apt to end, its output shown only when it fails.
apt() {
  local log status=0 as_root=()
  log=$(mktemp)
  undo rm -f "$log"
  if ((EUID != 0)); then
    command -v sudo >/dev/null || die "packages have to be installed and there is no sudo: run it as root"
    as_root=(sudo)
  fi
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1 || status=$?
  ((status == 0)) || show_tail "apt-get $*" "$log"
  return "$status"
}

# Old package lists name versions that are gone, so they are renewed before anything is installed.
install_packages() {
  say "installing $*"
  apt update || die "apt-get update failed: look at /etc/apt/sources.list.d and the network"
  apt install -y --no-install-recommends "$@" || die "apt-get install failed: see above, then run qemu/install.sh again"
}

main() {
  local missing
  undo_on_exit
  command -v apt-get >/dev/null || die "this is not a Debian system: install ${PACKAGES[*]} (or their like) by hand"
  mapfile -t missing < <(missing_packages)
  ((${#missing[@]} == 0)) || install_packages "${missing[@]}"
  apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || apt update || die "apt knows no package lists: run apt-get update"
}

main "$@"
