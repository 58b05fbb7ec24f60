# Every target makes .venv and installs when needed, and again only when setup.cfg (or pyproject.toml) has changed.

PYTHON := .venv/bin/python
INSTALLED := .venv/installed
CORES := $(shell nproc 2>/dev/null || echo 2)

.PHONY: quickstart demo test test-fast test-browser test-lowest test-hf test-gpu quality style bench bench-gpu

# Flow of two frames with the shipped weights; then a fine-tune on the look of these frames, evaluated before and after.
QUICKSTART := outputs/quickstart
HELD_OUT := --dataset synthetic --data_dir examples/frames --synthetic_image_size 112 144 --synthetic_displacement 26 40 \
	--synthetic_shapes 1 3 --synthetic_appearance 0 --synthetic_nonrigid 0 --synthetic_ego_motion 0 --synthetic_num_pairs 128
quickstart: $(INSTALLED)
	rm -rf $(QUICKSTART)
	$(PYTHON) predict_flow.py examples/frames/frame_0001.png examples/frames/frame_0002.png --output $(QUICKSTART)/flow.png
	$(PYTHON) predict_flow.py examples/frames/frame_0001.png examples/frames/frame_0002.png --output $(QUICKSTART)/flow.flo
	$(PYTHON) evaluate_flow.py $(HELD_OUT) --output $(QUICKSTART)/before.json
	.venv/bin/accelerate launch --num_cpu_threads_per_process $(CORES) --num_processes 1 --num_machines 1 \
		--mixed_precision no --dynamo_backend no train_flow.py --config configs/quickstart.yaml
	$(PYTHON) evaluate_flow.py --model $(QUICKSTART) $(HELD_OUT) --output $(QUICKSTART)/report.json \
		--picture $(QUICKSTART)/comparison.png
	@echo "Next:"
	@echo "  $(PYTHON) predict_flow.py --model $(QUICKSTART) FRAME1 FRAME2 --output flow.png"
	@echo "  .venv/bin/accelerate launch train_flow.py --config configs/stylised.yaml \\"
	@echo "      --model_name_or_path pretrained/raft-small-synthetic --synthetic_textures FOLDER_OF_YOUR_FRAMES"

# the page in the browser; it prints its address
demo: $(INSTALLED)
	$(PYTHON) -c "import gradio" 2>/dev/null || $(PYTHON) -m pip install --quiet --editable ".[demo]"
	$(PYTHON) app.py

# One torch thread for each worker, as more get in each other's way; on two cores a third worker, as tests wait as well.
XDIST := --numprocesses 3 --dist loadfile
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not gpu and not browser" $(XDIST) --durations=15

# for the edit loop, some 70 seconds on two cores: no test that takes a second or starts a training
test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not slow and not gpu and not browser" $(XDIST) --numprocesses 2

# the page in a real browser: installs Debian's Chromium where there is none and it may; else the tests are skipped
test-browser: $(INSTALLED)
	$(PYTHON) -c "import gradio, playwright" 2>/dev/null || $(PYTHON) -m pip install --quiet --editable ".[test,browser]"
	command -v chromium chromium-browser google-chrome >/dev/null || (apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends chromium >/dev/null) || \
		echo "no Chromium, and apt-get cannot install it: the tests are skipped"
	$(PYTHON) -m pytest -m browser tests/test_page.py -rs --durations=5

# the suite with the lowest versions that setup.cfg allows, in an environment of its own
LOWEST := .venv-lowest
test-lowest:
	test -x $(LOWEST)/bin/python || python3 -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv 'setuptools>=77,<82'
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable ".[test]"
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -m "not gpu and not browser" $(XDIST)

# What only a GPU shows, with neither network nor data. Without one, or with DEVICE=cpu, the same code on tiny sizes.
test-gpu: $(INSTALLED)
	$(PYTHON) -m pytest -v -m gpu $(if $(DEVICE),--device $(DEVICE)) --durations=15 tests/gpu

# transformers' own tests of models, configurations and image processors, of the installed version
test-hf: $(INSTALLED)
	$(PYTHON) -m pip install --quiet --editable ".[test,hf-tests]"
	$(PYTHON) tests/transformers_own/fetch_tests.py
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/transformers_own -rs

# Every number of the tables in docs/speed.md and docs/scaling_*.png, one benchmark after the other, so that none disturbs
# the next: about 40 minutes on two idle CPU cores. DATA_ROOT=folder reads real data sets instead of synthetic ones.
RESULTS := outputs/benchmarks
bench: $(INSTALLED)
	$(PYTHON) -m benchmarks.bench_inference --output $(RESULTS)/inference.json
	$(PYTHON) -m benchmarks.bench_runtimes --output $(RESULTS)/runtimes.json
	$(PYTHON) -m benchmarks.bench_training --output $(RESULTS)/training.json
	$(PYTHON) -m benchmarks.bench_memory --output $(RESULTS)/memory.json
	$(PYTHON) -m benchmarks.bench_on_demand --output $(RESULTS)/on_demand.json
	$(PYTHON) -m benchmarks.bench_scaling --output $(RESULTS)/scaling.json
	$(PYTHON) -m benchmarks.bench_data $(if $(DATA_ROOT),--data_root "$(DATA_ROOT)") --output $(RESULTS)/data.json
	$(PYTHON) -m benchmarks.report --results $(RESULTS)

# Tables of one GPU, in eight minutes: outputs/benchmarks/gpu.json, and docs/speed.md. DEVICE=cpu tries the code.
bench-gpu: $(INSTALLED)
	$(PYTHON) -m benchmarks.bench_gpu $(if $(DEVICE),--device $(DEVICE)) --output $(RESULTS)/gpu.json --page docs/speed.md

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
	$(PYTHON) -m pip install --quiet --editable ".[dev]"
	touch $(INSTALLED)
