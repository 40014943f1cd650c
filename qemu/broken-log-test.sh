#!/usr/bin/env bash
# Proves that migration-test.sh can fail: with a backend that forgets to mark one written page in 16, the guest must find stale pages.
#
# The bug is planted in a copy of the tree, which is built in target/broken-log. A test of moves that passes all the same is the
# failure here, and so is one that fails for another reason. Knows one line of backend/src/dirty_log.rs.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

USAGE="usage: broken-log-test.sh [--bin-dir DIR]"
ROOT=$(realpath "$QEMU_DIR/..")
BIN_DIR=''
PLACE=backend/src/dirty_log.rs
RIGHT='for page in self.pages(offset, len) {'
WRONG='for page in self.pages(offset, len).filter(|page| page % 16 != 0) {'
COPY=$ROOT/target/broken-log

parse() {
  while (($#)); do
    case $1 in
      --help) say "$USAGE" && exit 0 ;;
      --bin-dir) need_directory "$1" "${2:-}" && BIN_DIR=$(realpath "$2") && shift ;;
      *) say "$USAGE" >&2 && exit 2 ;;
    esac
    shift
  done
  BIN_DIR=${BIN_DIR:-${CARGO_TARGET_DIR:-$ROOT/target}/release}
}

# plant: the tree beside, with the bug; what did not change keeps its time, so that a second run builds little.
plant() {
  rm -rf "$COPY/tree"
  mkdir -p "$COPY/tree"
  tar -C "$ROOT" --exclude=./target --exclude=./.git --exclude=./qemu/.cache --exclude=./tests/fuzz/target -cf - . | tar -C "$COPY/tree" -xf -
  [[ $(grep -cF "$RIGHT" "$ROOT/$PLACE") == 1 ]] || die "$PLACE has not one line \"$RIGHT\": plant the bug where pages are marked now"
  awk -v right="$RIGHT" -v wrong="$WRONG" '{ at = index($0, right) } at { $0 = substr($0, 1, at - 1) wrong } { print }' "$ROOT/$PLACE" >"$COPY/tree/$PLACE"
}

build() {
  CARGO_TARGET_DIR=$COPY/target cargo build --quiet --release --locked --manifest-path "$COPY/tree/Cargo.toml" -p cirro-backend >"$COPY/build.log" 2>&1 || {
    show_tail "cargo build" "$COPY/build.log"
    die "the backend with the planted bug does not build"
  }
  mkdir -p "$COPY/bin" "$COPY/tmp"
  cp "$BIN_DIR/cirro-node" "$BIN_DIR/cirroctl" "$COPY/target/release/cirro-backend" "$COPY/bin/"
}

main() {
  local status=0 found
  parse "$@"
  need_root
  undo_on_exit
  plant
  build
  undo rm -rf "$COPY/tmp"
  TMPDIR=$COPY/tmp "$QEMU_DIR/migration-test.sh" --times 5 --bin-dir "$COPY/bin" >"$COPY/log" 2>&1 || status=$?
  ((status != 0)) || die "ten moves with a broken log of dirty pages and nothing noticed: migration-test.sh proves nothing"
  found=$(sed -n 's/^failed \(stale pages.*\)/\1/p; s/^failed \(fio.*\)/\1/p' "$COPY/log" | head -n 1)
  [[ -n $found ]] || {
    show_tail migration-test.sh "$COPY/log"
    die "migration-test.sh failed, but not by what the broken log of dirty pages does"
  }
  say "found: $found"
  say "test migration::a_broken_dirty_log_is_found ... ok"
}

main "$@"
