#!/usr/bin/env bash
# Everything that QEMU and a guest's kernel can do to a disk, done under loads that verify themselves: resets, stops, hot-plug, migration, snapshots, modes.
#
# Each case is a function `case_NAME` below and prints `test actions::NAME ... ok`. Cases share a guest as long as they want the same one, and end
# with the same questions: is every block there that the disk answered for, does the guest's kernel complain, do both daemons live and log no error?
# When a guest ends, e2fsck looks at the node's file. The guest's half is guest/actions-work.sh: it does what `word` says. Knows QEMU by
# QMP over a pipe, and the daemons by their command lines, logs and `cirroctl stats`. Called by run-suites.sh with --quick.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=qemu/rig.sh
source "$QEMU_DIR/rig.sh"

USAGE="usage: actions-test.sh [--only NAME,...] [--quick] [--list] [--bin-dir DIR] [--keep]"
# In the order in which they are run: neighbours share a guest.
CASES=(serial write_cache stop_and_cont stop_without_node reboot system_reset unbind_and_rebind pci_remove_and_rescan device_del_and_add memory_hotplug
  memory_512M memory_4G queues_1 queues_2 queues_4 queues_8 queues_16 queue_size_2 queue_size_4 queue_size_64 queue_size_128 queue_size_256 queue_size_1024
  read_only_volume read_only_backend migrate_to_file migrate_to_another_backend savevm_and_loadvm)
QUICK=(stop_and_cont reboot system_reset unbind_and_rebind device_del_and_add memory_hotplug)
WANTED=()
NUMBERS_MIB=64
SERIAL=VM1-0123456789abcdef
# What a guest may take for one word, on a machine that others use too.
WORD_S_MAX=120
# Blocks 0 to ACKED - 1 were answered for, in this guest or one before it on the same volume.
ACKED=0
# The guest that runs, and how many words guests and monitors were told so far.
GUEST_KIND='' WORDS=0 QMP_CALLS=0

parse() {
  local option
  WANTED=("${CASES[@]}")
  while (($#)); do
    option=$1
    shift
    case $option in
      --help) say "$USAGE" && exit 0 ;;
      --list) printf '%s\n' "${CASES[@]}" && exit 0 ;;
      --quick) WANTED=("${QUICK[@]}") && continue ;;
      --keep) KEEP=yes && continue ;;
      --only) IFS=, read -ra WANTED <<<"${1:-}" ;;
      --bin-dir) need_directory "$option" "${1:-}" && BIN_DIR=$(realpath "$1") ;;
      *) say "$USAGE" >&2 && exit 2 ;;
    esac
    shift
  done
  BIN_DIR=${BIN_DIR:-${CARGO_TARGET_DIR:-$QEMU_DIR/../target}/release}
  for option in "${WANTED[@]}"; do
    declare -F "case_$option" >/dev/null || die "there is no case $option: see --list"
  done
}

# --- the guest and its monitor

# reported PATTERN: how many lines of the guest's report match as a whole.
reported() { grep -cxE "$1" "$REPORT" || true; }

# wait_until SECONDS WHAT COMMAND...: until the command is true, while everybody lives.
wait_until() {
  local deadline_s=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    runs "$GUEST_PID" || { guest_ended && die "the guest ended while it was to $what"; }
    runs "$NODE_PID" || daemon_failed cirro-node "ended by itself, while the guest was to $what"
    runs "$BACKEND_PID" || daemon_failed cirro-backend "ended by itself, while the guest was to $what"
    ((SECONDS < deadline_s)) || gave_up "$what"
    sleep 0.05
  done
}

gave_up() {
  KEEP=yes
  "$BIN_DIR/cirroctl" status --ctl-socket "$WORK/backend.ctl" >&2 || true
  show_tail cirro-node "$WORK/cirro-node.log"
  show_tail cirro-backend "$WORK/cirro-backend.log"
  show_tail QEMU "$WORK/qemu.log"
  show_tail "the guest's console" "$WORK/console.log"
  die "no end of \"$1\"; everything is kept in $WORK"
}

reported_more() { (($(reported "$1") > $2)); }

# hint COMMAND...: tells the guest, and waits for nothing.
hint() {
  WORDS=$((WORDS + 1))
  echo "$WORDS $*" >&"$WORD_IN"
}

# word COMMAND...: the guest does it, and has done it.
word() {
  hint "$@"
  wait_until "$WORD_S_MAX" "$*" reported_more "done $WORDS" 0
}

answered() { grep -q "\"id\": $1[,}]" "$WORK/qmp.log"; }

# qmp COMMAND [ARGUMENTS]: what QEMU answers, in ANSWER; an error of it is ours.
qmp() {
  QMP_CALLS=$((QMP_CALLS + 1))
  echo "{\"execute\": \"$1\", \"arguments\": ${2:-{\}}, \"id\": $QMP_CALLS}" >&"$QMP_IN"
  wait_until 60 "answer $1" answered "$QMP_CALLS"
  ANSWER=$(grep "\"id\": ${QMP_CALLS}[,}]" "$WORK/qmp.log")
  [[ $ANSWER != *'"error":'* ]] || die "QEMU refuses $1: $ANSWER"
}

# happened EVENT COUNT: QEMU has told of more such events.
happened() { (($(grep -c "\"event\": \"$1\"" "$WORK/qmp.log" || true) > $2)); }

events() { grep -c "\"event\": \"$1\"" "$WORK/qmp.log" || true; }

open_pipes() {
  mkfifo "$WORK"/{word,qmp}.{in,out}
  exec {WORD_IN}<>"$WORK/word.in" {QMP_IN}<>"$WORK/qmp.in" {QMP_OUT}<>"$WORK/qmp.out"
  : >"$WORK/qmp.log"
  cat <&"$QMP_OUT" >>"$WORK/qmp.log" &
  undo stop_process $!
}

# start_machine [OPTION]...: run-guest.sh with these and what all cases want.
start_machine() {
  : >"$WORK/console.log"
  GUEST_OPTIONS=(--input "$WORK/word" --monitor "$WORK/qmp" --with -action --with reboot=reset "$@")
  start_guest "$QEMU_DIR/guest/actions-work.sh" FS_MIB="$FS_MIB" NUMBERS_MIB="$NUMBERS_MIB" FIO_MIB="$FIO_MIB" "${GUEST_VARIABLES[@]}"
  qmp qmp_capabilities
}

# begin_guest [OPTION]...: a guest that is ready for words.
begin_guest() {
  start_machine "$@"
  wait_until 120 boot reported_more ready 0
}

# end_guest: it unmounts and ends, and what it leaves is whole.
end_guest() {
  [[ -n $GUEST_KIND ]] || return 0
  word unmount_files
  hint exit
  guest_ended
  GUEST_KIND=''
  check_file_system
}

# own_guest MEMORY_MIB QUEUES DISK_OPTIONS: a guest of its own, with as many processors as queues.
own_guest() {
  end_guest
  VCPUS=$2 QUEUES=$2
  begin_guest --memory "$1" --disk-options "$3"
  VCPUS=2 QUEUES=2
  word make_files
  word mount_files
  GUEST_KIND=own
}

# the_guest: the one that most cases share, with its file system mounted: a disk that can be pulled, and places for more memory.
the_guest() {
  [[ $GUEST_KIND != common ]] || return 0
  end_guest
  begin_guest "${COMMON_OPTIONS[@]}" --disk-options "$DISK"
  word make_files
  word mount_files
  GUEST_KIND=common
}
GUEST_VARIABLES=()
DISK=bus=bay,id=disk
# More of it, known once there is a directory: the second disk is where savevm puts the machine.
COMMON_OPTIONS=()

# --- loads and what has to be true after them

note_acked() {
  local last
  last=$(sed -n 's/^acked //p' "$REPORT" | tail -n 1)
  ((${last:--1} < ACKED)) || ACKED=$((last + 1))
}

# work_on: the loads go on, undisturbed, for some blocks more.
work_on() {
  wait_until 60 "work on" reported_more 'acked [0-9]+' $(($(reported 'acked [0-9]+') + 10))
}

# load KIND: `files` on the mounted file system, `disk` on the disk itself; it is well under way when this returns.
load() {
  word "load_$1" "$ACKED"
  work_on
}

end_load() {
  word end_load
  note_acked
}

# passed NAME: the questions at the end of every case.
passed() {
  local log
  note_acked
  ((ACKED > 0)) || die "the disk answered for no block"
  if [[ -n $GUEST_KIND ]]; then
    word check_numbers "$ACKED"
    word kernel_has_no_complaint
  fi
  for log in cirro-node cirro-backend; do
    if grep -E ' ERROR |panicked' "$WORK/$log.log" >&2; then die "$log logged an error"; fi
  done
  say "test actions::$1 ... ok"
}

# --- the cases

case_serial() {
  the_guest
  load files
  word is serial "$SERIAL"
  end_load
}

case_write_cache() {
  the_guest
  load files
  word is queue/write_cache write back
  word cache through
  word is queue/write_cache write through
  work_on
  word cache back
  work_on
  end_load
}

case_stop_and_cont() {
  local turn
  the_guest
  load files
  for turn in 0.1 1; do
    qmp stop
    sleep "$turn"
    qmp cont
    work_on
  done
  end_load
}

# The disk goes away under loads on the disk itself, by the words given, and comes back: the loads fail, and nothing else.
taken_away() {
  word unmount_files
  load disk
  "$@"
  word lose_load
  word forget_complaints
  note_acked
}

given_back() {
  word await_disk
  word check_numbers "$ACKED"
  word mount_files
  load files
  end_load
}

case_unbind_and_rebind() {
  the_guest
  taken_away word unbind
  word bind
  given_back
}

case_pci_remove_and_rescan() {
  the_guest
  taken_away word remove
  word rescan
  given_back
}

pull_disk() {
  local before
  before=$(events DEVICE_DELETED)
  qmp device_del '{"id": "disk"}'
  wait_until 60 "give its disk up" happened DEVICE_DELETED "$before"
}

case_device_del_and_add() {
  the_guest
  taken_away pull_disk
  word await_no_disk
  qmp device_add '{"driver": "vhost-user-blk-pci", "chardev": "disk", "bus": "bay", "id": "disk", "num-queues": 2}'
  given_back
}

# Memory comes and goes while the guest works, and the data of its requests lies in it.
case_memory_hotplug() {
  local before
  the_guest
  load files
  qmp object-add '{"qom-type": "memory-backend-memfd", "id": "more", "size": 268435456, "share": true}'
  qmp device_add '{"driver": "pc-dimm", "id": "dimm", "memdev": "more"}'
  word online_memory 2
  work_on
  end_load
  load files
  word data_is_in_movable_memory
  before=$(events DEVICE_DELETED)
  qmp device_del '{"id": "dimm"}'
  wait_until 60 "give the memory up" happened DEVICE_DELETED "$before"
  qmp object-del '{"id": "more"}'
  work_on
  end_load
}

# again: the guest begins anew, as it was told to.
again() {
  wait_until 120 "boot again" reported_more ready "$1"
  note_acked
}

case_reboot() {
  local before
  the_guest
  load files
  before=$(reported ready)
  hint reboot_now
  again "$before"
  word check_numbers "$ACKED"
  word mount_files
  load files
  end_load
}

case_system_reset() {
  local before
  the_guest
  load files
  before=$(reported ready)
  qmp system_reset
  again "$before"
  word check_numbers "$ACKED"
  word mount_files
  load files
  end_load
}

# Stopped while the node is away, the rings are given up with requests in flight; those are issued again.
case_stop_without_node() {
  the_guest
  load files
  kill -KILL "$NODE_PID"
  wait "$NODE_PID" 2>/dev/null || true
  start_node
  kill -STOP "$NODE_PID"
  sleep 0.5
  qmp stop
  sleep 1
  qmp cont
  sleep 0.5
  kill -CONT "$NODE_PID"
  work_on
  end_load
}

migrated() {
  qmp query-migrate
  [[ $ANSWER != *'"status": "failed"'* ]] || die "QEMU's migration failed: $ANSWER"
  [[ $ANSWER == *'"status": "completed"'* ]]
}

# to_file_and_back [COMMAND]...: the guest goes into a file under load, and comes out of it in another QEMU; the command is run between the two.
to_file_and_back() {
  the_guest
  load files
  qmp migrate "{\"uri\": \"exec:cat >$WORK/machine\"}"
  wait_until 120 "go into a file" migrated
  note_acked
  qmp quit
  wait "$GUEST_PID" 2>/dev/null || true
  "$@"
  start_machine "${COMMON_OPTIONS[@]}" --disk-options "$DISK" --with -incoming --with "exec:cat $WORK/machine"
  work_on
  end_load
  rm "$WORK/machine"
}

kill_backend() {
  kill -KILL "$BACKEND_PID"
  wait "$BACKEND_PID" 2>/dev/null || true
  rm -f "$WORK/disk.sock"
  QUEUES=16 start_backend
  wait_for_socket "$WORK/disk.sock" "$BACKEND_PID" 15 || daemon_failed cirro-backend "did not open its socket within 15 s"
}

case_migrate_to_file() { to_file_and_back true; }
case_migrate_to_another_backend() { to_file_and_back kill_backend; }

# hmp COMMAND: one of the human monitor, which says nothing when it has done it.
hmp() {
  qmp human-monitor-command "{\"command-line\": \"$1\"}"
  [[ $ANSWER == *'"return": ""'* ]] || die "QEMU refuses $1: $ANSWER"
}

# The guest goes back in time and its disk does not, so nothing of the disk may be in the guest's memory: no file system is mounted, and the load is one
# that writes the same bytes again.
case_savevm_and_loadvm() {
  local once
  the_guest
  word unmount_files
  word load_numbers "$ACKED"
  work_on
  hmp 'savevm once'
  once=$(reported 'acked [0-9]+')
  work_on
  note_acked
  hmp 'loadvm once'
  work_on
  (($(reported 'acked [0-9]+') > once)) || die "the guest did not go on after loadvm"
  end_load
  word check_numbers "$ACKED"
  word mount_files
}

# plain_work: loads that go well, on a guest of its own.
plain_work() {
  load files
  end_load
}

case_memory_512M() {
  own_guest 512 2 queue-size=128
  plain_work
}

# Above 2.75 GiB q35 puts what is over 2 GiB behind a hole that ends at 4 GiB: two regions. Rings and heads of requests are the kernel's and lie below, the
# programs' buffers above.
case_memory_4G() {
  GUEST_VARIABLES=(movablecore=2G)
  own_guest 4096 2 queue-size=128
  GUEST_VARIABLES=()
  load files
  word data_is_in_movable_memory
  end_load
}

with_queues() {
  own_guest 1024 "$1" queue-size=128
  word has_queues "$1"
  plain_work
}

case_queues_1() { with_queues 1; }
case_queues_2() { with_queues 2; }
case_queues_4() { with_queues 4; }
case_queues_8() { with_queues 8; }
case_queues_16() { with_queues 16; }

with_queue_size() {
  own_guest 768 2 "queue-size=$1"
  word holds_requests "$1"
  plain_work
}

case_queue_size_2() { with_queue_size 2; }
case_queue_size_4() { with_queue_size 4; }
case_queue_size_64() { with_queue_size 64; }
case_queue_size_128() { with_queue_size 128; }
case_queue_size_256() { with_queue_size 256; }
case_queue_size_1024() { with_queue_size 1024; }

# other_daemons VOLUME_OPTIONS [BACKEND_OPTION]...: the daemons anew, as they are to be.
other_daemons() {
  end_guest
  end_daemons
  VOLUME_OPTIONS=$1
  BACKEND_OPTIONS=("${@:2}")
  rm -f "$WORK/disk.sock" "$WORK/node.ctl"
  start_node
  wait_for_socket "$WORK/node.ctl" "$NODE_PID" 15 || daemon_failed cirro-node "did not open its control socket within 15 s"
  QUEUES=16 start_backend
  wait_for_socket "$WORK/disk.sock" "$BACKEND_PID" 15 || daemon_failed cirro-backend "did not open its socket within 15 s"
}

# refuses_writes VOLUME_OPTIONS BACKEND_OPTION...: the guest sees a disk that it cannot write, reads it, and not a byte of the file changes.
refuses_writes() {
  local before
  if ((ACKED == 0)); then
    the_guest
    plain_work
  fi
  other_daemons "$@"
  before=$(sha256sum "$RAW")
  begin_guest
  GUEST_KIND=reader
  word is ro 1
  word cannot_be_written
  word mount_read_only
  word check_numbers "$ACKED"
  word read_all
  word kernel_has_no_complaint
  end_guest
  [[ $(sha256sum "$RAW") == "$before" ]] || die "a disk that is read-only was changed"
  other_daemons ",serial=$SERIAL" --queue-size 1024
}

case_read_only_volume() { refuses_writes ",ro" --read-only; }
case_read_only_backend() { refuses_writes "" --read-only; }

main() {
  local started_s=$SECONDS name
  parse "$@"
  need_root
  undo_on_exit
  FS_MIB=64 HOLE_MIB=0 FIO_MIB=4 GUEST_TIMEOUT_S=900 VOLUME_OPTIONS=",serial=$SERIAL"
  "$QEMU_DIR/install.sh"
  "$QEMU_DIR/guest-image.sh"
  rig_up
  truncate -s "$((FS_MIB + NUMBERS_MIB + FIO_MIB))M" "$RAW"
  open_pipes
  qemu-img create -q -f qcow2 "$WORK/snapshots.qcow2" 1M
  COMMON_OPTIONS=(--with -device --with "pcie-root-port,id=bay,chassis=1" --with -m --with "slots=2,maxmem=4G"
    --with -drive --with "if=none,id=snapshots,format=qcow2,file=$WORK/snapshots.qcow2")
  BACKEND_OPTIONS=(--queue-size 1024)
  QUEUES=16 start_daemons
  for name in "${WANTED[@]}"; do
    "case_$name"
    passed "$name"
  done
  end_guest
  stop_daemons
  say "${#WANTED[@]} actions in $((SECONDS - started_s)) s"
}

main "$@"
