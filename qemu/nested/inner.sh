# shellcheck shell=sh
# What the guest in the guest does to our disk: writes at random places and every block read back and checked, by fio.
#
# Its init runs it with -eu; it reports as every guest's script does.
report() { echo "$*" >/dev/ttyS1; }

[ -b /dev/vda ]
fio --name=inner --filename=/dev/vda --size=8M --rw=randwrite --bs=4k --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c \
  --verify_fatal=1 --do_verify=1 --randseed=1 --thread --output-format=terse --terse-version=3 >/tmp/terse
# Fields of fio's terse format, version 3: 5 error, 6 and 47 KiB read and written, 8 and 49 operations a second.
awk -F';' '$1 == "3" {
  printf "value verified-KiB %d\nvalue written-KiB %d\nvalue read-IOPS %d\nvalue write-IOPS %d\n", $6, $47, $8, $49
  seen = 1; error = $5
} END { exit !seen || error != 0 }' /tmp/terse >/dev/ttyS1
dmesg >/tmp/dmesg
if grep -E 'I/O error|is not a head|blocked for more than' /tmp/dmesg; then exit 1; fi
