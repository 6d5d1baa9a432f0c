PYTHON ?= python3
DEMO := .venv-demo
DEV := .venv
TOOLS := .venv-wheelhouse
FBCLIP ?= fbclip
BUNDLE ?= runs/bench-gpu.fbclip
FUZZ_SEED ?= 0

.PHONY: help demo test check fuzz test-gpu bench bench-gpu lint docs lock wheelhouse release licences image-check nano clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /: /'

demo: $(DEMO)/.installed ## install the torch-free runtime and find the defects in the sample images
	$(DEMO)/bin/fbclip infer

# One process a core: many tests wait for servers, clocks and child processes.
test: $(DEV)/.installed ## everything that runs without a GPU
	$(DEV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: lint ## linters, types and the quick tests: for daily work
	$(DEV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

fuzz: $(DEV)/.installed ## 300,000 mutated pictures and 10,000 of all else; FUZZ_SEED= draws others (see docs/reference/robustness.md)
	$(DEV)/bin/python tests/helpers/fuzz.py pictures --count 300000 --seed $(FUZZ_SEED)
	for kind in tables manifests streams bodies; do \
		$(DEV)/bin/python tests/helpers/fuzz.py $$kind --count 10000 --seed $(FUZZ_SEED) || exit 1; \
	done

test-gpu: $(DEV)/.installed ## the tests of engines and of the TensorRT backend on this machine's GPU (see docs/guides/tensorrt.md)
	$(DEV)/bin/python -m pytest -m gpu -rs

bench: $(DEV)/.installed ## every backend that runs here, on the embedded model (under a minute)
	$(DEV)/bin/fbclip bench --profile

# On a device the installed command is used, because docs/guides/jetson.md sets its environment up; FBCLIP= names another.
bench-gpu: $(BUNDLE) ## the same report on a device with a GPU, its engine built first; BUNDLE= names another model
	$(FBCLIP) export --engine --bundle $(BUNDLE) --batch 1,1,4
	$(FBCLIP) bench --bundle $(BUNDLE) --batch 1,4 --profile --project runs/bench-gpu

runs/bench-gpu.fbclip:
	mkdir -p runs
	cp -r fbclip/assets/fbclip-nano.fbclip $@

lint: $(DEV)/.installed ## linters and types
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy -p fbclip
	$(DEV)/bin/lint-imports

docs: $(DEV)/.installed ## build the documentation into build/site; fails on links that lead nowhere
	NO_MKDOCS_2_WARNING=1 $(DEV)/bin/python -m mkdocs build --strict --quiet

LOCK := $(DEV)/bin/uv pip compile --quiet --python-version 3.13 --python-platform linux --generate-hashes --no-annotate \
	--custom-compile-command "make lock" --constraint constraints.txt

lock: $(DEV)/.installed ## pin what the images install, with hashes (deploy/requirements)
	$(LOCK) --extra serve --extra mqtt pyproject.toml -o deploy/requirements/cpu.txt
	$(LOCK) --extra serve --extra mqtt --extra gpu --no-emit-package onnxruntime pyproject.toml -o deploy/requirements/cuda.txt
	echo setuptools | $(LOCK) - -o deploy/requirements/build.txt

wheelhouse: $(TOOLS)/.installed ## wheels for machines without a network; WHEELHOUSE="--python 3.10 --machine aarch64 --extra serve" chooses
	$(TOOLS)/bin/python deploy/wheelhouse.py $(WHEELHOUSE)

release: $(DEV)/.installed ## sdist, wheel, SBOM, checksums in dist/, their contents checked
	$(DEV)/bin/python deploy/release.py

licences: $(DEV)/.installed ## write docs/licences.md from fresh environments
	$(DEV)/bin/python deploy/licences.py

image-check: $(DEV)/.installed ## execute the steps of deploy/Dockerfile.cpu in a fresh Debian root (as root, with debootstrap)
	$(DEV)/bin/python deploy/image_check.py

nano: $(DEV)/.installed ## train the embedded default anew and export it (minutes on 2 cores)
	$(DEV)/bin/python benchmarks/make_nano.py

$(DEMO)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(TOOLS)/.installed: constraints.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt build uv
	touch $@

$(DEV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(DEV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(DEMO) $(DEV) $(TOOLS)
