# shellcheck shell=bash
# The recipe of the guest that plays a VM host or a storage machine: guest-image.sh sources it.
#
# To Debian's cloud kernel come what a wire needs (virtio_net, netem), both ends of NVMe/TCP, AoE's initiator and KVM, and the programs
# that use them: tc, vblade, qemu-storage-daemon, and QEMU itself for a guest in the guest. Our own programs are not here: run.sh packs them
# for each run.
# shellcheck disable=SC2034 # guest-image.sh uses it
IMAGE=nested
MODULES+=(failover net_failover virtio_net sch_netem
  nvme_fabrics nvme_tcp configfs nvmet nvmet_tcp aoe)
# The first only where the processor has AMD-V, the second only where it has VT-x.
MODULES_LATER+=(irqbypass kvm kvm_amd kvm_intel)
PROGRAMS+=(/usr/sbin/tc /usr/sbin/ethtool /usr/sbin/vblade /usr/bin/qemu-storage-daemon /usr/bin/qemu-system-x86_64)
FILES+=(/usr/share/qemu/pvh.bin /usr/share/qemu/kvmvapic.bin /usr/share/seabios/bios-256k.bin /usr/share/seabios/bios.bin)
PACKAGES+=(iproute2 ethtool vblade qemu-system-x86 qemu-system-common qemu-system-data seabios)
# Without KVM QEMU wants a module of its own.
FILES+=(/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so)
