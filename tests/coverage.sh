#!/usr/bin/env bash
# Line coverage of src/ by the README's tests: what cargo test runs, and the program that the tests start. Prints a table by
# room and the sum; needs rustup's component llvm-tools, which it fetches if it may.
set -euo pipefail
cd "$(dirname "$0")/.."
sysroot=$(rustc --print sysroot)
tools() { find "$sysroot" -name "$1" -type f -perm -u+x | head -n 1; }
[[ -n $(tools llvm-cov) ]] || rustup component add llvm-tools >&2 || {
    echo "no llvm-cov: rustup component add llvm-tools" >&2
    exit 1
}
folder=${CARGO_TARGET_DIR:-target}/coverage
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -f "$folder"/*.profraw
export CARGO_TARGET_DIR=$folder RUSTFLAGS="-C instrument-coverage"
# A pool of files for each program: one for each process would fill the disk.
export LLVM_PROFILE_FILE="$folder/%4m.profraw"
list=$(cargo test --package tidewire --lib --bins --test it --no-run --message-format=json)
cargo test --package tidewire --lib --bins --test it >&2
objects=()
while read -r path; do objects+=(--object "$path"); done < <(
    grep -o '"executable":"[^"]*"' <<<"$list" | cut -d'"' -f4 | sort -u
)
"$(tools llvm-profdata)" merge --sparse "$folder"/*.profraw --output "$folder/all.profdata"
"$(tools llvm-cov)" export "${objects[@]}" --instr-profile "$folder/all.profdata" --summary-only |
    python3 -c '
import collections, json, sys
root = sys.argv[1]
files = json.load(sys.stdin)["data"][0]["files"]
rooms = collections.defaultdict(lambda: [0, 0])
for file in files:
    name = file["filename"]
    if not name.startswith(root):
        continue
    room = name[len(root) :].split("/")[0].removesuffix(".rs")
    lines = file["summary"]["lines"]
    for key in (room, "all of src"):
        rooms[key][0] += lines["covered"]
        rooms[key][1] += lines["count"]
for room, (covered, count) in sorted(rooms.items(), key=lambda item: item[1][0] / max(1, item[1][1])):
    print(f"{room:<16} {100 * covered / max(1, count):6.1f} %  {covered:>6} of {count}")
' "$PWD/src/"
