# Every target makes .venv and installs when needed, and again only when setup.cfg (or pyproject.toml) has changed.

PYTHON := .venv/bin/python
INSTALLED := .venv/installed
CORES := $(shell nproc 2>/dev/null || echo 2)

.PHONY: quickstart test test-hf quality style bench

quickstart: $(INSTALLED)
	rm -rf outputs/quickstart
	.venv/bin/accelerate launch --num_cpu_threads_per_process $(CORES) --num_processes 1 --num_machines 1 \
		--mixed_precision no --dynamo_backend no train_flow.py --config configs/quickstart.yaml
	$(PYTHON) evaluate_flow.py --model outputs/quickstart --dataset synthetic \
		--synthetic_image_size 112 144 --synthetic_displacement 1 6 --synthetic_shapes 2 6 --synthetic_num_pairs 32 \
		--output outputs/quickstart/report.json --picture outputs/quickstart/flow.png

test: $(INSTALLED)
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile

# transformers' own tests of models, configurations and image processors, of the installed version
test-hf: $(INSTALLED)
	$(PYTHON) -m pip install --quiet --editable ".[test,hf-tests]"
	$(PYTHON) tests/transformers_own/fetch_tests.py
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/transformers_own -rs

bench: $(INSTALLED)
	$(PYTHON) -m benchmarks.bench_data --output outputs/benchmarks/data.json

quality: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy --namespace-packages -p benchmarks

style: $(INSTALLED)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

$(INSTALLED): setup.cfg pyproject.toml
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --editable ".[test,quality]"
	touch $(INSTALLED)
