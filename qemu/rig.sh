# shellcheck shell=bash
# Two hosts on one machine, the daemons on them, a guest on the disk, and the proof on the storage side.
#
# It is sourced after lib.sh by demo.sh, guest-test.sh, crash-test.sh and actions-test.sh, which set the variables below and then call the functions
# in the order of this file. A host is a network namespace; its only interface is its end of a veth pair, so names cannot
# clash with anything of the machine. It knows the daemons' command lines and nothing of their inside.

# What the callers choose. BIN_DIR holds the daemons; sizes are in MiB and explained in guest/disk-work.sh.
BIN_DIR='' MTU=9000 LOSS_PERCENT=0 VCPUS=2 QUEUES='' GUEST_TIMEOUT_S=200
FS_MIB=192 HOLE_MIB=16 FIO_MIB=64 TREE=/usr,/lib,/modules
# More of the volume's description at the node: `,KEY=VALUE`.
VOLUME_OPTIONS=''
# More options of the backend.
BACKEND_OPTIONS=()
# How frames are protected: keys, made for the run, or none.
SECURITY=${SECURITY:-keys}

NODE_NS=cirro-node-$$
BACKEND_NS=cirro-backend-$$
INTERFACE=wire
VOLUME=demo
# Files of the run: made in rig_up.
WORK='' RAW='' REPORT='' DISK_MIB=''
NODE_PID='' BACKEND_PID='' GUEST_PID=''
NODE_KEYS=() BACKEND_KEYS=()
# More arguments for run-guest.sh.
GUEST_OPTIONS=()

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

# start_daemon NAME NAMESPACE ARGUMENTS...: leaves the process id in STARTED_PID. What it prints is added to its log.
start_daemon() {
  local name=$1 ns=$2
  [[ -x $BIN_DIR/$name ]] || die "there is no $BIN_DIR/$name: run cargo build --release first"
  ip netns exec "$ns" "$BIN_DIR/$name" "${@:3}" --link "$INTERFACE" --security "$SECURITY" >>"$WORK/$name.log" 2>&1 &
  STARTED_PID=$!
}

# make_keys: one for each daemon, and their options; none where security is none.
make_keys() {
  local node backend
  [[ $SECURITY == keys ]] || return 0
  [[ -e $WORK/node.key ]] || "$BIN_DIR/cirroctl" key new "$WORK/node.key" >/dev/null
  [[ -e $WORK/backend.key ]] || "$BIN_DIR/cirroctl" key new "$WORK/backend.key" >/dev/null
  node=$("$BIN_DIR/cirroctl" key show "$WORK/node.key")
  backend=$("$BIN_DIR/cirroctl" key show "$WORK/backend.key")
  NODE_KEYS=(--key "$WORK/node.key" --grant "$VOLUME=$backend")
  BACKEND_KEYS=(--key "$WORK/backend.key" --node-key "$node")
}

start_node() {
  make_keys
  start_daemon cirro-node "$NODE_NS" "${NODE_KEYS[@]}" --volume "$VOLUME=$RAW$VOLUME_OPTIONS" --state-dir "$WORK/node" --ctl-socket "$WORK/node.ctl"
  NODE_PID=$STARTED_PID
}

start_backend() {
  local run_dir=()
  # A daemon without the record of what is in flight knows no such option.
  ! "$BIN_DIR/cirro-backend" --help | grep -q -- --run-dir || run_dir=(--run-dir "$WORK/run")
  start_daemon cirro-backend "$BACKEND_NS" "${BACKEND_KEYS[@]}" --socket-path "$WORK/disk.sock" --volume "$VOLUME" --queues "${QUEUES:-$VCPUS}" \
    --state-dir "$WORK/backend" --ctl-socket "$WORK/backend.ctl" "${run_dir[@]}" "${BACKEND_OPTIONS[@]}"
  BACKEND_PID=$STARTED_PID
}

# end_daemons: whichever processes are the daemons then.
end_daemons() {
  local pid
  for pid in $BACKEND_PID $NODE_PID; do stop_process "$pid"; done
}

start_daemons() {
  undo end_daemons
  start_node
  wait_for_socket "$WORK/node.ctl" "$NODE_PID" 15 || daemon_failed cirro-node "did not open its control socket within 15 s"
  start_backend
  wait_for_socket "$WORK/disk.sock" "$BACKEND_PID" 15 || daemon_failed cirro-backend "did not open its socket within 15 s"
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

# start_guest SCRIPT [NAME=VALUE]...: boots it beside this shell, which goes on, so that a signal ends the run at once. What it
# reports comes into REPORT.
start_guest() {
  : >"$REPORT"
  "$QEMU_DIR/run-guest.sh" --socket "$WORK/disk.sock" --netns "$BACKEND_NS" --vcpus "$VCPUS" --queues "${QUEUES:-$VCPUS}" \
    --timeout "$GUEST_TIMEOUT_S" --console "$WORK/console.log" "${GUEST_OPTIONS[@]}" "$@" >"$REPORT" 2>"$WORK/qemu.log" &
  GUEST_PID=$!
  undo stop_process "$GUEST_PID"
}

# guest_ended: waits for the guest, and fails with what it said if it did.
guest_ended() {
  local status=0
  wait "$GUEST_PID" || status=$?
  ((status == 0)) && return
  cat "$WORK/qemu.log" >&2
  show_tail "the guest's console" "$WORK/console.log"
  show_tail cirro-node "$WORK/cirro-node.log"
  show_tail cirro-backend "$WORK/cirro-backend.log"
  ((status != 124)) || die "the guest was not done after $GUEST_TIMEOUT_S s"
  die "the guest's work on the disk failed ($(sed -n 's/^failed //p' "$REPORT"), exit $status)"
}

# run_disk_work: the guest does guest/disk-work.sh, while both daemons live.
run_disk_work() {
  local progress_pid
  start_guest "$QEMU_DIR/guest/disk-work.sh" FS_MIB="$FS_MIB" HOLE_MIB="$HOLE_MIB" FIO_MIB="$FIO_MIB" JOBS="$VCPUS" TREE="$TREE"
  tail -s 0.1 --pid="$GUEST_PID" -n +1 -f "$REPORT" | show_progress &
  progress_pid=$!
  while runs "$GUEST_PID" && runs "$NODE_PID" && runs "$BACKEND_PID"; do sleep 0.2; done
  runs "$NODE_PID" || daemon_failed cirro-node "ended while the guest was at work"
  runs "$BACKEND_PID" || daemon_failed cirro-backend "ended while the guest was at work"
  wait "$progress_pid" || true
  guest_ended
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

# check_file_system: e2fsck finds nothing in the node's raw file.
check_file_system() {
  e2fsck -f -n "$RAW" >"$WORK/e2fsck.log" 2>&1 || {
    show_tail "e2fsck -f -n $RAW" "$WORK/e2fsck.log"
    die "the node's file holds no clean ext4"
  }
}

# check_volume: the node's raw file, read by nobody's code but e2fsprogs, holds what the guest wrote.
check_volume() {
  local from_byte=$((FS_MIB << 20)) area_bytes=$((2 * HOLE_MIB << 20))
  check_file_system
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
