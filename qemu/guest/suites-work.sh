# shellcheck shell=sh
# What the guest does to the disk with the suites of others: fio and fsx on the device itself, fsx and stress-ng on a file system.
#
# The guest's init runs it with -eu and WORK, one of the functions work_*; FS and MOUNT_OPTIONS, or FS=none; FSX, the path of fsx; SEED. It reports as
# disk-work.sh does. Each suite checks what it reads by itself; besides, the kernel may have logged no complaint.
DISK=/dev/vda

report() { echo "$*" >/dev/ttyS1; }

trap '[ $? = 0 ] || report "failed $what"' EXIT

# Without this much of what was read would come from memory and not from the disk.
forget_caches() {
  while [ ! -e /tmp/enough ]; do
    sleep 1
    echo 3 >/proc/sys/vm/drop_caches
  done
}

# fio_job NAME OPTION...: fio's own verification; any error of it, and a job that did nothing, fails.
fio_job() {
  what="fio $1"
  echo "== $what"
  name=$1
  shift
  fio --name="$name" --filename=$DISK --direct=1 --thread --randseed="$SEED" --verify_fatal=1 \
    --output-format=terse --terse-version=3 "$@" >/tmp/terse || { cat /tmp/terse; return 1; }
  # Fields 5, 6 and 47 of fio's terse format, version 3: the error, KiB read and written.
  awk -F';' '$1 == "3" { error += $5 != 0; moved += $6 + $47 } END { exit error != 0 || moved == 0 }' /tmp/terse || { cat /tmp/terse; return 1; }
  report "job fio $name"
}

work_fio_verify() {
  for engine in libaio io_uring; do
    for block in 512 4k 64k 1m; do
      size=16m
      [ $block != 512 ] || size=1m
      fio_job "randwrite-$engine-$block" --rw=randwrite --bs=$block --size=$size --ioengine=$engine --iodepth=32 --verify=crc32c
    done
    fio_job "mixed-sizes-$engine" --rw=randrw --bsrange=512-256k --bs_unaligned=0 --blockalign=512 --size=32m --ioengine=$engine --iodepth=16 \
      --verify=sha1 --serialize_overlap=1 --verify_backlog=64
    fio_job "backlog-$engine" --rw=randwrite --bs=8k --size=16m --ioengine=$engine --iodepth=16 --fsync=32 --verify=md5 --verify_backlog=128 --verify_async=1
  done
  fio_job backwards --rw=write:-8k --bs=4k --size=8m --offset=64m --ioengine=sync --verify=crc32c
  fio_job meta-psync --rw=randwrite --bs=4k --size=8m --ioengine=psync --sync=1 --verify=pattern --verify_pattern=0xdeadbeef
}

# trims: how many discards the disk has done.
trims() { awk '{ print $12 }' /sys/block/vda/stat; }

# trim_job NAME OPTION...: a fio_job that must have discarded something.
trim_job() {
  before=$(trims)
  fio_job "$@"
  what="fio $1 discards"
  [ "$(trims)" -gt "$before" ]
}

# fio 3.33's trim_percentage is not here: it ends by an assertion of fio's own (fio_ro_check) when it comes to its first trim.
work_fio_trim() {
  for engine in libaio io_uring; do
    trim_job "trimwrite-4k-$engine" --rw=trimwrite --bs=4k --size=2m --ioengine=$engine --iodepth=1 --verify=crc32c
    trim_job "randtrimwrite-64k-$engine" --rw=randtrimwrite --bs=64k --size=16m --ioengine=$engine --iodepth=1 --verify=crc32c --verify_backlog=16
    fio_job "written-before-$engine" --rw=randwrite --bs=16k --size=32m --ioengine=$engine --iodepth=16 --verify=crc32c
    trim_all "$engine"
    zeroes_now
  done
}

# trim_all ENGINE: trims every block of what was written, in random order and sixteen at a time.
trim_all() {
  what="fio randtrim-$1"
  before=$(trims)
  fio --name=randtrim --filename=$DISK --direct=1 --thread --randseed="$SEED" --rw=randtrim --bs=64k --size=32m --ioengine="$1" --iodepth=16 >/tmp/out || { cat /tmp/out; return 1; }
  [ $(($(trims) - before)) -ge 32 ]
  report "job fio randtrim-$1"
}

# By the specification a discarded sector may hold anything; this device promises zeroes.
zeroes_now() {
  what='zeroes after randtrim'
  head -c $((32 << 20)) /dev/zero >/tmp/zeroes
  echo 3 >/proc/sys/vm/drop_caches
  dd if=$DISK bs=1M count=32 iflag=fullblock | cmp - /tmp/zeroes
  report 'job zeroes after randtrim'
}

# fsx FILE OPERATIONS CONFIGURATION...: each line an argument.
fsx() {
  file=$1
  operations=$2
  shift 2
  printf '%s\n' "$@" >/tmp/fsx.toml
  "$FSX" -f /tmp/fsx.toml -S "$SEED" -N "$operations" -P /tmp "$file" >/tmp/fsx.log 2>&1 || { tail -n 40 /tmp/fsx.log; return 1; }
  report "job fsx $operations operations, seed $SEED"
}

# On the device itself a hole is punched by a write of zeroes that may unmap.
work_fsx_device() {
  what='fsx on the device'
  forget_caches &
  fsx $DISK 3000 'blockmode = true' 'flen = 8388608' '[opsize]' 'max = 131072' 'align = 512' \
    '[weights]' 'truncate = 0' 'invalidate = 1' 'fsync = 1' 'fdatasync = 1' 'punch_hole = 5' 'posix_fadvise = 2'
}

work_fsx() {
  what="fsx on $FS"
  forget_caches &
  fsx /mnt/fsx 3000 'flen = 8388608' '[opsize]' 'max = 131072' \
    '[weights]' 'close_open = 1' 'invalidate = 1' 'fsync = 1' 'fdatasync = 1' 'posix_fallocate = 2' 'punch_hole = 5' 'sendfile = 3' 'posix_fadvise = 2' 'copy_file_range = 3'
}

# Without its io-uring, which often fails on any disk (docs/TESTING.md); fio has it.
work_stress() {
  what="stress-ng on $FS"
  mkdir /mnt/stress
  /usr/bin/stress-ng --temp-path /mnt/stress --verify --timeout 20 --seed "$SEED" --oomable \
    --hdd 1 --hdd-bytes 24m --iomix 1 --iomix-bytes 16m --aio 1 --sync-file 1 --sync-file-bytes 8m --readahead 1 --readahead-bytes 16m \
    --fallocate 1 --fallocate-bytes 16m --seek 1 --seek-size 16m --revio 1 --revio-bytes 16m --chattr 1 >/tmp/stress.log 2>&1 || { cat /tmp/stress.log; return 1; }
  cat /tmp/stress.log
  # Its exit code is 0 also when a stressor was skipped.
  what="stress-ng ran every stressor on $FS"
  if grep -iE 'skipp(ed|ing)' /tmp/stress.log | grep -vE 'skipped: 0'; then return 1; fi
  grep -q 'successful run completed' /tmp/stress.log
  report "job stress-ng of 9 stressors"
}

insmod_later() { for module in "$@"; do insmod "/modules/$module.ko"; done; }

make_file_system() {
  what="make and mount $FS"
  case $FS in
    ext4) /usr/sbin/mke2fs -q -t ext4 -F $DISK ;;
    xfs)
      insmod_later libcrc32c xfs
      /usr/sbin/mkfs.xfs -q -f $DISK
      ;;
    btrfs)
      insmod_later libcrc32c xor raid6_pq zstd_compress btrfs
      /usr/sbin/mkfs.btrfs -q -f $DISK
      ;;
  esac
  mount -t "$FS" -o "$MOUNT_OPTIONS" $DISK /mnt
}

check_here() {
  what="fstrim, unmount and check $FS"
  /usr/sbin/fstrim -v /mnt
  umount /mnt
  case $FS in
    ext4) /usr/sbin/e2fsck -f -n $DISK ;;
    xfs) /usr/sbin/xfs_repair -n $DISK ;;
    btrfs) /usr/bin/btrfs check --readonly $DISK ;;
  esac
}

kernel_has_no_complaint() {
  what='the kernel log'
  dmesg >/tmp/dmesg
  if grep -E 'I/O error|EXT4-fs (error|warning)|JBD2: .*rror|XFS .*([Cc]orrupt|error|shut)|BTRFS (error|critical)|is not a head|blocked for more than|BUG:|WARNING:' /tmp/dmesg; then
    return 1
  fi
}

[ "$FS" = none ] || make_file_system
"work_$WORK"
: >/tmp/enough
[ "$FS" = none ] || check_here
kernel_has_no_complaint
