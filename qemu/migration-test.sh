#!/usr/bin/env bash
# A guest with verified load is moved between two hosts and back while it works, and so are migrations that do not come to their end.
#
# Three network namespaces on a bridge: storage with one node, hosts A and B with a backend each. Nothing may reach the guest but
# pauses: fio verifies its data, a cached file shows pages that were not moved, its kernel has no complaint, and the node's file holds a
# clean file system. Prints QEMU's downtime and the longest pause of each move. Knows QEMU by its monitor, the daemons by their command
# lines, logs and `cirroctl`. --times N moves it N times in each direction; --aborts adds a cancelled migration, a destination
# whose QEMU is killed, and one whose backend is. The QEMU is that of newer-qemu.sh, or QEMU=PATH, 9.2 or newer.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=qemu/rig.sh
source "$QEMU_DIR/rig.sh"

USAGE="usage: migration-test.sh [--times N] [--aborts] [--bin-dir DIR] [--keep]"
TIMES=2 ABORTS='' CACHE_MIB=24 MEMORY_MIB=512
QEMU=${QEMU:-}
SWITCH_NS=cirro-switch-$$
declare -A NS=([A]=cirro-a-$$ [B]=cirro-b-$$) BACKENDS=() QEMUS=() MONITORS=() OWNERS=()
# The host that has the guest, how many QEMUs there were, and what the moves cost.
HOST=A STARTED=0 DOWNTIMES=() PAUSES=()
MOVE_S_MAX=120 PAUSE_MS_MAX=5000

parse() {
  while (($#)); do
    case $1 in
      --help) say "$USAGE" && exit 0 ;;
      --keep) KEEP=yes ;;
      --aborts) ABORTS=yes ;;
      --times) need_number "$1" "${2:-}" && TIMES=$2 && shift ;;
      --bin-dir) need_directory "$1" "${2:-}" && BIN_DIR=$(realpath "$2") && shift ;;
      *) say "$USAGE" >&2 && exit 2 ;;
    esac
    shift
  done
  BIN_DIR=${BIN_DIR:-${CARGO_TARGET_DIR:-$QEMU_DIR/../target}/release}
}

other() { if [[ $1 == A ]]; then echo B; else echo A; fi; }

network_up() {
  local ns port=0
  for ns in "$SWITCH_NS" "$NODE_NS" "${NS[A]}" "${NS[B]}"; do
    ip netns add "$ns" || die "cannot make the network namespace $ns"
    undo ip netns delete "$ns"
  done
  ip -n "$SWITCH_NS" link add bridge mtu "$MTU" type bridge || die "cannot make a bridge"
  ip -n "$SWITCH_NS" link set bridge up
  for ns in "$NODE_NS" "${NS[A]}" "${NS[B]}"; do
    port=$((port + 1))
    ip link add "$INTERFACE" netns "$ns" mtu "$MTU" type veth peer name "port$port" netns "$SWITCH_NS" mtu "$MTU" ||
      die "cannot make a veth pair with MTU $MTU"
    ip -n "$SWITCH_NS" link set "port$port" master bridge up
    ip -n "$ns" link set "$INTERFACE" up
  done
}

start_storage() {
  local host grants=()
  for host in node A B; do "$BIN_DIR/cirroctl" key new "$WORK/$host.key" >/dev/null; done
  for host in A B; do grants+=(--grant "$VOLUME=$("$BIN_DIR/cirroctl" key show "$WORK/$host.key")"); done
  start_daemon cirro-node "$NODE_NS" --key "$WORK/node.key" "${grants[@]}" --volume "$VOLUME=$RAW,durability=write-back" \
    --state-dir "$WORK/node" --ctl-socket "$WORK/node.ctl"
  NODE_PID=$STARTED_PID
  wait_for_socket "$WORK/node.ctl" "$NODE_PID" 15 || daemon_failed cirro-node "did not open its control socket within 15 s"
}

start_backend_of() {
  start_daemon cirro-backend "${NS[$1]}" --key "$WORK/$1.key" --node-key "$("$BIN_DIR/cirroctl" key show "$WORK/node.key")" \
    --socket-path "$WORK/$1.sock" --volume "$VOLUME" --queues "$VCPUS" --state-dir "$WORK/$1" --run-dir "$WORK/run-$1" \
    --ctl-socket "$WORK/$1.ctl"
  BACKENDS[$1]=$STARTED_PID
  wait_for_socket "$WORK/$1.sock" "$STARTED_PID" 15 || daemon_failed cirro-backend "of host $1 did not open its socket within 15 s"
}

restart_backend_of() {
  stop_process "${BACKENDS[$1]}" || daemon_failed cirro-backend "of host $1 ended with exit code $? on SIGTERM"
  start_backend_of "$1"
}

end_all() {
  local pid
  for pid in "${QEMUS[@]}" "${BACKENDS[@]}" $NODE_PID; do stop_process "$pid" || true; done
}

# start_qemu HOST [ARGUMENT]...: its monitor and its word from the host are pipes, its report grows in one file for all.
start_qemu() {
  local host=$1 run
  STARTED=$((STARTED + 1))
  run=$WORK/qemu-$STARTED
  mkfifo "$run.mon.in" "$run.mon.out" "$run.word.in" "$run.word.out"
  ip netns exec "${NS[$host]}" "$QEMU" -name "cirro-$host" -nodefaults -no-user-config -display none -no-reboot \
    -machine q35,memory-backend=ram -accel tcg -cpu max -smp "$VCPUS" -m "$MEMORY_MIB" \
    -object "memory-backend-memfd,id=ram,size=${MEMORY_MIB}M,share=on" \
    -kernel "$GUEST_DIR/vmlinux" -initrd "$GUEST_DIR/initramfs.cpio" \
    -append "console=ttyS0 panic=-1 quiet init_on_alloc=0 FS_MIB=$FS_MIB FIO_MIB=$FIO_MIB CACHE_MIB=$CACHE_MIB" \
    -fw_cfg "name=opt/cirro/script,file=$WORK/script" \
    -chardev "file,id=console,path=$WORK/console.log,append=on" -serial chardev:console \
    -chardev "file,id=report,path=$REPORT,append=on" -serial chardev:report \
    -serial "pipe:$run.word" -monitor "pipe:$run.mon" \
    -chardev "socket,id=disk,path=$WORK/$host.sock,reconnect-ms=1000" -device "vhost-user-blk-pci,chardev=disk,num-queues=$VCPUS" \
    "${@:2}" </dev/null >>"$WORK/qemu.log" 2>&1 &
  QEMUS[$host]=$! MONITORS[$host]=$run
  cat "$run.mon.out" >"$run.answers" &
  undo kill $!
}

# monitor HOST COMMAND
monitor() { printf '%s\n' "$2" | timeout 10 tee "${MONITORS[$1]}.mon.in" >/dev/null || fail "QEMU of host $1 does not take \"$2\""; }

# migration_state HOST: sets STATE to what QEMU says of its migration, DOWNTIME to its downtime in ms.
migration_state() {
  local answers=${MONITORS[$1]}.answers from
  from=$(($(stat -c %s "$answers") + 1))
  monitor "$1" "info migrate"
  sleep 0.05
  STATE=$(tail -c "+$from" "$answers" | sed -n 's/^Migration status: \([a-z-]*\).*/\1/p')
  DOWNTIME=$(tail -c "+$from" "$answers" | sed -n 's/^downtime: \([0-9]*\) m.*/\1/p')
}

fail() {
  KEEP=yes
  show_tail QEMU "$WORK/qemu.log"
  show_tail "the guest's console" "$WORK/console.log"
  show_tail cirro-node "$WORK/cirro-node.log"
  show_tail cirro-backend "$WORK/cirro-backend.log"
  grep '^failed' "$REPORT" >&2 || true
  die "$*; everything is kept in $WORK"
}

now_ms() { printf '%s' "$((${EPOCHREALTIME/./} / 1000))"; }

# completed HOST: sets COMPLETED to the requests that its backend has ended.
completed() {
  local answer
  COMPLETED=0
  answer=$("$BIN_DIR/cirroctl" stats --json --ctl-socket "$WORK/$1.ctl" 2>/dev/null) || return 0
  while [[ $answer =~ \"requests\":\ *([0-9]+)(.*) ]]; do
    COMPLETED=$((COMPLETED + BASH_REMATCH[1]))
    answer=${BASH_REMATCH[2]}
  done
}

# watch: looks for requests that ended on either host, and keeps the longest time without one in PAUSE.
watch() {
  local count now
  completed A
  count=$COMPLETED
  completed B
  count=$((count + COMPLETED)) now=$(now_ms)
  if [[ $count != "$SEEN" ]]; then SEEN=$count SEEN_MS=$now; fi
  ((now - SEEN_MS <= PAUSE)) || PAUSE=$((now - SEEN_MS))
}

watch_anew() {
  SEEN='' SEEN_MS=$(now_ms) PAUSE=0
  watch
}

check_guest() {
  runs "${QEMUS[$HOST]}" || fail "QEMU of host $HOST ended"
  ! grep -q '^failed\|^exit' "$REPORT" || fail "the guest's work failed: $(sed -n 's/^failed //p' "$REPORT" | head -n 1)"
}

# works SECONDS: the guest goes on; something must end on the host that has it.
works() {
  local until=$((SECONDS + $1)) before
  completed "$HOST"
  before=$COMPLETED
  while ((SECONDS < until)); do watch && check_guest; done
  completed "$HOST"
  ((COMPLETED > before)) || fail "no request of the guest ended on host $HOST for $1 s"
}

# await_state HOST REGEX
await_state() {
  local until=$((SECONDS + MOVE_S_MAX))
  while migration_state "$1" && ! [[ $STATE =~ ^($2)$ ]]; do
    [[ $STATE != failed ]] || fail "QEMU says that the migration failed"
    ((SECONDS < until)) || fail "the migration is \"$STATE\" after $MOVE_S_MAX s, not $2"
    watch && check_guest
  done
}

# begin_move TO BANDWIDTH
begin_move() {
  local socket
  start_qemu "$1" -incoming defer
  socket=$WORK/move-$STARTED
  monitor "$1" "migrate_incoming unix:$socket"
  wait_for_socket "$socket" "${QEMUS[$1]}" 20 || fail "QEMU of host $1 does not wait for a guest"
  monitor "$HOST" "migrate_set_parameter max-bandwidth $2"
  monitor "$HOST" "migrate_set_parameter downtime-limit 300"
  watch_anew
  monitor "$HOST" "migrate -d unix:$socket"
}

end_qemu() {
  stop_process "${QEMUS[$1]}" || true
  unset "QEMUS[$1]"
}

move() {
  local to
  to=$(other "$HOST")
  # Every second time the destination's backend is a new process.
  ((STARTED % 4 < 2)) || restart_backend_of "$to"
  begin_move "$to" 60M
  await_state "$HOST" completed
  [[ -n $DOWNTIME ]] || fail "QEMU does not tell its downtime"
  end_qemu "$HOST"
  HOST=$to
  works 4
  one_owner
  DOWNTIMES+=("$DOWNTIME") PAUSES+=("$PAUSE")
  say "moved $(other "$to") -> $to: downtime $DOWNTIME ms, longest pause of requests $PAUSE ms"
  ((PAUSE <= PAUSE_MS_MAX)) || fail "the guest waited $PAUSE ms"
}

# one_owner: the node's record names one attachment: that of the host that has the guest, and not that of the other.
one_owner() {
  local answer owner
  answer=$("$BIN_DIR/cirroctl" status --json --ctl-socket "$WORK/node.ctl")
  [[ $answer =~ \"owner\":\ *\{[^}]*\"attachment\":\ *\"([^\"]+)\" ]] || fail "the volume has no owner while the guest is at $HOST"
  owner=${BASH_REMATCH[1]}
  [[ ${OWNERS[$HOST]:-$owner} == "$owner" && ${OWNERS[$(other "$HOST")]:-} != "$owner" ]] ||
    fail "the owner is $owner while the guest is at $HOST"
  OWNERS[$HOST]=$owner
}

cancel() {
  local to
  to=$(other "$HOST")
  begin_move "$to" 1M
  works 3
  monitor "$HOST" migrate_cancel
  await_state "$HOST" cancelled
  end_qemu "$to"
  works 4
  one_owner
  say "cancelled: the guest goes on at $HOST"
}

# kill_destination qemu|backend: with SIGKILL, in the middle.
kill_destination() {
  local to
  to=$(other "$HOST")
  begin_move "$to" 1M
  works 2
  if [[ $1 == qemu ]]; then
    kill -KILL "${QEMUS[$to]}"
    wait "${QEMUS[$to]}" 2>/dev/null || true
    unset "QEMUS[$to]"
    works 4
  else
    kill -KILL "${BACKENDS[$to]}"
    wait "${BACKENDS[$to]}" 2>/dev/null || true
    works 2
    monitor "$HOST" migrate_cancel
    end_qemu "$to"
    start_backend_of "$to"
    works 4
  fi
  one_owner
  say "$1 of the destination killed: the guest goes on at $HOST"
}

wait_for_load() {
  local i
  for ((i = 0; i < 900; i++)); do
    ! grep -qx load "$REPORT" || return 0
    check_guest
    sleep 0.1
  done
  fail "the guest did not begin its work in 90 s"
}

finish() {
  local until=$((SECONDS + 120))
  echo enough >"${MONITORS[$HOST]}.word.in"
  while ! grep -q '^exit' "$REPORT"; do
    ((SECONDS < until)) || fail "the guest did not end its work in 120 s"
    ! grep -q '^failed' "$REPORT" || check_guest
    sleep 0.2
  done
  grep -qx 'exit 0' "$REPORT" || fail "the guest's work failed: $(sed -n 's/^failed //p' "$REPORT")"
  end_qemu "$HOST"
  stop_process "${BACKENDS[A]}" || daemon_failed cirro-backend "of host A ended with exit code $? on SIGTERM"
  stop_process "${BACKENDS[B]}" || daemon_failed cirro-backend "of host B ended with exit code $? on SIGTERM"
  stop_process "$NODE_PID" || daemon_failed cirro-node "ended with exit code $? on SIGTERM"
  check_file_system
}

main() {
  local i
  parse "$@"
  need_root
  undo_on_exit
  FS_MIB=96 FIO_MIB=8
  "$QEMU_DIR/install.sh"
  "$QEMU_DIR/guest-image.sh"
  QEMU=${QEMU:-$("$QEMU_DIR/newer-qemu.sh")}
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/cirro-move.XXXXXX")
  undo rig_clear_files
  RAW=$WORK/volume.raw REPORT=$WORK/report
  mkdir "$WORK/node" "$WORK/A" "$WORK/B"
  truncate -s "${FS_MIB}M" "$RAW"
  : >"$REPORT"
  { cat "$QEMU_DIR/guest/migration-work.sh"; echo; } >"$WORK/script"
  network_up
  undo end_all
  start_storage
  start_backend_of A
  start_backend_of B
  start_qemu A
  watch_anew
  wait_for_load
  one_owner
  for ((i = 0; i < 2 * TIMES; i++)); do move; done
  say "test migration::${TIMES}_times_there_and_back ... ok"
  if [[ -n $ABORTS ]]; then
    cancel && say "test migration::a_cancelled_migration_leaves_the_guest_where_it_is ... ok"
    kill_destination qemu && say "test migration::a_destination_that_is_killed_leaves_the_guest_where_it_is ... ok"
    kill_destination backend && say "test migration::a_destination_whose_backend_is_killed_harms_no_guest ... ok"
  fi
  finish
  say "downtimes: ${DOWNTIMES[*]} ms; longest pauses: ${PAUSES[*]} ms"
  say "$(guest_value passes) passes of fio, $(guest_value cached) checks of the cached file: no error, no wrong byte, no stale page, a clean file system"
  say "test migration::nothing_is_lost_stale_or_complained_of ... ok"
}

main "$@"
