"""What a long step says while it runs, and what a build says at its end."""

import logging

import pytest

from scvi_core import log as module
from scvi_core.log import duration, log, one_line, progress
from scvi_core.times import times_table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pa/ss@host/x", "https://***@host/x"),
        ("https://host:80/x@1 sqlite:////home/u@x/a:b@c", "https://host:80/x@1 sqlite:////home/u@x/a:b@c"),
        ("https://me:p@ss@host:80/x and postgresql://u@h", "https://***@host:80/x and postgresql://***@h"),
        ("http://host/x?token=abc&n=1&api_key=d", "http://host/x?token=***&n=1&api_key=***"),
        ("s3://b/k?X-Amz-Signature=ab'", "s3://b/k?X-Amz-Signature=***'"),
        ("a\nb\x1b[2J\x85\u2028\u202e\udc85", "a\\nb\\x1b[2J\\x85\\u2028\\u202e\\udc85"),
        ("é 細胞", "é 細胞"),
    ],
)
def test_one_line(text, shown):
    assert one_line(text) == shown and one_line(shown) == shown
    assert len(one_line("x" * 5000 + " mend it")) < 1100 and one_line("x" * 5000 + " mend it").endswith("x mend it")


@pytest.fixture
def lines():
    kept = []

    class Keep(logging.Handler):
        def emit(self, record):
            kept.append(record.getMessage())

    handler = Keep()
    log.addHandler(handler)
    yield kept
    log.removeHandler(handler)


def test_a_log_has_a_line_now_and_then(lines, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    parts = [range(25)] * 4
    assert list(progress(iter(parts), "cells read", 100, len)) == parts
    assert lines == ["cells read: 50 of 100, about 40 s left"]


def test_a_short_step_says_nothing(lines):
    assert list(progress([1, 2, 3], "cells read", 3)) == [1, 2, 3]
    assert not lines


def test_a_terminal_has_a_bar(lines, monkeypatch, capsys):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress(iter([1, 2, 3]), "cells read", 3)) == [1, 2, 3]
    assert not lines


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (42, "42 s"), (300, "5 min"), (5400, "1.5 h")])
def test_durations_are_as_one_reads_them(seconds, text):
    assert duration(seconds) == text


def test_times_are_summed_by_rule(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, row in {
        "qc.a": "10.0\t500.0",
        "qc.b": "95.0\t700.0",
        "train": "9000\t1500.0",
        "genes": "0.1\tNA",
    }.items():
        (folder / f"{name}.tsv").write_text(f"s\tmax_rss\n{row}\n")
    assert times_table(tmp_path).splitlines() == [
        "rule          jobs      time   longest    memory",
        "train            1     2.5 h     2.5 h    1.5 GB",
        "qc               2     2 min     2 min    0.7 GB",
        "genes            1       0 s       0 s    0.0 GB",
    ]
    assert times_table(tmp_path, since=2**40) == ""
