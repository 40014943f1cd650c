#!/usr/bin/env bash
# Builds the fuzz targets, and runs each for a while.
#
#   tests/fuzz/run.sh build             build only
#   tests/fuzz/run.sh SECONDS [TARGET]  build, then run every target (or one) for SECONDS; fails at the first crash
#
# libFuzzer needs its instrumentation, not a nightly compiler: the flags below are all stable.
set -euo pipefail
cd "$(dirname "$0")"

target_dir=${CARGO_TARGET_DIR:-$PWD/../../target}
# Corpus and crashes; neither is part of the repository.
state_dir=${CIRRO_FUZZ_DIR:-$PWD}
triple=$(rustc -vV | sed -n 's/^host: //p')
mapfile -t targets < <(sed -n '/^\[\[bin\]\]/,/^$/s/^name = "\(.*\)"/\1/p' Cargo.toml)

coverage=(-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares)

build() {
    RUSTFLAGS="${coverage[*]} --cfg fuzzing -Clink-dead-code" cargo build --release --locked --quiet \
        --target "$triple" --target-dir "$target_dir/fuzz"
    local name
    for name in "${targets[@]}"; do
        # One input proves that the target starts.
        "$target_dir/fuzz/$triple/release/$name" -runs=1 >/dev/null 2>&1 || { echo "fuzz target $name does not run" >&2; return 1; }
        echo "test fuzz::$name builds and runs ... ok"
    done
}

fuzz() {
    local name=$1 seconds=$2 log
    log=$(mktemp)
    mkdir -p "$state_dir/corpus/$name" "$state_dir/artifacts/$name"
    echo "fuzz $name for $seconds s"
    if ! "$target_dir/fuzz/$triple/release/$name" -max_total_time="$seconds" -max_len=16384 -timeout=10 -rss_limit_mb=2048 \
        -artifact_prefix="$state_dir/artifacts/$name/" "$state_dir/corpus/$name" >"$log" 2>&1; then
        tail -n 40 "$log"
        rm "$log"
        echo "fuzz $name: crash; replay with: $target_dir/fuzz/$triple/release/$name $state_dir/artifacts/$name/FILE" >&2
        return 1
    fi
    tail -n 1 "$log"
    rm "$log"
}

build
[ "${1:-build}" != build ] || exit 0
# Golden frames are the first corpus. The program that writes them needs no crate, so none is built for it.
CARGO_MANIFEST_DIR=$(dirname "$PWD") rustc --edition 2024 -o "$target_dir/fuzz/seeds" ../golden/seeds.rs
"$target_dir/fuzz/seeds" "$state_dir/corpus"
for name in "${targets[@]}"; do
    if [ -z "${2:-}" ] || [ "$2" = "$name" ]; then fuzz "$name" "$1"; fi
done
