# Targets install what they need into .venv first, and again when requirements.txt or pyproject.toml is newer.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEV_INSTALLED := .venv/.dev_installed
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: demo pictures check test gpu torture lint clean

demo: $(INSTALLED)  ## train a ResNet-50 on handwritten digits, evaluate it, draw its curves
	$(BIN)/accelerate launch --config_file accelerate_configs/one_gpu.yaml scripts/train.py --recipe demo --resume
	$(BIN)/python scripts/evaluate.py --ckpt runs/demo
	@printf '\nLook at runs/demo/curves.png. Then train on your own photographs: docs/own-images.md\n'

pictures: demo  ## draw README's pictures from the run of the demo
	$(BIN)/python scripts/prepare_data.py --data digits --output data/digits
	$(BIN)/python scripts/predict.py --ckpt runs/demo --picture .github/demo_predictions.png \
	  $$(for class in data/digits/val/*; do ls $$class/* | head -n 1; done)
	cp runs/demo/curves.svg .github/demo_curves.svg

check: lint  ## lint, then the quick tests
	$(PYTEST) -m "not slow"

test: lint  ## lint, then all tests
	$(PYTEST)

gpu: $(DEV_INSTALLED)  ## test this machine's GPU and measure its speed
	$(BIN)/python -m pytest -rs tests/gpu
	@if $(BIN)/python -c 'from resnet_in1k.utils import device; exit(device.device_type() == "cpu")'; then \
	  for what in input step train; do $(BIN)/python scripts/benchmark.py $$what || exit 1; done; \
	else echo "There is no GPU here: tests ran on an emulated one or were skipped, and nothing was measured."; fi

torture: $(DEV_INSTALLED)  ## kill and signal real training processes at every moment, at length; up to an hour on two cores
	$(BIN)/python -m pytest tests/train/test_torture.py tests/train/test_machines.py --torture -s

lint: $(DEV_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## all but runs/
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(DEV_INSTALLED): $(INSTALLED) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
