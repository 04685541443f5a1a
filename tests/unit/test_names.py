"""Names for clusters and cells: right ones land on the right cells, wrong tables are refused in one line."""

import pandas as pd
import pytest

from scvi_core.config import check_columns, load_config, load_samples
from scvi_core.files import Decisions, UserError
from scvi_core.names import annotate
from scvi_core.report import cluster_names

CELLS = pd.DataFrame(
    {
        "cell_id": [f"a:{i}" for i in range(8)],
        "cluster": list("00011122"),
        "cluster_r1": list("01234567"),
    }
)


def named(tmp_path, text, cells=CELLS):
    (tmp_path / "names.tsv").write_text(text)
    made = Decisions("cells")
    return annotate(tmp_path / "names.tsv", cells, made), {d.what: d for d in made}


def test_clusters_get_their_names_and_keep_their_numbers_without(tmp_path):
    found, made = named(tmp_path, 'cluster\tname\n# mine\n1\tT cell\n\n0\t"B, naive"\n')
    assert list(found) == ["B, naive"] * 3 + ["T cell"] * 3 + ["2"] * 2
    assert made["annotation"].value == 2 and "2 of 3 groups" in made["annotation"].reason
    assert made["clusters_unnamed"].value == ["2"] and made["clusters_unnamed"].warning
    assert made["clusters_unnamed"].reason.startswith("without a name, 2 cells in all")
    assert cluster_names(CELLS.assign(annotation=found)) == {"0": "B, naive", "1": "T cell"}


def test_one_name_for_several_and_another_resolution(tmp_path):
    found, made = named(tmp_path, "cluster_r1\tname\n" + "".join(f"{i}\t{'B' if i < 5 else 'T'}\n" for i in range(8)))
    assert list(found) == list("BBBBBTTT") and "clusters_unnamed" not in made
    assert cluster_names(CELLS.assign(annotation=found)) == {"0": "B", "2": "T"}  # of cluster 1 both


def test_cells_get_theirs(tmp_path):
    found, made = named(tmp_path, "cell_id\tname\na:7\tNK\na:0\tB\nz:9\tB\na:1\t\n")
    assert list(found) == ["B", *[None] * 6, "NK"]
    assert made["annotation"].value == 2 and made["annotation"].warning
    assert "of 8 cells have a name; 1 of the table's are not in the atlas" in made["annotation"].reason


def test_sizes_are_compared(tmp_path):
    _, made = named(tmp_path, "cluster\tname\tn_cells\n0\tB\t3\n1\tT\t\n2\tNK\t2\n")
    assert "sizes as when they were named" in made["annotation"].reason
    with pytest.raises(UserError, match="line 3: cluster 1 has 3 cells, and 1,200 when it was named; look whether"):
        named(tmp_path, "cluster\tname\tn_cells\n0\tB\t3\n1\tT\t1,200\n")


def test_names_that_differ_in_case_only_are_warned_of(tmp_path):
    found, made = named(tmp_path, "cluster\tname\n0\tB cell\n1\tB  Cell\n2\tT\n")
    assert made["names_alike"].value == ["B  Cell", "B cell"] and made["names_alike"].warning
    assert found.nunique() == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty; expected a header"),
        ("cluster\tname\n", "has no name"),
        ("cluster\tname\n0\t\n", "has no name"),
        ("cluster,name\n0,B\n", "columns cluster,name, separated by tabs; write cluster, name"),
        ("name\tcluster\nB\t0\n", "columns name, cluster"),
        ("cluster\n0\n", "columns cluster, separated"),
        (
            "cluster_r3\tname\n0\tB\n",
            "cluster_r3, which cluster.resolutions does not make; there is cluster, cluster_r1",
        ),
        ("cluster\tname\n0\tB\n3\tT\n", "line 3: no cluster '3' in column cluster, which has 0, 1, 2; was it named"),
        ("cluster_r1\tname\n8\tB\n", "no cluster '8' in column cluster_r1, which has 0 to 7"),
        ("cluster\tname\n0\tB\n0\tT\n", "line 3: cluster 0 is named 'T', and 'B' on line 2; keep one"),
        ("cluster\tname\n\tB\n", "line 2: 'B' is the name of no cluster"),
        ("cluster\tname\n0\tB\tx\n", "line 2: 3 columns where the header has 2"),
        ("cluster\tname\n0\t1\n", "line 2: cluster 0 is named '1', which is the number of a cluster without a name"),
        ("cluster\tname\tn_cells\n0\tB\tmany\n", "line 2: n_cells is 'many'"),
        ("cluster\tname\n0\t" + "x" * 201 + "\n", "line 2: a name of 200 printable characters"),
        ("cluster\tname\n0\tB\x1b[2J\n", "line 2: a name of 200 printable characters"),
        ("cell_id\tname\nb:0\tB\n", "none of its cells is in the atlas, whose first is 'a:0'"),
        ('cluster\tname\n0\t"B\n' + "x" * 200_000, "cannot be read"),
    ],
)
def test_what_is_no_table_of_names_is_refused_in_one_line(tmp_path, text, told):
    with pytest.raises(UserError) as error:
        named(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "names.tsv")) and told in str(error.value)
    assert "\n" not in str(error.value)


def test_the_column_may_be_asked_for_where_names_are_given(tmp_path):
    sheet, names = tmp_path / "samples.tsv", tmp_path / "names.tsv"
    sheet.write_text("sample\tpath\tbatch\na\tx\tb\n")
    names.write_text("cluster\tname\n0\tB\n")
    asked = {"samples": str(sheet), "de": {"groupby": "annotation"}}
    config = load_config(asked | {"annotations": str(names)})
    check_columns(config, load_samples(sheet))
    assert config.labels == ("annotation",)
    with pytest.raises(UserError, match=r"de\.groupby: no column 'annotation'; name clusters in a table"):
        check_columns(load_config(asked), load_samples(sheet))
    with pytest.raises(UserError, match=r"annotations: no file gone\.tsv"):
        check_columns(load_config(asked | {"annotations": "gone.tsv"}), load_samples(sheet))
    sheet.write_text("sample\tpath\tbatch\tannotation\na\tx\tb\tmine\n")
    with pytest.raises(UserError, match="the samples have a column 'annotation' of their own"):
        check_columns(config, load_samples(sheet))
