#!/usr/bin/env bash
# Runs suites, prints what each took of its budget, and ends with a line 'N passed, N failed'.
#
#   tests/run-suites.sh              the gate
#   tests/run-suites.sh --all        the gate and what takes longer
#   tests/run-suites.sh NAME...      these only, of both (after install and build)
#
# A suite is killed at twice its budget. The log of each stays in target/test-logs; a failed one is shown. A test that is ignored
# counts as failed: nothing is skipped silently.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

logs=${CARGO_TARGET_DIR:-target}/test-logs
# Where `build` puts the daemons that the suites run.
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
release=$target/release
export target release
# name | budget in seconds | command. The gate's budgets add up to 29 minutes; a run takes less.
# shellcheck disable=SC2016 # the shell that runs a suite expands it
gate=(
    'install|40|tests/install.sh'
    'build|380|cargo build --workspace --release --locked --quiet && cargo test --workspace --profile checked --no-run --locked --quiet'
    'lint|50|tests/lint.sh'
    'unit|180|cargo test --workspace --profile checked --lib --bins --test "[!e]*" --locked'
    'fuzz|160|tests/fuzz/run.sh build'
    'sim|200|"$target/checked/cirro-sim" --from 1 --count 9000 && "$target/checked/cirro-sim" --random --count 1500'
    'instructions|40|tests/instructions.sh'
    'e2e|330|CIRRO_BIN_DIR=$release cargo test --workspace --profile checked --test e2e --locked -- --test-threads=1'
    'udp|55|CIRRO_LINK_MODE=udp CIRRO_BIN_DIR=$release cargo test --workspace --profile checked --test e2e --locked -- --test-threads=1 matrix::what_is_written_is_read_at_mtu_1500 path:: sessions::requests_wait sharing::two_nodes ownership::of_two'
    'xdp|45|CIRRO_LINK_MODE=xdp CIRRO_BIN_DIR=$release cargo test --workspace --profile checked --test e2e --locked -- --test-threads=1 matrix::what_is_written_is_read_at_mtu_9000 path::a_path privilege::daemons_give xdp::'
    'guest|65|for options in "" "--loss 1 --vcpus 4"; do qemu/guest-test.sh --bin-dir "$release" $options || exit 1; done; SECURITY=none qemu/guest-test.sh --bin-dir "$release" --mtu 1500'
    'resize|40|qemu/resize-test.sh --bin-dir "$release"'
    'libvirt|60|qemu/libvirt-test.sh --bin-dir "$release"'
    'crash|85|qemu/crash-test.sh --bin-dir "$release" --kills 3 --mode write-back'
)
# shellcheck disable=SC2016
longer=(
    'moves|360|qemu/migration-test.sh --bin-dir "$release" --times 5 --aborts && qemu/broken-log-test.sh --bin-dir "$release"'
    'actions|600|qemu/actions-test.sh --bin-dir "$release"'
    'nested|720|qemu/nested/run.sh --bin-dir "$release"'
    'suites|1500|qemu/suites-test.sh --bin-dir "$release"'
    'keys|320|CIRRO_SECURITY=keys CIRRO_BIN_DIR=$release cargo test --workspace --profile checked --test e2e --locked -- --test-threads=1 --skip tap:: --skip keys::'
    'crashes|450|for mode in write-through write-back; do qemu/crash-test.sh --bin-dir "$release" --kills 20 --mode $mode || exit 1; done'
    'mutants|1200|"$target/checked/cirro-sim" --mutants'
)

passed=0
failed=0
summary=()

# Adds what the log says to the counts: cargo's result lines, or else lines 'test NAME ... ok', or else the exit code alone.
count() {
    local log=$1 code=$2 ok=0 bad=0 ignored=0
    if grep -q '^test result: ' "$log"; then
        read -r ok bad ignored < <(awk '/^test result: / { ok += $4; bad += $6; ignored += $8 } END { print ok, bad, ignored }' "$log")
    else
        ok=$(grep -c '^test .* \.\.\. ok$' "$log")
        bad=$(grep -c '^test .* \.\.\. FAILED$' "$log")
    fi
    bad=$((bad + ignored))
    if [ "$code" != 0 ] && [ "$bad" = 0 ]; then bad=1; fi
    if [ "$code" = 0 ] && [ "$((ok + bad))" = 0 ]; then ok=1; fi
    passed=$((passed + ok))
    failed=$((failed + bad))
    counted="$ok passed, $bad failed"
    [ "$ignored" = 0 ] || counted="$counted ($ignored of them ignored)"
    [ "$bad" = 0 ]
}

run() {
    local name=$1 budget=$2 command=$3 start=$SECONDS code=0 verdict=ok took
    local log=$logs/$name.log
    timeout --kill-after=10 $((2 * budget)) bash -c "$command" >"$log" 2>&1 </dev/null || code=$?
    took=$((SECONDS - start))
    count "$log" "$code" || verdict=FAILED
    [ "$code" != 124 ] || verdict="FAILED, killed at twice its budget"
    [ "$took" -le "$budget" ] || verdict="$verdict, over budget"
    line=$(printf '%-10s %4d s of %4d s  %s (%s)' "$name" "$took" "$budget" "$verdict" "$counted")
    summary+=("$line")
    echo "suite $line"
    case $verdict in
        FAILED*)
            grep -E '^test .* FAILED$|^error' "$log" | head -n 40
            echo "--- last lines of $log"
            tail -n 100 "$log"
            echo "--- end of $log"
            return 1
            ;;
    esac
}

main() {
    local suite name budget command start=$SECONDS suites=("${gate[@]}") of=1500
    mkdir -p "$logs"
    if [ "$(id -u)" != 0 ]; then
        echo "tests/run-suites.sh: run it as root: the tests make network namespaces and install packages" >&2
        exit 1
    fi
    if [ $# -gt 0 ]; then suites+=("${longer[@]}"); fi
    if [ "${1:-}" = --all ]; then
        shift
        of=$(printf '%s\n' "${suites[@]}" | awk -F'|' '{ sum += $2 } END { print sum }')
    fi
    for name in "$@"; do
        if [[ " ${suites[*]%%|*} " != *" $name "* ]]; then
            echo "tests/run-suites.sh: no suite $name; there are: ${suites[*]%%|*}" >&2
            exit 2
        fi
    done
    for suite in "${suites[@]}"; do
        IFS='|' read -r name budget command <<<"$suite"
        case $name in
            install | build) ;;
            *) if [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then continue; fi ;;
        esac
        run "$name" "$budget" "$command" && continue
        case $name in
            install | build)
                echo "the other suites need this one and were not run"
                break
                ;;
        esac
    done
    echo
    printf '%s\n' "${summary[@]}"
    printf '%-10s %4d s of %4d s\n\n' total $((SECONDS - start)) "$of"
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ]
}

main "$@"
