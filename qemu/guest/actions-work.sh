# shellcheck shell=sh
# A guest that does to its disk what the host says, one word after another, while loads that verify themselves run beside.
#
# The guest's init runs it with -eu and, in MiB, FS_MIB for ext4, NUMBERS_MIB behind it for numbered blocks, and FIO_MIB behind those for fio. A word comes
# over the third serial port as `NUMBER COMMAND [ARGUMENT]...` and names a function of this file; when it is done the guest reports `done NUMBER`, and
# when it fails it reports that and ends. A reboot begins here anew: what has to outlive one, the host knows. Numbered blocks are written one after the
# other, and `acked N` is reported when the disk has answered for block N: whatever happens then, it has to be there.
DISK=/dev/vda
BLOCK_KIB=16
NUMBERS_AT=$FS_MIB
FIO_AT=$((FS_MIB + NUMBERS_MIB))

report() { echo "$*" >/dev/ttyS1; }

trap '[ $? = 0 ] || report "failed $what"' EXIT

# --- what is written, and how it is checked

# blocks FROM COUNT: what numbered blocks hold: lines of 32 bytes that say which block it is.
blocks() {
  awk -v from="$1" -v count="$2" -v lines=$((BLOCK_KIB * 32)) 'BEGIN {
    for (n = from; n < from + count; n++) {
      block = sprintf("this is numbered block %8d\n", n)
      for (have = 1; have < lines; have *= 2) block = block block
      printf "%s", block
    }
  }'
}

# write_numbers FROM: until it is enough, the area is full, or a write fails.
write_numbers() {
  n=$1
  while [ ! -e /tmp/enough ] && [ "$n" -lt $((NUMBERS_MIB * 1024 / BLOCK_KIB)) ]; do
    blocks "$n" 1 | /usr/bin/dd of=$DISK bs=${BLOCK_KIB}K seek=$((NUMBERS_AT * 1024 / BLOCK_KIB + n)) iflag=fullblock oflag=direct \
      conv=notrunc,nocreat status=none || return 1
    report "acked $n"
    n=$((n + 1))
  done
}

# check_numbers COUNT: the first COUNT blocks are all there.
check_numbers() {
  blocks 0 "$1" >/tmp/expected
  /usr/bin/dd if=$DISK bs=1M skip=$((NUMBERS_AT << 20)) count=$((BLOCK_KIB * $1 << 10)) iflag=direct,skip_bytes,count_bytes status=none | cmp - /tmp/expected
  rm /tmp/expected
}

# Neither writer makes a file where the disk was.
#
# pass FILE OFFSET_MIB SEED BLOCK: reads and writes at random places; what was written is read back and checked, some of it soon and the rest at the end.
pass() {
  fio --name=pass --filename="$1" --offset="${2}M" --size="${FIO_MIB}M" --randseed="$3" --bs="$4" --rw=randrw --rwmixread=40 \
    --allow_file_create=0 --ioengine=libaio --direct=1 --iodepth=16 --fsync=64 --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=256 \
    --thread --output-format=terse --terse-version=3 >/tmp/terse 2>&1 || {
    cat /tmp/terse
    return 1
  }
  # Field 5 of fio's terse format, version 3, is the error.
  awk -F';' '$1 == "3" { seen = 1; error = $5 } END { exit !seen || error != 0 }' /tmp/terse
}

# fio_passes FILE OFFSET_MIB: one pass after another until it is enough or one fails.
fio_passes() {
  passes=0
  while [ ! -e /tmp/enough ]; do
    passes=$((passes + 1))
    block=4k
    [ $((passes % 4)) != 0 ] || block=64k
    pass "$1" "$2" $passes $block || return 1
    report "pass $passes"
  done
}

small_files() {
  n=0
  while [ ! -e /tmp/enough ]; do
    n=$((n + 1))
    echo "small file number $n" >"/mnt/small-$n" && sync && cat "/mnt/small-$n" >/dev/null && rm "/mnt/small-$n" || return 1
    sleep 0.2
  done
}

# --- words: the file system and the loads

make_files() { /usr/sbin/mke2fs -q -t ext4 -F $DISK "${FS_MIB}M"; }

mount_files() { mount $DISK /mnt; }

unmount_files() {
  umount /mnt
  /usr/sbin/e2fsck -f -n $DISK
}

# load_files FROM: on a mounted file system, and numbered blocks from FROM on beside it.
load_files() {
  begin_load "$1"
  truncate -s "${FIO_MIB}M" /mnt/data
  fio_passes /mnt/data 0 &
  FIO=$!
  small_files &
  FILES=$!
}

# load_disk FROM: on the disk itself, with nothing mounted.
load_disk() {
  begin_load "$1"
  fio_passes $DISK "$FIO_AT" &
  FIO=$!
  FILES=''
}

# load_numbers FROM: numbered blocks alone.
load_numbers() {
  begin_load "$1"
  FIO=''
  FILES=''
}

begin_load() {
  rm -f /tmp/enough
  write_numbers "$1" &
  NUMBERS=$!
}

# end_load: all of it has gone well to the end.
end_load() {
  : >/tmp/enough
  wait "$NUMBERS"
  [ -z "$FIO" ] || wait "$FIO"
  [ -z "$FILES" ] || wait "$FILES"
}

# lose_load: all of it ends by itself, because the disk is gone.
lose_load() {
  if wait "$FIO"; then return 1; fi
  if wait "$NUMBERS"; then return 1; fi
}

kernel_has_no_complaint() {
  dmesg >/tmp/dmesg
  if grep -E 'I/O error|EXT4-fs (error|warning)|is not a head|blocked for more than|JBD2: .*rror|WARNING|BUG|Oops' /tmp/dmesg; then return 1; fi
}

# forget_complaints: those of writers whose disk was taken away are as they should be.
forget_complaints() { dmesg -c >/dev/null; }

# --- words: what the guest itself does with its disk

# wait_for COMMAND...: until it is true, 30 s at most.
wait_for() {
  tries=300
  while ! "$@"; do
    tries=$((tries - 1))
    [ $tries -gt 0 ]
    sleep 0.1
  done
}

disk_is_there() { [ -b $DISK ]; }
disk_is_gone() { [ ! -e /sys/block/vda ]; }
await_disk() { wait_for disk_is_there; }
await_no_disk() { wait_for disk_is_gone; }

virtio_device() { basename "$(readlink -f /sys/block/vda/device)"; }

unbind() {
  UNBOUND=$(virtio_device)
  echo "$UNBOUND" >/sys/bus/virtio/drivers/virtio_blk/unbind
}

bind() { echo "$UNBOUND" >/sys/bus/virtio/drivers/virtio_blk/bind; }

remove() { echo 1 >"$(readlink -f /sys/block/vda/device/..)/remove"; }

rescan() { echo 1 >/sys/bus/pci/rescan; }

reboot_now() { reboot -f; }

# cache MODE: `back` or `through`, as the guest says and as it then is.
cache() {
  echo "write $1" >/sys/block/vda/cache_type
  [ "$(cat /sys/block/vda/cache_type)" = "write $1" ]
}

# is FILE VALUE...: what the kernel says of the disk.
is() {
  value=$(cat "/sys/block/vda/$1")
  echo "$1 is $value"
  shift
  [ "$value" = "$*" ]
}

new_memory_is_there() { [ "$(cat /sys/devices/system/memory/memory*/state | grep -c offline)" = "$1" ]; }

# online_memory BLOCKS: takes the memory that was plugged, for what can be moved away again: the pages of programs come from there first.
online_memory() {
  wait_for new_memory_is_there "$1"
  for state in /sys/devices/system/memory/memory*/state; do
    [ "$(cat "$state")" = online ] || echo online_movable >"$state"
  done
}

# data_is_in_movable_memory: fio, which began after the memory was there, has its buffers in it: 16 of up to 64 KiB.
data_is_in_movable_memory() {
  awk '/^Node/ { zone = $4 } zone == "Movable" && $1 == "managed" { all = $2 } zone == "Movable" && $2 == "free" { free = $3 }
    END { print all - free, "of", all, "pages in use"; exit all - free < 256 }' /proc/zoneinfo
}

# has_queues COUNT
has_queues() { [ "$(find /sys/block/vda/mq -mindepth 1 -maxdepth 1 -type d | wc -l)" = "$1" ]; }

# holds_requests COUNT: the disk's queues have so many places, which is how many requests the kernel gives them.
holds_requests() { [ "$(cat /sys/block/vda/queue/nr_requests)" = "$1" ]; }

cannot_be_written() {
  if /usr/bin/dd if=/dev/zero of=$DISK bs=4K count=1 oflag=direct conv=notrunc,nocreat; then return 1; fi
  if /usr/sbin/blkdiscard -f -o 0 -l 1048576 $DISK; then return 1; fi
}

mount_read_only() { mount -o ro $DISK /mnt; }

read_all() { /usr/bin/dd if=$DISK of=/dev/null bs=1M iflag=direct status=none; }

# --- the conversation

what='listen to the host'
stty -F /dev/ttyS2 raw -echo
exec 3</dev/ttyS2
report ready
while read -r number command <&3; do
  what=$command
  echo "== $command"
  $command
  report "done $number"
done
