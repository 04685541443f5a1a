import pytest
from _project import CONFIG, SHEET, make, snakemake, write_config, write_sheet


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The small project, built once. Nobody writes in it but :func:`as_built`'s users, into config/ only."""
    folder = make(tmp_path_factory.mktemp("small") / "first")
    done = snakemake(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def as_built(built):
    """The built project; its configuration and sample sheet are put back afterwards."""
    yield built
    write_config(built, CONFIG)
    write_sheet(built, SHEET)


@pytest.fixture(scope="session")
def atlas(built):
    return built / "results" / "small"
