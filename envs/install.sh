#!/usr/bin/env bash
# Make a virtual environment from the lock: envs/install.sh PYTHON FOLDER [EXTRA_PIP_ARGUMENTS...]
# Every package is pinned and its hash checked. PyTorch's build is the one thing that differs by machine: where pip
# finds a CPU build of the pinned version the CPU lock is taken, else the CUDA lock, which is several gigabytes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$1 venv=$2
shift 2
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
torch=$(grep -m1 -oE '^torch==[0-9.]+' "$here/cpu.lock" | cut -d= -f3)
lock=${SCVI_CORE_LOCK:-}
if [ -z "$lock" ]; then
    if "$venv/bin/pip" install --quiet --dry-run --no-deps --ignore-installed "torch==$torch+cpu" "$@" >/dev/null 2>&1; then
        lock=cpu
    else
        lock=cuda
    fi
fi
echo "installing envs/$lock.lock into $venv (torch $torch)"
"$venv/bin/pip" install --quiet --require-hashes -r "$here/$lock.lock" "$@"
"$venv/bin/pip" install --quiet --no-deps --no-build-isolation --editable "$here/.."
