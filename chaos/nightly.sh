#!/usr/bin/env bash
# A night of chaos: as many hours as given (8), then the mutants and the storm of 10,000 clients. The report is written after every run, so a night that is
# cut short leaves one too. Exits with 1 if a promise was broken, else with what went wrong first: 2, a run could not be carried out; 3, a mutant escaped.
set -euo pipefail
cd "$(dirname "$0")/.."
hours=${1:-8}
folder=${2:-chaos/reports}
cargo build --release -p chaos
status=0
chaos() {
    local code=0
    cargo run --release -p chaos -- "$@" --report "$folder" || code=$?
    if [ "$code" -eq 1 ] || [ "$status" -eq 0 ]; then status=$code; fi
}
chaos campaign --minutes $((hours * 60)) --failpoints
chaos mutants
chaos storm
exit "$status"
