from concurrent.futures import ThreadPoolExecutor

import pytest
from _project import CONFIG, SHEET, make, snakemake, write_config, write_sheet


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """The small project in two folders, each built once; side by side, as one build leaves one of two cores idle."""
    base = tmp_path_factory.mktemp("small")
    folders = [make(base / name) for name in ("first", "twin")]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda folder: snakemake(folder, "--cores", "1"), folders))
    for one in done:
        assert one.returncode == 0, one.stdout + one.stderr
    return folders


@pytest.fixture(scope="session")
def built(builds):
    """The first. Nobody writes in it but :func:`as_built`'s users, into config/ only."""
    return builds[0]


@pytest.fixture
def as_built(built):
    """The built project; its configuration and sample sheet are put back afterwards."""
    yield built
    write_config(built, CONFIG)
    write_sheet(built, SHEET)


@pytest.fixture(scope="session")
def atlas(built):
    return built / "results" / "small"
