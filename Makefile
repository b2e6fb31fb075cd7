# slurm-mps: `make demo` shows it on a throw-away cluster, `make test` proves it, `make install` puts it on a node.
# Both of the former run as root on Debian 12 and install what is missing; they change nothing else.

PREFIX ?= /opt/slurm-mps
PLUGINDIR ?= $(firstword $(wildcard /usr/lib/*/slurm-wlm /usr/lib64/slurm /usr/lib/*/slurm) /usr/lib64/slurm)

SYSTEM_PYTHON = /usr/bin/python3
DEV = .cache/dev
DEV_PYTHON = $(DEV)/bin/python3
export PYTHONDONTWRITEBYTECODE = 1
export PIP_CACHE_DIR = $(CURDIR)/.cache/pip

PACKAGES = slurmctld slurmd slurm-client slurm-wlm-basic-plugins libslurm-dev munge \
	gcc libc6-dev make git util-linux python3 python3-venv clang libclang-rt-14-dev cppcheck shellcheck strace \
	debootstrap rpm man-db zsh fish

all: plugin

# What is missing is installed without starting any service: policy-rc.d's 101 is Debian's own word for "do not".
deps:
	@missing=$$(dpkg-query -W -f='$${Package} $${db:Status-Status}\n' $(PACKAGES) 2>/dev/null | \
		awk '$$2 == "installed" { have[$$1] = 1 } END { for (p in have) print p }' | \
		sort | comm -13 - <(printf '%s\n' $(PACKAGES) | sort)); \
	[ -z "$$missing" ] || tests/install-packages.sh $$missing

dev: $(DEV)/.installed

$(DEV_PYTHON): $(DEV)/.installed

$(DEV)/.installed: pyproject.toml
	@echo "make: installing the test tools into $(DEV)"
	@$(SYSTEM_PYTHON) -m venv $(DEV)
	@$(DEV_PYTHON) -m pip install --quiet --disable-pip-version-check \
		$$($(DEV_PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*p["dependencies"], *p["optional-dependencies"]["test"], *p["optional-dependencies"]["docs"])')
	@touch $@

plugin:
	@$(MAKE) --no-print-directory -C spank

simulator:
	@$(MAKE) --no-print-directory -C tests/simulator

build: deps
	@$(MAKE) --no-print-directory plugin simulator dev

demo: build
	@$(DEV_PYTHON) -m tests.lab.demo $(DEMO)

test: build
	@$(DEV_PYTHON) -m pytest $(TESTS)
	@[ -n "$(TESTS)" ] || $(DEV_PYTHON) -m tests.lab.matrix --short

# The tests that need a Slurm on every release; the first time it makes their root file systems below .cache.
# MATRIX=24.11 for one, and SLURM_MPS_RELEASE=24.11 before any other target that starts a cluster.
test-matrix: build
	@$(DEV_PYTHON) -m tests.lab.matrix $(MATRIX)

bench: build
	@$(DEV_PYTHON) -m tests.lab.bench $(BENCH)

# Many nodes and many jobs; SCALE="--nodes 64 --jobs 500" is what it does unless told otherwise.
scale: build
	@$(DEV_PYTHON) -m tests.lab.scale $(SCALE)

# Prolog, epilog and reconcile killed at every change and at random, in every order; ten minutes unless told otherwise.
torture: build
	@$(DEV_PYTHON) -m tests.torture $(TORTURE)

# What a GPU machine without a registry needs for the commands below; carry build/bundle and build/spank there.
bundle: build
	@$(DEV_PYTHON) -m tests.harness.bundle build/bundle $(BUNDLE)

# On real GPUs, as root. Nothing is set on them; with a bundle nothing is installed either, but for .cache in here.
export SLURM_MPS_BUNDLE ?= $(if $(wildcard /usr/sbin/slurmd),,$(wildcard $(CURDIR)/build/bundle))
GPU_PYTHON = $(if $(SLURM_MPS_BUNDLE),.cache/bundle/bin/python3,$(DEV_PYTHON))

.cache/bundle/bin/python3:
	@$(SYSTEM_PYTHON) -m venv --without-pip .cache/bundle
	@$@ $(wildcard $(SLURM_MPS_BUNDLE)/wheels/pip-*.whl)/pip install --quiet --no-index \
		--find-links $(SLURM_MPS_BUNDLE)/wheels pytest hypothesis jsonschema nvidia-ml-py rich

test-gpu: $(GPU_PYTHON)
	@$(GPU_PYTHON) -m pytest -p no:cacheprovider --real-gpu $(or $(TESTS),tests/contract)

hardware: $(GPU_PYTHON)
	@$(GPU_PYTHON) -m tests.lab.hardware

bench-gpu: $(GPU_PYTHON)
	@$(GPU_PYTHON) -m tests.lab.bench --real-gpu --json $$($(GPU_PYTHON) -m tests.lab.hardware.site scripts) $(BENCH)
	@$(GPU_PYTHON) -m tests.lab.hardware.cost $(COST)

worth: $(GPU_PYTHON)
	@$(GPU_PYTHON) -m tests.lab.hardware.worth $(WORTH)

# The figures of docs/benchmarks, from the newest data beside them.
plots: dev
	@$(DEV_PYTHON) -m pip install --quiet --disable-pip-version-check matplotlib
	@$(DEV_PYTHON) -m tests.lab.hardware.plot

# A cluster of simulated nodes with slurm-mps installed, to try things in.
shell: build
	@$(DEV_PYTHON) -m tests.harness.site

# Into the Slurm of this machine, with slurm-mps in $(PREFIX); `slurm-mps uninstall` undoes all but $(PREFIX).
install:
	[ -x $(PREFIX)/bin/python3 ] || $(SYSTEM_PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/python3 -m pip install --quiet --disable-pip-version-check .
	$(PREFIX)/bin/slurm-mps install $(INSTALL)

# The same with the plugin that was built here.
install-hooks:
	$(PREFIX)/bin/slurm-mps install --no-doctor --plugin build/spank/spank_mps.so --plugin-dir $(PLUGINDIR)

# The site in build/docs/html and the man pages in build/docs/man; a warning is an error.
docs: dev man
	@$(DEV)/bin/sphinx-build -q -W --keep-going -b html -d build/docs/doctrees docs build/docs/html
	@echo build/docs/html/index.html

man: dev
	@$(DEV)/bin/sphinx-build -q -W --keep-going -b man -d build/docs/doctrees docs build/docs/man

# Packages for the Slurm of this machine; each prints the path of what it built.
deb: plugin man
	@PIP="$(DEV_PYTHON) -m pip" packaging/build-deb.sh $(PLUGINDIR)

rpm: plugin man
	@PIP="$(DEV_PYTHON) -m pip" packaging/build-rpm.sh $(PLUGINDIR)

clean:
	rm -rf build

SHELL = /bin/bash
.PHONY: all build deps dev plugin simulator demo test test-matrix bench scale torture bundle test-gpu hardware bench-gpu \
	worth plots shell install install-hooks deb docs man rpm clean
