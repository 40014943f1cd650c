#!/usr/bin/env bash
# A guest works on the disk while its backend and its node are killed, the wire is cut, and 1 % of the frames are lost.
#
# Nothing of that may reach the guest but pauses: no error of its kernel or of fio, whose data is verified, and a clean file system
# on the node's side at the end. --kills says how often each of the three happens; after that both daemons are hit together, in
# each order. Prints a line for each fault and for the pauses that followed, and fails when one is longer than it may be. Knows the daemons
# by their command lines, their logs and `cirroctl stats`. Called by `make crash-test` and, for a short run, by run-suites.sh.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=qemu/rig.sh
source "$QEMU_DIR/rig.sh"

USAGE="usage: crash-test.sh [--kills N] [--mode write-through|write-back] [--loss PERCENT] [--only backend|node|cut|both] [--bin-dir DIR] [--keep]"
KILLS=20 MODE=write-back ONLY=''
# A guest may wait so long after the node says that it is ready, and after a backend was started besides the VMM's own interval.
NODE_PAUSE_MS_MAX=100 BACKEND_PAUSE_MS_MAX=500
# What a request may take to end after any fault.
RECOVERY_S_MAX=20
NODE_PAUSES=() BACKEND_PAUSES=() CUT_PAUSES=()

parse() {
  local option
  LOSS_PERCENT=1
  while (($#)); do
    option=$1
    shift
    case $option in
      --help) say "$USAGE" && exit 0 ;;
      --keep) KEEP=yes && continue ;;
      --kills | --loss) need_number "$option" "${1:-}" ;;
      --bin-dir) need_directory "$option" "${1:-}" ;;
      --mode) [[ ${1:-} == write-through || ${1:-} == write-back ]] || die "--mode is write-through or write-back" ;;
      --only) [[ ${1:-} == backend || ${1:-} == node || ${1:-} == cut || ${1:-} == both ]] || die "--only is backend, node, cut or both" ;;
      *) say "$USAGE" >&2 && exit 2 ;;
    esac
    case $option in
      --kills) KILLS=$1 ;;
      --loss) LOSS_PERCENT=$1 ;;
      --mode) MODE=$1 ;;
      --only) ONLY=$1 ;;
      --bin-dir) BIN_DIR=$(realpath "$1") ;;
    esac
    shift
  done
  BIN_DIR=${BIN_DIR:-${CARGO_TARGET_DIR:-$QEMU_DIR/../target}/release}
}

# wanted NAME: whether this kind of fault is asked for.
wanted() { [[ -z $ONLY || $ONLY == "$1" ]]; }

now_ms() { printf '%s' "$((${EPOCHREALTIME/./} / 1000))"; }

# completed: sets COMPLETED to the requests that the backend has ended; 0 as long as it does not answer.
completed() {
  local answer
  COMPLETED=0
  answer=$("$BIN_DIR/cirroctl" stats --json --ctl-socket "$WORK/backend.ctl" 2>/dev/null) || return 0
  while [[ $answer =~ \"requests\":\ *([0-9]+)(.*) ]]; do
    COMPLETED=$((COMPLETED + BASH_REMATCH[1]))
    answer=${BASH_REMATCH[2]}
  done
}

# wait_for_progress COUNT: until more than COUNT requests have ended. Sets PROGRESS_MS to the time at which that was seen.
wait_for_progress() {
  local deadline_ms
  deadline_ms=$(($(now_ms) + RECOVERY_S_MAX * 1000))
  while completed && ((COMPLETED <= $1)); do
    runs "$GUEST_PID" || guest_ended
    runs "$NODE_PID" || daemon_failed cirro-node "ended by itself"
    runs "$BACKEND_PID" || daemon_failed cirro-backend "ended by itself"
    (($(now_ms) < deadline_ms)) || guest_hangs
  done
  PROGRESS_MS=$(now_ms)
}

guest_hangs() {
  KEEP=yes
  "$BIN_DIR/cirroctl" status --ctl-socket "$WORK/backend.ctl" >&2 || true
  show_tail cirro-node "$WORK/cirro-node.log"
  show_tail cirro-backend "$WORK/cirro-backend.log"
  show_tail QEMU "$WORK/qemu.log"
  show_tail "the guest's console" "$WORK/console.log"
  die "no request of the guest has ended for $RECOVERY_S_MAX s; everything is kept in $WORK"
}

# kill_daemon PID: SIGKILL; returns when it is gone.
kill_daemon() {
  kill -KILL "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}

# node_ready_ms: when the node said last that it is ready.
node_ready_ms() {
  local time
  time=$(awk '/ is ready on / { time = $1 } END { print time }' "$WORK/cirro-node.log")
  [[ -n $time ]] || die "the node's log does not say when it was ready"
  date -d "$time" +%s%3N
}

# pause_after_node: what the guest waited after the node was ready, in PAUSE_MS; progress was seen already.
pause_after_node() {
  PAUSE_MS=$((PROGRESS_MS - $(node_ready_ms)))
  ((PAUSE_MS > 0)) || PAUSE_MS=0
}

# A moment of undisturbed work, never twice the same.
work_on() {
  completed
  wait_for_progress $((COMPLETED + 50))
  sleep "0.$((RANDOM % 7 + 1))"
}

kill_node() {
  kill_daemon "$NODE_PID"
  sleep "0.$((RANDOM % 5 + 1))"
  completed
  start_node
  wait_for_progress "$COMPLETED"
  pause_after_node
  NODE_PAUSES+=("$PAUSE_MS")
  say "node killed and started: the guest goes on $PAUSE_MS ms after it is ready"
}

kill_backend() {
  local started_ms
  kill_daemon "$BACKEND_PID"
  sleep "0.$((RANDOM % 3))"
  start_backend
  started_ms=$(now_ms)
  wait_for_progress 0
  BACKEND_PAUSES+=($((PROGRESS_MS - started_ms)))
  say "backend killed and started: the guest goes on $((PROGRESS_MS - started_ms)) ms after its start"
}

# cut_wire SECONDS
cut_wire() {
  local up_ms
  ip -n "$NODE_NS" link set "$INTERFACE" down
  sleep "$1"
  completed
  ip -n "$NODE_NS" link set "$INTERFACE" up
  up_ms=$(now_ms)
  wait_for_progress "$COMPLETED"
  CUT_PAUSES+=($((PROGRESS_MS - up_ms)))
  say "wire cut for $1 s: the guest goes on $((PROGRESS_MS - up_ms)) ms after its return"
}

# both_down FIRST: both are killed; FIRST is started before the other.
both_down() {
  kill_daemon "$NODE_PID"
  sleep 0.3
  kill_daemon "$BACKEND_PID"
  sleep 0.3
  "start_$1"
  sleep 1.5
  if [[ $1 == node ]]; then start_backend; else start_node; fi
  wait_for_progress 0
  say "backend killed while the node was down, the $1 started first: the guest goes on"
}

# node_dies_in_open MS: the node is killed so long after a backend started, and OPEN waits for writes of the one before.
node_dies_in_open() {
  kill_daemon "$BACKEND_PID"
  start_backend
  sleep "0.$1"
  kill_daemon "$NODE_PID"
  start_node
  wait_for_progress 0
  say "node killed 0.$1 s after a backend's start: the guest goes on"
}

both_at_once() {
  kill -KILL "$NODE_PID" "$BACKEND_PID"
  kill_daemon "$NODE_PID"
  kill_daemon "$BACKEND_PID"
  start_node
  start_backend
  wait_for_progress 0
  say "both killed at once: the guest goes on"
}

# summary NAME LIMIT_MS PAUSES...: the median and the worst; fails above the limit.
summary() {
  local name=$1 limit=$2 sorted
  shift 2
  (($#)) || return 0
  mapfile -t sorted < <(printf '%s\n' "$@" | sort -n)
  say "pauses after $name: median ${sorted[$#/2]} ms, worst ${sorted[$#-1]} ms of $# (limit $limit ms)"
  ((sorted[$# - 1] <= limit)) || {
    SLOW=yes
    say "FAILED: a pause after $name was longer than $limit ms"
  }
}

# The VMM's own interval between tries: run-guest.sh chooses it.
reconnect_ms() { if [[ $("${QEMU:-qemu-system-x86_64}" -chardev socket,help 2>&1) == *reconnect-ms* ]]; then echo 200; else echo 1000; fi; }

hit_all() {
  local i
  for ((i = 0; i < KILLS; i++)); do
    if wanted backend; then work_on && kill_backend; fi
    if wanted node; then work_on && kill_node; fi
    if wanted cut; then work_on && cut_wire $((KILLS > 1 ? 1 + 9 * i / (KILLS - 1) : 1)); fi
  done
  wanted both || return 0
  work_on && both_down backend
  work_on && both_down node
  for i in 01 05 2; do work_on && node_dies_in_open "$i"; done
  work_on && both_at_once
  work_on
}

wait_for_load() {
  local i
  for ((i = 0; i < 600; i++)); do
    ! grep -qx load "$REPORT" || return 0
    runs "$GUEST_PID" || guest_ended
    sleep 0.1
  done
  die "the guest did not begin its work in 60 s; see $WORK/console.log"
}

main() {
  local started_s=$SECONDS
  parse "$@"
  need_root
  undo_on_exit
  FS_MIB=128 HOLE_MIB=0 FIO_MIB=16 VOLUME_OPTIONS=",durability=$MODE" GUEST_TIMEOUT_S=$((120 + 40 * KILLS)) SLOW=''
  "$QEMU_DIR/install.sh"
  "$QEMU_DIR/guest-image.sh"
  rig_up
  mkfifo "$WORK/word.in" "$WORK/word.out"
  GUEST_OPTIONS=(--input "$WORK/word")
  start_daemons
  start_guest "$QEMU_DIR/guest/crash-work.sh" FS_MIB="$FS_MIB" FIO_MIB="$FIO_MIB"
  wait_for_load
  hit_all
  echo enough >"$WORK/word.in"
  guest_ended
  stop_daemons
  check_loss
  check_file_system
  summary "a restart of the node, from when it is ready" "$NODE_PAUSE_MS_MAX" "${NODE_PAUSES[@]}"
  summary "a restart of the backend" $((BACKEND_PAUSE_MS_MAX + $(reconnect_ms))) "${BACKEND_PAUSES[@]}"
  summary "a cut of the wire" $((RECOVERY_S_MAX * 1000)) "${CUT_PAUSES[@]}"
  say "$(guest_value passes) passes of fio in $((SECONDS - started_s)) s, $MODE: no error, no wrong byte, a clean file system"
  [[ -z $SLOW ]] || exit 1
  say "test crash::${KILLS}_kills_each_$MODE ... ok"
}

main "$@"
