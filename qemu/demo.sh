#!/usr/bin/env bash
# The demonstration, `make demo`: a real guest works on a disk that lives across a raw Ethernet link.
#
# It installs what is missing, builds the daemons, makes two hosts out of network namespaces, boots Debian's kernel on the
# disk, lets it work (guest/disk-work.sh), and then holds the node's raw file to what the guest saw. It ends with a short report
# and leaves nothing behind, however it ends. The proof itself is rig.sh, which guest-test.sh shares.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=qemu/rig.sh
source "$QEMU_DIR/rig.sh"

USAGE="usage: demo.sh [--loss PERCENT] [--vcpus N] [--mtu N] [--bin-dir DIR] [--keep]
  --loss PERCENT  drop that share of the frames, both ways, at random
  --vcpus N       virtual processors and queues of the guest (2)
  --mtu N         of the wire (9000)
  --bin-dir DIR   take the daemons from there and build nothing
  --keep          leave the raw file, logs and statistics for a look"

parse() {
  local option
  while (($#)); do
    option=$1
    shift
    case $option in
      --help) say "$USAGE" && exit 0 ;;
      --keep) KEEP=yes && continue ;;
      --loss | --vcpus | --mtu) need_number "$option" "${1:-}" ;;
      --bin-dir) need_directory "$option" "${1:-}" ;;
      *) say "$USAGE" >&2 && exit 2 ;;
    esac
    case $option in
      --loss) LOSS_PERCENT=$1 ;;
      --vcpus) VCPUS=$1 ;;
      --mtu) MTU=$1 ;;
      --bin-dir) BIN_DIR=$(realpath "$1") ;;
    esac
    shift
  done
}

build_daemons() {
  command -v cargo >/dev/null || die "there is no cargo: install Rust with rustup (https://rustup.rs), then run it again"
  cd "$QEMU_DIR/.."
  say "building the daemons (release)"
  cargo build --release --quiet -p cirro-node -p cirro-backend -p cirro-ctl
  BIN_DIR=$(cd "${CARGO_TARGET_DIR:-target}/release" && pwd)
}

# Whoever started this may have cargo and not be root: the build is theirs, the rest is root's.
become_root() {
  ((EUID == 0)) && return
  command -v sudo >/dev/null || need_root
  local again=(--bin-dir "$BIN_DIR" --loss "$LOSS_PERCENT" --vcpus "$VCPUS" --mtu "$MTU")
  [[ -z $KEEP ]] || again+=(--keep)
  exec sudo "$QEMU_DIR/demo.sh" "${again[@]}"
}

dropped_line() {
  ((LOSS_PERCENT > 0)) || return 0
  say "  dropped on purpose   $(frames_dropped "$NODE_NS") on the way to the node, $(frames_dropped "$BACKEND_NS") on the way back"
}

wire_report() {
  say ""
  say "On the wire (veth, MTU $MTU, $LOSS_PERCENT % loss)"
  say "  frames               $(frames_into "$NODE_NS") to the node, $(frames_into "$BACKEND_NS") to the backend"
  dropped_line
  say "  frames lost          $(stat_sum backend frames_lost) as the backend saw it, $(stat_sum node frames_lost) as the node saw it"
  say "  messages sent again  $(stat_sum backend messages_resent) by the backend, $(stat_sum node messages_resent) by the node, after $(stat_sum backend probe_timeouts) and $(stat_sum node probe_timeouts) probe timeouts"
}

final_report() {
  local files
  files=$(guest_value tree-files)
  say ""
  say "Proven"
  say "  A stock Debian kernel ($(awk '$1 == "boot" { print $3 }' "$REPORT")) used the disk with $(guest_value queues) queues: mkfs.ext4, mount, copy, fstrim, fsck."
  say "  $files files ($(guest_value tree-MiB) MiB) had the same SHA-256 after a new mount in the guest."
  say "  Discarded and zeroed areas read as zeroes; fio wrote $((2 * VCPUS * FIO_MIB)) MiB at random and verified every block (crc32c)."
  say "  The node's raw file, opened without us: a clean ext4, the same $files files with the same SHA-256, zeroes where discarded,"
  say "  $(($(stat -c %b "$RAW") / 2048)) of its $DISK_MIB MiB taken on the node's disk."
  say ""
  say "Speed in the guest"
  say "  copy and sync        $(guest_value copy-MiB/s) MiB/s, read again $(guest_value reread-MiB/s) MiB/s"
  say "  fio 4 KiB            $(guest_value fio-4K-write-MiB/s) MiB/s written ($(guest_value fio-4K-write-IOPS) IOPS), $(guest_value fio-4K-read-MiB/s) MiB/s verified ($(guest_value fio-4K-read-IOPS) IOPS)"
  say "  fio 128 KiB          $(guest_value fio-128K-write-MiB/s) MiB/s written, $(guest_value fio-128K-read-MiB/s) MiB/s verified"
  [[ $(awk '$1 == "accel" { print $2 }' "$REPORT") == kvm ]] || say "  (without KVM: the guest's processor is emulated and is the limit)"
  wire_report
}

main() {
  local started_s
  parse "$@"
  undo_on_exit
  "$QEMU_DIR/install.sh"
  [[ -n $BIN_DIR ]] || build_daemons
  become_root
  "$QEMU_DIR/guest-image.sh"
  started_s=$SECONDS
  rig_up
  say "two hosts ($NODE_NS, $BACKEND_NS), a wire with MTU $MTU and $LOSS_PERCENT % loss, a sparse raw file of $DISK_MIB MiB"
  start_daemons
  if [[ $SECURITY == keys ]]; then
    say "cirro-node and cirro-backend run, with keys made for this run: frames are encrypted"
  else
    say "cirro-node and cirro-backend run, without keys"
  fi
  run_disk_work
  stop_daemons
  check_loss
  check_volume
  final_report
  say ""
  [[ -z $KEEP ]] || say "kept in $WORK"
  say "done in $((SECONDS - started_s)) s"
}

main "$@"
