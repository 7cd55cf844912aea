# make demo: train, compare and evaluate three small jobs.   make test: lint, types, import contracts, tests.
# Both make .venv first, on a fresh machine too. PYTHON=... chooses another interpreter (3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed

# Beside Python, some tests need a SLURM, an SSH server and FUSE. They are installed where that starts no service and asks
# nobody (as root in a container of Debian); elsewhere these tests are skipped, and say what to install.
PACKAGES := slurmctld slurmd slurm-client munge iproute2 openssh-server libfuse3-3

.PHONY: packages install demo test suite lint style words types chaos gpu matrix soak docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; found '$(PYTHON)'. Say PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,dev]'
	touch $@

demo: install
	$(BIN)/python -P examples/demo.py

packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -d /run/systemd/system ] && \
	    ! dpkg-query --show $(PACKAGES) >/dev/null 2>&1; then \
	    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; \
	    { apt-get update -qq && apt-get install -qq -y --no-install-recommends $(PACKAGES); } >/dev/null 2>&1 || \
	    echo "not installed: $(PACKAGES); tests that need them are skipped"; \
	fi

# Types are checked beside the tests, which leave a core idle now and then: the first check takes minutes.
test: style packages
	$(MAKE) --no-print-directory --jobs=2 types suite

suite: install
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

lint: style words types

words: install
	$(BIN)/pytest -q --noconftest tests/test_words.py

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy

# The whole of what `make test` runs a seeded sample of; `gpu` needs two of them.
chaos gpu matrix soak: install
	$(BIN)/pytest -m $@ -o timeout=0 $(if $(filter chaos,$@),--capture=no)

# The site, in build/docs; a dead link fails (with --quiet, mkdocs would count no warnings, and so let it pass).
docs: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist *.egg-info
