"""What people do in notebooks and scripts: masks, new batches, odd numbers, Ctrl-C, forks, joins to their own data."""

import os
import signal
import subprocess
import sys
import textwrap

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from _data import brief, cells

import scvi_core as sv
from scvi_core.config import DeConfig, ModelConfig
from scvi_core.files import UserError, write_parquet
from scvi_core.mapping import embed
from scvi_core.registry.pyfunc import Embedder
from scvi_core.tables import cells_table, clusters_table, latent_table

SMALL = ModelConfig(n_hidden=8, n_latent=2)
QUICK = DeConfig(n_samples=100)


def fit(adata=None, **more):
    more = {"batch_key": "batch", "model": SMALL, "train": brief(), "device": "cpu", "progress": False, **more}
    return sv.fit(cells() if adata is None else adata, **more)


@pytest.fixture(scope="module")
def fitted():
    adata = cells()
    return adata, fit(adata)


def changed(adata, **columns):
    new = adata.copy()
    new.obs = new.obs.assign(**columns)
    return new


# ---- masks


def test_a_mask_goes_by_its_index(fitted):
    adata, model = fitted
    mask = adata.obs["kind"] == "T"
    ask = lambda **given: model.differential_expression(adata, config=QUICK, **given)  # noqa: E731
    truth = ask(cells=mask.to_numpy())
    other = np.random.default_rng(0).permutation(adata.n_obs)
    for same in (mask, mask.iloc[other], mask.astype("boolean").iloc[other], list(mask), mask.astype(object)):
        pd.testing.assert_frame_equal(ask(cells=same), truth)
    pd.testing.assert_frame_equal(ask(cells=mask, reference=(~mask).iloc[other]), truth)
    numbered = adata.copy()
    numbered.obs_names = [str(i) for i in range(adata.n_obs)]
    by_number = pd.Series(mask.to_numpy())[other]  # labels 0, 1 ... are those names
    pd.testing.assert_frame_equal(model.differential_expression(numbered, config=QUICK, cells=by_number), truth)


def test_a_mask_that_is_none_is_refused(fitted):
    adata, model = fitted
    mask = adata.obs["kind"] == "T"
    ask = lambda given, **more: model.differential_expression(adata, cells=given, **more)  # noqa: E731
    more_cells = pd.concat([mask, pd.Series([True], ["else"])])
    for given in (mask.reset_index(drop=True), mask.iloc[1:], more_cells, pd.concat([mask.iloc[1:], mask.iloc[1:2]])):
        with pytest.raises(UserError, match=r"cells: its index is not that of adata.obs"):
            ask(given)
    with pytest.raises(UserError, match=r"reference: its index is not"):
        ask(mask, reference=(~mask).iloc[1:])
    missing = mask.astype("boolean").where(np.arange(60) > 3)
    hidden = np.ma.masked_array(mask.to_numpy(), np.arange(60) <= 3)
    for given in (missing, missing.astype(object), missing.to_numpy(object), hidden):
        with pytest.raises(UserError, match=r"cells: 4 cells have neither True nor False"):
            ask(given)
    for given in (mask.astype(int), mask.to_frame(), mask.to_numpy()[:5], "kind", [True], mask.map(str)):
        with pytest.raises(UserError, match="cells: give True or False for each of the 60 cells"):
            ask(given)
    with pytest.raises(UserError, match="reference: goes with a mask"):
        model.differential_expression(adata, "kind", reference=mask)
    with pytest.raises(UserError, match="groupby: no cell column"):
        model.differential_expression(adata, ["kind"])
    with pytest.raises(UserError, match="holdout: a Series"):
        fit(adata, holdout=mask.astype(int))


def test_a_group_may_be_called_rest(fitted):
    adata, model = fitted
    named = changed(
        adata, arm=np.array(["rest", "stim"])[np.arange(60) % 2], other=np.array(["T", "U"])[np.arange(60) % 2]
    )
    found = model.differential_expression(named, "arm", config=QUICK)
    assert set(zip(found["group"], found["reference"], strict=True)) == {("rest", "the rest"), ("stim", "the rest")}
    same = model.differential_expression(named, "other", config=QUICK)
    assert (same["reference"] == "rest").all()
    columns = ["gene_id", "lfc_mean", "proba_de", "rank"]
    pd.testing.assert_frame_equal(found[columns], same[columns])


# ---- batches that the model never met


def test_under_known_batches_the_own_one_does_not_matter(fitted):
    adata, model = fitted
    new, bare = changed(adata, batch="new"), adata.copy()
    del bare.obs["batch"]
    for other in (new, bare):
        for ask in (
            lambda a: model.normalized_expression(a, ["G3"], transform_batch="b1").to_numpy(),
            lambda a: model.expression_samples(a, ["G3"], transform_batch=["b0", "b1"]),
            lambda a: model.gene_correlation(a, ["G3", "G4"], transform_batch="b0").to_numpy(),
        ):
            assert np.array_equal(ask(adata), ask(other))
        with pytest.raises(UserError, match=r"'new' is not one the model was trained on|no column 'batch'"):
            model.normalized_expression(other, ["G3"])
        with pytest.raises(UserError, match=r"'new' is not one the model was trained on|no column 'batch'"):
            model.elbo(other)


def test_groups_of_new_batches_are_compared_under_known_ones(fitted):
    adata, model = fitted
    new = changed(adata, batch=np.where(adata.obs["batch"] == "b0", "x", "y"))
    one = model.differential_expression(adata, "kind", config=QUICK)
    two = model.differential_expression(new, "kind", config=QUICK)  # as many batches, of the same cells
    pd.testing.assert_frame_equal(one, two)
    for batches in ("own", "within"):
        with pytest.raises(
            UserError, match=rf"de.batches: '{batches}'.* 60 cells are of batches that the model was not"
        ):
            model.differential_expression(new, "kind", config=QUICK.model_copy(update={"batches": batches}))
    sees = fit(adata, model=SMALL.model_copy(update={"encode_covariates": True}))
    for ask in (
        lambda: sees.normalized_expression(new, transform_batch="b0"),
        lambda: sees.differential_expression(new, "kind"),
    ):
        with pytest.raises(UserError, match="'x' is not one the model was trained on"):
            ask()


def test_levels_that_differ_in_writing_only_are_one():
    adata = cells()
    number = np.arange(60) % 2
    model = fit(changed(adata, batch=number))
    truth = model.elbo(changed(adata, batch=number))
    for same in (number.astype(float), number.astype(str), pd.Categorical(number.astype(float)), number.astype("int8")):
        assert np.array_equal(model.elbo(changed(adata, batch=same)), truth)
    given = [
        model.normalized_expression(changed(adata, batch=number), ["G3"], transform_batch=b) for b in (1, 1.0, "1.0")
    ]
    assert all(frame.equals(given[0]) for frame in given)
    apart = fit(changed(adata, batch=np.array(["1", "1.0", "01"])[np.arange(60) % 3]))
    assert apart.schema.batches == ("01", "1", "1.0") and apart.batch_codes(["1.0", "1", "01"]) == [2, 1, 0]
    with pytest.raises(UserError, match=r"'1\.00' is not one of"):  # which of the two is not known
        apart.batch_codes("1.00")


# ---- numbers in other forms


def test_backed_cells_and_odd_numbers(fitted, tmp_path):
    adata, model = fitted
    adata.write_h5ad(tmp_path / "c.h5ad")
    backed = ad.read_h5ad(tmp_path / "c.h5ad", backed="r")
    truth = model.latent(adata)
    assert np.array_equal(model.latent(backed), truth)
    assert np.array_equal(Embedder(model).predict(backed).iloc[:, 1:].to_numpy(), truth)
    dense = adata.X.toarray()
    half = ad.AnnData(dense.astype(np.float16), adata.obs, adata.var)
    assert np.array_equal(embed(model, half).iloc[:, 1:].to_numpy(), truth)
    texts = ad.AnnData(dense.astype(object), adata.obs, adata.var)
    for ask in (model.latent, lambda a: embed(model, a)):
        with pytest.raises(UserError, match="object values in X; give raw counts"):
            ask(texts)
    torch.set_default_dtype(torch.float64)
    try:
        for ask in (
            lambda: fit(adata),
            lambda: model.latent(adata),
            lambda: model.differential_expression(adata, "kind"),
        ):
            with pytest.raises(UserError, match="default dtype is float64"):
                ask()
    finally:
        torch.set_default_dtype(torch.float32)
    double = changed(adata)
    double.obs = pd.concat([double.obs, double.obs[["batch"]]], axis=1)
    with pytest.raises(UserError, match="2 columns are called 'batch'"):
        model.elbo(double)


# ---- Ctrl-C


@pytest.fixture(autouse=True)
def python_takes_ctrl_c():
    """What runs in the background is deaf to it, until it says otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class AfterSteps:
    """Send this process a signal once so many minibatches have been gathered."""

    def __init__(self, monkeypatch, n, times=1):
        from scvi_core.counts import Counts

        gather, self.left = Counts.gather, n

        def counted(*args):
            self.left -= 1
            if -times < self.left <= 0:
                os.kill(os.getpid(), signal.SIGINT)
            return gather(*args)

        monkeypatch.setattr(Counts, "gather", counted)


def weights(model):
    return {name: tensor.numpy() for name, tensor in model.network.state_dict().items()}


def same_weights(one, other):
    return all(np.array_equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_ctrl_c_gives_the_model_so_far(monkeypatch, tmp_path, caplog):
    whole = fit()
    per_epoch = 4  # minibatches of 16 of 54 cells
    with monkeypatch.context() as patch:
        AfterSteps(patch, 2)  # noticed before the next one
        within = fit()
    assert within.card["stopped"] == {"step": 3, "steps": 4 * per_epoch}
    assert "stopped at step 3 of 16" in repr(within) and "checkpoints=FOLDER lets it go on" in caplog.text
    assert list(within.history["epoch"]) == [1] and within.card["metrics"]["kept_epoch"] == 1
    assert within.fingerprint != whole.fingerprint and not same_weights(within, whole)
    assert within.latent(cells()).shape == (60, 2) and not within.network.training
    within.save(tmp_path / "part")
    again = sv.load(tmp_path / "part")
    assert again.card["stopped"] == within.card["stopped"] and same_weights(again, within)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stopped_fit_goes_on_from_its_checkpoint(monkeypatch, tmp_path, caplog):
    whole = fit()
    for n in (2, 9):  # within the first epoch, and later; each but the last step
        with monkeypatch.context() as patch:
            AfterSteps(patch, n)
            part = fit(checkpoints=tmp_path / "kept")
        assert "stopped" in part.card and "is kept, and the same call goes on" in caplog.text
        assert [p.suffix for p in (tmp_path / "kept").iterdir()] == [".safetensors"]
        done = fit(checkpoints=str(tmp_path / "kept"))
        assert same_weights(done, whole) and done.fingerprint == whole.fingerprint and "stopped" not in done.card
        pd.testing.assert_frame_equal(done.history.drop(columns="seconds"), whole.history.drop(columns="seconds"))
        assert not list((tmp_path / "kept").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoints: .*; name a folder"):
        fit(checkpoints=tmp_path / "file")


def test_a_second_ctrl_c_interrupts_and_others_keep_theirs(monkeypatch):
    with monkeypatch.context() as patch:
        AfterSteps(patch, 3, times=2)
        with pytest.raises(KeyboardInterrupt):
            fit(train=brief(batch_size=64))  # one minibatch an epoch
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with monkeypatch.context() as patch:
            AfterSteps(patch, 3)
            model = fit()
        assert seen and "stopped" not in model.card
    finally:
        signal.signal(signal.SIGINT, before)


# ---- forks


def test_a_forked_child_computes():
    script = textwrap.dedent(
        """
        import multiprocessing as mp
        import sys

        import numpy as np
        import torch

        sys.path.insert(0, "tests/unit")
        from _data import brief, cells
        import scvi_core as sv

        torch.set_num_threads(2)
        adata = cells(n=600, g=300)
        fit = lambda: sv.fit(adata, "batch", train=brief(max_epochs=1), progress=False, device="cpu")
        model = fit()
        kind = adata.obs["kind"]
        ask = {
            "latent": lambda: model.latent(adata),
            "de": lambda: model.differential_expression(adata, "kind")["lfc_mean"].to_numpy(),
            "fit": lambda: fit().latent(adata),
        }
        here = {name: question() for name, question in ask.items()}
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # threads of torch's own
        context = mp.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=lambda: queue.put({name: question() for name, question in ask.items()}))
        child.start()
        there = queue.get(timeout=60)
        child.join(60)
        for name, values in here.items():
            assert np.allclose(values, there[name], atol=1e-4), name
        print("answered", child.exitcode)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "answered 0" in done.stdout, done.stderr


# ---- one's own AnnData


def atlas(folder, names=("s1", "s2")):
    """(cells.parquet, latent.parquet) of cells whose barcodes are alike in all samples; what they say is by cell."""
    rng, ids = np.random.default_rng(0), [f"{name}:{code}" for name in names for code in ("AA", "CC", "GG")]
    n = len(ids)
    obs = pd.DataFrame(
        {
            "sample": pd.Categorical([i.partition(":")[0] for i in ids]),
            "batch": pd.Categorical([i.partition(":")[0] for i in ids]),
            **{name: np.arange(n) + 10 for name in ("n_counts", "n_genes")},
            **{name: rng.random(n) for name in ("pct_mito", "doublet_score")},
            "donor": pd.Categorical(["d1"] * 3 + ["d2"] * (n - 3)),
        },
        index=ids,
    )
    found = pd.DataFrame(
        {"cluster": [str(9 + i % 2) for i in range(n)], "umap_1": rng.random(n), "umap_2": rng.random(n)}
    )
    found = found.assign(tsne_1=np.nan, tsne_2=np.nan)
    write_parquet(folder / "cells.parquet", cells_table(obs, clusters_table(ids, found)))
    write_parquet(folder / "latent.parquet", latent_table(ids, rng.normal(size=(n, 2)).astype(np.float32)))
    return pd.read_parquet(folder / "cells.parquet"), pd.read_parquet(folder / "latent.parquet")


def mine(names, **columns):
    return ad.AnnData(np.ones((len(names), 2), np.float32), pd.DataFrame(columns, index=names))


def test_attach_goes_by_cell(tmp_path, caplog):
    table, latent = atlas(tmp_path)
    assert list(table.columns[:4]) == ["cell_id", "barcode", "sample", "batch"]
    assert list(table["barcode"]) == ["AA", "CC", "GG"] * 2
    adata = mine(["s2:GG", "s1:AA", "else"])
    with caplog.at_level("INFO"):
        found = sv.attach(adata, tmp_path)
    assert found.tolist() == [True, True, False] and "2 of 3 cells are in" in caplog.text
    assert adata.obs["n_counts"].tolist()[:2] == [15, 10] and np.isnan(adata.obs["n_counts"].iloc[2])
    assert list(adata.obs["cluster"].cat.categories) == ["9", "10"] and adata.obs["cluster"].isna().tolist() == [
        0,
        0,
        1,
    ]
    z = latent.set_index("cell_id")
    assert np.array_equal(adata.obsm["X_scvi"][:2], z.loc[["s2:GG", "s1:AA"]].to_numpy())
    assert (
        np.isnan(adata.obsm["X_scvi"][2]).all() and adata.obsm["X_umap"].shape == (3, 2) and "X_tsne" not in adata.obsm
    )
    adata.write_h5ad(tmp_path / "mine.h5ad")
    sv.attach(adata, str(tmp_path))  # again: the same values
    alone = mine(["CC", "AA"])
    sv.attach(alone, tmp_path, sample="s2")
    assert alone.obs["n_counts"].tolist() == [14, 13]
    both = mine(["x", "y"], lane=["s2", "s1"], code=["CC", "CC"])
    sv.attach(both, tmp_path, sample="lane", barcode="code", prefix="atlas_")
    assert both.obs["atlas_n_counts"].tolist() == [14, 11] and "X_atlas_umap" in both.obsm


def test_attach_by_barcode_alone_only_where_it_tells(tmp_path):
    with pytest.raises(UserError, match=r"barcode 'AA' is in samples s1, s2 .*say by sample="):
        atlas(tmp_path)
        sv.attach(mine(["AA"]), tmp_path)
    atlas(tmp_path, ["s1"])
    adata = mine(["GG", "AA"])
    assert sv.attach(adata, tmp_path).all() and adata.obs["n_counts"].tolist() == [12, 10]
    with pytest.raises(UserError, match=r"33\.3% of its barcodes .* perhaps by chance"):
        sv.attach(mine(["GG", "TT", "AT"]), tmp_path)
    assert sv.attach(mine(["GG", "TT", "AT"]), tmp_path, sample="s1").tolist() == [True, False, False]


def test_attach_refuses_what_would_be_wrong(tmp_path):
    atlas(tmp_path)
    for adata, more, match in (
        (mine(["other"]), {}, r"none of its 1 cells \(such as 'other'\) is in .* as 's1:AA'"),
        (mine(["AA"]), {"sample": "s3"}, "none of its 1 cells"),
        (mine(["AA"]), {"barcode": "nope"}, "barcode: no cell column 'nope'"),
        (mine(["a", "b"], code=["AA", "AA"]), {"sample": "s1", "barcode": "code"}, "several of its cells are 's1:AA'"),
        (mine(["s1:AA"], cluster=["B cell"]), {}, r"obs\['cluster'\] hold other values"),
    ):
        before = adata.obs.copy()
        with pytest.raises(UserError, match=match):
            sv.attach(adata, tmp_path, **more)
        pd.testing.assert_frame_equal(adata.obs, before)
        assert not adata.obsm
    agrees = mine(["s1:AA"], donor=["d1"], n_counts=[10.0])
    sv.attach(agrees, tmp_path)
    with pytest.raises(UserError, match=r"no such file; run `scvi-core cells`"):
        sv.attach(agrees, tmp_path / "absent")
    with pytest.raises(UserError, match="a DataFrame; give an anndata"):
        sv.attach(agrees.obs, tmp_path)
