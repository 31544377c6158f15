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
