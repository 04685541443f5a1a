#!/usr/bin/env bash
# Make a virtual environment from the lock: envs/install.sh PYTHON FOLDER [EXTRA_PIP_ARGUMENTS...]
# Every package is pinned and its hash checked. PyTorch's build is the one thing that differs by machine: TORCH=cpu, cuda
# or auto (envs/torch.sh).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$1 venv=$2
shift 2
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
lock=$(bash "$here/torch.sh" "$venv/bin/python" "${TORCH:-auto}")
echo "installing envs/$lock.lock into $venv"
"$venv/bin/pip" install --require-hashes -r "$here/$lock.lock" "$@" | bash "$here/large.sh"
"$venv/bin/pip" install --quiet --no-deps --no-build-isolation --editable "$here/.."
