#!/usr/bin/env bash
# Prints the path of a QEMU that moves a guest without losing its pages: 10.0, from Debian's backports.
#
# QEMU 7.2 under TCG gives a moved guest stale pages, on its own virtio-blk and a raw file too (docs/TESTING.md), so a test of moves wants
# another. Where the machine's own is 10 or newer, it is that one; else the packages are unpacked, not installed, into .cache/qemu. Knows apt;
# leaves its lists and its sources alone. Called by migration-test.sh.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

RELEASE=bookworm
WANTED=10
PACKAGES=(qemu-system-x86 qemu-system-common qemu-system-data seabios)
UNPACKED=$CACHE_DIR/qemu

installed_major() { qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\)\..*/\1/p'; }

# quietly LOG COMMAND...: its output is shown only when it fails.
quietly() {
  "${@:2}" >"$1" 2>&1 || {
    show_tail "${*:2}" "$1"
    die "cannot unpack QEMU from Debian's backports: see above, or give migration-test.sh one with QEMU=PATH"
  }
}

unpack() {
  local dir package apt
  # Beside its place, so that it comes there whole or not at all.
  mkdir -p "$CACHE_DIR"
  dir=$(mktemp -d "$CACHE_DIR/unpack.XXXXXX")
  undo rm -rf "$dir"
  mkdir -p "$dir/lists/partial" "$dir/root"
  # What QEMU is linked with comes from the release itself, for install.sh installed its QEMU.
  printf 'deb http://deb.debian.org/debian %s main\n' "$RELEASE" "$RELEASE-backports" >"$dir/sources.list"
  apt=(apt-get -q -o "Dir::State::lists=$dir/lists" -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=-
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
  cd "$dir"
  quietly "$dir/log" "${apt[@]}" update
  quietly "$dir/log" "${apt[@]}" download "${PACKAGES[@]/%//$RELEASE-backports}"
  for package in *.deb; do quietly "$dir/log" dpkg-deb -x "$package" root; done
  cat >root/qemu <<'RUN'
#!/bin/sh
here=$(dirname "$0")
export QEMU_MODULE_DIR="$here/usr/lib/x86_64-linux-gnu/qemu"
exec "$here/usr/bin/qemu-system-x86_64" -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" -L "$here/usr/lib/ipxe/qemu" "$@"
RUN
  chmod +x root/qemu
  quietly "$dir/log" root/qemu --version
  rm -rf "$UNPACKED"
  mv root "$UNPACKED"
}

main() {
  local major
  undo_on_exit
  major=$(installed_major) || true
  if ((${major:-0} >= WANTED)); then
    command -v qemu-system-x86_64
  else
    [[ -x $UNPACKED/qemu ]] || unpack
    say "$UNPACKED/qemu"
  fi
}

main "$@"
