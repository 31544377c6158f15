#!/usr/bin/env bash
# A night of chaos: as many hours as given (8), then the mutants and the storm of 10,000 clients. The report is written after every run, so a night that is
# cut short leaves one too. Exits with 1 if a promise was broken.
set -euo pipefail
cd "$(dirname "$0")/.."
hours=${1:-8}
folder=${2:-chaos/reports}
cargo build --release -p chaos
status=0
cargo run --release -p chaos -- campaign --minutes $((hours * 60)) --failpoints --report "$folder" || status=$?
cargo run --release -p chaos -- mutants --report "$folder" || status=$?
cargo run --release -p chaos -- storm --report "$folder" || status=$?
exit "$status"
