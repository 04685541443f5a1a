#!/usr/bin/env bash
# Which build of PyTorch to install: envs/torch.sh PYTHON [cpu|cuda|auto] prints cpu or cuda, by which lock and wheels go.
# auto is the CPU build where pip can find one for PYTHON, else the CUDA build. Nothing is downloaded to find out; what is
# taken, and how to have the other, is said in one line.
set -euo pipefail
python=$1 wanted=${2:-auto}
version=$(grep -m1 -oE '^torch==[0-9.]+' "$(dirname "$0")/cpu.lock" | cut -d= -f3)
index="PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu (uv: --torch-backend cpu)"
case $wanted in cpu | cuda | auto) ;; *) echo "error: TORCH=$wanted; give cpu, cuda or auto" >&2; exit 2 ;; esac

found=no
if [ "$(uname)" = Darwin ]; then
    found=yes # all builds for it are CPU builds
elif [ "$wanted" != cuda ]; then
    if ! "$python" -m pip --version > /dev/null 2>&1; then
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        "$python" -m venv "$scratch"
        python=$scratch/bin/python
    fi
    if "$python" -m pip index versions torch 2> /dev/null | grep -qE "(^|[ ,])${version//./\\.}\+cpu(,|$)"; then found=yes; fi
fi
case $wanted-$found in
    cpu-yes | auto-yes) echo "PyTorch $version: the CPU build; an environment takes 2.4 GB (TORCH=cuda takes the CUDA build)" >&2 && echo cpu ;;
    cpu-no)
        echo "error: TORCH=cpu, but pip finds no CPU build of PyTorch $version for $("$python" -V); set $index, or TORCH=cuda" >&2
        exit 1
        ;;
    auto-no)
        echo "PyTorch $version: the CUDA build, as pip finds no CPU build; an environment takes 6.1 GB, and 2.4 GB by $index" >&2
        echo cuda
        ;;
    cuda-*) echo "PyTorch $version: the CUDA build; an environment takes 6.1 GB" >&2 && echo cuda ;;
esac
