#!/usr/bin/env bash
# A guest that libvirt starts from libvirt/domain.xml works on the disk, while the backend is killed and started again under it,
# and the disk is detached and attached.
#
# libvirtd is a real one, started here in namespaces of its own (mounts, processes, network), with the directories it uses replaced by
# those of the run: it sees nothing of the machine's libvirt, and ends with the run. Of domain.xml only that is replaced that a test cannot
# have: KVM, the socket's path, and what the machine boots and prints to. The daemons are expected as guest-test.sh has it. Prints what was
# done and a line `test NAME ... ok`. Called by run-suites.sh.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=qemu/rig.sh
source "$QEMU_DIR/rig.sh"

USAGE="usage: libvirt-test.sh [--bin-dir DIR] [--verbose] [--keep]"
VERBOSE=''
PACKAGES=(libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients)
DOMAIN=vm1
# The machine's description, a file with its disk alone, and when it must be done.
XML='' DISK_XML='' DEADLINE_S=''
LIBVIRTD_PID='' PROGRESS_PID=''

parse() {
  local option
  while (($#)); do
    option=$1
    shift
    case $option in
      --help) say "$USAGE" && exit 0 ;;
      --verbose) VERBOSE=yes ;;
      --keep) KEEP=yes ;;
      --bin-dir)
        need_directory "$option" "${1:-}"
        BIN_DIR=$(realpath "$1")
        shift
        ;;
      *) say "$USAGE" >&2 && exit 2 ;;
    esac
  done
  BIN_DIR=${BIN_DIR:-${CARGO_TARGET_DIR:-$QEMU_DIR/../target}/release}
}

virsh() { timeout 30 virsh -q -c "qemu+unix:///system?socket=$WORK/libvirt/run/libvirt/libvirt-sock" "$@"; }

# start_libvirtd: in the backend's host. The first process of its namespace is a shell, which takes in the machines when they end; killed, it takes
# all others with it.
start_libvirtd() {
  local root=$WORK/libvirt
  mkdir -p "$root"/{etc,run,lib,cache,log}
  printf '%s\n' 'auth_unix_rw = "none"' 'auth_unix_ro = "none"' >"$root/etc/libvirtd.conf"
  # No change to control groups, owners or /dev of the machine; what QEMU prints goes to a file, not to another daemon.
  printf '%s\n' 'user = "root"' 'group = "root"' 'security_driver = "none"' 'dynamic_ownership = 0' 'remember_owner = 0' \
    'cgroup_controllers = []' 'namespaces = []' 'stdio_handler = "file"' >"$root/etc/qemu.conf"
  # Whom Debian's libvirtd knows QEMU by, even where another is configured; made by a package that also starts libvirtd as a service.
  { cat /etc/passwd && say 'libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin'; } >"$root/passwd"
  { cat /etc/group && say 'libvirt-qemu:x:64055:'; } >"$root/group"
  # shellcheck disable=SC2016 # The words are the inner shell's.
  ip netns exec "$BACKEND_NS" unshare --mount --pid --fork --kill-child --mount-proc bash -euc '
    mount --bind "$1/etc" /etc/libvirt
    for name in passwd group; do mount --bind "$1/$name" "/etc/$name"; done
    for name in lib cache log; do mount --bind "$1/$name" "/var/$name"; done
    mount --bind "$1/run" /run
    libvirtd --config /etc/libvirt/libvirtd.conf &
    wait "$!"' libvirtd "$root" </dev/null >"$WORK/libvirtd.log" 2>&1 &
  LIBVIRTD_PID=$!
  undo kill -KILL "$LIBVIRTD_PID"
  wait_for_socket "$root/run/libvirt/libvirt-sock" "$LIBVIRTD_PID" 15 || daemon_failed libvirtd "did not open its socket within 15 s"
}

# replace FROM TO: in XML, where FROM must be.
replace() {
  [[ $XML == *"$1"* ]] || die "libvirt/domain.xml has no $1, which this test replaces"
  XML=${XML/"$1"/"$2"}
}

# write_domain: domain.xml with the test's own in its places, and its disk alone.
write_domain() {
  cat "$QEMU_DIR/guest/disk-work.sh" "$QEMU_DIR/guest/replug-work.sh" >"$WORK/script"
  XML=$(cat "$QEMU_DIR/libvirt/domain.xml")
  replace "<domain type='kvm'>" "<domain type='qemu'>
  <sysinfo type='fwcfg'><entry name='opt/cirro/script' file='$WORK/script'/></sysinfo>"
  replace "path='/run/cirro/vm1.sock'" "path='$WORK/disk.sock'"
  replace "<boot dev='hd'/>" "<kernel>$GUEST_DIR/vmlinux</kernel><initrd>$GUEST_DIR/initramfs.cpio</initrd>
    <cmdline>console=ttyS0 panic=-1 quiet FS_MIB=$FS_MIB HOLE_MIB=$HOLE_MIB FIO_MIB=$FIO_MIB JOBS=$VCPUS TREE=$TREE</cmdline>"
  replace '<on_reboot>restart</on_reboot>' '<on_reboot>destroy</on_reboot>'
  replace "<serial type='pty'/>" "<serial type='file'><source path='$WORK/console.log'/><target port='0'/></serial>
    <serial type='file'><source path='$REPORT'/><target port='1'/></serial>"
  printf '%s\n' "$XML" >"$WORK/domain.xml"
  DISK_XML=$WORK/disk.xml
  sed -n '/<disk /,/<\/disk>/p' "$WORK/domain.xml" >"$DISK_XML"
}

# start_domain: what the guest reports comes into REPORT, as with run-guest.sh.
start_domain() {
  : >"$REPORT"
  virsh define "$WORK/domain.xml" >"$WORK/virsh.log" 2>&1 || machine_failed "is not understood"
  virsh start "$DOMAIN" >>"$WORK/virsh.log" 2>&1 || machine_failed "does not start"
  [[ -n $VERBOSE ]] || return 0
  tail -s 0.1 -n +1 -f "$REPORT" | show_progress &
  PROGRESS_PID=$!
  undo kill "$PROGRESS_PID"
}

machine_failed() {
  show_tail virsh "$WORK/virsh.log"
  show_tail libvirtd "$WORK/libvirtd.log"
  show_tail QEMU "$WORK/libvirt/log/libvirt/qemu/$DOMAIN.log"
  show_tail "the guest's console" "$WORK/console.log"
  show_tail "the guest's report" "$REPORT"
  show_tail cirro-node "$WORK/cirro-node.log"
  show_tail cirro-backend "$WORK/cirro-backend.log"
  die "libvirt's machine $1"
}

is_off() { [[ $(virsh domstate "$DOMAIN" 2>>"$WORK/virsh.log") == 'shut off' ]]; }
reported() { grep -qsE "^($1)\$" "$REPORT"; }
has_no_disk() { [[ -z $(virsh domblklist "$DOMAIN") ]]; }
backend_worked() { "$BIN_DIR/cirroctl" stats --json --ctl-socket "$WORK/backend.ctl" >"$WORK/backend.stats" 2>/dev/null && (($(stat_sum backend requests) > 0)); }

# await WHAT COMMAND...: until the command succeeds; fails when the guest said that it failed, a daemon ended, or time is up.
await() {
  local what=$1
  shift
  until "$@"; do
    ! reported 'failed .*' || machine_failed "failed ($(sed -n 's/^failed //p' "$REPORT")) before this: $what"
    runs "$NODE_PID" || daemon_failed cirro-node "ended by itself"
    runs "$BACKEND_PID" || daemon_failed cirro-backend "ended by itself"
    runs "$LIBVIRTD_PID" || daemon_failed libvirtd "ended by itself"
    ((SECONDS < DEADLINE_S)) || machine_failed "did not come to this in $GUEST_TIMEOUT_S s: $what"
    sleep 0.1
  done
}

# kill_backend: SIGKILL with requests in flight, because the node answers nothing for a while before, and another start; libvirt's QEMU connects
# again and the guest goes on.
kill_backend() {
  kill -STOP "$NODE_PID"
  sleep 0.5
  kill -KILL "$BACKEND_PID"
  wait "$BACKEND_PID" 2>/dev/null || true
  kill -CONT "$NODE_PID"
  start_backend
  await "the guest goes on after a restart of the backend" backend_worked
  say "backend killed and started: the guest goes on"
}

replug() {
  await "the guest is done with the disk" reported unplug
  virsh detach-device "$DOMAIN" "$DISK_XML" --live >>"$WORK/virsh.log" 2>&1 || machine_failed "does not give up its disk"
  await "the guest sees that the disk is gone" reported gone
  await "libvirt sees that the disk is gone" has_no_disk
  virsh attach-device "$DOMAIN" "$DISK_XML" --live >>"$WORK/virsh.log" 2>&1 || machine_failed "does not take its disk back"
  say "disk detached and attached"
}

check_guest() {
  reported 'exit 0' || machine_failed "ended without success"
  ! grep -E 'I/O error|EXT4-fs (error|warning)' "$WORK/console.log" || machine_failed "logged errors of the disk"
  grep -q 'requests are issued again' "$WORK/cirro-backend.log" || die "no request was in flight when the backend was killed: the test showed nothing"
  [[ $(guest_value queues) == "$QUEUES" ]] || die "the guest has $(guest_value queues) queues, not the $QUEUES of libvirt/domain.xml"
}

main() {
  local started_s=$SECONDS
  parse "$@"
  need_root
  undo_on_exit
  VCPUS=4 QUEUES=4 FS_MIB=128 HOLE_MIB=4 FIO_MIB=8 TREE=/usr,/modules GUEST_TIMEOUT_S=180
  "$QEMU_DIR/install.sh" "${PACKAGES[@]}"
  "$QEMU_DIR/guest-image.sh"
  rig_up
  start_daemons
  start_libvirtd
  write_domain
  DEADLINE_S=$((SECONDS + GUEST_TIMEOUT_S))
  start_domain
  await "the guest copies files" reported 'step .* mount'
  kill_backend
  await "the guest writes at random" reported 'step .* discard and write zeroes'
  kill_backend
  replug
  await "the guest powers off" is_off
  check_guest
  stop_daemons
  check_volume
  say "$(guest_value tree-files) files and $((3 * VCPUS * FIO_MIB)) MiB of verified writes in $((SECONDS - started_s)) s, $(command virsh --version) of libvirt"
  [[ -z $KEEP ]] || say "kept in $WORK"
  say "test libvirt::reconnect_and_replug_queues_$QUEUES ... ok"
}

main "$@"
