#!/usr/bin/env bash
# Suites of others, run against our disk in a guest: fio's verification and trims, fsx, stress-ng, on the device and on three file systems.
#
# Each run has a volume, daemons and a guest of its own. It has passed when the suite found no fault, the guest's kernel logged none, the
# daemons logged no ERROR and ended well, and the file system in the node's raw file is clean. guest/suites-work.sh is what
# the guest does; docs/TESTING.md says which suites there are and which were not taken.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=qemu/rig.sh
source "$QEMU_DIR/rig.sh"

USAGE="usage: suites-test.sh [--only NAME,...] [--list] [--seed N] [--bin-dir DIR] [--verbose]"
FSX_VERSION=0.3.2
# The image's recipe packs it.
export FSX=$CACHE_DIR/fsx-$FSX_VERSION/bin/fsx
# NAME|WORK|FILE SYSTEM|MOUNT OPTIONS|SIZE IN MIB|LOSS IN PERCENT
RUNS=(
  'fio_verify|fio_verify|none|-|96|0'
  'fio_trim|fio_trim|none|-|96|0'
  'fio_trim_loss_1|fio_trim|none|-|96|1'
  'fsx_device|fsx_device|none|-|32|0'
  'fsx_ext4_discard|fsx|ext4|discard|192|0'
  'fsx_ext4_journal|fsx|ext4|data=journal|192|0'
  'fsx_xfs|fsx|xfs|discard|320|0'
  'fsx_btrfs|fsx|btrfs|discard=async|320|0'
  'stress_ext4_loss_1|stress|ext4|discard|320|1'
  'stress_xfs|stress|xfs|discard|320|0'
  'stress_btrfs|stress|btrfs|discard=async|512|0'
)
ONLY='' SEED=1 VERBOSE='' SUITE_PID=''

parse() {
  local option
  while (($#)); do
    option=$1
    shift
    case $option in
      --help) say "$USAGE" && exit 0 ;;
      --list) printf '%s\n' "${RUNS[@]%%|*}" && exit 0 ;;
      --verbose) VERBOSE=yes && continue ;;
      --only) check_names "${1:-}" && ONLY=$1 ;;
      --seed) need_number "$option" "${1:-}" && SEED=$1 ;;
      --bin-dir) need_directory "$option" "${1:-}" && BIN_DIR=$(realpath "$1") ;;
      *) say "$USAGE" >&2 && exit 2 ;;
    esac
    shift
  done
  BIN_DIR=${BIN_DIR:-${CARGO_TARGET_DIR:-$QEMU_DIR/../target}/release}
}

check_names() {
  local name names
  IFS=, read -ra names <<<"$1"
  ((${#names[@]})) || die "--only wants names; --list shows them"
  for name in "${names[@]}"; do
    printf '%s\n' "${RUNS[@]%%|*}" | grep -qxF -- "$name" || die "there is no suite \"$name\"; --list shows all"
  done
}

wanted() { [[ -z $ONLY || ,$ONLY, == *,$1,* ]]; }

install_fsx() {
  [[ ! -x $FSX ]] || return 0
  say "installing fsx $FSX_VERSION from crates.io"
  cargo install fsx --quiet --version "$FSX_VERSION" --locked --root "$CACHE_DIR/fsx-$FSX_VERSION" || die "cargo install fsx failed: see above"
}

# end_suite: a suite under way is asked to end, and undoes what it made.
# shellcheck disable=SC2317 # undo calls it
end_suite() {
  [[ -z $SUITE_PID ]] || { kill "$SUITE_PID" && wait "$SUITE_PID"; }
}

# check_on_the_node FS: the node's raw file, read by the file system's own tool.
check_on_the_node() {
  local check
  case $1 in
    ext4) check=(e2fsck -f -n "$RAW") ;;
    xfs) check=(xfs_repair -f -n "$RAW") ;;
    btrfs) check=(btrfs check --readonly "$RAW") ;;
    *) return 0 ;;
  esac
  "${check[@]}" >"$WORK/check.log" 2>&1 || {
    show_tail "${check[*]}" "$WORK/check.log"
    die "the node's file holds no clean $1"
  }
}

check_logs() {
  local name
  for name in cirro-node cirro-backend; do
    ! grep -q ERROR "$WORK/$name.log" || daemon_failed "$name" "logged an ERROR"
  done
}

# run_suite NAME WORK FS OPTIONS MIB LOSS: in a shell of its own, the caller's `&`, so that what it made is undone at its end.
run_suite() {
  local started_s=$SECONDS jobs
  UNDO=()
  undo_on_exit
  FS_MIB=$5 LOSS_PERCENT=$6 HOLE_MIB=0 FIO_MIB=0 GUEST_TIMEOUT_S=600
  GUEST_OPTIONS=(--image suites --memory 1024)
  rig_up
  start_daemons
  # On a busy machine an emulated timer may come too late for the kernel's test of it, which then panics.
  start_guest "$QEMU_DIR/guest/suites-work.sh" no_timer_check WORK="$2" FS="$3" MOUNT_OPTIONS="$4" FSX="$FSX" SEED="$SEED"
  guest_ended
  stop_daemons
  check_logs
  check_loss
  check_on_the_node "$3"
  [[ -z $VERBOSE ]] || cat "$REPORT"
  jobs=$(grep -c '^job ' "$REPORT") || die "the guest did not say that it ran anything"
  say "test suites::$1 ... ok"
  say "  $jobs jobs in $((SECONDS - started_s)) s"
}

main() {
  local run name work fs options mib loss failed=0
  parse "$@"
  need_root
  undo_on_exit
  undo end_suite
  "$QEMU_DIR/install.sh" stress-ng xfsprogs btrfs-progs
  install_fsx
  "$QEMU_DIR/guest-image.sh" "$QEMU_DIR/suites-image.sh"
  for run in "${RUNS[@]}"; do
    IFS='|' read -r name work fs options mib loss <<<"$run"
    wanted "$name" || continue
    run_suite "$name" "$work" "$fs" "$options" "$mib" "$loss" &
    SUITE_PID=$!
    wait "$SUITE_PID" || {
      say "test suites::$name ... FAILED"
      failed=1
    }
  done
  exit "$failed"
}

main "$@"
