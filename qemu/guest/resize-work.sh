# shellcheck shell=sh
# What the guest does while its disk becomes larger: fio writes and verifies on a mounted file system, which grows into the new space by
# resize2fs, and more verified writes fill that.
#
# The guest's init runs it with -eu and FIO_MIB, the size of each of fio's files, and MORE_MIB, more than the file system has before and less than it gets.
# It reports `step SECONDS WHAT`, `ready` when the size may change, `value NAME NUMBER`. It asks nobody for the size: the kernel hears of it.
DISK=/dev/vda

report() { echo "$*" >/dev/ttyS1; }

now() { cut -d' ' -f1 /proc/uptime; }

sectors() { cat /sys/block/vda/size; }

# Under -e the shell leaves at the first command that fails; this says which step it was in.
trap '[ $? = 0 ] || report "failed $what"' EXIT
what='find the disk'

# step WHAT COMMAND...: runs it and reports how long it took.
step() {
  what=$1
  shift
  started=$(now)
  echo "== $what"
  "$@"
  report "step $(echo "$started $(now)" | awk '{ printf "%.2f", $2 - $1 }') $what"
}

# verified NAME MIB: random writes into a file of the file system, every block read back and checked.
verified() {
  fio --name="$1" --filename="/mnt/$1" --size="$2M" --rw=randwrite --bs=64k --ioengine=libaio --direct=1 --iodepth=16 \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=1 --thread --minimal >"/tmp/$1.out"
}

# load: fio again and again until the file /tmp/enough is there.
load() {
  until [ -e /tmp/enough ]; do verified load "$FIO_MIB" || return 1; done
}

wait_for_size() {
  tries=600
  while [ "$(sectors)" = "$BEFORE" ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ]
    sleep 0.1
  done
}

fill() {
  verified more "$MORE_MIB"
  touch /tmp/enough
  wait "$LOAD_PID"
  sync
}

[ -b $DISK ]
BEFORE=$(sectors)
report "value sectors-before $BEFORE"
step "mkfs.ext4" /usr/sbin/mke2fs -q -t ext4 -F $DISK
step "mount" mount $DISK /mnt
load &
LOAD_PID=$!
sleep 1
report ready
step "the kernel hears of the new size" wait_for_size
report "value sectors-after $(sectors)"
step "resize2fs on the mounted file system" /usr/sbin/resize2fs $DISK
report "value fs-MiB $(df -m /mnt | awk 'END { print $2 }')"
step "verified writes into the new space" fill
step "unmount" umount /mnt
step "fsck" /usr/sbin/e2fsck -f -n $DISK
