# make demo: build the pancreas atlas on real data.  make test: prove that it all works.
# Python >= 3.11, make and git are enough; everything else goes to .venv.
PYTHON ?= python3
# PyTorch's build, of environments and images: cpu, cuda, or auto: cpu where pip can find it (envs/torch.sh)
TORCH ?= auto
export TORCH
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo demo-slurm demo-apptainer demo-slurm-apptainer image bundle test faults parity triton remote lint schemas clean

# the end of each demo: what is where, below a folder of results
define told
echo; \
echo "The atlas is in $(1)/pancreas:"; \
echo "  report   $(1)/pancreas/report.html (open it in a browser)"; \
echo "  tables   $(1)/pancreas/cells.parquet latent.parquet de.parquet genes.parquet"; \
echo "  counts   $(1)/pancreas/counts.zarr"; \
echo "  model    $(1)/pancreas/model, registered as models:/pancreas"; \
echo "           (scvi-core models list --tracking-uri $${MLFLOW_TRACKING_URI:-sqlite:///$(1)/mlflow.db})"
endef

PANCREAS := --configfile config/demo/config.yaml
demo: .venv/installed
	$(BIN)/python workflow/scripts/fetch_demo.py resources/demo
	snakemake --cores all $(PANCREAS)
	@$(call told,results)

# The demo by a Slurm that is there (sbatch), into results/slurm. GPU=1 trains on a GPU; SLURM='...' adds options of
# Snakemake's, such as --default-resources slurm_partition=NAME slurm_account=NAME
GPU ?= 0
demo-slurm: .venv/installed
	$(BIN)/python workflow/scripts/fetch_demo.py resources/demo
	snakemake --profile workflow/profiles/slurm $(PANCREAS) --config results=results/slurm --set-resources train:gpu=$(GPU) $(SLURM)
	@$(call told,results/slurm)

# The image containers/scvi-core.sif, by Apptainer: make image PYTHON=python3.11. TORCH=cuda: for GPUs. MIRROR=URL: from
# a Debian mirror's packages, where no image registry can be reached
image:
	PYTHON="$(PYTHON)" MIRROR="$(MIRROR)" bash containers/build.sh --torch $(TORCH)

containers/scvi-core.sif:
	$(MAKE) image

# The demo inside the image, into results/apptainer; and both: by Slurm, inside the image
APPTAINER := --profile workflow/profiles/apptainer --config results=results/apptainer
demo-apptainer: .venv/installed containers/scvi-core.sif
	$(BIN)/python workflow/scripts/fetch_demo.py resources/demo
	snakemake --cores all $(PANCREAS) $(APPTAINER)
	@$(call told,results/apptainer)

demo-slurm-apptainer: .venv/installed containers/scvi-core.sif
	$(BIN)/python workflow/scripts/fetch_demo.py resources/demo
	snakemake --profile workflow/profiles/slurm --workflow-profile workflow/profiles/apptainer $(PANCREAS) \
	    --config results=results/slurm-apptainer --set-resources train:gpu=$(GPU) $(SLURM)
	@$(call told,results/slurm-apptainer)

# all that a site without network needs, in one file under dist/
bundle: .venv/installed
	$(BIN)/python workflow/scripts/fetch_demo.py resources/demo
	PYTHON="$(PYTHON)" bash containers/bundle.sh $(TORCH)

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 tests

# kill -9, faults at system calls, full disks, lost servers; and Slurm, where there is one
faults: .venv/installed
	SCVI_CORE_PLATFORM=1 $(BIN)/python -m pytest -q tests/platform

# the model against scvi-tools itself, at equal weights; in an environment of its own, which shares the built kernels
parity: .venv/installed
	[ -x .venv-peer/bin/python ] || "$(PYTHON)" -m venv .venv-peer
	.venv-peer/bin/pip install --quiet "$$(grep -m1 -oE '^torch==[0-9.]+' envs/cpu.lock)" 'scvi-tools>=1.4,<1.5' \
	    pydantic pyyaml rich pyarrow safetensors pytest
	OMP_NUM_THREADS=1 PYTHONPATH=. .venv-peer/bin/python -m pytest -q tests/unit/test_parity.py tests/unit/test_parity_labels.py

# the GPU's kernels, run by Triton's interpreter on the CPU, and the whole path of a GPU on a fake one;
# Triton in a folder of its own
triton: .venv/installed
	[ -d .venv-triton/triton ] || $(BIN)/pip install --quiet --no-deps --target .venv-triton \
	    "$$(grep -m1 -oE '^triton==[0-9.]+' envs/cuda.lock)"
	PYTHONPATH=.venv-triton $(BIN)/python -m pytest -q -n 2 tests/unit/test_gpu.py tests/unit/test_fake_gpu.py

# samples in S3: moto's server on loopback, and the storage plugin, in a folder of their own
remote: .venv/installed
	[ -d .venv-remote/moto ] || $(BIN)/pip install --quiet --no-deps --target .venv-remote \
	    'snakemake-storage-plugin-s3>=0.3,<0.4' boto3 botocore s3transfer jmespath \
	    'moto>=5,<6' responses xmltodict py-partiql-parser
	PYTHONPATH="$(CURDIR)/.venv-remote" $(BIN)/python -m pytest -q tests/platform/test_remote.py

lint: .venv/installed
	ruff check . && ruff format --check . && snakefmt --check Snakefile workflow && snakemake --lint $(PANCREAS)

schemas: .venv/installed
	scvi-core validate --schemas workflow/schemas

.venv/installed: envs/cpu.lock envs/cuda.lock envs/install.sh envs/torch.sh pyproject.toml scvi_core/kernels/kernels.c
	bash envs/install.sh "$(PYTHON)" .venv
	@touch $@

clean:
	rm -rf .venv .venv-peer .venv-triton .venv-remote results/* .snakemake
