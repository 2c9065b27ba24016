# The two commands of the README are `make demo` and `make test`; both do all set-up themselves.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := build

export CARGO_TARGET_DIR := $(CURDIR)/target
CARGO ?= $(shell command -v cargo || echo $(HOME)/.cargo/bin/cargo)
PROGRAMS := $(CARGO_TARGET_DIR)/debug

# One set of artefacts for everything: `--workspace` resolves one set of features, so nothing is compiled twice.
BUILD := $(CARGO) build --workspace --all-targets --locked

.PHONY: setup build test test-full bench style lint demo clean

setup:
	@tests/setup

build:
	@$(BUILD)
	# The final crate alone gets the flag, so the dependencies are shared with the dynamic build.
	initramfs/build-static "$(PROGRAMS)/static"

test: setup
	@tests/run

# Also what is too large or too slow for every change: full-size trees, long fault runs. Hours.
test-full: setup
	@tests/run --full

# The tables of docs/benchmarks.md beside peers, with optimised programs. `make bench TABLE=pack` makes one.
bench: setup
	@$(PROGRAMS_ONLY) --release
	initramfs/build-static "$(CARGO_TARGET_DIR)/release/static" --release
	"$(CARGO_TARGET_DIR)/release/moor-bench" $(TABLE)

# What needs no compiler comes first: it fails in seconds.
style:
	@$(CARGO) fmt --all --check
	tests/licences

lint: style
	@$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

# Programs only, since the demo needs no test: half the time of `make build` on a machine that has built nothing. One small test
# is named, because only then cargo takes the features that everything else is built with.
PROGRAMS_ONLY := $(CARGO) build --workspace --bins --test addresses --locked

demo: setup
	@$(PROGRAMS_ONLY)
	initramfs/build-static "$(PROGRAMS)/static"
	"$(PROGRAMS)/moor-demo"

clean:
	@$(CARGO) clean
