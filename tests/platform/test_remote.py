"""Samples at URLs: fetched by Snakemake's storage plugin from a real S3 server on loopback, to the same bytes.

Skipped where the plugin or moto is not there: `make remote` installs both beside the environment and runs this.
"""

import logging
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow"))  # the small project
from _project import SHEET, snakemake, tree, write_sheet

boto3, moto, _ = (
    pytest.importorskip(name, reason=f"{name} is not installed: `make remote` does so and runs this")
    for name in ("boto3", "moto.server", "snakemake_storage_plugin_s3")
)
VARIES = ("logs", "benchmarks", "model_ref.json")  # by the contract of the files
URLS = [f"s3://cells/{path}" for path in SHEET["path"]]
CACHE = Path(".snakemake") / "storage" / "s3" / "cells" / "data"


@pytest.fixture(scope="module")
def bucket():
    """A bucket on a server of its own, known to Snakemake by its own settings alone."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not every request
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY": "tester", "SECRET_KEY": "secret"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"SNAKEMAKE_STORAGE_S3_{name}", value)
        patch.setenv("NO_PROXY", host)
        s3 = boto3.resource(
            "s3",
            endpoint_url=settings["ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id=settings["ACCESS_KEY"],
            aws_secret_access_key=settings["SECRET_KEY"],
        )
        yield s3.create_bucket(Bucket="cells")
    server.stop()


@pytest.fixture
def remote(bucket, project):
    """The project, its samples in the bucket and nowhere else."""
    bucket.objects.delete()
    for path in (project / "data").rglob("*"):
        if path.is_file():
            bucket.upload_file(str(path), path.relative_to(project).as_posix())
    (project / "data").rename(project.parent / "data")
    write_sheet(project, SHEET | {"path": URLS})
    return project


def counts(sample):
    return f"results/small/samples/{sample}/counts.h5ad"


def said(done):
    return done.stdout + done.stderr


def test_the_same_bytes_as_from_local_files(remote, reference):
    done = snakemake(remote)
    assert done.returncode == 0, said(done)
    made = tree(remote / "results" / "small", VARIES)
    assert made == tree(reference / "results" / "small", VARIES)  # so no place is on record either
    log = (remote / "results" / "small" / "logs" / "ingest.b.log").read_text()
    assert f"b: read {URLS[1]}, content sha256 " in log
    assert not [path for path in (remote / CACHE).rglob("*") if path.is_file()]
    assert "Nothing to be done" in said(snakemake(remote, "-n"))


def test_a_changed_object_is_fetched_again_and_named_when_damaged(remote, bucket):
    assert snakemake(remote, counts("a"), counts("c")).returncode == 0
    whole = (remote.parent / "data" / "a.h5ad").read_bytes()
    bucket.put_object(Key="data/a.h5ad", Body=whole[: len(whole) // 2])
    done = snakemake(remote, counts("a"), counts("c"))
    assert done.returncode != 0 and f"\nerror: {URLS[0]}: the file is truncated" in said(done), said(done)
    assert "Traceback" not in said(done) and "c: read" not in said(done)


def test_what_a_killed_run_had_begun_to_fetch_is_not_taken_for_whole(remote, reference):
    (remote / CACHE / "b").mkdir(parents=True)
    (remote / CACHE / "b" / "barcodes.tsv").write_text("of an earlier upload\n")
    (remote / CACHE / "a.h5ad").write_bytes((remote.parent / "data" / "a.h5ad").read_bytes()[:1000])
    done = snakemake(remote, counts("a"), counts("b"))
    assert done.returncode == 0, said(done)
    for sample in "ab":
        assert (remote / counts(sample)).read_bytes() == (reference / counts(sample)).read_bytes()


def test_what_is_not_there_or_out_of_reach(remote, monkeypatch):
    write_sheet(remote, SHEET | {"path": [*URLS[:2], "s3://cells/data/none.h5ad"]})
    done = snakemake(remote)
    assert done.returncode != 0 and "s3://cells/data/none.h5ad" in said(done), said(done)
    monkeypatch.delenv("SNAKEMAKE_STORAGE_S3_ACCESS_KEY")
    monkeypatch.delenv("SNAKEMAKE_STORAGE_S3_SECRET_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(remote))
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_EC2_METADATA_DISABLED"]:
        monkeypatch.delenv(name)
    write_sheet(remote, SHEET | {"path": URLS})
    done = snakemake(remote)
    assert done.returncode != 0 and "Unable to locate credentials" in said(done), said(done)
    assert not (remote / "results").exists() or not list((remote / "results").rglob("*.h5ad"))
