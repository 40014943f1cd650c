# shellcheck shell=bash
# The recipe of the guest that runs suites of others: guest-image.sh sources it.
#
# To the small guest come xfs and btrfs, which suites-work.sh loads when it wants them, with their tools, stress-ng and fsx. FSX is where
# suites-test.sh has put the latter.
# shellcheck disable=SC2034 # guest-image.sh uses it
IMAGE=suites
MODULES_LATER+=(libcrc32c xfs xor raid6_pq zstd_compress btrfs)
PROGRAMS+=(/usr/sbin/mkfs.xfs /usr/sbin/xfs_repair /usr/sbin/mkfs.btrfs /usr/bin/btrfs /usr/bin/stress-ng "$FSX")
PACKAGES+=(xfsprogs btrfs-progs stress-ng)
