# shellcheck shell=sh
# What both guests of qemu/nested do: their end of the wire, its impairment, and the words of run.sh that they obey.
#
# It stands before host.sh or store.sh in the script of a guest, which the guest's init runs with -eu. It reports on the second serial
# port as README.md of qemu says; run.sh's words come over the third, a command a line, and each is answered by `done`.
WIRE=eth0

report() { echo "$*" >/dev/ttyS1; }

# Under -e the shell leaves at the first command that fails; this says which word it obeyed.
what='set up'
trap '[ $? = 0 ] || report "failed $what"' EXIT

# wire_up ADDRESS MTU: one frame at a time, so that what netem loses is a frame and never a bundle of them.
wire_up() {
  ip link set lo up
  ip link set $WIRE mtu "$2" up
  ip address add "$1/24" dev $WIRE
  /usr/sbin/ethtool -K $WIRE gso off
}

# impair [NETEM ARGUMENT]...: what this end sends is delayed, lost and so on from now on; counters start anew.
impair() {
  /usr/sbin/tc qdisc delete dev $WIRE root || true
  /usr/sbin/tc qdisc add dev $WIRE root netem limit 100000 "$@"
  /usr/sbin/tc qdisc show dev $WIRE
}

# sent NAME: what netem has passed and lost since then.
sent() {
  /usr/sbin/tc -s qdisc show dev $WIRE |
    sed -n "s/.* \([0-9]*\) pkt (dropped \([0-9]*\),.*/value $1-frames \1\nvalue $1-dropped \2/p" >/dev/ttyS1
}

obey() {
  stty -F /dev/ttyS2 raw -echo
  report ready
  # There is no last word: run.sh ends the machine.
  while read -r line; do
    what=$line
    # shellcheck disable=SC2086 # a command and its arguments
    $line
    report "done"
  done </dev/ttyS2
}
