# shellcheck shell=bash
# Functions that every script in this directory shares: messages, a stack of things to undo, processes and waiting.
#
# It is sourced, never run, and knows nothing of disks or networks: rig.sh has those. The script that sources it has
# set -euo pipefail and calls undo_on_exit before it makes anything.

QEMU_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE_DIR=$QEMU_DIR/.cache
# Used by the scripts that source this file.
# shellcheck disable=SC2034
GUEST_DIR=$CACHE_DIR/guest
UNDO=()

say() { printf '%s\n' "$*"; }

# die WHAT FAILED, ON WHAT, AND WHAT TO DO
die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# undo COMMAND [ARGUMENT]...: run at exit, the last one first, whatever happened; its failure is not ours.
undo() { UNDO+=("$(printf '%q ' "$@")"); }

undo_all() {
  local status=$? i
  trap '' INT TERM HUP
  for ((i = ${#UNDO[@]} - 1; i >= 0; i--)); do
    eval "${UNDO[i]}" >/dev/null 2>&1 || true
  done
  UNDO=()
  exit "$status"
}

undo_on_exit() {
  trap undo_all EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

# runs PID: true while that child has not ended (a zombie has).
runs() {
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  [[ ${stat##*) } != Z* ]]
}

# stop_process PID: ask, wait five seconds, insist; gives back what the process exited with.
stop_process() {
  local pid=$1 i
  kill "$pid" 2>/dev/null || true
  for ((i = 0; i < 50; i++)); do
    runs "$pid" || break
    sleep 0.1
  done
  if runs "$pid"; then
    kill -KILL "$pid" 2>/dev/null || true
  fi
  wait "$pid" 2>/dev/null
}

# show_tail NAME FILE: the last lines of a log, for a person who has to find out why.
show_tail() {
  printf -- '--- last lines of %s ---\n' "$1" >&2
  tail -n 15 "$2" >&2 || true
}

# wait_for_socket PATH PID SECONDS: 0 when the unix socket is there, 1 when its process ended or the time is up.
wait_for_socket() {
  local i
  for ((i = 0; i < $3 * 20; i++)); do
    [[ -S $1 ]] && return 0
    runs "$2" || return 1
    sleep 0.05
  done
  return 1
}

need_root() {
  ((EUID == 0)) || die "needs root, for network namespaces and raw sockets: run it again with sudo"
}

need_number() {
  [[ $2 =~ ^[0-9]+$ ]] || die "$1 wants a whole number, not \"$2\""
}

need_directory() {
  [[ -d $2 ]] || die "$1 wants a directory, not \"$2\""
}
