#!/usr/bin/env bash
# The guest run of `make test`: what demo.sh does, with less data, no build and no report. The exit code says all.
#
# The daemons are expected in the target directory's release folder, or where --bin-dir says. It prints what was done and a
# line `test NAME ... ok` for the gate to count; when it failed, what failed and the last lines of every log.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=qemu/rig.sh
source "$QEMU_DIR/rig.sh"

USAGE="usage: guest-test.sh [--loss PERCENT] [--vcpus N] [--queues N] [--mtu N] [--bin-dir DIR] [--verbose]"
VERBOSE=''

parse() {
  local option
  while (($#)); do
    option=$1
    shift
    case $option in
      --help) say "$USAGE" && exit 0 ;;
      --verbose) VERBOSE=yes && continue ;;
      --loss | --vcpus | --queues | --mtu) need_number "$option" "${1:-}" ;;
      --bin-dir) need_directory "$option" "${1:-}" ;;
      *) say "$USAGE" >&2 && exit 2 ;;
    esac
    case $option in
      --loss) LOSS_PERCENT=$1 ;;
      --vcpus) VCPUS=$1 ;;
      --queues) QUEUES=$1 ;;
      --mtu) MTU=$1 ;;
      --bin-dir) BIN_DIR=$(realpath "$1") ;;
    esac
    shift
  done
  BIN_DIR=${BIN_DIR:-${CARGO_TARGET_DIR:-$QEMU_DIR/../target}/release}
}

main() {
  local started_s=$SECONDS
  parse "$@"
  need_root
  undo_on_exit
  FS_MIB=128 HOLE_MIB=4 FIO_MIB=$((48 / VCPUS)) TREE=/usr,/modules GUEST_TIMEOUT_S=85
  "$QEMU_DIR/install.sh"
  "$QEMU_DIR/guest-image.sh"
  rig_up
  start_daemons
  if [[ -n $VERBOSE ]]; then run_disk_work; else run_disk_work >/dev/null; fi
  stop_daemons
  check_loss
  check_volume
  say "$(guest_value tree-files) files and $((2 * VCPUS * FIO_MIB)) MiB of verified writes in $((SECONDS - started_s)) s"
  say "test guest::queues_$(guest_value queues)_mtu_${MTU}_loss_$LOSS_PERCENT ... ok"
}

main "$@"
