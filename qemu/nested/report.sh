# shellcheck shell=bash
# What the guests reported, as tables, as JSON, and as answers to whether all is well.
#
# It is sourced by run.sh, whose variables it reads, and knows only the lines of the reports: `measured SYSTEM LOSS RW DEPTH KEY VALUE...`
# and `value NAME NUMBER`.

# The systems as people call them. The first three are driven by cirro-load over vhost-user, the others by fio on the kernel's disk.
declare -A TITLES=(
  [ours]="cirrostratus"
  [nvme]="NVMe/TCP"
  [aoe]="AoE"
  [nvme-kernel]="NVMe/TCP, kernel device"
  [aoe-kernel]="AoE, kernel device"
)

# measured_line SYSTEM LOSS RW DEPTH: nothing if it was not measured.
measured_line() {
  awk -v key="measured $1 $2 $3 $4 " 'index($0, key) == 1' "$WORK/host.report" | tail -n 1
}

# figure KEY LINE: its value, or 0.
figure() { awk -v key="$1" '{ for (i = 6; i < NF; i += 2) if ($i == key) value = $(i + 1) } END { printf "%.0f", value }' <<<"$2"; }

# value_of GUEST NAME: the sum of what a guest reported by that name.
value_of() { awk -v name="$2" '$1 == "value" && $2 == name { value += $3 } END { printf "%.0f", value }' "$WORK/$1.report"; }

# inner_value NAME
inner_value() { awk -v name="$1" '$1 == "inner" && $2 == "value" && $3 == name { value = $4 } END { print value + 0 }' "$WORK/host.report"; }

# cells SYSTEM RW DEPTH FORMAT: IOPS, p99.9 and errors at each loss, each three by FORMAT.
cells() {
  local loss line
  for loss in ${LOSSES//,/ }; do
    line=$(measured_line "$1" "$loss" "$2" "$3")
    # shellcheck disable=SC2059 # the format is an argument
    printf "$4" "$(figure iops "$line")" "$(figure p999_us "$line")" "$(figure errors "$line")"
  done
}

workload_title() {
  printf '4 KiB random %s, depth %s' "${1#rand}" "$2"
}

text_tables() {
  local rw depth system loss
  for rw in randread randwrite; do
    for depth in ${DEPTHS//,/ }; do
      printf '\n%-34s' "$(workload_title "$rw" "$depth")"
      for loss in ${LOSSES//,/ }; do printf ' | %26s' "$loss % loss"; done
      printf '\n%-34s' ""
      for loss in ${LOSSES//,/ }; do printf ' | %7s %11s %6s' IOPS "p99.9 us" errors; done
      printf '\n'
      for system in ${SYSTEMS//,/ }; do
        printf '%-34s%s\n' "  ${TITLES[$system]}" "$(cells "$system" "$rw" "$depth" ' | %7s %11s %6s')"
      done
    done
  done
}

markdown_tables() {
  local rw depth system loss
  for rw in randread randwrite; do
    for depth in ${DEPTHS//,/ }; do
      printf '\n**%s**\n\n| system |' "$(workload_title "$rw" "$depth")"
      for loss in ${LOSSES//,/ }; do printf ' %s %% loss: IOPS | p99.9 µs | errors |' "$loss"; done
      printf '\n|---|'
      for loss in ${LOSSES//,/ }; do printf '%s' '---:|---:|---:|'; done
      printf '\n'
      for system in ${SYSTEMS//,/ }; do
        printf '| %s |%s\n' "${TITLES[$system]}" "$(cells "$system" "$rw" "$depth" ' %s | %s | %s |')"
      done
    done
  done
}

# circumstances: what a reader must know of the run, a line each.
circumstances() {
  local loss
  say "$(date -u '+%Y-%m-%d %H:%M UTC'), commit $(git -C "$QEMU_DIR" describe --always --dirty --exclude '*' 2>/dev/null || echo unknown), guests of 1 processor ($(sed -n 's/^accel //p' "$WORK/store.report")) with Linux $(sed -n 's/^boot [^ ]* //p' "$WORK/store.report"), $(qemu-system-x86_64 --version | sed -n '1s/ (.*//p')."
  say "Machine: $(nproc) processors,$(sed -n '/^model name/ { s/.*://p; q }' /proc/cpuinfo); load average $LOAD_BEFORE before and $(cut -d' ' -f1 /proc/loadavg) after."
  say "Wire: MTU $MTU, netem at both ends: delay $DELAY${JITTER:+, jitter $JITTER}${REORDER:+, reorder $REORDER %}${DUPLICATE:+, duplicate $DUPLICATE %}. Volumes of $VOLUME_MIB MiB in the storage guest's memory; $SECONDS_EACH s each; ours with --security $SECURITY."
  for loss in ${LOSSES//,/ }; do
    say "At $loss % netem lost $(value_of host "$loss-dropped") of $(($(value_of host "$loss-frames") + $(value_of host "$loss-dropped"))) frames to the storage guest and $(value_of store "$loss-dropped") of $(($(value_of store "$loss-frames") + $(value_of store "$loss-dropped"))) back."
  done
  [[ -z $INNER ]] || say "The guest in the guest ($(sed -n 's/^inner accel //p' "$WORK/host.report"), booted in $(sed -n 's/^inner boot \([^ ]*\).*/\1/p' "$WORK/host.report") s) wrote $(inner_value written-KiB) KiB on our disk at the last loss and verified $(inner_value verified-KiB) KiB."
}

json_report() {
  local first=yes loss
  printf '{"commit": "%s", "mtu": %s, "delay": "%s", "volume_mib": %s, "seconds": %s, "wire": [' \
    "$(git -C "$QEMU_DIR" describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)" "$MTU" "$DELAY" "$VOLUME_MIB" "$SECONDS_EACH"
  for loss in ${LOSSES//,/ }; do
    [[ -n $first ]] || printf ', '
    first=''
    printf '{"loss_percent": %s, "lost_to_store": %s, "lost_to_host": %s}' "$loss" "$(value_of host "$loss-dropped")" "$(value_of store "$loss-dropped")"
  done
  printf '],\n "inner": {"written_kib": %s, "verified_kib": %s},\n "measured": [' "$(inner_value written-KiB)" "$(inner_value verified-KiB)"
  awk '$1 == "measured" {
    printf "%s\n  {\"system\": \"%s\", \"loss_percent\": %s, \"rw\": \"%s\", \"depth\": %s", (seen ? "," : ""), $2, $3, $4, $5
    for (i = 6; i < NF; i += 2) printf ", \"%s\": %s", $i, $(i + 1)
    printf "}"
    seen = 1
  }' "$WORK/host.report"
  printf '\n]}\n'
}

write_reports() {
  circumstances >"$WORK/circumstances"
  { cat "$WORK/circumstances" && text_tables; } >"$OUT/report.txt"
  { cat "$WORK/circumstances" && markdown_tables; } >"$OUT/report.md"
  json_report >"$OUT/report.json"
}

# ours_has_no_error LOSS: every measurement of ours there ended requests and none with an error.
ours_has_no_error() {
  awk -v loss="$1" '$1 == "measured" && $2 == "ours" && $3 == loss {
    errors = ""; requests = 0
    for (i = 6; i < NF; i += 2) { if ($i == "errors") errors = $(i + 1); if ($i == "requests") requests = $(i + 1) }
    if (errors != "0" || requests == 0) bad = 1
    seen = 1
  } END { exit !seen || bad }' "$WORK/host.report"
}

# wire_lost LOSS: frames went both ways, and netem lost some of them exactly when it was told to. Of less than 20 that are to be expected none is
# proof of nothing.
wire_lost() {
  local guest
  for guest in store host; do
    awk -v loss="$1" -v frames="$(value_of "$guest" "$1-frames")" -v dropped="$(value_of "$guest" "$1-dropped")" 'BEGIN {
      if (frames == 0) exit 1
      if (loss == 0) exit dropped != 0
      exit dropped == 0 && (frames + dropped) * loss / 100 >= 20
    }' || return 1
  done
}

everything_was_measured() {
  local system loss rw depth
  for system in ${SYSTEMS//,/ }; do
    for loss in ${LOSSES//,/ }; do
      for rw in randread randwrite; do
        for depth in ${DEPTHS//,/ }; do
          [[ -n $(measured_line "$system" "$loss" "$rw" "$depth") ]] || {
            say "not measured: $system at $loss %, $rw, depth $depth"
            return 1
          }
        done
      done
    done
  done
}

# inner_verified: the guest in the guest wrote and verified all of its 8 MiB, and ended well.
inner_verified() {
  (($(inner_value written-KiB) >= 8192 && $(inner_value verified-KiB) >= 8192)) && grep -qx 'inner exit 0' "$WORK/host.report"
}
