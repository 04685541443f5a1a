"""Flipped bits in what one step hands to the next; `benchmarks/flips.py` tries as many as one likes."""

import shutil
import sys

from _project import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import flips


def test_no_flipped_bit_is_taken(built, tmp_path, monkeypatch):
    atlas = shutil.copytree(built / "results" / "small", tmp_path / "results" / "small")
    monkeypatch.chdir(tmp_path)
    n, bad = flips.wrong(atlas, flips=1, seed=7, of_store=6)
    assert n >= 30 and bad == []
