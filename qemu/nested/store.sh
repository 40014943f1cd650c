# shellcheck shell=sh
# The guest that plays the storage machine: the same volume, a file in its memory, served by cirro-node, by the kernel's NVMe/TCP target
# and by vblade.
#
# wire.sh stands before it. ADDRESS, MTU and VOLUME_MIB are kernel parameters, and SECURITY is ours.
make_volume() { dd if=/dev/zero of="/volumes/$1" bs=1M count="$VOLUME_MIB"; }

serve_ours() {
  make_volume ours
  cirro-node --link "$WIRE" --security "$SECURITY" --volume disk=/volumes/ours --state-dir /tmp/node --ctl-socket /tmp/node.ctl \
    ${GRANT:+--grant "disk=$GRANT"} ${GRANT:+--key /keys/node.key} >/tmp/node.log 2>&1 &
}

# A file that is not opened with O_DIRECT, which this kernel's tmpfs refuses.
serve_nvme() {
  target=/sys/kernel/config/nvmet
  make_volume nvme
  mount -t configfs config /sys/kernel/config
  mkdir -p $target/subsystems/disk/namespaces/1 $target/ports/1
  echo 1 >$target/subsystems/disk/attr_allow_any_host
  echo 1 >$target/subsystems/disk/namespaces/1/buffered_io
  printf %s /volumes/nvme >$target/subsystems/disk/namespaces/1/device_path
  echo 1 >$target/subsystems/disk/namespaces/1/enable
  echo tcp >$target/ports/1/addr_trtype
  echo ipv4 >$target/ports/1/addr_adrfam
  echo "$ADDRESS" >$target/ports/1/addr_traddr
  echo 4420 >$target/ports/1/addr_trsvcid
  ln -s $target/subsystems/disk $target/ports/1/subsystems/disk
}

serve_aoe() {
  make_volume aoe
  vblade 0 0 "$WIRE" /volumes/aoe >/tmp/vblade.log 2>&1 &
}

# counters: what the node has counted, into the console.
counters() {
  cirroctl stats --ctl-socket /tmp/node.ctl
  cat /tmp/node.log /tmp/vblade.log
}

mkdir /volumes
mount -t tmpfs volumes /volumes
wire_up "$ADDRESS" "$MTU"
serve_ours
serve_nvme
serve_aoe
obey
