#!/usr/bin/env bash
# Ours, NVMe/TCP and AoE between the same two guests, on the same wire, which loses frames: one command, one report.
#
# One guest plays the storage machine (store.sh), the other the VM host (host.sh) with a guest of its own on our disk. What each end
# sends its kernel's netem delays and loses. This script boots both, tells them what to do, checks that ours had no error, that the
# wire lost frames when it should, and that everything was measured, and writes the tables. It needs neither root nor a network of the
# machine. README.md says what drives what.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
# shellcheck source=qemu/nested/report.sh
source "$QEMU_DIR/nested/report.sh"

USAGE="usage: run.sh [OPTION]...
  --quick               one loss (1 %), one depth (16), no kernel paths, no guest in the guest
  --losses LIST         percent of the frames, each way (0,0.1,1)
  --delay TIME          each way, as netem takes it (0.1ms)
  --jitter TIME         of the delay (none)
  --reorder PERCENT     frames that overtake others: needs a delay (none)
  --duplicate PERCENT   frames that come twice (none)
  --depths LIST         requests in flight (1,16)
  --systems LIST        of ours, nvme, aoe, nvme-kernel, aoe-kernel (all)
  --seconds N           of each measurement (5)
  --size MIB            of each volume (64)
  --mtu N               of the wire (9000)
  --security none|keys  of ours; the others have none (none)
  --no-inner            without the guest in the guest
  --out DIR             put report.txt, report.md and report.json there (target/nested)
  --bin-dir DIR         our programs (target/release)
  --keep                leave consoles and reports of the guests for a look"

LOSSES=0,0.1,1 DELAY=0.1ms JITTER='' REORDER='' DUPLICATE='' DEPTHS=1,16 SECONDS_EACH=5 VOLUME_MIB=64 MTU=9000 SECURITY=none
SYSTEMS=ours,nvme,aoe,nvme-kernel,aoe-kernel INNER=yes OUT='' BIN_DIR='' KEEP=''
STORE_ADDRESS=192.168.77.1 HOST_ADDRESS=192.168.77.2
GUEST_TIMEOUT_S=3600
# What one word to a guest may take, the longest being the guest in the guest without KVM.
WORD_TIMEOUT_S=900
declare -A GUEST_PIDS WORD_FDS
FAILED=''

usage_error() {
  say "$USAGE" >&2
  exit 2
}

need_list() {
  [[ $2 =~ $3 ]] || die "$1 wants $4, not \"$2\""
}

parse() {
  local option number='[0-9]+(\.[0-9]+)?'
  while (($#)); do
    option=$1
    shift
    case $option in
      --help) say "$USAGE" && exit 0 ;;
      --keep) KEEP=yes && continue ;;
      --no-inner) INNER='' && continue ;;
      --quick) LOSSES=1 DEPTHS=16 SYSTEMS=ours,nvme,aoe SECONDS_EACH=2 INNER='' && continue ;;
    esac
    (($#)) || usage_error
    case $option in
      --losses) need_list "$option" "$1" "^$number(,$number)*$" "percents, as 0,0.1,1" && LOSSES=$1 ;;
      --delay) need_list "$option" "$1" "^${number}(us|ms)$" "a time, as 0.1ms" && DELAY=$1 ;;
      --jitter) need_list "$option" "$1" "^${number}(us|ms)$" "a time, as 0.1ms" && JITTER=$1 ;;
      --reorder) need_list "$option" "$1" "^$number$" "a percentage" && REORDER=$1 ;;
      --duplicate) need_list "$option" "$1" "^$number$" "a percentage" && DUPLICATE=$1 ;;
      --depths) need_list "$option" "$1" '^[0-9]+(,[0-9]+)*$' "numbers, as 1,16" && DEPTHS=$1 ;;
      --systems) need_list "$option" "$1" '^(ours|(nvme|aoe)(-kernel)?)(,(ours|(nvme|aoe)(-kernel)?))*$' "some of ours, nvme, aoe, nvme-kernel, aoe-kernel" && SYSTEMS=$1 ;;
      --seconds) need_number "$option" "$1" && SECONDS_EACH=$1 ;;
      --size) need_number "$option" "$1" && VOLUME_MIB=$1 ;;
      --mtu) need_number "$option" "$1" && MTU=$1 ;;
      --security) need_list "$option" "$1" '^(none|keys)$' "none or keys" && SECURITY=$1 ;;
      --out) OUT=$1 ;;
      --bin-dir) need_directory "$option" "$1" && BIN_DIR=$(realpath "$1") ;;
      *) usage_error ;;
    esac
    shift
  done
  BIN_DIR=${BIN_DIR:-${CARGO_TARGET_DIR:-$QEMU_DIR/../target}/release}
  OUT=${OUT:-${CARGO_TARGET_DIR:-$QEMU_DIR/../target}/nested}
}

clear_files() { [[ -n $KEEP ]] || rm -rf "$WORK"; }

# overlay NAME PROGRAM...: an archive NAME.cpio of our programs, their libraries and what lies in $WORK/NAME already.
overlay() {
  local root=$WORK/$1 program
  for program in "${@:2}"; do
    [[ -x $BIN_DIR/$program ]] || die "there is no $BIN_DIR/$program: run cargo build --release --workspace first"
    # Symbols are for people, and a guest unpacks them into its memory.
    install -D -s "$BIN_DIR/$program" "$root/usr/bin/$program"
    ldd "$BIN_DIR/$program" | awk '/=> \// { print $3 } /^\t\// { print $1 }' | while read -r library; do
      [[ -e $root$library ]] || install -D "$library" "$root$library"
    done
  done
  (cd "$root" && find . | cpio --quiet -o -H newc) >"$WORK/$1.cpio"
}

# make_keys: one for each end, into its overlay; their public halves into VARIABLES.
make_keys() {
  [[ $SECURITY == keys ]] || return 0
  mkdir "$WORK/store/keys" "$WORK/host/keys"
  "$BIN_DIR/cirroctl" key new "$WORK/store/keys/node.key" >/dev/null
  "$BIN_DIR/cirroctl" key new "$WORK/host/keys/backend.key" >/dev/null
  VARIABLES+=("NODE_KEY=$("$BIN_DIR/cirroctl" key show "$WORK/store/keys/node.key")"
    "GRANT=$("$BIN_DIR/cirroctl" key show "$WORK/host/keys/backend.key")")
}

# pack: the overlays of both guests. The guest in the guest is the one that all other tests boot.
pack() {
  mkdir -p "$WORK/store" "$WORK/host/inner"
  make_keys
  overlay store cirro-node cirroctl
  if [[ -n $INNER ]]; then
    ln "$CACHE_DIR/guest/vmlinux" "$CACHE_DIR/guest/initramfs.cpio" "$WORK/host/inner/" 2>/dev/null ||
      cp "$CACHE_DIR/guest/vmlinux" "$CACHE_DIR/guest/initramfs.cpio" "$WORK/host/inner/"
    cp "$QEMU_DIR/nested/inner.sh" "$WORK/host/inner/script"
  fi
  overlay host cirro-backend cirroctl cirro-load
}

# boot_guest NAME MAC MEMORY_MIB ADDRESS: store or host.
boot_guest() {
  local name=$1 fd
  cat "$QEMU_DIR/nested/wire.sh" "$QEMU_DIR/nested/$name.sh" >"$WORK/$name.script"
  mkfifo "$WORK/$name.word.in" "$WORK/$name.word.out"
  : >"$WORK/$name.report"
  "$QEMU_DIR/run-guest.sh" --image nested --overlay "$WORK/$name.cpio" --wire "$WORK/wire" --mac "$2" --mtu "$MTU" --vcpus 1 --memory "$3" \
    --timeout "$GUEST_TIMEOUT_S" --console "$WORK/$name.console" --input "$WORK/$name.word" "$WORK/$name.script" \
    ADDRESS="$4" "${VARIABLES[@]}" >"$WORK/$name.report" 2>"$WORK/$name.qemu" &
  GUEST_PIDS[$name]=$!
  undo stop_process "${GUEST_PIDS[$name]}"
  exec {fd}<>"$WORK/$name.word.in"
  WORD_FDS[$name]=$fd
}

guest_failed() {
  KEEP=yes
  cat "$WORK/$1.qemu" >&2
  show_tail "the report of the $1" "$WORK/$1.report"
  show_tail "the console of the $1" "$WORK/$1.console"
  die "the $1 $2; everything is kept in $WORK"
}

# wait_for_line NAME LINE COUNT SECONDS: until a guest has reported LINE so often.
wait_for_line() {
  local deadline_s=$((SECONDS + $4))
  while (($(grep -cx "$2" "$WORK/$1.report") < $3)); do
    runs "${GUEST_PIDS[$1]}" || guest_failed "$1" "ended"
    ((SECONDS < deadline_s)) || guest_failed "$1" "did not say \"$2\" within $4 s"
    sleep 0.1
  done
}

# tell NAME COMMAND...: has a guest obey, and waits until it has.
tell() {
  local before
  before=$(grep -cx "done" "$WORK/$1.report") || true
  printf '%s\n' "${*:2}" >&"${WORD_FDS[$1]}"
  wait_for_line "$1" "done" $((before + 1)) "$WORD_TIMEOUT_S"
}

boot_guests() {
  boot_guest store 52:54:00:00:77:01 1024 "$STORE_ADDRESS"
  wait_for_socket "$WORK/wire" "${GUEST_PIDS[store]}" 60 || guest_failed store "made no wire"
  boot_guest host 52:54:00:00:77:02 2048 "$HOST_ADDRESS"
  wait_for_line store ready 1 180
  wait_for_line host ready 1 180
  say "both guests run ($(sed -n 's/^accel //p' "$WORK/host.report"), Linux $(sed -n 's/^boot [^ ]* //p' "$WORK/host.report")) after $SECONDS s"
}

# impair LOSS: both ends.
impair() {
  local arguments="delay $DELAY $JITTER loss $1%"
  [[ -z $REORDER ]] || arguments+=" reorder $REORDER%"
  [[ -z $DUPLICATE ]] || arguments+=" duplicate $DUPLICATE%"
  tell store impair "$arguments"
  tell host impair "$arguments"
}

# measure_at LOSS RW DEPTH: each system in turn.
measure_at() {
  local system
  impair "$1"
  for system in ${SYSTEMS//,/ }; do
    tell host measure "$system" "$1" "$2" "$3"
    say "  $(grep '^measured' "$WORK/host.report" | tail -n 1 | cut -d' ' -f2-)"
  done
  tell store sent "$1"
  tell host sent "$1"
}

# measure_all: what is compared in one table is measured at one time, so that what else the machine does hits all alike.
measure_all() {
  local rw depth loss
  tell host attach
  for rw in randread randwrite; do
    for depth in ${DEPTHS//,/ }; do
      say "$(workload_title "$rw" "$depth"), from $SECONDS s on"
      for loss in ${LOSSES//,/ }; do measure_at "$loss" "$rw" "$depth"; done
    done
  done
  if [[ -n $INNER ]]; then
    say "the guest in the guest, at $loss % loss, from $SECONDS s on"
    tell host inner
    sed -n 's/^inner /  /p' "$WORK/host.report"
  fi
  tell host counters
  tell store counters
}

# test_line NAME COMMAND...: runs it; its success is the test's.
test_line() {
  if "${@:2}"; then
    say "test nested::$1 ... ok"
  else
    say "test nested::$1 ... FAILED"
    FAILED=yes
  fi
}

check() {
  local loss
  for loss in ${LOSSES//,/ }; do
    [[ ,$SYSTEMS, != *,ours,* ]] || test_line "ours_has_no_error_at_${loss}_percent_loss" ours_has_no_error "$loss"
    test_line "wire_lost_what_it_should_at_${loss}_percent_loss" wire_lost "$loss"
  done
  test_line every_system_was_measured everything_was_measured
  [[ -z $INNER ]] || test_line inner_guest_verified_its_disk inner_verified
}

main() {
  parse "$@"
  undo_on_exit
  "$QEMU_DIR/install.sh" ethtool vblade qemu-system-common
  "$QEMU_DIR/guest-image.sh"
  "$QEMU_DIR/guest-image.sh" "$QEMU_DIR/nested/image.sh"
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/cirro-nested.XXXXXX")
  undo clear_files
  VARIABLES=(STORE="$STORE_ADDRESS" MTU="$MTU" SECURITY="$SECURITY" VOLUME_MIB="$VOLUME_MIB" LOAD_S="$SECONDS_EACH")
  pack
  LOAD_BEFORE=$(cut -d' ' -f1 /proc/loadavg)
  boot_guests
  measure_all
  mkdir -p "$OUT"
  write_reports
  say ""
  cat "$OUT/report.txt"
  check
  [[ -z $KEEP ]] || say "kept in $WORK"
  say "done in $SECONDS s; $OUT has report.txt, report.md and report.json"
  [[ -z $FAILED ]]
}

main "$@"
