#!/usr/bin/env bash
# What benchmarks/gpu.py needs on a machine that has a GPU, PyTorch for it and the usual scientific packages, but no
# network: the rest as wheels, scvi-tools among them.
#
#   PYTHON=python3.12 bash benchmarks/gpu_wheels.sh wheels     # where there is a network; the Python that is there, too
#   python3 -m pip install --no-index --no-deps --target site wheels/*.whl      # on the machine with the GPU, then
#   python3 -m pip install --no-index --no-deps --no-build-isolation --target site .
#   PYTHONPATH=site python3 benchmarks/gpu.py --json gpu.json
set -euo pipefail
folder=${1:?name a folder for the wheels}
names='annotated-types|anndata|array-api-compat|donfig|fast-array-utils|google-crc32c|legacy-api-wrap|msgspec|natsort'
names+='|numcodecs|pydantic|pydantic-core|pydantic-settings|pynndescent|python-dotenv|scanpy|scikit-misc|scverse-misc'
names+='|session-info2|typing-inspection|umap-learn|zarr'
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
grep -E "^($names)==" "$(dirname "$0")/../envs/cuda.lock" | sed 's/ *\\$//' >"$pins"
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$folder" -r "$pins" \
    'scvi-tools>=1.4,<1.5' docrep six ml-collections mudata pyro-api pyro-ppl sparse
du -sh "$folder"
