"""Fetch the demo data: Baron et al. 2016 human pancreas (GEO GSE84133), 2,142 cells of four donors, as four samples.

The matrix ships inside the PyPI package came 0.1.13; pip fetches that file, nothing of it is installed or run.

    python workflow/scripts/fetch_demo.py resources/demo
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import anndata as ad
import pandas as pd

from scvi_core.files import replacing

PACKAGE, MEMBER = "came==0.1.13", "raw-Baron_human.h5ad"
SHA256 = "c0fca7f46d5ae82d8b5753ed5ce246cded66e2e870face389bd11084aab17700"


def main(folder: Path) -> None:
    """Write ``{donor}.h5ad`` for the four donors, unless they are there."""
    donors = [f"human{i}" for i in range(1, 5)]
    if all((folder / f"{donor}.h5ad").exists() for donor in donors):
        print(f"demo data: already in {folder}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"error: pip could not download {PACKAGE}; check the connection to the package index")
        wheel = next(Path(scratch).glob("came-*.whl"))
        with zipfile.ZipFile(wheel) as outer, zipfile.ZipFile(io.BytesIO(outer.read("came/sample_data.zip"))) as inner:
            content = inner.read(MEMBER)
        if hashlib.sha256(content).hexdigest() != SHA256:
            sys.exit(f"error: {MEMBER} is not the file of the known checksum; delete pip's cache and try again")
        source = Path(scratch) / MEMBER
        source.write_bytes(content)
        adata = ad.read_h5ad(source)
    adata.obs = pd.DataFrame(
        {"donor": adata.obs["donor"].astype(str), "cell_type": adata.obs["cell_type1"].astype(str)}
    )
    for donor in donors:
        mine = adata[adata.obs["donor"] == donor].copy()
        with replacing(folder / f"{donor}.h5ad") as temporary:
            mine.write_h5ad(temporary, compression="gzip")
        print(f"demo data: {folder / donor}.h5ad, {mine.n_obs} cells")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
