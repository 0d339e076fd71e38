# Everything a newcomer or a developer runs. Needs Python 3.10 or later; uses uv where it is there.

PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null)
WORKERS ?= 2
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: compare test test-addons test-versions lint format docs support step-cost catalogue-cost step-cost-addons memory evidence \
	suite-cost foreign-attack clean

compare: .venv/installed  ## Compare five strategies on handwritten digits; the report goes to results/.
	.venv/bin/trainstep compare docs/experiment.yaml --output results

test: .venv/installed  ## Run the tests with the newest TensorFlow and Keras 3.
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile

test-addons: .venv-addons/installed  ## Run the same tests with Keras 2 and tensorflow-addons.
	.venv-addons/bin/python -m pytest -n $(WORKERS) --dist loadfile

test-versions:  ## Install and import on every supported Python, and run the tests on the lowest Keras 3.
	tests/versions.sh

lint: .venv/installed  ## Check style, formatting and types.
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	mkdir -p .typing && ln -sfn .. .typing/trainstep
	.venv/bin/pyright

format: .venv/installed  ## Put imports and formatting in order.
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/installed  ## Write the tables in the README and the schema of experiments anew.
	.venv/bin/python docs/catalogue.py
	.venv/bin/python docs/evidence.py
	.venv/bin/python docs/findings.py

support: .venv/installed .venv-addons/installed  ## Write anew what the tests show of each strategy.
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile -m shows --ledger=docs/support/keras-3.json
	.venv-addons/bin/python -m pytest -n $(WORKERS) --dist loadfile -m shows --ledger=docs/support/keras-2.json
	.venv/bin/python docs/support.py

step-cost: .venv/installed  ## Measure what a step of each strategy costs.
	.venv/bin/python -m trainstep.benchmarks.step_cost

catalogue-cost: .venv/installed  ## Measure what a step of every strategy costs, and keep what came out.
	.venv/bin/python -m trainstep.benchmarks.catalogue_cost --output benchmarks/results

step-cost-addons: .venv-addons/installed  ## The same on Keras 2, beside GradientAccumulator.
	# Its metadata asks for a TensorFlow older than tensorflow-addons runs on; its code does not.
	$(ADDONS_INSTALL) --quiet --no-deps gradient-accumulator==0.5.2
	.venv-addons/bin/python -m trainstep.benchmarks.step_cost

memory: .venv/installed  ## Measure what micro_batches saves of memory, and gradient_accumulation takes.
	.venv/bin/python -m trainstep.benchmarks.memory

evidence: .venv/installed results/digits_cnn.keras  ## Run the experiments in benchmarks/experiments, and keep what came out.
	# With a store, so that a run that was stopped goes on; runs of an earlier day are in another.
	.venv/bin/python -m trainstep.benchmarks.evidence benchmarks/experiments/*.yaml --output benchmarks/results --store results/evidence-$$(date -u +%F).sqlite

# The teacher of benchmarks/experiments/distillation.yaml.
results/digits_cnn.keras: | .venv/installed
	.venv/bin/python -m trainstep.benchmarks.teacher digits_cnn --epochs 30 --output $@

suite-cost: .venv/installed  ## Measure what the suite itself takes, and keep what came out.
	.venv/bin/python -m trainstep.benchmarks.suite_cost --output benchmarks/results

foreign-attack: .venv-addons/installed  ## Attack models by foolbox too, and keep what came out.
	.venv-addons/bin/python -m trainstep.benchmarks.foreign_attack --output benchmarks/results

clean:  ## Remove what was installed.
	rm -rf .venv .venv-addons build *.egg-info

ADDONS_INSTALL = $(if $(UV),uv pip install --python .venv-addons/bin/python,.venv-addons/bin/python -m pip install)

# The first Python among the candidates that tensorflow-addons runs on.
ADDONS_PYTHON = $(shell for python in $(PYTHON) python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 12))' 2>/dev/null \
	&& command -v $$python && break; done)

.venv/installed: pyproject.toml
ifdef UV
	uv venv --quiet --allow-existing --python $(PYTHON) .venv
	uv pip install --quiet --compile-bytecode --python .venv/bin/python --editable . --group dev
else
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "trainstep needs Python 3.10 to 3.13, and $(PYTHON) is not one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv/bin/python -m pip install --quiet --editable . --group dev
endif
	touch $@

.venv-addons/installed: pyproject.toml
ifdef UV
	uv venv --quiet --allow-existing --python '>=3.10,<3.12' .venv-addons
	uv pip install --quiet --compile-bytecode --python .venv-addons/bin/python --editable '.[addons]' --group dev --group oracles
else
	@test -n "$(ADDONS_PYTHON)" || { echo "tensorflow-addons needs Python 3.10 or 3.11, and none was found."; exit 1; }
	$(ADDONS_PYTHON) -m venv .venv-addons
	.venv-addons/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-addons/bin/python -m pip install --quiet --editable '.[addons]' --group dev --group oracles
endif
	touch $@
