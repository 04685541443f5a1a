#!/usr/bin/env bash
# Write all that an air-gapped site needs into one file: containers/bundle.sh [cpu|cuda|auto]
# The project, its wheels, the demo data, and the image where it has been built. On the other side:
#     tar -xf scvi-core-VERSION-cpu-offline.tar && bash scvi-core-VERSION-cpu-offline/install_offline.sh FOLDER
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3} demo=${DEMO:-resources/demo}
variant=$(bash envs/torch.sh "$python" "${1:-auto}")
wheels=build/wheels-$variant
bash envs/wheels.sh "$variant" "$wheels" "$python"
ls "$demo"/*.h5ad > /dev/null 2>&1 || { echo "error: no demo data in $demo; run make demo first" >&2; exit 1; }

version=$(sed -n 's/__version__ = "\(.*\)"/\1/p' scvi_core/_version.py)
name=scvi-core-$version-$variant-offline
mkdir -p dist
staged=$(mktemp -d dist/bundle.XXXXXX)
trap 'rm -rf "$staged"' EXIT
mkdir -p "$staged/$name"/{wheels,demo}
cp -l "$wheels"/* "$staged/$name/wheels"
cp "$demo"/*.h5ad "$staged/$name/demo"
cp containers/install_offline.sh "$staged/$name"
if [ -f containers/scvi-core.sif ] && command -v apptainer > /dev/null &&
    ! apptainer inspect containers/scvi-core.sif | grep -qx "scvi-core.variant: $variant"; then
    echo "error: containers/scvi-core.sif is not of the variant $variant; make image TORCH=$variant" >&2
    exit 1
fi
git rev-parse --git-dir > /dev/null 2>&1 || { echo "error: a bundle is made in a clone, by git's list of files" >&2; exit 1; }
for file in containers/scvi-core.sif containers/scvi-core.sbom.json; do
    if [ -f $file ]; then cp -l $file "$staged/$name"; else echo "not in the bundle, as it is not built: $file"; fi
done
same=(--sort=name --mtime=@315532800 --owner=0 --group=0 --numeric-owner) # the same files, the same bytes
git ls-files --cached --others --exclude-standard | while read -r file; do [ ! -e "$file" ] || echo "$file"; done |
    tar "${same[@]}" -czf "$staged/$name/source.tar.gz" -T -
(cd "$staged/$name" && find . -type f ! -name SHA256SUMS -printf '%P\n' | LC_ALL=C sort | tr '\n' '\0' | xargs -0 sha256sum > "$OLDPWD/$staged/SUMS")
mv "$staged/SUMS" "$staged/$name/SHA256SUMS"
tar "${same[@]}" -cf "dist/$name.tar" -C "$staged" "$name"
echo "dist/$name.tar: $(du -h "dist/$name.tar" | cut -f1)"
