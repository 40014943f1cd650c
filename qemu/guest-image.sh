#!/usr/bin/env bash
# Builds the guest that the tests boot: Debian's own cloud kernel and an initramfs of Debian's own tools.
#
# The kernel package is downloaded and unpacked here, never installed on this machine. Its compressed image is opened
# so that QEMU can enter it directly (PVH), and the initramfs is left uncompressed: both save seconds without KVM. The
# result is kept in .cache/guest until this file, the guest's init or one of the packed programs changes. Called by
# demo.sh and guest-test.sh; it knows nothing of the daemons. `--force` builds again. A recipe makes another image
# besides: a file of bash that sets IMAGE, the name, and adds to the lists below.
set -euo pipefail
# shellcheck source=qemu/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

IMAGE=guest
KERNEL_PACKAGE=linux-image-cloud-amd64
# In the order of loading. One that the kernel has built in is skipped.
MODULES=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
  crc16 mbcache jbd2 crc32c_generic ext4 qemu_fw_cfg)
# Packed, but loaded by nobody: what only some runs want.
MODULES_LATER=()
PROGRAMS=(/usr/bin/fio /usr/sbin/mke2fs /usr/sbin/e2fsck /usr/sbin/resize2fs /usr/sbin/blkdiscard /usr/sbin/fstrim /usr/bin/sha256sum
  /usr/bin/dd)
# Files and directories that programs read.
FILES=()
# What all that is of.
PACKAGES=(busybox-static fio e2fsprogs util-linux coreutils libc6)
RECIPE='' FORCE=''

# What the image is made from: a change of any of it makes a new image.
image_stamp() {
  sha256sum "$QEMU_DIR/guest-image.sh" "$QEMU_DIR/guest/init" ${RECIPE:+"$RECIPE"} | cut -d' ' -f1
  dpkg-query -W "${PACKAGES[@]}"
}

# fetch_kernel DIR: the package that the meta package stands for, unpacked into DIR.
fetch_kernel() {
  local dir=$1 package
  package=$(apt-cache depends "$KERNEL_PACKAGE" | awk '/Depends: linux-image-/ { print $2; exit }')
  [[ -n $package ]] || die "apt knows no $KERNEL_PACKAGE: run apt-get update, or qemu/install.sh"
  say "downloading $package (unpacked under qemu/.cache, not installed)"
  (cd "$dir" && apt-get download "$package") >"$dir/apt.log" 2>&1 || {
    show_tail "apt-get download $package" "$dir/apt.log"
    die "cannot download $package: run apt-get update and try again"
  }
  dpkg -x "$dir/$package"_*.deb "$dir"
}

# read_number FILE OFFSET BYTES: a little-endian number of the boot header (Documentation/arch/x86/boot.rst).
read_number() { od -An -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '; }

# open_kernel BZIMAGE VMLINUX: the ELF file inside a bzImage. Its payload ends with four bytes of length that are not
# part of the compressed stream.
open_kernel() {
  local setup_sectors payload_at payload_bytes tool magic
  setup_sectors=$(read_number "$1" $((0x1f1)) 1)
  payload_at=$(((setup_sectors + 1) * 512 + $(read_number "$1" $((0x248)) 4)))
  payload_bytes=$(($(read_number "$1" $((0x24c)) 4) - 4))
  magic=$(od -An -t x1 -j "$payload_at" -N 4 "$1" | tr -d ' ')
  case $magic in
    02214c18) tool=lz4 ;;
    28b52ffd) tool=zstd ;;
    fd377a58) tool=xz ;;
    *) die "the kernel's payload starts with $magic, which is neither lz4, zstd nor xz: open_kernel has to learn it" ;;
  esac
  dd if="$1" bs=64K iflag=skip_bytes,count_bytes skip="$payload_at" count="$payload_bytes" status=none |
    "$tool" -dc >"$2"
  [[ $(head -c 4 "$2" | od -An -t x1 | tr -d ' ') == 7f454c46 ]] || die "what came out of $1 is not an ELF file"
}

# copy_modules KERNEL_DIR ROOT LIST MODULE...: the modules and a list of them in the order of loading.
copy_modules() {
  local tree=("$1"/lib/modules/*) name file
  mkdir -p "$2/modules"
  for name in "${@:4}"; do
    file=$(find "${tree[0]}/kernel" -name "$name.ko" -o -name "${name//_/-}.ko")
    if [[ -n $file ]]; then
      cp "$file" "$2/modules/"
      basename "$file" >>"$2/modules/$3"
    elif ! grep -qE "/${name//_/[_-]}\.ko" "${tree[0]}/modules.builtin"; then
      die "the kernel ${tree[0]##*/} has no module $name, neither loadable nor built in"
    fi
  done
}

# copy_programs ROOT: the programs at their own paths, and every library that the loader would look for.
copy_programs() {
  local program library
  for program in "${PROGRAMS[@]}"; do
    [[ -x $program ]] || die "$program is missing: run qemu/install.sh"
    install -D "$program" "$1$program"
    ldd "$program" | awk '/=> \// { print $3 } /^\t\// { print $1 }' | while read -r library; do
      [[ -e $1$library ]] || install -D "$library" "$1$library"
    done
  done
  ((${#FILES[@]} == 0)) || cp -rL --parents "${FILES[@]}" "$1"
}

build_image() {
  local work
  mkdir -p "$CACHE_DIR"
  work=$(mktemp -d "$CACHE_DIR/build.XXXXXX")
  undo rm -rf "$work"
  mkdir -p "$work/kernel" "$work/root/bin" "$work/guest"
  fetch_kernel "$work/kernel"
  open_kernel "$work"/kernel/boot/vmlinuz-* "$work/guest/vmlinux"
  copy_modules "$work/kernel" "$work/root" order "${MODULES[@]}"
  copy_modules "$work/kernel" "$work/root" later "${MODULES_LATER[@]}"
  copy_programs "$work/root"
  cp /bin/busybox "$work/root/bin/busybox"
  install "$QEMU_DIR/guest/init" "$work/root/init"
  (cd "$work/root" && find . | cpio --quiet -o -H newc) >"$work/guest/initramfs.cpio"
  image_stamp >"$work/guest/stamp"
  rm -rf "$GUEST_DIR"
  mv "$work/guest" "$GUEST_DIR"
  say "built the image $IMAGE: kernel $(du -h "$GUEST_DIR/vmlinux" | cut -f1), initramfs $(du -h "$GUEST_DIR/initramfs.cpio" | cut -f1)"
}

main() {
  undo_on_exit
  [[ ${1:-} != --force ]] || { FORCE=yes && shift; }
  RECIPE=${1:-}
  # shellcheck source=/dev/null
  [[ -z $RECIPE ]] || source "$RECIPE"
  GUEST_DIR=$CACHE_DIR/$IMAGE
  mkdir -p "$CACHE_DIR"
  exec 9>"$CACHE_DIR/lock"
  flock 9
  if [[ -z $FORCE && -f $GUEST_DIR/stamp ]] && cmp -s <(image_stamp) "$GUEST_DIR/stamp"; then
    return
  fi
  build_image
}

main "$@"
