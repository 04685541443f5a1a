#!/usr/bin/env bash
# Lock the dependencies of pyproject.toml anew, with hashes: envs/refresh.sh (needs uv and pip)
# One resolution for Python 3.11 to 3.14 and every platform. cpu.lock is cuda.lock less NVIDIA's packages, and admits
# the CPU builds of the pinned PyTorch that pip can download here (set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for them).
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
for python in 3.11 3.12 3.13; do
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python" --dest "$scratch" \
        "torch==$torch+cpu" 2>/dev/null || echo "no CPU build of torch $torch for Python $python at hand"
done
python3 envs/cpu_lock.py envs/cuda.lock envs/cpu.lock "$scratch"/torch-*.whl
