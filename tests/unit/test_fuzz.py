"""A few of what `benchmarks/fuzz.py` tries 10^5 of: whatever is changed in an input, a result or one line."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fuzz


@pytest.mark.parametrize("name", fuzz.READERS)
def test_no_changed_input_is_a_fault(name):
    n, found = fuzz.run(name, inputs=25, seed=1)
    assert n == 25 and found == []


def test_what_is_no_result_is_found(monkeypatch):
    def reads(path):
        data = path.read_bytes()
        if len(data) % 2:
            raise KeyError("a\nb")
        while len(data) % 4 == 0:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setitem(fuzz.READERS, "sheet", (fuzz.READERS["sheet"][0], reads))
    _, found = fuzz.run("sheet", inputs=30)
    assert any("KeyError" in line for line in found) and any("took over" in line for line in found), found
