#!/bin/sh
# What both images do: install scvi-core and what it needs, and nothing else, from the wheels beside this file.
# install.sh FOLDER. The folder of wheels holds one version of each package (envs/wheels.sh), so pip has no choice.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=$1
python3 -c 'import platform; print(".".join(platform.python_version_tuple()[:2]), platform.machine())' |
    cmp - "$here/PYTHON" || { echo "error: the wheels are for Python $(cat "$here/PYTHON")" >&2; exit 1; }
python3 -m venv "$venv"
"$venv/bin/pip" --isolated install --quiet --no-cache-dir --no-compile --no-index --find-links "$here" scvi-core
mkdir -p "$venv/share/scvi-core"
cp "$here/check.py" "$here/sbom.py" "$venv/share/scvi-core/"
"$venv/bin/pip" --isolated uninstall --quiet --yes pip
cd "$venv"/lib/python3.*/site-packages
# what only a compiler or a test of those packages reads
rm -rf torch/include torch/share pyarrow/include numpy/_core/include
for package in numpy scipy pandas sklearn statsmodels networkx sympy numba matplotlib pyarrow; do
    [ ! -d $package ] || find $package -type d -name tests -prune -exec rm -rf {} +
done
# bytecode without dates: the same files at each build. A few packages hold templates that are no Python: not an error
"$venv/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$venv/lib" > /dev/null 2>&1 || true
