# The commands a person needs. `make` alone lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The static binary is built for this machine's own triple, named so that its flags do not reach build scripts. Where the
# sources lie is left out of it, and what C calls today is always the same day: the same sources give the same bytes in any
# directory, at any time (make reproducible).
TRIPLE = $(shell rustc -vV | sed -n 's/^host: //p')
TARGET_DIR = $(or $(CARGO_TARGET_DIR),target)
STATIC = SOURCE_DATE_EPOCH=0 RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$(CURDIR)=/imagemirror \
  --remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=/cargo"
BINARY = $(TARGET_DIR)/$(TRIPLE)/release/imagemirror

CRD = crds/imagemirrors.imagemirror.dev.yaml
CHART_CRD = charts/imagemirror/files/crd.yaml
VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' Cargo.toml | head -n 1)

CARGO_DENY = 0.20.2
CARGO_CYCLONEDX = 0.5.9
MDBOOK = 0.5.4

# What libFuzzer needs to see which code an input reaches; none of it needs a nightly compiler.
COVERAGE = -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares
FUZZ_DIR = fuzz/target
FUZZ_SECONDS ?= 10
FUZZ_TARGETS ?= $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))

# The one way in which programs and tests are built: other selections have other features, and build much of it again.
BUILD = cargo build --workspace --bins --tests --locked

# Most tests wait for a server, not for a processor.
export RUST_TEST_THREADS ?= 8

.PHONY: help
help: ## List these commands
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)$$/\1\t\2/p' Makefile | while IFS=$$'\t' read -r name text; do printf '  make %-16s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: release ## Mirror three images between real registries under a real Kubernetes API; KEEP=1 leaves it running
	cargo run --locked -p testenv -- demo --binary $(BINARY) $(if $(KEEP),--keep)

# Built before the environment starts: an error of the compiler should not wait for it.
.PHONY: test
test: release ## Run every test against a real control plane and real registries
	$(BUILD)
	TESTENV=$(TARGET_DIR)/debug/testenv hack/image $(BINARY) $(TARGET_DIR)/image
	$(TARGET_DIR)/debug/testenv up -- cargo test --workspace --locked

# SOAK_MINUTES is 7 to 50. Nobody waits for this in CI.
.PHONY: soak
soak: ## Run the operator with its own timing for SOAK_MINUTES=30, with faults that last as long as real ones
	$(BUILD)
	$(TARGET_DIR)/debug/testenv up -- cargo test --locked --test it -- --ignored --nocapture soak

# Skips, and says why, where no node can be: root and containerd are needed.
.PHONY: e2e
e2e: release e2e-tools ## Install image and chart on a real node, delete the leader in mid-copy, run what was mirrored; needs root
	$(BUILD)
	TESTENV=$(TARGET_DIR)/debug/testenv hack/image $(BINARY) $(TARGET_DIR)/image
	$(TARGET_DIR)/debug/testenv e2e --image $(TARGET_DIR)/image/oci

# From Debian's packages, where they are absent and may be installed.
.PHONY: e2e-tools
e2e-tools:
	@missing=(); \
	for pair in containerd:containerd runc:runc iptables:iptables ip:iproute2; do \
	  command -v $${pair%:*} >/dev/null || missing+=($${pair#*:}); \
	done; \
	[[ -x /usr/lib/cni/bridge || -x /opt/cni/bin/bridge ]] || missing+=(containernetworking-plugins); \
	if [[ $${#missing[@]} -gt 0 && $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" \
	    || echo "not installed: $${missing[*]}" >&2; \
	fi

.PHONY: golden
golden: ## Write tests/golden, docs/cli.md and docs/reference/metrics.md from what the tests see now
	$(BUILD)
	UPDATE_GOLDEN=1 $(TARGET_DIR)/debug/testenv up -- cargo test --locked --test it -- golden every_metric

.PHONY: recording
recording: ## Write docs/recording.svg from a real sync at a terminal
	$(BUILD)
	$(TARGET_DIR)/debug/testenv up -- cargo test --locked --workspace --test it -- --ignored recording

# ROUNDS is how often each run is made, 5 by default. BENCH_PEERS names further peers as NAME=PROGRAM. WORKLOADS (W1, W2,
# W1-far, W2-far) and CLIENTS measure a part of the whole, and write no file. DEADLINE is that of one run, in seconds.
# TMPDIR: the registries' storage belongs into memory, because the noise of disks is larger than what is measured.
.PHONY: bench
bench: release ## Measure against crane, regsync and others, and write benches/RESULTS.md
	$(STATIC) cargo build --release --locked -p imagemirror-bench --target $(TRIPLE)
	$(if $(wildcard /dev/shm),TMPDIR=/dev/shm) $(TARGET_DIR)/$(TRIPLE)/release/imagemirror-bench run \
	  --binary $(BINARY) --results benches/RESULTS.md $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(DEADLINE),--deadline $(DEADLINE)) \
	  $(addprefix --peer ,$(BENCH_PEERS)) $(addprefix --workload ,$(WORKLOADS)) $(addprefix --client ,$(CLIENTS))

# SCALE is further options, such as `--mirrors 100 --tags 10`.
.PHONY: scale
scale: release ## Measure the operator with 1,000 objects and 50,000 tags, and write benches/SCALE.md
	$(STATIC) cargo build --release --locked -p imagemirror-bench --target $(TRIPLE)
	cargo build --locked -p testenv
	$(if $(wildcard /dev/shm),TMPDIR=/dev/shm) $(TARGET_DIR)/debug/testenv up -- \
	  $(TARGET_DIR)/$(TRIPLE)/release/imagemirror-bench scale --binary $(BINARY) --results benches/SCALE.md $(SCALE)

# What is new goes to $(FUZZ_DIR)/corpus, what breaks a target to fuzz/artifacts; fuzz/corpus stays as it was written.
.PHONY: fuzz
fuzz: ## Fuzz what reads text of others, FUZZ_SECONDS=10 each of FUZZ_TARGETS; needs a C++ compiler
	@command -v "$${CXX:-c++}" >/dev/null || { echo 'libFuzzer is built with a C++ compiler: install g++' >&2; exit 1; }
	RUSTFLAGS="$(COVERAGE)" cargo build --release --manifest-path fuzz/Cargo.toml \
	  --target $(TRIPLE) --target-dir $(FUZZ_DIR)
	@for target in $(FUZZ_TARGETS); do \
	  mkdir -p $(FUZZ_DIR)/corpus/$$target fuzz/artifacts/$$target; \
	  dictionary=fuzz/dictionaries/$$target; \
	  echo "==> $$target"; \
	  $(FUZZ_DIR)/$(TRIPLE)/release/$$target -max_total_time=$(FUZZ_SECONDS) -timeout=10 -verbosity=0 \
	    -print_final_stats=1 -artifact_prefix=fuzz/artifacts/$$target/ $$([[ ! -f $$dictionary ]] || echo -dict=$$dictionary) \
	    $(FUZZ_DIR)/corpus/$$target fuzz/corpus/$$target; \
	done

.PHONY: release
release: ## Build the static binary
	$(STATIC) cargo build --release --locked --bin imagemirror --target $(TRIPLE)

.PHONY: image
image: release ## Assemble the container image in target/image/oci, without Docker
	hack/image $(BINARY) $(TARGET_DIR)/image

# Takes a release build more. What must be the same for it to hold: docs/releases.md.
.PHONY: reproducible
reproducible: image ## Build the image again elsewhere, and fail if it is another
	hack/reproducible $(BINARY) $(TARGET_DIR)/image $(TARGET_DIR)/reproducible

.PHONY: generate
generate: ## Write the CRD and its reference from the Rust types; the chart's README and schema from its values
	mkdir -p $(dir $(CHART_CRD)) $(TARGET_DIR)
	cargo run --quiet --locked --bin imagemirror -- crd > $(TARGET_DIR)/crd.yaml
	cp $(TARGET_DIR)/crd.yaml $(CRD)
	cp $(TARGET_DIR)/crd.yaml $(CHART_CRD)
	cargo run --quiet --locked -p testenv -- chart charts/imagemirror
	UPDATE_GOLDEN=1 cargo test --quiet --workspace --locked --test it -- reference_of_the_api >/dev/null

.PHONY: check-generated
check-generated: ## Fail, with a diff, when something generated or kept twice differs
	@$(BUILD)
	@$(TARGET_DIR)/debug/imagemirror crd > $(TARGET_DIR)/crd.yaml
	@diff -u $(CRD) $(TARGET_DIR)/crd.yaml || { echo '$(CRD) is not current: run `make generate`' >&2; exit 1; }
	@diff -u $(CHART_CRD) $(TARGET_DIR)/crd.yaml || { echo '$(CHART_CRD) is not current: run `make generate`' >&2; exit 1; }
	@$(TARGET_DIR)/debug/testenv chart --check charts/imagemirror
	@cargo test --quiet --workspace --locked --test it -- the_reference_ >$(TARGET_DIR)/reference.out 2>&1 \
	  || { cat $(TARGET_DIR)/reference.out; echo 'docs/reference or docs/cli.md is not current: run `make generate golden`' >&2; exit 1; }
	@diff -u --label config/rbac/clusterrole.yaml --label charts/imagemirror/templates/_helpers.tpl \
	  <(sed -n '/^rules:/,/^---/p' config/rbac/clusterrole.yaml | sed '1d;$$d') \
	  <(sed -n '/define "imagemirror.mirrorRules"/,/end -}}/p' charts/imagemirror/templates/_helpers.tpl | sed '1d;$$d') \
	  || { echo 'the ClusterRole of config/rbac and of the chart must be the same' >&2; exit 1; }
	@grep -qx 'version: $(VERSION)' charts/imagemirror/Chart.yaml \
	  && grep -qx 'appVersion: "$(VERSION)"' charts/imagemirror/Chart.yaml \
	  && grep -qx '  newTag: $(VERSION)' config/default/kustomization.yaml \
	  || { echo 'Chart.yaml and config/default/kustomization.yaml must name the version of Cargo.toml, $(VERSION)' >&2; exit 1; }
	@echo 'generated files are current'

.PHONY: fmt
fmt: ## Format the code
	cargo fmt --all
	cargo fmt --manifest-path fuzz/Cargo.toml

.PHONY: lint
lint: ## Check the format, clippy and the documentation, with and without Kubernetes, with traces
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo clippy --lib --no-default-features --locked -- -D warnings
	cargo check --lib --no-default-features --locked
	cargo check --features otel --tests --locked
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

.PHONY: deny
deny: cargo-deny ## Check the licences, sources, build scripts and bans of all dependencies
	cargo deny --locked check bans licenses sources

.PHONY: advisories
advisories: cargo-deny ## Check all dependencies against the advisory database, which is fetched
	cargo deny --locked check advisories

.PHONY: cargo-deny
cargo-deny:
	cargo deny --version 2>/dev/null | grep -qx 'cargo-deny $(CARGO_DENY)' || cargo install --locked cargo-deny --version $(CARGO_DENY)

.PHONY: sbom
sbom: ## Write target/sbom/imagemirror.cdx.json, which names all that is in the static binary (CycloneDX)
	cargo cyclonedx --version 2>/dev/null | grep -qx 'cargo-cyclonedx-cyclonedx $(CARGO_CYCLONEDX)' \
	  || cargo install --locked cargo-cyclonedx --version $(CARGO_CYCLONEDX)
	hack/sbom $(TRIPLE) $(TARGET_DIR)/sbom

.PHONY: docs
docs: ## Make the book of the documentation, target/book; a link in it that leads nowhere is an error
	mdbook --version 2>/dev/null | grep -qx 'mdbook v$(MDBOOK)' \
	  || cargo install --locked mdbook --version $(MDBOOK) --no-default-features --features search
	hack/book mdbook $(TARGET_DIR)

.PHONY: tools
tools: ## Build the programs of the test environment and print where they are
	cargo run --quiet --locked -p testenv -- tools

.PHONY: ci
ci: ## Do what CI does
	.ci/run
