#!/usr/bin/env bash
# Formatting, clippy and shellcheck. Called by run-suites.sh and `make lint`.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo fmt --all --check
cargo fmt --manifest-path tests/fuzz/Cargo.toml --check -- --config-path rustfmt.toml
echo "test lint::format ... ok"
cargo clippy --workspace --all-targets --profile checked --locked --quiet -- -D warnings
echo "test lint::clippy ... ok"
mapfile -t scripts < <(grep -rlE --include='*' '^#!/usr/bin/env bash|^# shellcheck shell=' \
    --exclude-dir={.git,target,.cache,corpus,artifacts} .)
shellcheck -x -P SCRIPTDIR "${scripts[@]}"
echo "test lint::shellcheck ... ok"
