# Every command that a person needs. Start with `make demo` or `make test`; both install what they need (Debian, as root).
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-install lint sim mutants instructions fuzz soak crash-test nested bench doc

MINUTES ?= 1
FROM ?= 1
COUNT ?= 1000
SIM = $${CARGO_TARGET_DIR:-target}/checked/cirro-sim

help: ## Say what there is.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

demo: ## Boot a real guest on a disk that lives across a raw Ethernet link, and prove that its data arrived.
	qemu/demo.sh

test: ## The gate: build, lint and every test, at most 25 minutes on 2 cores.
	tests/run-suites.sh

test-all: ## The gate and every test that takes longer: about 70 minutes on 2 cores.
	tests/run-suites.sh --all

test-install: ## Install the Debian packages that the tests need.
	tests/install.sh

lint: ## Formatting, clippy and shellcheck; warnings are errors.
	tests/lint.sh

sim: ## Run the simulator: SEED=n repeats one run and tells of it, else COUNT=n runs from FROM=n.
	cargo build --quiet --profile checked --locked -p cirro-tests --bin cirro-sim
	$(SIM) $(if $(SEED),--seed $(SEED),--from $(FROM) --count $(COUNT)) $(if $(TRACE),--trace)

mutants: ## Plant deliberate bugs in a copy and see the simulator find each (15 minutes).
	cargo build --quiet --profile checked --locked -p cirro-tests --bin cirro-sim
	$(SIM) --mutants

instructions: ## Count the instructions of a fixed run, and take them as the measure of tests/instructions.txt.
	tests/instructions.sh --write

fuzz: ## Run each fuzz target for MINUTES=1.
	tests/fuzz/run.sh $$(($(MINUTES) * 60))

soak: ## Real daemons under verified load, killed, cut off and stopped at random for MINUTES=1; SEED=n repeats a run.
	cargo run --quiet --release --locked -p cirro-tests --bin cirro-soak -- --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

crash-test: ## A guest works on while both daemons are killed 20 times each and the wire is cut, in both modes.
	cargo build --release --quiet --locked -p cirro-node -p cirro-backend -p cirro-ctl
	qemu/crash-test.sh --kills 20 --mode write-through
	qemu/crash-test.sh --kills 20 --mode write-back

nested: ## Ours, NVMe/TCP and AoE between two guests whose kernels lose frames, and a guest in the guest (8 minutes).
	cargo build --release --quiet --locked -p cirro-node -p cirro-backend -p cirro-ctl
	cargo build --release --quiet --locked -p cirro-tests --bin cirro-load
	qemu/nested/run.sh $(if $(QUICK),--quick)

bench: ## Measure, beside other ways to the same disk; writes docs/PERFORMANCE.md.
	tests/bench/run.sh

doc: ## Build the API documentation of our crates.
	cargo doc --workspace --no-deps --document-private-items --locked
