# Every target makes .venv first, and again when requirements.txt or pyproject.toml is newer than it.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test torture lint clean

demo: $(INSTALLED)  ## train a ResNet-50 on handwritten digits, evaluate it, draw its curves
	$(BIN)/accelerate launch --config_file accelerate_configs/one_gpu.yaml scripts/train.py --recipe demo --resume
	$(BIN)/python scripts/evaluate.py --ckpt runs/demo
	@printf '\nLook at runs/demo/curves.png. Then train on your own images, in DATA/train/<class>/ and DATA/val/<class>/:\n'
	@printf '  . .venv/bin/activate\n  accelerate launch scripts/train.py --data DATA --output-dir runs/mine --dry-run\n'

test: lint  ## lint, then the whole suite
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

torture: $(INSTALLED)  ## kill and signal real training processes at every moment, at length; up to an hour on two cores
	$(BIN)/python -m pytest tests/test_torture.py --torture -s

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## all but runs/
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[dev]'
	touch $@
