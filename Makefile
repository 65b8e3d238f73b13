# All that one does with this project. `make` alone lists it.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
WIRE := nodeservice/wire
SOURCES := nodeservice tests tools $(wildcard benchmarks)
# Tests and the demo talk to the engine that `make engine` found, and to the MinIO that `make minio` found.
WITH_ENGINE = DOCKER_HOST=$$(tools/engine.sh) MINIO_BIN=$$(tools/minio.sh)

.PHONY: help setup engine image minio test-deps proto fmt lint test-fast test test-vm test-gpu soak bench bench-quick demo demo-gpu lock clean package deb lint-ansible

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make .venv with the command .venv/bin/nodeservice (again only when the lock file changed)
	@tools/setup.sh

engine: setup ## Find a container engine, or install and start one (Debian and Ubuntu, as root)
	@tools/engine.sh --start >/dev/null

image: engine ## Build nodeservice/demo and nodeservice/wordcount from a static busybox
	@tools/image.sh

minio: ## Find a MinIO server for the S3 tests, or build one where Go is installed
	@tools/minio.sh >/dev/null

test-deps: ## Install what only the tests need (Debian and Ubuntu, as root)
	@tools/test_deps.sh

proto: setup ## Generate the wire package from proto/
	@$(BIN)/python -m grpc_tools.protoc -I$(WIRE)=proto/cluster \
		--python_out=. --pyi_out=. --grpc_python_out=. $(WIRE)/master_worker.proto

fmt: setup ## Format, and repair what ruff can repair
	@$(BIN)/ruff check --quiet --fix-only $(SOURCES)
	@$(BIN)/ruff format --quiet $(SOURCES)

lint: setup ## Style, types and import layers
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/ruff format --quiet --check $(SOURCES)
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo || { echo "lint-imports: see .importlinter for the layers"; exit 1; }

lint-ansible: setup ## The Ansible collection, by ansible-lint (production profile, offline) and yamllint
	@cd ansible && ../$(BIN)/yamllint --strict . ../tests/ansible
	@cd ansible && PATH=$(CURDIR)/$(BIN):$$PATH ../$(BIN)/ansible-lint --offline -q

test-fast: setup ## Tests without engine or servers, offline, in seconds
	@$(BIN)/pytest -q -m "not engine and not minio and not crash and not slow" --hypothesis-profile=fast tests/core tests/unit tests/contract

# Two files of tests at a time: most of the time of most of them is waiting.
test: setup engine image minio test-deps lint lint-ansible ## Installs what is missing, lints, runs all tests but those of test-vm
	@$(WITH_ENGINE) $(BIN)/pytest -q -m "not vm" -n 2 --dist loadfile --no-loadscope-reorder

test-vm: setup ## Limits, package and playbooks on cgroup v2 with systemd, in virtual machines (Debian x86_64, root; hours; options: VM=tests/vm/FILE)
	@echo "Boots Debian in QEMU, without KVM: minutes for each test. Consoles, journals and the nodes' logs stay in build/vm." >&2
	@mkdir -p build && $(BIN)/pytest -v -m vm --durations=0 --durations-min=1 --basetemp=build/vm $(or $(VM),tests/vm)

test-gpu: setup ## Checks this machine's NVIDIA GPUs, changes no setting of theirs, writes evidence (options: GPU="--gpu UUID")
	@$(BIN)/python tools/test_gpu.py $(GPU)

soak: setup engine minio ## A cluster whose parts are killed and frozen at random, seed by seed (root; some minutes each)
	@$(WITH_ENGINE) $(BIN)/python tools/soak.py $(SOAK)

bench: setup engine image minio ## Measure everything beside its baselines: JSON, tables and plots in build/bench (40 minutes; calm machine)
	@$(WITH_ENGINE) $(BIN)/python -m benchmarks run --out "$${BENCH_OUT:-build/bench/full.json}"

bench-quick: setup engine image minio ## The same, smaller, in minutes; BENCH_OUT names the JSON
	@$(WITH_ENGINE) $(BIN)/python -m benchmarks run --quick --out "$${BENCH_OUT:-build/bench/quick.json}"

demo: setup engine image ## The main job, live: master, node and a batch of tasks
	@DOCKER_HOST=$$(tools/engine.sh) $(BIN)/python tools/demo.py

demo-gpu: setup engine ## Sixteen pretended GPUs on two nodes, live: leases, parts, a fault, the bill (root, C compiler)
	@$(BIN)/python tools/demo_gpu.py

package: setup ## Build the wheel and its list of components (CycloneDX) into dist/
	@tools/package.sh >/dev/null

deb: setup ## Build dist/nodeservice_VERSION_ARCH.deb for this Debian or Ubuntu (DEB_VERSION names another version)
	@tools/deb.sh >/dev/null

lock: setup ## Write requirements/*.txt anew from pyproject.toml
	@tools/lock.sh

clean: ## Remove everything that make put into this folder
	@rm -rf .venv .demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
