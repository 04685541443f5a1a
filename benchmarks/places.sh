#!/usr/bin/env bash
# The demo here, by Slurm, in the image, and both: seconds of each, and whether all gave the same bytes.
#     bash benchmarks/places.sh [demo demo-slurm demo-apptainer demo-slurm-apptainer]      after make image
# Run it in a fresh clone: what is built already is not built again.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- demo demo-slurm demo-apptainer demo-slurm-apptainer
make .venv/installed > /dev/null
log=$(mktemp)
trap 'rm -f "$log"' EXIT
digests() { # of every file of an atlas but logs, times and the registry's reference
    (cd "$1/pancreas" && find . -type f ! -path './logs/*' ! -path './benchmarks/*' ! -name model_ref.json -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum)
}
printf '| place | seconds | files | that differ from the first |\n|---|---:|---:|---:|\n'
first=""
for place in "$@"; do
    results=results/${place#demo}
    results=${results/-/} results=${results%/}
    start=$SECONDS
    make "$place" > "$log" 2>&1 || { tail -20 "$log" >&2; exit 1; }
    took=$((SECONDS - start))
    found=$(digests "$results")
    [ -n "$first" ] || first=$found
    differ=$(diff <(echo "$first") <(echo "$found") | grep -c '^[<>]' || true)
    printf '| %s | %s | %s | %s |\n' "$place" "$took" "$(wc -l <<< "$found")" "$differ"
done
