# Each command sets up .venv first where it is missing or older than requirements.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint format clean

demo: .venv/installed  ## Train, validate and test on the recordings that ship with the repository.
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		run_classification.py recipes/demo.json --overwrite_output_dir

test: .venv/installed  ## Run the tests, in as many processes as there are cores.
	$(BIN)/python -m pytest -q -n auto --dist worksteal

bench: .venv/installed  ## Measure what is claimed about speed: the quick set, under five minutes.
	$(BIN)/python -m benchmarks

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs
