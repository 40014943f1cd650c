# shellcheck shell=sh
# What the guest does to the disk under test: a file system's whole life, then random writes that are read back.
#
# The guest's init runs it with -eu and these variables, in MiB: FS_MIB for ext4, HOLE_MIB for each of two areas behind it
# that are filled and then discarded and zeroed, FIO_MIB behind those for each of JOBS fio jobs; TREE is the list of directories to copy,
# divided by commas. It reports `step SECONDS WHAT`, `value NAME NUMBER`, and `file SHA256 PATH` for every file of the
# tree, so that the storage side can be held to it. It knows only a block device.
# The programs of Debian have their whole path: by name alone, busybox's shell prefers its own.
DISK=/dev/vda
HOLE_AT=$FS_MIB
ZERO_AT=$((FS_MIB + HOLE_MIB))
FIO_AT=$((FS_MIB + 2 * HOLE_MIB))

report() { echo "$*" >/dev/ttyS1; }

now() { cut -d' ' -f1 /proc/uptime; }

# Under -e the shell leaves at the first command that fails; this says which step it was in.
trap '[ $? = 0 ] || report "failed $what"' EXIT
what='find the disk'

# step WHAT COMMAND...: runs it, reports how long it took, and leaves that in TOOK.
step() {
  what=$1
  shift
  started=$(now)
  echo "== $what"
  "$@"
  TOOK=$(echo "$started $(now)" | awk '{ printf "%.2f", $2 - $1 }')
  report "step $TOOK $what"
}

# rate NAME MIB: what the last step moved, per second.
rate() { report "value $1 $(echo "$2 $TOOK" | awk '{ printf "%.0f", $1 / ($2 > 0 ? $2 : 0.01) }')"; }

copy_tree() {
  mkdir /mnt/tree
  echo "$TREE" | tr , '\n' | while read -r from; do
    cp -a "$from" /mnt/tree/
  done
  mkdir /mnt/tree/small
  n=0
  while [ $n -lt 300 ]; do
    echo "small file number $n" >"/mnt/tree/small/$n"
    n=$((n + 1))
  done
  sync
}

manifest() { (cd /mnt/tree && find . -type f | sort | xargs /usr/bin/sha256sum) >"$1"; }

check_again() {
  mount -o ro $DISK /mnt
  manifest /tmp/again
  umount /mnt
  cmp /tmp/sums /tmp/again
}

trim_file_system() {
  dd if=/dev/urandom of=/mnt/doomed bs=1M count=8 conv=fsync
  rm /mnt/doomed
  sync
  /usr/sbin/fstrim -v /mnt
}

# all_zero AT_MIB: whether an area of HOLE_MIB reads as zeroes.
all_zero() { dd if=$DISK bs=1M skip="$1" count="$HOLE_MIB" | cmp - /tmp/zeroes; }

discard_and_zero() {
  head -c $((HOLE_MIB << 20)) /dev/zero >/tmp/zeroes
  tr '\0' '\252' </dev/zero | dd of=$DISK bs=1M seek="$HOLE_AT" count=$((2 * HOLE_MIB)) iflag=fullblock conv=fsync
  if all_zero "$HOLE_AT"; then return 1; fi
  /usr/sbin/blkdiscard -f -o $((HOLE_AT << 20)) -l $((HOLE_MIB << 20)) $DISK
  /usr/sbin/blkdiscard -f -z -o $((ZERO_AT << 20)) -l $((HOLE_MIB << 20)) $DISK
  echo 3 >/proc/sys/vm/drop_caches
  all_zero "$HOLE_AT"
  all_zero "$ZERO_AT"
}

# verify NAME BLOCK: random writes over the area of each job, then every block read back and checked by fio.
verify() {
  fio --name="$1" --filename=$DISK --offset="${FIO_AT}M" --size="${FIO_MIB}M" --offset_increment="${FIO_MIB}M" \
    --numjobs="$JOBS" --group_reporting --rw=randwrite --bs="$2" --ioengine=libaio --direct=1 --iodepth=32 \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=1 --thread --output-format=terse --terse-version=3 >/tmp/terse
  cat /tmp/terse
  # Fields of fio's terse format, version 3: 5 error, 7 and 48 KiB/s read and written, 8 and 49 operations a second.
  awk -F';' -v name="$1" '$1 == "3" {
    printf "value %s-read-MiB/s %.0f\nvalue %s-read-IOPS %d\n", name, $7 / 1024, name, $8
    printf "value %s-write-MiB/s %.0f\nvalue %s-write-IOPS %d\n", name, $48 / 1024, name, $49
    seen = 1; error = $5
  } END { exit !seen || error != 0 }' /tmp/terse >/dev/ttyS1
}

[ -b $DISK ]
report "value queues $(find /sys/block/vda/mq -mindepth 1 -maxdepth 1 -type d | wc -l)"
report "value disk-MiB $(($(cat /sys/block/vda/size) / 2048))"
step "mkfs.ext4" /usr/sbin/mke2fs -q -t ext4 -F $DISK "${FS_MIB}M"
step "mount" mount $DISK /mnt
step "copy a tree and sync" copy_tree
TREE_MIB=$(du -sm /mnt/tree | cut -f1)
report "value tree-files $(find /mnt/tree -type f | wc -l)"
report "value tree-MiB $TREE_MIB"
rate copy-MiB/s "$TREE_MIB"
step "checksum" manifest /tmp/sums
step "fstrim after deleting a file" trim_file_system
step "unmount" umount /mnt
step "fsck" /usr/sbin/e2fsck -f -n $DISK
step "checksum again, read from the disk" check_again
rate reread-MiB/s "$TREE_MIB"
step "discard and write zeroes" discard_and_zero
step "fio 4 KiB random, verify=crc32c" verify fio-4K 4k
step "fio 128 KiB random, verify=crc32c" verify fio-128K 128k
sed 's/^\([0-9a-f]*\)  /file \1 /' /tmp/sums >/dev/ttyS1
