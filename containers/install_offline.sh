#!/usr/bin/env bash
# Install scvi-core from this bundle, without network: bash install_offline.sh FOLDER   (PYTHON=python3.11 chooses one)
# FOLDER becomes the project: its .venv, the demo data, the image if there is one. Then, in it: make demo
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?"error: name the folder to install into"} python=${PYTHON:-python3}
[ ! -e "$folder" ] || [ -z "$(ls -A "$folder")" ] || { echo "error: $folder is not empty; name a new folder" >&2; exit 1; }
found=$("$python" -c 'import platform; print(".".join(platform.python_version_tuple()[:2]), platform.machine())')
[ "$found" = "$(cat "$here/wheels/PYTHON")" ] ||
    { echo "error: the bundle is for Python $(cat "$here/wheels/PYTHON"), $python is $found; set PYTHON=" >&2; exit 1; }
(cd "$here" && sha256sum --check --quiet SHA256SUMS)

mkdir -p "$folder/resources"
tar -xzf "$here/source.tar.gz" -C "$folder"
cp -r "$here/demo" "$folder/resources/demo"
for file in scvi-core.sif scvi-core.sbom.json; do
    [ ! -f "$here/$file" ] || cp "$here/$file" "$folder/containers/$file"
done
"$python" -m venv "$folder/.venv"
"$folder/.venv/bin/python" -m pip --isolated install --quiet --no-index --no-deps "$here"/wheels/*.whl
cp "$folder"/.venv/lib/python3.*/site-packages/scvi_core/kernels/_kernels* "$folder/scvi_core/kernels" # for what runs from the sources
touch "$folder/.venv/installed" # so that make takes it as it is
echo "installed in $folder; next: cd $folder && make demo"
