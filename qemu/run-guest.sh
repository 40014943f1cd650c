#!/usr/bin/env bash
# Boots a guest of guest-image.sh, has it run one script, and exits with that script's exit code.
#
# The disk is a vhost-user-blk device on the socket of a back-end that is already there; without --socket the guest has
# no disk. With --wire it has a network interface that leads to one other guest, by a socket that the first of the two makes. What
# the script reports (see README.md) goes to standard output as it comes, the guest's console to a file.
# Exit codes of its own: 124 the time was up, 125 the guest ended without a word, 2 usage. It knows nothing of the network
# behind the back-end. Called by demo.sh, guest-test.sh and others, and by hand.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

USAGE="usage: run-guest.sh [--socket PATH] [--netns NAME] [--vcpus N] [--queues N] [--memory MIB] [--timeout SECONDS]
                    [--console FILE] [--input PIPE] [--monitor PIPE] [--disk-options KEY=VALUE,...] [--with QEMU_ARGUMENT]...
                    [--accel kvm|tcg] [--image NAME] [--overlay CPIO] [--wire SOCKET] [--mac MAC] [--mtu N] SCRIPT [NAME=VALUE]..."
SOCKET='' NETNS='' VCPUS=2 QUEUES='' MEMORY_MIB=768 TIMEOUT_S=120 CONSOLE='' INPUT='' MONITOR='' DISK_OPTIONS='' ACCEL=''
IMAGE=guest OVERLAY='' WIRE='' MAC=52:54:00:00:00:01 MTU=9000
SCRIPT='' VARIABLES=() WITH=()
QEMU=${QEMU:-qemu-system-x86_64}

usage_error() {
  say "$USAGE" >&2
  exit 2
}

parse() {
  while [[ ${1:-} == --* ]]; do
    [[ $1 != --help ]] || { say "$USAGE" && exit 0; }
    (($# > 1)) || usage_error
    case $1 in
      --socket) SOCKET=$2 ;;
      --netns) NETNS=$2 ;;
      --vcpus) VCPUS=$2 ;;
      --queues) QUEUES=$2 ;;
      --memory) MEMORY_MIB=$2 ;;
      --timeout) TIMEOUT_S=$2 ;;
      --console) CONSOLE=$2 ;;
      --input) INPUT=$2 ;;
      --monitor) MONITOR=$2 ;;
      --disk-options) DISK_OPTIONS=,$2 ;;
      --with) WITH+=("$2") ;;
      --accel) ACCEL=$2 ;;
      --image) IMAGE=$2 ;;
      --overlay) OVERLAY=$2 ;;
      --wire) WIRE=$2 ;;
      --mac) MAC=$2 ;;
      --mtu) MTU=$2 ;;
      *) usage_error ;;
    esac
    shift 2
  done
  (($#)) || usage_error
  SCRIPT=$1
  VARIABLES=("${@:2}")
  QUEUES=${QUEUES:-$VCPUS}
  GUEST_DIR=$CACHE_DIR/$IMAGE
}

# kvm_boots: true when /dev/kvm carries this very guest. Some flavours exist and cannot, so it is tried, once per boot
# of this machine.
kvm_boots() {
  local answer
  answer=$CACHE_DIR/kvm-$(cat /proc/sys/kernel/random/boot_id)-$(sha256sum "$GUEST_DIR/stamp" | cut -c 1-12)
  [[ -w /dev/kvm ]] || return 1
  if [[ ! -f $answer ]]; then
    rm -f "$CACHE_DIR"/kvm-*
    if "${BASH_SOURCE[0]}" --accel kvm --vcpus 1 --timeout 10 /dev/null >/dev/null 2>&1; then
      echo yes >"$answer"
    else
      echo no >"$answer"
    fi
  fi
  [[ $(cat "$answer") == yes ]]
}

# qemu_arguments WORK_DIR: fills ARGUMENTS. The kernel's check of its timer panics when a busy machine lets an emulated processor wait. Old QEMU counts a chardev's reconnection in seconds, new QEMU in milliseconds.
qemu_arguments() {
  local cpu=max reconnect="reconnect=1"
  [[ $ACCEL == kvm ]] && cpu=host
  [[ $("$QEMU" -chardev socket,help 2>&1) == *reconnect-ms* ]] && reconnect="reconnect-ms=200"
  # shellcheck disable=SC2054 # The commas are QEMU's.
  ARGUMENTS=(
    -name cirro-guest -nodefaults -no-user-config -display none -no-reboot
    -machine q35,memory-backend=ram -accel "$ACCEL" -cpu "$cpu" -smp "$VCPUS" -m "$MEMORY_MIB"
    -object "memory-backend-memfd,id=ram,size=${MEMORY_MIB}M,share=on"
    -kernel "$GUEST_DIR/vmlinux" -initrd "$INITRAMFS"
    -append "console=ttyS0 panic=-1 quiet no_timer_check ${VARIABLES[*]}"
    -fw_cfg "name=opt/cirro/script,file=$1/script"
    -serial "file:$CONSOLE" -serial "file:$1/report"
  )
  # What is written into INPUT.in comes out of the guest's third serial port; INPUT.out has to be there too.
  [[ -z $INPUT ]] || ARGUMENTS+=(-serial "pipe:$INPUT")
  # QMP: commands into MONITOR.in, answers and events out of MONITOR.out.
  [[ -z $MONITOR ]] || ARGUMENTS+=(-chardev "pipe,id=monitor,path=$MONITOR" -mon "chardev=monitor,mode=control")
  ARGUMENTS+=("${WITH[@]}")
  [[ -z $SOCKET ]] || ARGUMENTS+=(
    -chardev "socket,id=disk,path=$SOCKET,$reconnect"
    -device "vhost-user-blk-pci,chardev=disk,num-queues=$QUEUES$DISK_OPTIONS"
  )
  [[ -z $WIRE ]] || wire_arguments
}

# wire_arguments: adds an interface. A stream between two sockets loses nothing and knows no offloads: what the guests' kernels send
# is cut into frames before.
wire_arguments() {
  local server=on
  [[ ! -S $WIRE ]] || server=off
  ARGUMENTS+=(
    -netdev "stream,id=wire,server=$server,addr.type=unix,addr.path=$WIRE"
    -device "virtio-net-pci,netdev=wire,mac=$MAC,host_mtu=$MTU"
  )
}

# boot WORK_DIR: runs QEMU to its end or to the end of the time; 124 for the latter. The report is shown as it grows.
boot() {
  local prefix=() qemu_pid show_pid status=0 deadline_s
  [[ -z $NETNS ]] || prefix=(ip netns exec "$NETNS")
  "${prefix[@]}" "$QEMU" "${ARGUMENTS[@]}" </dev/null >"$1/qemu.log" 2>&1 &
  qemu_pid=$!
  undo stop_process "$qemu_pid"
  tail -s 0.1 --pid="$qemu_pid" -n +1 -f "$1/report" | grep --line-buffered -v '^exit ' &
  show_pid=$!
  undo stop_process "$show_pid"
  deadline_s=$((SECONDS + TIMEOUT_S))
  while runs "$qemu_pid" && ((SECONDS < deadline_s)); do sleep 0.1; done
  if runs "$qemu_pid"; then
    stop_process "$qemu_pid" || true
    wait "$show_pid" || true
    return 124
  fi
  wait "$qemu_pid" || status=$?
  wait "$show_pid" || true
  if ((status != 0)); then
    cat "$1/qemu.log" >&2
    return 125
  fi
}

main() {
  local work status=0
  parse "$@"
  undo_on_exit
  [[ -f $GUEST_DIR/stamp ]] || die "there is no image $IMAGE: run qemu/guest-image.sh"
  command -v "$QEMU" >/dev/null || die "$QEMU is missing: run qemu/install.sh"
  [[ -r $SCRIPT ]] || die "cannot read the guest's script $SCRIPT"
  if [[ -z $ACCEL ]]; then
    ACCEL=tcg
    ! kvm_boots || ACCEL=kvm
  fi
  work=$(mktemp -d)
  undo rm -rf "$work"
  CONSOLE=${CONSOLE:-$work/console}
  : >"$work/report"
  # A file of fw_cfg may not be empty.
  { cat "$SCRIPT"; echo; } >"$work/script"
  INITRAMFS=$GUEST_DIR/initramfs.cpio
  # The kernel unpacks one archive after another.
  [[ -z $OVERLAY ]] || { INITRAMFS=$work/initramfs.cpio && cat "$GUEST_DIR/initramfs.cpio" "$OVERLAY" >"$INITRAMFS"; }
  qemu_arguments "$work"
  say "accel $ACCEL"
  boot "$work" || status=$?
  ((status == 0)) || exit "$status"
  status=$(awk '$1 == "exit" { print $2 }' "$work/report")
  exit "${status:-125}"
}

main "$@"
