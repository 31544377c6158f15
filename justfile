# Recipes; `just` lists them.

_default:
    @just --list

# What CI runs
check:
    .ci/run

# Only what is quick: formatting, lints, the rules of the house
quick:
    cargo fmt --all -- --check
    cargo clippy --all-targets --locked -- -D warnings
    cargo test --test it tidy

# One run of the chaos campaign (docs/CHAOS.md)
chaos *args:
    cargo run --release -p chaos -- run {{args}}

# A night of it
nightly hours="8":
    chaos/nightly.sh {{hours}}

# 10,000 clients lose their node
storm *args:
    cargo run --release -p chaos -- storm {{args}}

# Line coverage of src/ by the tests
coverage:
    tests/coverage.sh

# Postgres, three nodes, a demo
dev *args:
    cargo run --release -- dev {{args}}

test *args:
    cargo test {{args}}

fmt:
    cargo fmt --all

# Licences, advisories, sources (needs cargo-deny)
deny:
    cargo deny check
