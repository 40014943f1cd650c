# shellcheck shell=bash
# The recipe of the guest that plays a VM host or a storage machine: guest-image.sh sources it.
#
# To Debian's cloud kernel come what a wire needs (virtio_net, netem), both ends of NVMe/TCP, AoE's initiator and KVM, and the programs
# that use them: tc, vblade, qemu-storage-daemon, and QEMU itself for a guest in the guest. Our own programs are not here: run.sh packs them
# for each run.
IMAGE=nested
MODULES+=(failover net_failover virtio_net sch_netem
  nvme_fabrics nvme_tcp configfs nvmet nvmet_tcp aoe)
# Only a processor with SVM takes kvm_amd.
MODULES_LATER+=(irqbypass kvm kvm_amd)
PROGRAMS+=(/usr/sbin/tc /usr/sbin/ip /usr/sbin/vblade /usr/bin/qemu-storage-daemon /usr/bin/qemu-system-x86_64)
FILES+=(/usr/share/qemu/pvh.bin /usr/share/qemu/kvmvapic.bin /usr/share/seabios/bios-256k.bin /usr/share/seabios/bios.bin)
PACKAGES+=(iproute2 vblade qemu-system-x86 qemu-system-common qemu-system-data seabios)
