"""How time and memory grow: `scvi-core train` on simulated stores of many sizes.

    python benchmarks/scale.py COUNTS.h5ad --cells 1000 10000 100000 1300000 --genes 720 --plot scale.png
    python benchmarks/scale.py COUNTS.h5ad --pairs 100000x720 100000x2000 100000x10000 --epochs 1

Each store is drawn from a model fitted to COUNTS.h5ad (benchmarks/simulate.py) and kept under `--out`; each fit is the
command itself, in a process of its own, with its defaults. With `--epochs N` only N epochs are timed, and the whole fit
is extrapolated, which the table says. The largest size but one of the fewest genes (or `--stream`) is fitted once more
with little memory allowed, to show what streaming costs. Finished runs are kept too: the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scvi_core.files import UserError, canonical_json, replacing, sha256_file, sha256_text, write_json

# This process imports nothing large: Linux counts to a child's peak what its parent held when it forked.

HERE = Path(__file__).parent
RULES = """
import json, sys
from scvi_core.config import TrainConfig
from scvi_core.files import code_sha256
from scvi_core.train import Schedule, hold_out
config = TrainConfig()
train = {n: n - len(hold_out(config, n, 0)) for n in map(int, sys.argv[1:])}
print(json.dumps({
    "code": code_sha256(), "config": config.model_dump(), "n_train": train,
    "epochs": {n: Schedule.of(config, m).epochs for n, m in train.items()},
}))
"""
STREAMED = 0.1  # share of the packed counts that may be in memory, where streaming is timed


def main() -> None:
    try:
        run(_options())
    except UserError as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    """Simulate and fit every size; print the table."""
    pairs = options.pairs or list(itertools.product(sorted(options.cells), sorted(options.genes)))
    if not options.counts.is_file():
        raise UserError(f"{options.counts}: no such file")
    source = sha256_file(options.counts)[:12]
    rules = json.loads(_python("-c", RULES, *sorted({str(n) for n, _ in [*pairs, *(options.stream or [])]})))
    rows = []
    for cells, genes in pairs:
        store = _store(options, source, cells, genes)
        rows.append(_row(_fitted(options, store, cells, genes, rules, None), cells, genes, rules, options))
        print(_table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    for cells, genes in [] if options.no_stream else options.stream or _usual(pairs):
        store = _store(options, source, cells, genes)
        memory = _little(store)
        if memory is None:
            print(f"{cells:,} x {genes:,}: too small to stream; name a larger size in --stream", file=sys.stderr)
            continue
        if (cells, genes) not in pairs:
            rows.append(_row(_fitted(options, store, cells, genes, rules, None), cells, genes, rules, options))
        rows.append(_row(_fitted(options, store, cells, genes, rules, memory), cells, genes, rules, options))
    print(_table(rows))
    if any(row["extrapolated"] for row in rows):
        print(f"\n~ {options.epochs} of the epochs were run; their median time stands for all of the default's.")
    if options.json:
        write_json(
            options.json, {"threads": options.threads, "epochs": options.epochs, "rules": rules, "results": rows}
        )
    if options.plot:
        _plot(rows, options.plot)


def _store(options: argparse.Namespace, source: str, cells: int, genes: int) -> Path:
    """The simulated store of one size, drawn if it is not there."""
    out = options.out / f"{options.counts.stem}.{source}.{cells}x{genes}.zarr"
    if not out.exists():
        print(f"simulating {cells:,} cells x {genes:,} genes ...", file=sys.stderr, flush=True)
        fitted = options.out / f"{options.counts.stem}.{source}.model{genes}"
        given = {"--cells": cells, "--genes": genes, "--out": out, "--model": fitted, "--threads": options.threads}
        if options.simulate_epochs:
            given["--epochs"] = options.simulate_epochs
        arguments = [str(part) for pair in given.items() for part in pair]
        _python(HERE / "simulate.py", options.counts, *arguments, capture=False)
    return out


def _fitted(
    options: argparse.Namespace, store: Path, cells: int, genes: int, rules: dict[str, Any], memory_gb: float | None
) -> dict[str, Any]:
    """Run `scvi-core train`; what it took. Kept by content."""
    train: dict[str, Any] = {"max_epochs": options.epochs} if options.epochs else {}
    if memory_gb is not None:
        train["memory_gb"] = memory_gb
    config = {"threads": options.threads, "device": "cpu", "train": train}
    digest = sha256_text(canonical_json([sha256_file(store / ".zattrs"), config, rules["code"], rules["config"]]))[:12]
    path = options.out / "runs" / f"{cells}x{genes}{'.streamed' * (memory_gb is not None)}.{digest}.json"
    if not path.exists():
        print(
            f"fitting {cells:,} cells x {genes:,} genes{' from disk' * bool(memory_gb)} ...",
            file=sys.stderr,
            flush=True,
        )
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.out) as folder:
            arguments = ["--store", store, "--out", f"{folder}/model", "--run", f"{folder}/run.json"]
            command = ["-m", "scvi_core.cli", "train", *arguments, "--config", json.dumps(config)]
            began, load = time.perf_counter(), os.getloadavg()[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".log"), "w") as log:
                process = subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=log)
                _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise UserError(f"scvi-core train failed on {store}; {path.with_suffix('.log')} says why")
            told = {
                "command_seconds": time.perf_counter() - began,
                "peak_mb": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "loads": [load, os.getloadavg()[0]],
                "run": json.loads(Path(folder, "run.json").read_text()),
            }
        write_json(path, told | {"memory_gb": memory_gb, "packed_gb": _packed_gb(store), "density": _density(store)})
    return json.loads(path.read_text())


def _row(told: dict[str, Any], cells: int, genes: int, rules: dict[str, Any], options: argparse.Namespace) -> dict:
    """Numbers of one run, for the whole fit."""
    each = told["run"]["seconds_per_epoch"]
    epochs = rules["epochs"][str(cells)]
    # early stopping, where it is on, may end a whole fit sooner: what is extrapolated is the most it may take
    more = (epochs - len(each)) * statistics.median(each) if options.epochs else 0.0
    return {
        "cells": cells,
        "genes": genes,
        "streamed": told["memory_gb"] is not None,
        "extrapolated": bool(more),
        "epochs": epochs if options.epochs else len(each),
        "epochs_run": len(each),
        "command_seconds": told["command_seconds"] + more,
        "fit_seconds": told["run"]["seconds"] + more,
        "epoch_seconds": statistics.median(each),
        "cells_per_second": rules["n_train"][str(cells)] / statistics.median(each),
        "peak_mb": told["peak_mb"],
        **{key: told[key] for key in ("memory_gb", "packed_gb", "density", "cpu_seconds", "loads")},
    }


def _array(store: Path, name: str) -> dict[str, Any]:
    return json.loads((store / "X" / name / ".zarray").read_text())


def _packed_gb(store: Path) -> float:
    """What the counts take in memory: a byte or more a count, two or four a gene number."""
    genes = json.loads((store / "X" / ".zattrs").read_text())["shape"][1]
    count = int(_array(store, "data")["dtype"][-1])
    return _array(store, "data")["shape"][0] * (count + (2 if genes <= 2**16 else 4)) / 1e9


def _density(store: Path) -> float:
    cells, genes = json.loads((store / "X" / ".zattrs").read_text())["shape"]
    return _array(store, "data")["shape"][0] / cells / genes


def _little(store: Path) -> float | None:
    """Memory to allow, so that a store streams: a tenth of it, but three blocks, which are a chunk each or so."""
    chunks = _array(store, "data")["shape"][0] / _array(store, "data")["chunks"][0]
    return None if chunks < 4 else round(_packed_gb(store) * max(STREAMED, 3.5 / chunks), 4)


def _usual(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What to stream: of the fewest genes, the most cells but one size, so that the largest fit is not made twice."""
    fewest = min(genes for _, genes in pairs)
    sizes = sorted(pair for pair in pairs if pair[1] == fewest)
    return sizes[-2:][:1]


def _python(*command: Any, capture: bool = True) -> str:
    """Run Python in a process of its own; what it prints."""
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        raise UserError(f"{command[0] if capture is False else 'python'} failed; its own message stands above")
    return done.stdout or ""


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| cells | genes | density | counts | epochs | seconds, command | seconds, fit | seconds an epoch | cells/s "
        "| peak MB |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        about = "~" if row["extrapolated"] else ""
        held = f"{row['packed_gb']:.3g} GB" + (
            f", {row['memory_gb']:.3g} at a time" if row["streamed"] else " in memory"
        )
        cells = [
            f"{row['cells']:,}", f"{row['genes']:,}", f"{row['density']:.3f}", held, f"{row['epochs']}",
            f"{about}{row['command_seconds']:,.0f}", f"{about}{row['fit_seconds']:,.0f}",
            f"{row['epoch_seconds']:,.2f}", f"{row['cells_per_second']:,.0f}", f"{row['peak_mb']:,.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds of the command and peak memory against cells, a line a number of genes; and against genes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from scvi_core.report.style import style

    heads = {"cells": "genes", "genes": "cells"}
    measures = {"command_seconds": "seconds of the command", "peak_mb": "peak memory, MB"}
    with matplotlib.rc_context(style() | {"text.parse_math": True}):  # powers of ten
        figure, axes = plt.subplots(2, 2, figsize=(7.2, 5.4), layout="constrained")
        for (measure, name), (along, by) in itertools.product(measures.items(), heads.items()):
            axis = axes[list(measures).index(measure), list(heads).index(along)]
            for value in sorted({row[by] for row in rows}):
                line = sorted((r[along], r[measure]) for r in rows if r[by] == value and not r["streamed"])
                axis.plot(*zip(*line, strict=True), "o-", markersize=4, linewidth=1.2, label=f"{value:,} {by}")
            streamed = [(r[along], r[measure]) for r in rows if r["streamed"]]
            if streamed:
                label = "streamed from disk"
                axis.plot(*zip(*streamed, strict=True), "s", markersize=6, fillstyle="none", color="black", label=label)
            axis.set(xscale="log", yscale="log", xlabel=along, ylabel=name)
            axis.legend()
        if any(row["extrapolated"] for row in rows):
            figure.supxlabel("times extrapolated from some epochs", fontsize=8)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")
        plt.close(figure)


def _pair(text: str) -> tuple[int, int]:
    cells, _, genes = text.partition("x")
    return int(cells), int(genes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "counts", type=Path, help="AnnData with raw counts in X, that the simulation's model is fitted to"
    )
    parser.add_argument("--cells", nargs="+", type=int, default=[1_000, 10_000, 100_000, 1_300_000])
    parser.add_argument("--genes", nargs="+", type=int, default=[720, 2_000, 10_000])
    parser.add_argument(
        "--pairs", nargs="+", type=_pair, metavar="CELLSxGENES", help="these sizes, not all of --cells x --genes"
    )
    parser.add_argument("--epochs", type=int, help="run that many, and extrapolate; default: whole fits")
    parser.add_argument("--stream", nargs="+", type=_pair, metavar="CELLSxGENES", help="sizes to fit from disk too")
    parser.add_argument("--no-stream", action="store_true", help="fit nothing from disk")
    parser.add_argument("--simulate-epochs", type=int, help="of the simulation's model, to try this script")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("results/scale-benchmark"), help="folder of stores and runs")
    parser.add_argument("--json", type=Path, help="also write every number here")
    parser.add_argument("--plot", type=Path, help="also draw time and memory here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
