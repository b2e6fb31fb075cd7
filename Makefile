# slurm-mps: `make demo` shows it on a throw-away cluster, `make test` proves it, `make install` puts it on a node.
# The first two run as root on Debian 12 or 13, install what is missing, and change nothing else: tests/README.md.

PREFIX ?= /opt/slurm-mps
PLUGINDIR ?= $(firstword $(wildcard /usr/lib/*/slurm-wlm /usr/lib64/slurm /usr/lib/*/slurm) /usr/lib64/slurm)

SYSTEM_PYTHON = /usr/bin/python3
DEV = .cache/dev
DEV_PYTHON = $(DEV)/bin/python3
export PYTHONDONTWRITEBYTECODE = 1
export PIP_CACHE_DIR = $(CURDIR)/.cache/pip

SLURM = slurmctld slurmd slurm-client slurm-wlm-basic-plugins libslurm-dev munge
# What the demo needs; with SLURM_MPS_RELEASE its Slurm comes into a root file system below .cache.
DEMO_PACKAGES = gcc libc6-dev make git util-linux python3 python3-venv $(if $(SLURM_MPS_RELEASE),debootstrap,$(SLURM))
TEST_PACKAGES = $(sort $(DEMO_PACKAGES) $(SLURM) debootstrap clang libclang-rt-dev cppcheck shellcheck strace rpm man-db \
	zsh fish charliecloud-runtime)

plugin: ## the plugin alone, in build/spank
	$(call compile,spank)

simulator:
	$(call compile,tests/simulator)

QUIET = --no-print-directory $(if $(V),,-s)

# V=1 shows the compiler's commands.
define compile
	@$(MAKE) -sq -C $(1) 2>/dev/null || echo "make: compiling $(1)"
	@$(MAKE) $(QUIET) -C $(1)
endef

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

# The Python of the demo, without packages, and the tools of the tests in it.
$(DEV_PYTHON):
	@$(SYSTEM_PYTHON) -m venv $(DEV)

dev: $(DEV)/.tools

$(DEV)/.tools: pyproject.toml
	@echo "make: installing the test tools into $(DEV)"
	@$(SYSTEM_PYTHON) -m venv $(DEV)
	@$(DEV_PYTHON) -m pip install --quiet --disable-pip-version-check \
		$$($(DEV_PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*p["dependencies"], *p["optional-dependencies"]["test"], *p["optional-dependencies"]["docs"])')
	@touch $@

build:
	@tests/harness/prepare.sh $(DEMO_PACKAGES)
	@$(MAKE) $(QUIET) $(if $(SLURM_MPS_RELEASE),,plugin) simulator $(DEV_PYTHON)

build-tests:
	@tests/harness/prepare.sh $(TEST_PACKAGES)
	@$(MAKE) $(QUIET) plugin simulator dev

demo: build ## one MPS job from sbatch to nothing left, on a throw-away Slurm
	@$(DEV_PYTHON) -m tests.lab.demo $(DEMO)

shell: build ## a shell in a throw-away cluster of simulated nodes, to try things in
	@$(DEV_PYTHON) -m tests.harness.site

check: build-tests ## format, lint, types, C, unit tests, links, a few jobs on a real Slurm: one minute
	@$(SUITE) --quick

test: build-tests ## all tests, in ten minutes; TESTS=tests/unit for some, JOBS=4 at a time
	@$(SUITE) $(or $(TESTS),--releases)

SUITE = $(DEV_PYTHON) -m tests.harness.suite $(if $(JOBS),--jobs $(JOBS))

test-accounting: build-tests ## what slurmdbd and Prometheus have of MPS jobs; installs both and MariaDB (300 MB)
	@tests/harness/prepare.sh slurmdbd mariadb-server prometheus
	@$(SUITE) tests/slurm/test_accounting.py tests/node/test_metrics.py

test-matrix: build-tests ## what needs a Slurm, on every release (ten to twenty minutes each); MATRIX=24.11 for one
	@$(DEV_PYTHON) -m tests.lab.matrix $(MATRIX)

test-vm: build-tests ## the .deb in virtual machines with systemd: restarts, power cut, purge; VM=24.11 for one
	@tests/harness/prepare.sh qemu-system-x86 e2fsprogs
	@$(DEV_PYTHON) -m tests.lab.vm $(VM)

check-clones: build-tests ## the demo on bare Debian systems, from clones in many places (ten minutes)
	@$(DEV_PYTHON) -m tests.lab.clones $(CLONES)

torture: build-tests ## hooks killed at every change and at random, in every order; TORTURE="--minutes 10"
	@$(DEV_PYTHON) -m tests.torture $(TORTURE)

bench: build-tests ## what a job's start and end cost
	@$(DEV_PYTHON) -m tests.lab.bench $(BENCH)

scale: build-tests ## many nodes and many jobs; SCALE="--nodes 64 --jobs 500"
	@$(DEV_PYTHON) -m tests.lab.scale $(SCALE)

# What a GPU machine without a registry needs for the commands below; carry build/bundle and build/spank there. With
# BUNDLE="--release 26.05" it is that release of Slurm in a whole root file system, and build/bundle is all.
bundle: build-tests
	@$(DEV_PYTHON) -m tests.harness.bundle build/bundle $(BUNDLE)

# On real GPUs, as root. Nothing is set on them; with a bundle nothing is installed either, but for .cache in here.
export SLURM_MPS_BUNDLE ?= $(if $(wildcard /usr/sbin/slurmd),,$(wildcard $(CURDIR)/build/bundle))
GPU_TOOLS = $(if $(SLURM_MPS_BUNDLE),.cache/bundle/bin/python3,$(DEV)/.tools)
GPU_PYTHON = $(dir $(GPU_TOOLS))$(if $(SLURM_MPS_BUNDLE),,bin/)python3

.cache/bundle/bin/python3:
	@$(SYSTEM_PYTHON) -m venv --without-pip .cache/bundle
	@$@ $(wildcard $(SLURM_MPS_BUNDLE)/wheels/pip-*.whl)/pip install --quiet --no-index \
		--find-links $(SLURM_MPS_BUNDLE)/wheels pytest hypothesis jsonschema nvidia-ml-py rich

test-gpu: $(GPU_TOOLS) ## the simulated GPUs' tests on real GPUs
	@$(GPU_PYTHON) -m pytest -p no:cacheprovider --real-gpu $(or $(TESTS),tests/contract)

hardware: $(GPU_TOOLS) ## everything else that real GPUs can show
	@$(GPU_PYTHON) -m tests.lab.hardware

containers: $(GPU_TOOLS) ## programs in containers on a real GPU (a minute)
	@$(GPU_PYTHON) -m tests.lab.hardware.containers

bench-gpu: $(GPU_TOOLS) ## the benchmarks on real GPUs
	@$(GPU_PYTHON) -m tests.lab.bench --real-gpu --json $$($(GPU_PYTHON) -m tests.lab.hardware.site scripts) $(BENCH)
	@$(GPU_PYTHON) -m tests.lab.hardware.cost $(COST)

worth: $(GPU_TOOLS) ## what MPS gains a program, on real GPUs
	@$(GPU_PYTHON) -m tests.lab.hardware.worth $(WORTH)

sharing: $(GPU_TOOLS) ## several jobs on one real GPU, in each way, and one cancelled; SHARING="--limit 150 cancelled"
	@$(GPU_PYTHON) -m tests.lab.hardware.sharing $(SHARING)

many-gpus: $(GPU_TOOLS) ## 48 ranks on each of several real GPUs, a fault, stuck kernels; MANY_GPUS="--limit 150"
	@$(GPU_PYTHON) -m tests.lab.hardware.many_gpus $(MANY_GPUS)

monitors: $(GPU_TOOLS) ## what NVIDIA's monitors say of MPS programs, on a real GPU (half a minute)
	@$(GPU_PYTHON) -m tests.lab.hardware.monitors

# The figures of docs/benchmarks, from the newest data beside them.
plots: dev
	@$(DEV_PYTHON) -m pip install --quiet --disable-pip-version-check matplotlib
	@$(DEV_PYTHON) -m tests.lab.hardware.plot

install: ## into the Slurm of this machine, in PREFIX=/opt/slurm-mps; "slurm-mps uninstall" undoes it
	[ -x $(PREFIX)/bin/python3 ] || $(SYSTEM_PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/python3 -m pip install --quiet --disable-pip-version-check .
	$(PREFIX)/bin/slurm-mps install $(INSTALL)

# The same with the plugin that was built here.
install-hooks:
	$(PREFIX)/bin/slurm-mps install --no-doctor --plugin build/spank/spank_mps.so --plugin-dir $(PLUGINDIR)

docs: dev man ## the site in build/docs/html and the man pages in build/docs/man
	@$(SPHINX) -b html docs $(DOCS)/html
	@echo $(DOCS)/html/index.html

man: dev
	@$(SPHINX) -b man docs $(DOCS)/man

# A warning is an error. One at a time: all write docs/generated first.
DOCS ?= build/docs
SPHINX = mkdir -p $(DOCS) && flock .cache/docs.lock $(DEV)/bin/sphinx-build -q -W --keep-going -d $(DOCS)/doctrees

deb: plugin dev ## a .deb for the Slurm of this machine; prints its path
	@packaging/build-deb.sh $(PLUGINDIR)

rpm: plugin dev ## an .rpm likewise
	@packaging/build-rpm.sh $(PLUGINDIR)

clean: ## remove build; the tools and roots in .cache stay
	rm -rf build

SHELL = /bin/bash
.PHONY: plugin simulator help dev build build-tests demo shell check test test-accounting test-matrix test-vm check-clones torture bench scale bundle test-gpu \
	hardware containers bench-gpu worth sharing monitors plots install install-hooks docs man deb rpm clean
