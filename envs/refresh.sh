#!/usr/bin/env bash
# Lock the dependencies of pyproject.toml anew, with hashes: envs/refresh.sh (needs uv and pip)
# One resolution for Python 3.11 to 3.14 and every platform. cpu.lock is cuda.lock less NVIDIA's packages, and admits
# the CPU builds of the pinned PyTorch that are in torch-cpu.sha256: those of PyTorch's CPU index for Linux, as it says
# itself, without a download of any.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
torch=2.13.0
echo "torch==$torch" > "$scratch/constraints.txt"
env -u UV_FIND_LINKS uv pip compile pyproject.toml --extra workflow --extra test --universal --python-version 3.11 \
    --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate \
    --constraint "$scratch/constraints.txt" --output-file envs/cuda.lock --quiet "$@"
printf 'setuptools\n' | uv pip compile - --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-header --no-annotate --output-file "$scratch/build.lock" --quiet # what installs the project itself
grep -q '^setuptools==' envs/cuda.lock || cat "$scratch/build.lock" >> envs/cuda.lock
if curl -fsS https://download.pytorch.org/whl/cpu/torch/ > "$scratch/index.html"; then
    grep -oE "torch-$torch(%2B|\+)cpu-cp3(1[1-4])-cp3\2-manylinux[^#\"]*_(x86_64|aarch64)\.whl#sha256=[0-9a-f]{64}" "$scratch/index.html" |
        sed -E 's/%2B/+/; s/(.*)#sha256=(.*)/\2  \1/' | LC_ALL=C sort -u -k2 > envs/torch-cpu.sha256
fi
grep -q "torch-$torch+cpu" envs/torch-cpu.sha256 || { echo "error: envs/torch-cpu.sha256 is not of torch $torch" >&2; exit 1; }
python3 envs/cpu_lock.py envs/cuda.lock envs/cpu.lock envs/torch-cpu.sha256
