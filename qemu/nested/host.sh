# shellcheck shell=sh
# The guest that plays the VM host: cirro-backend and the kernel's initiators of NVMe/TCP and AoE, the load on each, and a guest of its own
# on our disk.
#
# wire.sh stands before it. ADDRESS, STORE, MTU, LOAD_S and SECURITY are kernel parameters. What a measurement finds is reported in
# one line: `measured SYSTEM LOSS RW DEPTH KEY VALUE...`.

# wait_for PATH: until there is something.
wait_for() {
  tries=0
  until [ -e "$1" ]; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] || return 1
    sleep 0.1
  done
}

# export_device NAME DEVICE: a disk of this kernel behind a vhost-user-blk socket, as ours is.
export_device() {
  qemu-storage-daemon --object iothread,id=io \
    --blockdev "driver=host_device,node-name=disk,filename=$2,cache.direct=on,aio=native" \
    --export "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=/tmp/$1.sock,writable=on,iothread=io" \
    >"/tmp/$1.log" 2>&1 &
  wait_for "/tmp/$1.sock"
}

attach_ours() {
  cirro-backend --link "$WIRE" --security "$SECURITY" --volume disk --socket-path /tmp/ours.sock --queues 1 --state-dir /tmp/backend \
    --run-dir /tmp/run --ctl-socket /tmp/backend.ctl ${NODE_KEY:+--key /keys/backend.key} ${NODE_KEY:+--node-key "$NODE_KEY"} \
    >/tmp/backend.log 2>&1 &
  wait_for /tmp/ours.sock
}

attach_nvme() {
  echo "transport=tcp,traddr=$STORE,trsvcid=4420,nqn=disk" >/dev/nvme-fabrics
  wait_for /dev/nvme0n1
  export_device nvme /dev/nvme0n1
}

attach_aoe() {
  wait_for /dev/etherd/discover
  echo >/dev/etherd/discover
  wait_for /dev/etherd/e0.0
  export_device aoe /dev/etherd/e0.0
}

# attach: all systems, over a wire that is as it should be.
attach() {
  attach_ours
  attach_nvme
  attach_aoe
}

# measure SYSTEM LOSS RW DEPTH: cirro-load on its socket, or fio on the kernel's disk for NAME-kernel.
measure() {
  case $1 in
    nvme-kernel) measure_kernel /dev/nvme0n1 "$@" ;;
    aoe-kernel) measure_kernel /dev/etherd/e0.0 "$@" ;;
    *) cirro-load --socket "/tmp/$1.sock" --rw "$3" --depth "$4" --seconds "$LOAD_S" --json >/tmp/figures || {
      report "measured $* iops 0 errors 1"
      return 0
    } ;;
  esac
  echo "measured $* $(sed 's/"stalled":.*//; s/[{}":,]\+/ /g' /tmp/figures)" >/dev/ttyS1
}

measure_kernel() {
  fio --name=load --filename="$1" --rw="$4" --bs=4k --iodepth="$5" --ioengine=libaio --direct=1 --time_based --runtime="$LOAD_S" \
    --ramp_time=300ms --continue_on_error=all --percentile_list=50:99:99.9 --thread --output-format=json >/tmp/fio || true
  # fio's JSON has one thing a line; of the sections read and write the one that was asked for counts.
  awk -v section="${4#rand}" '
    $1 ~ /^"(read|write|trim|sync)"/ && $3 == "{" { in_section = $1 == "\"" section "\"" }
    { gsub(/[",]/, "") }
    $1 == "total_err" { errors = $3 }
    !in_section { next }
    $1 == "total_ios" { requests = $3 }
    $1 == "iops" { iops = $3 }
    $1 == "clat_ns" { latency = 1 }
    latency && $1 == "max" { max = $3 }
    $1 == "50.000000" { p50 = $3 }
    $1 == "99.000000" { p99 = $3 }
    $1 == "99.900000" { p999 = $3; latency = 0 }
    END {
      if (errors == "") errors = 1
      printf "requests %d iops %.0f p50_us %.0f p99_us %.0f p999_us %.0f max_us %.0f errors %d\n", requests, iops, p50 / 1000, p99 / 1000, p999 / 1000, max / 1000, errors
    }' /tmp/fio >/tmp/figures
}

# inner: a guest in this guest uses our disk, by KVM on the emulated processor's SVM if there is that, else emulated in emulation.
# What it reports comes with `inner` before it.
inner() {
  accel=tcg cpu=max
  while read -r module; do insmod "/modules/$module" || true; done </modules/later
  [ ! -e /dev/kvm ] || accel=kvm cpu=host
  report "inner accel $accel"
  : >/tmp/inner.report
  qemu-system-x86_64 -name inner -nodefaults -no-user-config -display none -no-reboot -machine q35,memory-backend=ram \
    -accel $accel -cpu $cpu -smp 1 -m 448 -object memory-backend-memfd,id=ram,size=448M,share=on \
    -kernel /inner/vmlinux -initrd /inner/initramfs.cpio -append "console=ttyS0 panic=-1 quiet no_timer_check" \
    -fw_cfg name=opt/cirro/script,file=/inner/script -serial file:/tmp/inner.console -serial file:/tmp/inner.report \
    -chardev socket,id=disk,path=/tmp/ours.sock,reconnect=1 -device vhost-user-blk-pci,chardev=disk,num-queues=1 >/tmp/inner.log 2>&1 ||
    cat /tmp/inner.log
  sed 's/^/inner /' /tmp/inner.report >/dev/ttyS1
  tail -n 40 /tmp/inner.console
}

# counters: what the backend has counted, into the console.
counters() {
  cirroctl stats --ctl-socket /tmp/backend.ctl
  cat /tmp/backend.log
}

wire_up "$ADDRESS" "$MTU"
obey
