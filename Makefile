# Every target creates .venv with plain pip if it is missing. PYTHON names the interpreter that does so.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
# The scales whose records are committed; the demo's are not.
COMMITTED := $(filter-out demo,$(sort $(notdir $(patsubst %/records,%,$(wildcard recipes/results/*/records)))))

# Without cached byte code every process compiles torch and transformers again: 18 s of processor time instead of 7.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check bench report clean

demo: .venv/demo
	$(BIN)/epochal data kjv
	$(BIN)/epochal run --scale demo --jobs $(JOBS) --tracker none
	$(BIN)/epochal report --scale demo

# A file of tests stays in one process, which keeps what its tests share. One process more than cores, because tests of
# launchers and schedulers mostly wait.
test: .venv/test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/test
	for name in laws records optimizers losses teachers regularizers ensembles distributed parity; do $(BIN)/python benchmarks/$$name.py || exit 1; done

report: .venv/demo
	for scale in $(COMMITTED); do $(BIN)/epochal report --scale $$scale || exit 1; done
	$(BIN)/python -m recipes._results_page $(COMMITTED)

clean:
	rm -rf .venv work recipes/results/demo

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# A stamp per extra: an interrupted installation is done again, a changed pin installs what changed. The published fira
# package is a test oracle; it comes without its many dependencies. Byte code is compiled at the first import: compiling all
# of it takes half of pip's time.
.venv/demo .venv/test: .venv/%: pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[$*]"
	$(if $(filter test,$*),$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps fira)
	touch $@
