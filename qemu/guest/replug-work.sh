# shellcheck shell=sh
# What the guest does after disk-work.sh when the host takes the disk out of the running machine and puts it in again: what was
# written before is there, and the disk takes new work.
#
# It follows disk-work.sh in the same shell, whose functions it uses. It reports `unplug` when the disk may go, and `gone`.

# wait_for WHAT COMMAND...: until the command succeeds, 30 seconds at most.
wait_for() {
  # shellcheck disable=SC2034 # disk-work.sh says it at a failure.
  what=$1
  shift
  tries=0
  until "$@"; do
    tries=$((tries + 1))
    [ $tries -lt 300 ]
    sleep 0.1
  done
}

disk_is_gone() { [ ! -e "$DISK" ]; }

report unplug
wait_for "the disk goes" disk_is_gone
report gone
wait_for "the disk comes" test -b "$DISK"
step "checksum again, after the disk was out" check_again
step "fio after the disk was out, verify=crc32c" verify fio-replugged 4k
