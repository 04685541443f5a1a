"""What an atlas is made of, for anyone to check: digests of its files, software versions, configuration, seed."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scvi_core.config import Config, load_config
from scvi_core.files import UserError, sha256_file, sha256_text

PACKAGES = (
    "scvi-core anndata duckdb faiss-cpu h5py igraph knncolle matplotlib mlflow numpy openTSNE pandas pyarrow "
    "pydeseq2 safetensors scikit-learn scikit-misc scipy scranpy torch zarr"
)


def built_with(folder: Path) -> Config:
    """The configuration that an atlas was built with, by its manifest.

    Raises
    ------
    UserError
        When there is no manifest, as the build is not done, or none that says it.
    """
    path = folder / "manifest.json"
    try:
        config = json.loads(path.read_text("utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: does not say what the atlas was built with ({type(error).__name__}); name its --config"
        ) from None
    return load_config(config, str(path))


def public_config(config: Config) -> dict[str, Any]:
    """Give the configuration without places: files, folders and addresses, which differ between machines."""
    out = config.model_dump(mode="json", exclude={"results", "samples", "annotations"})
    del out["registry"]["tracking_uri"]
    return out


def software_versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that the numbers depend on, without importing them.

    Of Python without the patch release, which changes no number: an image may hold another than an environment does.
    """
    out = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES.split():
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def manifest(folder: Path, config: Config, names: list[str]) -> dict[str, Any]:
    """List SHA-256 and size of every file of the atlas, with software, configuration and seed.

    Left out is what varies between two runs of the same build: ``model_ref.json``, ``logs/``, ``benchmarks/``. A store
    (a folder) has one digest: of the lines ``{sha256 of the file}  {path in the store}``, sorted by path.
    """
    paths = [f"samples/{s}/{file}" for s in names for file in ("counts.h5ad", "qc.parquet")]
    paths += ["cells.parquet", "genes.parquet", "counts.zarr", "latent.parquet", "de.parquet", "metrics.json"]
    paths += ["model/model.safetensors", "model/model.json", "model/history.parquet", "decisions.jsonl", "report.html"]
    if config.model.decoder == "linear":
        paths.append("loadings.parquet")
    if config.annotate.label is not None:
        paths += ["annotation.parquet", "label_probabilities.parquet", "labels.parquet"]
    if config.contrast.tests:
        paths += ["contrast.parquet", "pseudobulk.parquet"]
    if config.criticism.enabled:
        paths += sorted(f"criticism/{path.name}" for path in folder.glob("criticism/*"))
    if config.export.h5ad:
        paths.append("atlas.h5ad")
    files: dict[str, dict[str, Any]] = {}
    for name in paths:
        path = folder / name
        if path.is_dir():
            inside = sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*") if p.is_file())
            lines = "".join(f"{sha256_file(p)}  {relative}\n" for relative, p in inside)
            size = sum(p.stat().st_size for _, p in inside)
            files[name] = {"tree_sha256": sha256_text(lines), "size": size, "n_files": len(inside)}
        elif path.exists():
            files[name] = {"sha256": sha256_file(path), "size": path.stat().st_size}
        else:
            raise UserError(f"{path}: missing, so the manifest cannot be written; run the step that writes it")
    return {
        "format_version": 1,
        "atlas": config.atlas,
        "seed": config.seed,
        "config": public_config(config),
        "software": software_versions(),
        "files": files,
    }
