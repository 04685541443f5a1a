# make demo: build the pancreas atlas on real data.  make test: prove that it all works.
# Python >= 3.11, make and git are enough; everything else goes to .venv.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test parity lint schemas clean

demo: .venv/installed
	$(BIN)/python workflow/scripts/fetch_demo.py resources/demo
	snakemake --cores all
	@echo
	@echo "The atlas is in results/pancreas:"
	@echo "  report   results/pancreas/report.html (open it in a browser)"
	@echo "  tables   results/pancreas/cells.parquet latent.parquet de.parquet genes.parquet"
	@echo "  counts   results/pancreas/counts.zarr"
	@echo "  model    results/pancreas/model, registered as models:/pancreas (scvi-core models list)"

test: .venv/installed
	$(BIN)/python -m pytest -q tests

# the model against scvi-tools itself, at equal weights; in an environment of its own, which shares the built kernels
parity: .venv/installed
	[ -x .venv-peer/bin/python ] || "$(PYTHON)" -m venv .venv-peer
	.venv-peer/bin/pip install --quiet "$$(grep -m1 -oE '^torch==[0-9.]+' envs/cpu.lock)" 'scvi-tools>=1.4,<1.5' \
	    pydantic pyyaml rich pyarrow safetensors pytest
	OMP_NUM_THREADS=1 PYTHONPATH=. .venv-peer/bin/python -m pytest -q tests/unit/test_parity.py

lint: .venv/installed
	ruff check . && ruff format --check . && snakefmt --check Snakefile workflow && snakemake --lint

schemas: .venv/installed
	scvi-core validate --schemas workflow/schemas

.venv/installed: envs/cpu.lock envs/cuda.lock envs/install.sh pyproject.toml scvi_core/kernels.c
	bash envs/install.sh "$(PYTHON)" .venv
	@touch $@

clean:
	rm -rf .venv .venv-peer results/* .snakemake
