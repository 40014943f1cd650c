# shellcheck shell=sh
# What the guest does while it is moved from host to host: the load of crash-work.sh, and files that only the disk writes into its memory.
#
# The guest's init runs it with -eu and FS_MIB, FIO_MIB, CACHE_MIB. It reports as crash-work.sh does. A page of a cached file is
# written by the device, never by the guest: when its checksum is made a moment later, nothing is read from the disk again, so a page
# that the host forgot to move shows.
DISK=/dev/vda

report() { echo "$*" >/dev/ttyS1; }

trap '[ $? = 0 ] || report "failed $what"' EXIT

pass() {
  fio --name=move --filename=/mnt/data --size="${FIO_MIB}M" --rw=randrw --rwmixread=40 --bs=4k --ioengine=libaio --direct=1 \
    --iodepth=8 --fsync=64 --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=256 --randseed="$1" \
    --rate_iops=400 --thread --output-format=terse --terse-version=3 >/tmp/terse 2>&1 || {
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

# stale_pages FILE: the pages of the cached file that are not what the disk has, the first twenty of them, and how many bytes of each.
stale_pages() {
  cp "$1" /tmp/cached
  echo 1 >/proc/sys/vm/drop_caches
  sha256sum -c "/tmp/${1##*/}" >/dev/null && echo "(the disk is right)"
  cmp -l /tmp/cached "$1" | awk '{ bytes[int(($1 - 1) / 4096)]++ } END { for (page in bytes) print page ":" bytes[page] }' | sort -n >/tmp/pages
  echo "$(wc -l </tmp/pages) of them: $(head -n 20 /tmp/pages | tr "\n" " ")"
}

# cached_file: two files take turns, so that a page which was not moved has the bytes of the other.
cached_file() {
  rounds=0
  while [ ! -e /tmp/enough ]; do
    rounds=$((rounds + 1))
    now=$((rounds % 2))
    echo 1 >/proc/sys/vm/drop_caches
    cat /mnt/known-$now >/dev/null
    sleep 1
    if ! sha256sum -c /tmp/known-$now >/dev/null; then
      : >/tmp/stale
      report "failed stale pages: the cached file is not what was read, round $rounds, pages: $(stale_pages /mnt/known-$now)"
      return 1
    fi
  done
  report "value cached $rounds"
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
for name in known-0 known-1; do
  dd if=/dev/urandom of=/mnt/$name bs=1M count="$CACHE_MIB" 2>/dev/null
  sha256sum /mnt/$name >/tmp/$name
done
sync

report load
small_files &
files=$!
cached_file &
cached=$!
passes=0
while [ ! -e /tmp/enough ] && [ ! -e /tmp/stale ]; do
  passes=$((passes + 1))
  what="fio, pass $passes"
  pass $passes
done
what='the cached file'
wait $cached
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
