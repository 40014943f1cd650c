# shellcheck shell=sh
# What the guest does while both daemons are killed and the wire is cut: fio's random reads and writes that it verifies, and
# small files that are made, synced and deleted, on ext4, until the host says that it is enough.
#
# The guest's init runs it with -eu and FS_MIB, FIO_MIB. The host's word comes over the third serial port. It reports as
# disk-work.sh does, and `load` when the load begins. An error of the disk that anybody's code swallowed is in the kernel's log.
DISK=/dev/vda

report() { echo "$*" >/dev/ttyS1; }

trap '[ $? = 0 ] || report "failed $what"' EXIT

# pass NUMBER BLOCK: reads and writes at random places of a file; what was written is read back and checked, some of it soon and
# the rest at the end.
pass() {
  fio --name=crash --filename=/mnt/data --size="${FIO_MIB}M" --rw=randrw --rwmixread=40 --bs="$2" --ioengine=libaio --direct=1 \
    --iodepth=16 --fsync=64 --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=256 --randseed="$1" \
    --thread --output-format=terse --terse-version=3 >/tmp/terse 2>&1 || {
    cat /tmp/terse
    return 1
  }
  # Field 5 of fio's terse format, version 3, is the error.
  awk -F';' '$1 == "3" { seen = 1; error = $5 } END { exit !seen || error != 0 }' /tmp/terse
}

small_files() {
  n=0
  while [ ! -e /tmp/enough ]; do
    n=$((n + 1))
    echo "small file number $n" >"/mnt/small-$n" && sync && cat "/mnt/small-$n" >/dev/null && rm "/mnt/small-$n" || return 1
    sleep 0.2
  done
}

kernel_has_no_complaint() {
  dmesg >/tmp/dmesg
  if grep -E 'I/O error|EXT4-fs (error|warning)|is not a head|blocked for more than|JBD2: .*rror' /tmp/dmesg; then return 1; fi
}

what='listen to the host'
stty -F /dev/ttyS2 raw -echo
{ head -n 1 /dev/ttyS2 >/dev/null; : >/tmp/enough; } &

what='mkfs.ext4 and mount'
/usr/sbin/mke2fs -q -t ext4 -F $DISK "${FS_MIB}M"
mount $DISK /mnt

report load
small_files &
files=$!
passes=0
while [ ! -e /tmp/enough ]; do
  passes=$((passes + 1))
  what="fio, pass $passes"
  block=4k
  [ $((passes % 4)) != 0 ] || block=64k
  pass $passes $block
done
what='small files'
wait $files
report "value passes $passes"
what='the kernel log'
kernel_has_no_complaint
what='unmount'
umount /mnt
what='fsck'
/usr/sbin/e2fsck -f -n $DISK
what='the kernel log'
kernel_has_no_complaint
