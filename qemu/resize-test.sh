#!/usr/bin/env bash
# A guest's disk becomes larger while it works: cirroctl on the node, and the guest's kernel sees it by itself.
#
# The guest runs fio with verification on a mounted ext4 meanwhile, grows that with resize2fs, and fills the new space with verified writes. A size that
# would cut data off, and one for a volume in use, are refused by name. Afterwards e2fsck finds nothing in the node's raw file. It prints a line
# `test NAME ... ok` for the gate to count. The daemons are expected as guest-test.sh says.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=qemu/rig.sh
source "$QEMU_DIR/rig.sh"

USAGE="usage: resize-test.sh [--loss PERCENT] [--mtu N] [--bin-dir DIR] [--verbose]"
VERBOSE=''
BEFORE_MIB=64 AFTER_MIB=256

parse() {
  local option
  while (($#)); do
    option=$1
    shift
    case $option in
      --help) say "$USAGE" && exit 0 ;;
      --verbose) VERBOSE=yes && continue ;;
      --loss | --mtu) need_number "$option" "${1:-}" ;;
      --bin-dir) need_directory "$option" "${1:-}" ;;
      *) say "$USAGE" >&2 && exit 2 ;;
    esac
    case $option in
      --loss) LOSS_PERCENT=$1 ;;
      --mtu) MTU=$1 ;;
      --bin-dir) BIN_DIR=$(realpath "$1") ;;
    esac
    shift
  done
  BIN_DIR=${BIN_DIR:-${CARGO_TARGET_DIR:-$QEMU_DIR/../target}/release}
}

# resize SIZE: what cirroctl says of it, in SAID; its exit code.
resize() {
  local status=0
  SAID=$("$BIN_DIR/cirroctl" volume resize "$VOLUME" "$1" --ctl-socket "$WORK/node.ctl" 2>&1) || status=$?
  [[ -z $VERBOSE ]] || say "  resize $1: $SAID"
  return "$status"
}

# refused SIZE WORDS: the size is refused, by the volume's name and both sizes, in one line that has the words.
refused() {
  ! resize "$1" || die "the node gave the volume $1, which it has to refuse"
  [[ $SAID == *"volume $VOLUME: has "*", not $1: "*"$2"* && $SAID != *$'\n'* ]] || die "the refusal of $1 says: $SAID"
}

# guest_says WORDS: waits until the guest has reported that.
guest_says() {
  until grep -q "^$1" "$REPORT"; do
    runs "$GUEST_PID" || guest_ended
    runs "$GUEST_PID" || die "the guest ended before it said \"$1\""
    sleep 0.1
  done
}

grow_under_load() {
  start_guest "$QEMU_DIR/guest/resize-work.sh" FIO_MIB=16 MORE_MIB=$((BEFORE_MIB + 32))
  guest_says ready
  refused 32M "would lose data"
  resize "${AFTER_MIB}M" || die "cirroctl volume resize failed: $SAID"
  [[ $SAID == "volume $VOLUME has ${AFTER_MIB}M now, not ${BEFORE_MIB}M; 1 session was told" ]] || die "cirroctl says: $SAID"
  # Nothing lies behind this end, but the guest uses the volume.
  refused "$((AFTER_MIB - 1))M" "1 session(s) have it open"
  guest_ended
  [[ -z $VERBOSE ]] || show_progress <"$REPORT"
}

check_sizes() {
  (($(guest_value sectors-before) == BEFORE_MIB * 2048)) || die "the disk had $(guest_value sectors-before) sectors at first"
  (($(guest_value sectors-after) == AFTER_MIB * 2048)) || die "the guest saw $(guest_value sectors-after) sectors, not $((AFTER_MIB * 2048))"
  (($(guest_value fs-MiB) > AFTER_MIB * 8 / 10)) || die "the file system has $(guest_value fs-MiB) MiB after resize2fs"
  (($(stat -c %s "$RAW") == AFTER_MIB << 20)) || die "the node's file has $(stat -c %s "$RAW") bytes"
}

main() {
  local started_s=$SECONDS
  parse "$@"
  need_root
  undo_on_exit
  VCPUS=2 FS_MIB=$BEFORE_MIB HOLE_MIB=0 FIO_MIB=0 GUEST_TIMEOUT_S=110
  "$QEMU_DIR/install.sh"
  "$QEMU_DIR/guest-image.sh"
  rig_up
  start_daemons
  grow_under_load
  stop_daemons
  check_loss
  check_sizes
  check_file_system
  say "the guest saw its disk grow from $BEFORE_MIB to $AFTER_MIB MiB and filled it, in $((SECONDS - started_s)) s"
  say "test resize::a_guest_sees_its_disk_grow_and_works_there_at_once_loss_$LOSS_PERCENT ... ok"
}

main "$@"
