#!/usr/bin/env bash
# Build the Apptainer image, test it, and write its software bill of materials beside it.
#     containers/build.sh [--torch cpu|cuda|auto] [--wheels FOLDER] [--mirror URL] [--base IMAGE] [--out FILE.sif]
# --torch:  PyTorch's build; auto, the default, is the CPU build where pip can find one (envs/torch.sh)
# --wheels: a folder made by envs/wheels.sh; without it that is called, with $PYTHON (a Python 3.11, as in the image)
# --mirror: build the base from this Debian mirror's packages; a dated one (snapshot.debian.org) pins them
# --base:   another image of Debian with Python 3.11: docker://, or a path of a .sif
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
torch=auto wheels="" mirror=${MIRROR:-} base="" out=$root/containers/scvi-core.sif
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || { sed -n 's/^# \{0,1\}//; 2,8p' "$0" >&2; exit 2; }
    case $1 in
        --torch) torch=$2 ;;
        --wheels) wheels=$2 ;;
        --mirror) mirror=$2 ;;
        --base) base=$2 ;;
        --out) out=$2 ;;
        *) echo "error: no option $1" >&2; exit 2 ;;
    esac
    shift 2
done
command -v apptainer > /dev/null || { echo "error: apptainer is not installed" >&2; exit 1; }
if [ -z "$wheels" ]; then
    variant=$(bash "$root/envs/torch.sh" "${PYTHON:-python3}" "$torch")
    wheels=$root/build/wheels-$variant
    bash "$root/envs/wheels.sh" "$variant" "$wheels" "${PYTHON:-python3}"
fi
wheels=$(cd "$wheels" && pwd)
variant=$(find "$wheels" -name 'torch-*+cpu-*.whl' | grep -q . && echo cpu || echo cuda)
(cd "$wheels" && sha256sum --check --quiet SHA256SUMS)
[ "$(cut -d' ' -f1 "$wheels/PYTHON")" = 3.11 ] ||
    { echo "error: $wheels: wheels for Python $(cat "$wheels/PYTHON"), the image has 3.11; set PYTHON=python3.11" >&2; exit 1; }

arguments=(--build-arg "VARIANT=$variant" --build-arg "VERSION=$(ls "$wheels"/scvi_core-*.whl | sed 's/.*scvi_core-\([^-]*\)-.*/\1/')")
arguments+=(--build-arg "REVISION=$(git -C "$root" describe --always --dirty --abbrev=40 2> /dev/null || echo unknown)")
case $base in
    "") [ -z "$mirror" ] || arguments+=(--build-arg BOOTSTRAP=debootstrap --build-arg "MIRROR=$mirror") ;;
    *.sif) arguments+=(--build-arg BOOTSTRAP=localimage --build-arg "BASE=$base") ;;
    *) arguments+=(--build-arg "BASE=${base#docker://}") ;;
esac
# one date for all files: the tree is the same at each build, though a SIF's own header is not
start=$SECONDS
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-315532800} apptainer build --force --fakeroot --bind "$wheels:/mnt:ro" \
    "${arguments[@]}" --mksquashfs-args "-comp zstd -Xcompression-level ${ZSTD_LEVEL:-9}" "$out" "$root/containers/scvi-core.def"

bill=${out%.sif}.sbom.json
[ ! -f "$bill" ] || mv "$bill" "$bill.before"
apptainer exec "$out" python /opt/venv/share/scvi-core/sbom.py > "$bill"
echo "$out: $(du -h "$out" | cut -f1), $((SECONDS - start)) s; packages in $bill"
if [ -f "$bill.before" ]; then
    echo "against the image before: $(python3 "$root/containers/sbom.py" "$bill.before" "$bill" || true)"
    rm "$bill.before"
fi
