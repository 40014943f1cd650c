#!/usr/bin/env bash
# Counts the instructions that the protocol and both workers take for a fixed run on virtual time, and compares them with tests/instructions.txt: more
# than 3 % up or down fails. A processor's noise is not in them, so a change that costs 3 % is seen on any machine.
#
#   tests/instructions.sh            compare
#   tests/instructions.sh --write    take what is counted now as the measure (make instructions); say in the change why it is another
#
# The run is `cirro-sim --steady`: one disk, 4000 requests, a full ring, a wire that loses nothing. Copies and checksums are in the workers' counts as
# valgrind's processor does them.
set -euo pipefail
cd "$(dirname "$0")/.."

requests=4000
band_percent=3
measure=tests/instructions.txt
sim=${CARGO_TARGET_DIR:-target}/checked/cirro-sim
cargo build --quiet --profile checked --locked -p cirro-tests --bin cirro-sim

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! valgrind --tool=callgrind --callgrind-out-file="$work/out" "$sim" --steady "$requests" >"$work/log" 2>&1; then
    cat "$work/log" >&2
    echo "tests/instructions.sh: the run failed" >&2
    exit 1
fi

# Instructions a request: the whole of both turns with all they call; and of the protocol what is its own.
annotate() {
    callgrind_annotate --show-percs=no --auto=no --threshold=100 "$@" "$work/out" 2>/dev/null | tr -d ','
}
turn() {
    annotate --inclusive=yes | awk -v name="$1" -v requests="$requests" \
        'index($0, name) && $1 > most { most = $1 } END { printf "%d", most / requests }'
}
counted() {
    echo "backend-turn $(turn 'cirro_backend::worker::Worker<L>::turn')"
    echo "node-turn $(turn 'cirro_node::node::NodeWorker<L')"
    echo "protocol $(annotate | awk -v requests="$requests" '/cirro_protocol/ { sum += $1 } END { printf "%d", sum / requests }')"
}

counted >"$work/counted"
if [ "${1:-}" = --write ]; then
    {
        echo "# Instructions a request, counted and compared by tests/instructions.sh; 'make instructions' writes this file."
        cat "$work/counted"
    } >"$measure"
    cat "$measure"
    exit 0
fi

failed=0
while read -r name now; do
    was=$(awk -v name="$name" '$1 == name { print $2 }' "$measure")
    if [ -z "$was" ] || [ "$now" -eq 0 ]; then
        verdict="FAILED"
        why="it is not counted, or not in $measure"
    else
        percent=$(awk -v was="$was" -v now="$now" 'BEGIN { printf "%+.2f", (now - was) * 100 / was }')
        why="$now instructions a request, $percent % against $was"
        verdict=$(awk -v percent="$percent" -v band="$band_percent" \
            'BEGIN { print (percent > band || percent < -band) ? "FAILED" : "ok" }')
    fi
    echo "$name: $why"
    echo "test instructions::$name ... $verdict"
    [ "$verdict" = ok ] || failed=1
done <"$work/counted"
if [ "$failed" = 1 ]; then
    echo "A change of more than $band_percent %: look for its cause (callgrind_annotate), or take it as the measure: make instructions"
fi
exit "$failed"
