#!/usr/bin/env bash
# Fill a folder with wheels: envs/wheels.sh cpu|cuda FOLDER [PYTHON]. All of the lock, hashes checked, and scvi-core's own
# wheel and source distribution. For PYTHON's version and this machine's kind. Images and offline installs take from it.
# Which of the two there is, is asked before anything is downloaded (envs/torch.sh).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
variant=$1 out=$2 python=${3:-python3}
lock=$root/envs/$variant.lock
[ -f "$lock" ] || { echo "error: no lock envs/$variant.lock; give cpu or cuda" >&2; exit 1; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# no dates, and no debugging section that names the folder it was built in: the same wheel each time
export SOURCE_DATE_EPOCH=315532800 CFLAGS=-g0 PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -c 'import platform; print(".".join(platform.python_version_tuple()[:2]), platform.machine())' > "$scratch/PYTHON"

"$python" -m venv "$scratch/venv" # pip, and the locked setuptools
python=$scratch/venv/bin/python
awk '/^[^ ]/ { mine = /^setuptools==/ } mine' "$lock" > "$scratch/build.lock"
"$python" -m pip install --quiet --require-hashes -r "$scratch/build.lock"

# the dependencies, unless the folder already holds this lock's
sha256sum < "$lock" | cat - "$scratch/PYTHON" > "$scratch/LOCK"
if ! cmp -s "$scratch/LOCK" "$out/LOCK"; then
    bash "$root/envs/torch.sh" "$python" "$variant" > /dev/null
    rm -f "$out"/*.whl "$out/LOCK"
    "$python" -m pip download --no-deps --require-hashes --dest "$scratch/all" -r "$lock" | bash "$root/envs/large.sh"
    # the few that are published as source alone
    find "$scratch/all" -type f ! -name '*.whl' -print0 |
        xargs -0 --no-run-if-empty "$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch/all"
    mv "$scratch/all"/*.whl "$out"
    cp "$scratch/LOCK" "$out/LOCK"
fi

# scvi-core from a clean copy, by way of its source distribution; build/ may hold files of earlier versions
mkdir "$scratch/source"
cp "$root"/{pyproject.toml,README.md,LICENSE} "$scratch/source"
(cd "$root" && find scvi_core -type f ! -name '*.so' ! -name '*.pyc' -print0 | tar --null -cf - -T -) | tar -xf - -C "$scratch/source"
rm -f "$out"/scvi_core-*
(cd "$scratch/source" && "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$out" .)
(cd "$scratch/source" && "$python" -c "import setuptools.build_meta as b; b.build_sdist('$out')" > /dev/null)
"$python" -m zipfile --list "$out"/scvi_core-*.whl | grep -q 'scvi_core/kernels/_kernels' ||
    { echo "error: scvi-core's kernels were not compiled; install a C compiler and Python's headers" >&2; exit 1; }

cp "$scratch/PYTHON" "$root"/containers/{install.sh,check.py,sbom.py} "$out"
(cd "$out" && find . -maxdepth 1 -type f ! -name SHA256SUMS -printf '%P\n' | LC_ALL=C sort | xargs sha256sum > SHA256SUMS)
echo "$out: $(find "$out" -name '*.whl' | wc -l) wheels for Python $(cat "$out/PYTHON"), $(du -sh "$out" | cut -f1)"
