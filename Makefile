# Each target is a line or two that can be copied; the first ones make a virtual environment by themselves.

PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
DEMO = outputs/demo

.PHONY: demo test test-lowest coverage bench style format clean

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/installed  ## install, fine-tune on the embedded street scenes, evaluate, segment pictures
	$(PY) scripts/train.py src/segmenter_hf/training/demo.json
	$(PY) scripts/evaluate.py --model_name_or_path $(DEMO)/model --dataset_name scenes --output_dir $(DEMO)/evaluation
	$(PY) scripts/draw_scenes.py --num_images 6 --seed 1000 --output_dir $(DEMO)/pictures
	$(PY) scripts/predict.py --model_name_or_path $(DEMO)/model --images $(DEMO)/pictures/images --output_dir $(DEMO)/predictions
	@echo "Look at $(DEMO)/predictions and $(DEMO)/model/README.md."

test: $(VENV)/installed  ## install and run all tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

test-lowest:  ## run all tests with the lowest versions that setup.cfg declares, in an environment of their own
	$(PYTHON) -m venv $(VENV)-lowest
	sed -nE 's/^ +([a-z0-9_-]+)>=([0-9.]+).*/\1==\2/p' setup.cfg > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c $(VENV)-lowest/lowest.txt
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n 2

coverage: $(VENV)/installed  ## run all tests and show which lines and branches of the package they leave out
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --cov --cov-fail-under=90

bench: $(VENV)/installed  ## measure speed and memory beside peers; keep the machine quiet
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	$(PY) benchmarks/benchmark.py --task all --output_dir outputs/benchmark

style: $(VENV)/installed  ## check style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/installed  ## mend style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove what the targets made
	rm -rf $(VENV) $(VENV)-lowest outputs .cache build *.egg-info src/*.egg-info
