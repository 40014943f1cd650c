# shellcheck shell=bash
# Two hosts on one machine, the daemons on them, a guest on the disk, and the proof on the storage side.
#
# It is sourced after lib.sh by demo.sh and guest-test.sh, which set the variables below and then call the functions
# in the order of this file. A host is a network namespace; its only interface is its end of a veth pair, so names cannot
# clash with anything of the machine. It knows the daemons' command lines and nothing of their inside.

# What the callers choose. BIN_DIR holds the daemons; sizes are in MiB and explained in guest/disk-work.sh.
BIN_DIR='' MTU=9000 LOSS_PERCENT=0 VCPUS=2 QUEUES='' GUEST_TIMEOUT_S=200
FS_MIB=192 HOLE_MIB=16 FIO_MIB=64 TREE=/usr,/lib,/modules

NODE_NS=cirro-node-$$
BACKEND_NS=cirro-backend-$$
INTERFACE=wire
VOLUME=demo
# Files of the run: made in rig_up.
WORK='' RAW='' REPORT='' DISK_MIB=''
NODE_PID='' BACKEND_PID=''

# rig_up: the working directory, the namespaces, the wire and, if asked for, its losses.
rig_up() {
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/cirro-guest.XXXXXX")
  undo rig_clear_files
  RAW=$WORK/volume.raw REPORT=$WORK/report
  mkdir "$WORK/node" "$WORK/backend"
  DISK_MIB=$((FS_MIB + 2 * HOLE_MIB + VCPUS * FIO_MIB))
  truncate -s "${DISK_MIB}M" "$RAW"
  local ns
  for ns in "$NODE_NS" "$BACKEND_NS"; do
    ip netns add "$ns" || die "cannot make the network namespace $ns"
    undo ip netns delete "$ns"
  done
  ip link add "$INTERFACE" netns "$NODE_NS" mtu "$MTU" type veth peer name "$INTERFACE" netns "$BACKEND_NS" mtu "$MTU" ||
    die "cannot make a veth pair with MTU $MTU"
  for ns in "$NODE_NS" "$BACKEND_NS"; do
    ip -n "$ns" link set lo up || die "cannot configure the network namespace $ns"
    ip -n "$ns" link set "$INTERFACE" up || die "cannot set $INTERFACE up in $ns"
    ((LOSS_PERCENT == 0)) || lose_frames "$ns"
  done
}

# Kept when somebody wants to look at them.
KEEP=''
rig_clear_files() { [[ -n $KEEP ]] || rm -rf "$WORK"; }

# lose_frames NAMESPACE: drops LOSS_PERCENT of what arrives there, whatever it is.
lose_frames() {
  ip netns exec "$1" nft -f - <<RULES || die "nft cannot drop frames in $1: does this kernel have nf_tables and its netdev family?"
table netdev loss {
  chain arriving {
    type filter hook ingress device "$INTERFACE" priority 0; policy accept;
    ether type 0x88b5 numgen random mod 100 < $LOSS_PERCENT counter drop
  }
}
RULES
}

daemon_failed() {
  show_tail "$1" "$WORK/$1.log"
  die "$1 $2"
}

# start_daemon NAME NAMESPACE SOCKET ARGUMENTS...: leaves the process id in STARTED_PID when SOCKET is there.
start_daemon() {
  local name=$1 ns=$2 socket=$3
  [[ -x $BIN_DIR/$name ]] || die "there is no $BIN_DIR/$name: run cargo build --release first"
  ip netns exec "$ns" "$BIN_DIR/$name" "${@:4}" >"$WORK/$name.log" 2>&1 &
  STARTED_PID=$!
  undo stop_process "$STARTED_PID"
  wait_for_socket "$socket" "$STARTED_PID" 15 || daemon_failed "$name" "did not open $socket within 15 s"
}

start_daemons() {
  start_daemon cirro-node "$NODE_NS" "$WORK/node.ctl" --link "$INTERFACE" --volume "$VOLUME=$RAW" --security none \
    --state-dir "$WORK/node" --ctl-socket "$WORK/node.ctl"
  NODE_PID=$STARTED_PID
  start_daemon cirro-backend "$BACKEND_NS" "$WORK/disk.sock" --socket-path "$WORK/disk.sock" --link "$INTERFACE" \
    --volume "$VOLUME" --queues "${QUEUES:-$VCPUS}" --security none --state-dir "$WORK/backend" --ctl-socket "$WORK/backend.ctl"
  BACKEND_PID=$STARTED_PID
}

# show_progress: what the guest reports, for a person; the checksums of single files are not.
show_progress() {
  local kind rest
  while read -r kind rest; do
    case $kind in
      accel) say "  the guest starts (${rest^^})" ;;
      boot) say "  $(printf '%6.2f' "${rest%% *}") s  boot Linux ${rest#* }" ;;
      step) say "  $(printf '%6.2f' "${rest%% *}") s  ${rest#* }" ;;
      failed) say "  FAILED  $rest" ;;
    esac
  done
}

# run_disk_work: the guest does guest/disk-work.sh. What it reported is in REPORT. It runs beside this shell, which only
# waits, so that a signal ends the run at once.
run_disk_work() {
  local status=0 guest_pid progress_pid
  : >"$REPORT"
  "$QEMU_DIR/run-guest.sh" --socket "$WORK/disk.sock" --netns "$BACKEND_NS" --vcpus "$VCPUS" --queues "${QUEUES:-$VCPUS}" \
    --timeout "$GUEST_TIMEOUT_S" --console "$WORK/console.log" "$QEMU_DIR/guest/disk-work.sh" FS_MIB="$FS_MIB" \
    HOLE_MIB="$HOLE_MIB" FIO_MIB="$FIO_MIB" JOBS="$VCPUS" TREE="$TREE" >"$REPORT" 2>"$WORK/qemu.log" &
  guest_pid=$!
  undo stop_process "$guest_pid"
  tail -s 0.1 --pid="$guest_pid" -n +1 -f "$REPORT" | show_progress &
  progress_pid=$!
  while runs "$guest_pid" && runs "$NODE_PID" && runs "$BACKEND_PID"; do sleep 0.2; done
  runs "$NODE_PID" || daemon_failed cirro-node "ended while the guest was at work"
  runs "$BACKEND_PID" || daemon_failed cirro-backend "ended while the guest was at work"
  wait "$guest_pid" || status=$?
  wait "$progress_pid" || true
  ((status == 0)) && return
  cat "$WORK/qemu.log" >&2
  show_tail "the guest's console" "$WORK/console.log"
  show_tail cirro-node "$WORK/cirro-node.log"
  show_tail cirro-backend "$WORK/cirro-backend.log"
  ((status != 124)) || die "the guest was not done after $GUEST_TIMEOUT_S s"
  die "the guest's work on the disk failed ($(sed -n 's/^failed //p' "$REPORT"), exit $status)"
}

# ask_stats NAME: keeps what a daemon counted, told over its control socket while it still runs.
ask_stats() {
  "$BIN_DIR/cirroctl" stats --json --ctl-socket "$WORK/$1.ctl" >"$WORK/$1.stats" 2>"$WORK/cirroctl.log" || {
    show_tail cirroctl "$WORK/cirroctl.log"
    die "the $1 does not tell its counters"
  }
}

# stop_daemons: on SIGTERM both end by themselves with exit code 0.
stop_daemons() {
  ask_stats node
  ask_stats backend
  stop_process "$BACKEND_PID" || daemon_failed cirro-backend "ended with exit code $? on SIGTERM"
  stop_process "$NODE_PID" || daemon_failed cirro-node "ended with exit code $? on SIGTERM"
}

# check_loss: a wire that was to lose frames did, in both directions; otherwise the run has shown less than it says.
check_loss() {
  ((LOSS_PERCENT == 0)) && return
  (($(frames_dropped "$NODE_NS") > 0 && $(frames_dropped "$BACKEND_NS") > 0)) || die "nft dropped nothing at $LOSS_PERCENT % loss"
}

# check_volume: the node's raw file, read by nobody's code but e2fsprogs, holds what the guest wrote.
check_volume() {
  local from_byte=$((FS_MIB << 20)) area_bytes=$((2 * HOLE_MIB << 20))
  e2fsck -f -n "$RAW" >"$WORK/e2fsck.log" 2>&1 || {
    show_tail "e2fsck -f -n $RAW" "$WORK/e2fsck.log"
    die "the node's file holds no clean ext4"
  }
  mkdir "$WORK/dump"
  debugfs -R "rdump /tree $WORK/dump" "$RAW" >"$WORK/debugfs.log" 2>&1
  sed -n 's/^file \([0-9a-f]*\) /\1  /p' "$REPORT" >"$WORK/sums.guest"
  (cd "$WORK/dump/tree" && find . -type f | LC_ALL=C sort | xargs sha256sum) >"$WORK/sums.node"
  [[ -s $WORK/sums.guest ]] || die "the guest reported no checksums"
  cmp "$WORK/sums.guest" "$WORK/sums.node" || die "the files in the node's volume are not the ones that the guest wrote"
  cmp -n "$area_bytes" -i "$from_byte:0" "$RAW" /dev/zero ||
    die "the areas that the guest discarded and zeroed are not zeroes in the node's file"
}

# guest_value NAME: a number that the guest reported.
guest_value() { awk -v name="$1" '$1 == "value" && $2 == name { print $3 }' "$REPORT"; }

# stat_sum NAME FIELD: the sum of a counter over everything in a daemon's answer; a question mark without an answer.
stat_sum() {
  grep -oE "\"$2\": *[0-9]+" "$WORK/$1.stats" 2>/dev/null |
    awk -F: '{ sum += $2; seen = 1 } END { if (seen) print sum; else print "?" }'
}

# frames_into NAMESPACE: what the kernel counted at that end of the wire, before any loss.
frames_into() { ip netns exec "$1" cat "/sys/class/net/$INTERFACE/statistics/rx_packets"; }

frames_dropped() {
  ip netns exec "$1" nft list ruleset | sed -n 's/.*counter packets \([0-9]*\).*/\1/p'
}
