"""What is wrong with a configuration, word for word: a table of what people write."""

import pytest

from scvi_core.config import load_config, load_samples
from scvi_core.files import UserError

TABLE = [
    ("cluster: {resolutions: 0.8}", "cluster.resolutions: give a list: [0.8]"),
    (
        "cluster: {resolutions: [0.8, abc, -1]}",
        "cluster.resolutions.1: give a number above 0, at most 1,000 (got abc); cluster.resolutions.2: give a "
        "number above 0, at most 1,000 (got -1)",
    ),
    ("cluster: {resolutions: []}", "cluster.resolutions: give a list of one at least (got [])"),
    ("cluster: {umap: maybe}", "cluster.umap: give true or false (got maybe)"),
    ("cluster: {tsne: maybe}", "cluster.tsne: give true or false or auto (got maybe)"),
    ("qc: {n_mads: yes}", "qc.n_mads: give a number above 0, at most 1,000,000 (got yes, which YAML takes for true)"),
    ("qc: {n_mads: 0}", "qc.n_mads: give a number above 0, at most 1,000,000 (got 0)"),
    ('qc: {n_mads: "0,5"}', "qc.n_mads: give a number above 0, at most 1,000,000 (got '0,5')"),
    ("qc: {min_counts: 2.5}", "qc.min_counts: give a whole number from 0 to 2,147,483,647 (got 2.5)"),
    ("qc: {max_pct_mito: 200}", "qc.max_pct_mito: give a number from 0 to 100 (got 200)"),
    ("qc: {min_counts: -1}", "qc.min_counts: give a whole number from 0 to 2,147,483,647 (got -1)"),
    ("de: {fdr: 2}", "de.fdr: give a number above 0, below 1 (got 2)"),
    ("qc: {drop: high_mito}", "qc.drop: give a list: [high_mito]"),
    (
        "qc: {drop: [high_mit]}",
        "qc.drop.0: give empty, low_counts, high_counts, low_genes, high_genes, high_mito, high_hb, high_top50 or "
        "doublet; did you mean high_mito? (got high_mit)",
    ),
    ("qc: 5", "qc: has keys of its own (cells, n_mads, min_counts ...), indented below it (got 5)"),
    ("qc:", "qc: is empty; indent its keys below it, or leave it out"),
    ("genes: {n_top: many}", "genes.n_top: give a whole number, auto or all (got many)"),
    ("genes: {n_top: true}", "genes.n_top: give a whole number, auto or all (got true)"),
    ("genes: {n_top: 0}", "genes.n_top: must be at least 1, and 1,000,000 at most (got 0)"),
    ("genes: {include: INS}", "genes.include: give a list: [INS]"),
    (
        "genes: {include: [NO, INS]}",
        'genes.include.0: give a text: "NO", in quotes, as YAML takes it for true or false',
    ),
    ("n_top: 2000", "unknown key 'n_top'; did you mean 'genes.n_top'?"),
    (
        "qc: {genes: {n_top: 5}}",
        "unknown key 'qc.genes'; 'genes' stands in no section: write it at the beginning of a line",
    ),
    (
        "min_cells: 4",
        "unknown key 'min_cells'; did you mean 'genes.min_cells' or 'de.min_cells' or 'contrast.min_cells'?",
    ),
    ("qc: {min_count: 5}", "unknown key 'qc.min_count'; did you mean 'qc.min_counts'?"),
    ("trian: {}", "unknown key 'trian'; did you mean 'train'?"),
    ("sead: 1", "unknown key 'sead'; did you mean 'seed'?"),
    (
        "model: {zzz: 1}",
        "unknown key 'model.zzz'; valid keys: likelihood, dispersion, library, n_latent, n_hidden, n_layers, "
        "decoder, loadings_l1, dropout, encoder_norm, decoder_norm, encode_covariates, covariates_in, "
        "categorical_covariates, continuous_covariates, reuse",
    ),
    ("model: {likelihood: zimb}", "model.likelihood: give zinb, nb or poisson; did you mean zinb? (got zimb)"),
    ("atlas: no", 'atlas: give a text: "no", in quotes, as YAML takes it for true or false'),
    ("atlas: 2024_01", 'atlas: give a text: "2024_01", in quotes, as YAML takes it for a number'),
    ("atlas: 2024-01-01", 'atlas: give a text: "2024-01-01", in quotes, as YAML takes it for a date'),
    ("atlas: 007", 'atlas: give a text: "007", in quotes, as YAML takes it for a number'),
    (
        "atlas: a b",
        "atlas: use letters, digits, '.', '_' and '-' (first a letter or digit, no '..', at most 64) (got 'a b')",
    ),
    ("atlas: [a]", 'atlas: give a text (got ["a"])'),
    ("atlas:", "atlas: is empty; give a text, or leave it out"),
    ("seed: 1.5", "seed: give a whole number from 0 below 2,147,483,648 (got 1.5)"),
    ("report: {title: 2024}", 'report.title: give a text: "2024", in quotes, as YAML takes it for a number'),
    ("report: {labels: donor}", "report.labels: give a list: [donor]"),
    ("train: {batch_size: 1}", "train.batch_size: give a whole number from 2 to 1,000,000 or auto (got 1)"),
    ("train: {max_epochs: 1e2}", "train.max_epochs: give a whole number or auto (got 1e2)"),
    ("contrast: {tests: {column: a}}", "contrast.tests: give a list: each entry starts with '- '"),
    ("contrast: {within: 3}", 'contrast.within: give a text: "3", in quotes, as YAML takes it for a number'),
    ("input: {metadata: 5}", "input.metadata: give a list: [5]"),
    ("input: {layer: }", "input.layer: is empty; give a text, or leave it out"),
    ("device: gpu", "device: give auto, cpu or cuda; did you mean cpu? (got gpu)"),
    ("cluster:\n\tumap: true", "line 2: not valid YAML (a tab; indent with spaces)"),
    (
        "contrast: {tests: [{colum: a, group: x, reference: y}]}",
        "contrast.tests.0.column: is missing; unknown key 'contrast.tests.0.colum'; did you mean "
        "'contrast.tests.0.column'?",
    ),
    (
        "contrast: {tests: [{column: a, group: no, reference: yes}]}",
        'contrast.tests.0.group: give a text: "no", in quotes, as YAML takes it for true or false',
    ),
    ("", "expected keys and values, such as `atlas: pancreas`, found nothing"),
    ("atlas pancreas", "expected keys and values, such as `atlas: pancreas`, found a text"),
    ("- a", "expected keys and values, such as `atlas: pancreas`, found a list"),
    ("atlas: 'x\n\ty: 2\n  z", "line 3: not valid YAML (found unexpected end of stream)"),
]


@pytest.mark.parametrize(("text", "told"), TABLE)
def test_a_configuration_is_refused_in_its_users_words(tmp_path, text, told):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(file)
    assert str(error.value).removeprefix(str(file)).removeprefix(":").strip() == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"cluster": {"resolutions": 0.8}}', "--config: cluster.resolutions: give a list: [0.8]"),
        ('{"atlas": 7}', '--config: atlas: give a text: "7", in quotes, as YAML takes it for a number'),
    ],
)
def test_the_same_of_json(text, told):
    with pytest.raises(UserError) as error:
        load_config(text)
    assert str(error.value) == told


def test_what_stands_in_the_file_is_shown_where_the_command_line_says_no_other(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("atlas: 2024_01\n")
    with pytest.raises(UserError, match=f'^{file}: atlas: give a text: "2024_01", in quotes'):
        load_config({"atlas": 202401}, str(file))
    with pytest.raises(UserError, match='atlas: give a text: "5", in quotes'):
        load_config({"atlas": 5}, str(file))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            "a b\td\tx\tauto",
            "sample: use letters, digits, '.', '_' and '-' (first a letter or digit, no '..', at most 64)",
        ),
        (
            "a\td\tx\tcell_as_rows",
            "orientation: give auto, cells_as_rows or genes_as_rows; did you mean cells_as_rows?",
        ),
        ("a\td\t\tauto", "batch: is empty"),
    ],
)
def test_a_sheet_is_refused_in_the_same_words(tmp_path, row, told):
    file = tmp_path / "samples.tsv"
    file.write_text(f"sample\tpath\tbatch\torientation\n{row}\n")
    with pytest.raises(UserError) as error:
        load_samples(file)
    assert str(error.value).startswith(f"{file} line 2: {told}")
