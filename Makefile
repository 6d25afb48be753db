# `make run` trains two networks of one size on the built-in images; `make test` is everything CI checks.
# Both make .venv once, with pip alone. Another interpreter: make run PYTHON=/path/to/python3.12
PYTHON ?= python3
BIN := .venv/bin
RUFF := $(BIN)/ruff check --quiet --isolated --target-version py310 --line-length 130 --select E,F,W,B,UP
# Notebooks set up what the next cell uses and end in one line that exports them.
RUFF += --extend-exclude _modidx.py --ignore E402,W292,B018,B905 \
    --per-file-ignores '*.ipynb:E702' --per-file-ignores '*.ipynb:F811' --per-file-ignores 'package.ipynb:F401'
MYPY := $(BIN)/mypy --ignore-missing-imports --disallow-untyped-defs --disallow-incomplete-defs --check-untyped-defs \
    --no-implicit-reexport --extra-checks --strict-equality --warn-redundant-casts --warn-unreachable

export PIP_DISABLE_PIP_VERSION_CHECK := 1
.NOTPARALLEL:
.PHONY: run test bench docs export picture readme colab test-colab test-package clean

run: .venv/.installed
	@$(BIN)/python -m attn_cifar study demo

# One thread for each of two workers, so that two cores are used and not fought over; each new process finds compiled modules.
test: export OMP_NUM_THREADS := 1
test: export PYTHONDONTWRITEBYTECODE :=
test: .venv/.installed-dev
	@echo "lint" && $(RUFF) attn_cifar tests nbs setup.py .github
	@echo "types and notebooks" && { $(MYPY) attn_cifar & types=$$!; $(BIN)/nbdev_test --n_workers 2 && wait $$types; }
	@echo "tests" && $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder tests

# Measure training through other loops and ours; DATA=folder for images other than the downloaded CIFAR-10.
bench: .venv-bench/.installed
	@.venv-bench/bin/python -m attn_cifar study $(or $(STUDY),speed) $(if $(DATA),--data $(DATA))

export: .venv/.installed-dev
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export

# The book: _docs/index.html.
docs: .venv/.installed-docs
	@$(BIN)/python .github/site.py

# The picture of README, from CIFAR-10; DATA=folder for images other than the downloaded ones.
picture: .venv/.installed-dev
	@$(BIN)/python .github/picture.py $(DATA)

readme: .venv/.installed-dev
	@$(BIN)/python .github/readme.py

# The badge and first cell of every notebook; then all of them as Colab runs them: alone, in order, in a clean environment with
# Colab's versions (.github/colab.txt), so PYTHON must be 3.12. NOTEBOOKS="01_data quickstart" for some of them.
colab: .venv/.installed-dev
	@$(BIN)/python .github/colab.py

test-colab:
	@$(PYTHON) .github/colab.py --try $(if $(DATA),--data $(if $(filter cifar10 shapes,$(DATA)),$(DATA),$(abspath $(DATA)))) $(NOTEBOOKS)

# The wheel and the sdist in a clean environment on each Python that is at hand, one after another.
test-package:
	@$(PYTHON) .github/package.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find attn_cifar nbs tests .github -name __pycache__ -prune -exec rm -rf {} +

# pip is the last thing venv writes: where ensurepip is missing, the next make tries again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: add PYTHON=/path/to/it")'
	@$(PYTHON) -m venv .venv

.venv/.installed: settings.ini setup.py | $(BIN)/pip
	@echo "installing into .venv: minutes, and gigabytes unless torch is the CPU-only one (see README)"
	@$(BIN)/python -m pip install -q --use-pep517 -e . && touch $@

.venv-bench/.installed: settings.ini setup.py
	@$(PYTHON) -m venv .venv-bench
	@echo "installing into .venv-bench: minutes, and gigabytes"
	@.venv-bench/bin/python -m pip install -q --use-pep517 -e '.[bench]' && touch $@

.venv/.installed-dev: settings.ini setup.py | $(BIN)/pip
	@echo "installing into .venv: minutes, and gigabytes unless torch is the CPU-only one (see README)"
	@$(BIN)/python -m pip install -q --use-pep517 -e '.[dev]' && touch .venv/.installed $@

.venv/.installed-docs: settings.ini setup.py | $(BIN)/pip
	@$(BIN)/python -m pip install -q --use-pep517 -e '.[docs]' && touch .venv/.installed $@
