import itertools
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from _data import brief, cells, choose, packed

from scvi_core import kernels
from scvi_core.config import ModelConfig
from scvi_core.kernels import native
from scvi_core.model import NORMS, Noise, build
from scvi_core.train import elbo_of, train
from scvi_core.train.step import gradients

LIKELIHOODS = ("zinb", "nb", "poisson")
DISPERSIONS = ("gene", "gene-batch", "gene-cell")
LIBRARIES = ("observed", "latent")
EVERY = list(itertools.product(LIKELIHOODS, DISPERSIONS, LIBRARIES))
MORE = [{"n_layers": n, "dropout": dropout} for n, dropout in itertools.product((1, 2), (0.0, 0.3))]
MORE.append({"n_layers": 2, "dropout": 0.3, "decoder": "linear"})


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    choose("compiled", monkeypatch)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(half=False, n=20, covariates=True, batch_key="batch", n_genes=25, seed=0, **more):
    """A model ready for a step, with weights and statistics to speak of, and all its cells as one minibatch."""
    design = (("day",), ("age",)) if covariates else ()
    schema, counts = packed(cells(n, n_genes), *design, batch_key=batch_key)
    sizes = {"n_latent": 3, "n_hidden": 40, **more}
    model = build(ModelConfig(**sizes), n_genes, len(schema.batches), 4 if covariates else 0, seed)
    torch.manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith(("norm.bias", "library_mean_s", "rho.bias", "dropout_logit.bias", "running_mean")):
            value.normal_(0.5, 0.5)
        if name.endswith(("norm.weight", "library_variance_s", "running_var")):
            value.uniform_(0.5, 2.0)
    model.half = half
    return model.train(), counts.gather(torch.arange(n))


def cells_of(n, n_genes):
    """The non-zeros of some cells."""
    return packed(cells(n, n_genes))[1].gather(torch.arange(n)).x


def step(noise=None, **how):
    """Its ELBO by cell, gradients and state."""
    model, minibatch = made(**how)
    elbo_n = gradients(model, minibatch, noise or Noise(5), 0.7)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return elbo_n, found, {name: value.clone() for name, value in model.state_dict().items()}


def plain_step(**how):
    """The same by PyTorch's operations and its autograd alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", None)
        return step(**how)


def compare(ours, theirs, near):
    """Gradients within `near` of the largest of each tensor; ELBO and statistics as float32 allows."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-6, atol=1e-5)
    assert not ours[0].requires_grad
    for name, expected in theirs[1].items():
        got, unit = ours[1][name], expected.abs().max()
        assert got.dtype == torch.float32 and torch.isfinite(got).all()
        if name.endswith("linear.bias"):  # the batch norm behind it takes the mean away: both are 0 but for rounding
            unit = theirs[1][name.replace("linear.bias", "norm.bias")].abs().max()
        assert unit > 0, name
        assert (got - expected).abs().max() <= near * unit, (name, float((got - expected).abs().max() / unit))
    for name, expected in theirs[2].items():
        torch.testing.assert_close(ours[2][name], expected, rtol=1e-5, atol=1e-6, msg=name)
        if name.endswith("num_batches_tracked"):
            assert ours[2][name] == 1


@pytest.mark.parametrize(("likelihood", "dispersion", "library"), EVERY)
def test_gradients_are_autograds(likelihood, dispersion, library):
    for more in MORE:
        how = {"likelihood": likelihood, "dispersion": dispersion, "library": library, **more}
        compare(step(**how), plain_step(**how), 1e-5)


@pytest.mark.parametrize(("likelihood", "dispersion", "library"), EVERY)
def test_gradients_are_autograds_with_half_heads(likelihood, dispersion, library):
    """Both round to bfloat16, 8 bits: one the gradients of each cell's value, the other their share of the mean."""
    for more in MORE:
        how = {"likelihood": likelihood, "dispersion": dispersion, "library": library, "half": True, **more}
        ours, theirs = step(**how), plain_step(**how)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=0)
        compare((theirs[0], *ours[1:]), theirs, 2**-6)


@pytest.mark.parametrize(
    "how",
    [
        {"batch_key": None, "covariates": False, "library": "latent"},  # the decoder sees z alone
        {"batch_key": None, "covariates": False, "decoder": "linear"},
        {"n": 2, "covariates": False},
        {"n": 130, "n_hidden": 128, "n_genes": 300, "n_latent": 10},
        {"n_hidden": 1, "n_latent": 1, "n_genes": 2},
        {"n_hidden": 33, "n_genes": 257, "dispersion": "gene-batch"},
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_other_sizes(how, half):
    ours, theirs = step(half=half, **how), plain_step(half=half, **how)
    # a lone hidden unit and two cells: float32's rounding is divided by a variance of next to nothing
    near = 1e-4 if min(how.get("n", 9), how.get("n_hidden", 9)) < 3 else 2e-5
    if half:
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=0)
        ours, near = (theirs[0], *ours[1:]), 2**-6
    compare(ours, theirs, near)


class Given:
    """Noise that is the same in every precision."""

    n_cells = None

    def __init__(self):
        self.i = 0

    def normal(self, like):
        self.i += 1
        drawn = np.random.default_rng(self.i).normal(size=tuple(like.shape))
        return torch.from_numpy(drawn).float().to(like.dtype)


@pytest.mark.parametrize(
    "how",
    [
        {"library": "latent", "n_layers": 2},
        {"likelihood": "nb", "dispersion": "gene-batch"},
        {"likelihood": "nb", "dispersion": "gene-cell", "library": "latent"},
        {"likelihood": "poisson"},
        {"decoder": "linear"},
    ],
)
def test_gradients_are_finite_differences(how):
    """Of the loss in float64, by every weight tensor, along random directions and single weights."""
    how = {"n_hidden": 6, "n_genes": 12, "n": 15, "dropout": 0.0, **how}
    _, found, _ = step(Given(), **how)
    model, minibatch = made(**how)
    model.double()
    for name in ("library_n", "covariates_nc"):
        setattr(minibatch, name, getattr(minibatch, name).double())
    minibatch.x.x_m = minibatch.x.x_m.double()

    @torch.no_grad()
    def loss():
        reconstruction_n, kl_z_n, kl_l_n = model.elbo_terms(minibatch, Given())
        return (0.7 * kl_z_n + kl_l_n - reconstruction_n).mean()

    rng = np.random.default_rng(0)
    for name, weight in model.named_parameters():
        gradient = found[name].double()
        # no linear.bias has a gradient, beside its norm's
        unit = float(found[name.replace("linear.bias", "norm.bias")].norm())
        ways = [torch.from_numpy(rng.normal(size=tuple(weight.shape))) for _ in range(4)]
        for place in rng.integers(0, weight.numel(), 4):
            ways.append(torch.zeros(weight.numel(), dtype=torch.float64))
            ways[-1][place] = 1
        for way in ways:
            way = way.view_as(weight) / way.norm() * 1e-6
            weight.data += way
            after = loss()
            weight.data -= 2 * way
            slope = (after - loss()) / 2e-6
            weight.data += way
            expected = float((gradient * way).sum() * 1e6)
            assert slope == pytest.approx(expected, rel=1e-4, abs=1e-5 * unit + 1e-6), name


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("likelihood", ["zinb", "poisson"])
def test_the_same_bits_on_any_number_of_threads(likelihood, half):
    """Heads in bfloat16 are PyTorch's own products, which more threads may split, and round, otherwise."""
    for dispersion in ("gene-batch", "gene-cell"):
        how = {"half": half, "likelihood": likelihood, "dispersion": dispersion, "library": "latent", "n": 130}
        how |= {"n_hidden": 129, "n_genes": 300}
        torch.set_num_threads(1)
        first = step(**how)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found, again = step(**how), step(**how)
            same = again if half else first
            assert torch.equal(found[0], again[0])
            for mine, other in zip(found[1:], same[1:], strict=True):
                assert all(torch.equal(mine[name], other[name]) for name in mine), threads
            if half:
                torch.testing.assert_close(found[0], first[0], rtol=1e-3, atol=0)
                compare((first[0], *found[1:]), first, 2**-7)


def test_kernels_give_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    x = cells_of(130, 300)
    weight_gh, outer_nh, row_n = torch.randn(300, 129), torch.randn(130, 129), torch.randint(0, 4, (130,))
    logits, library_n, theta_1g = [torch.randn(130, 300) for _ in range(2)], torch.randn(130) + 5, torch.randn(1, 300)
    biases, theta_rg = [torch.randn(300) for _ in range(2)], torch.randn(4, 300)

    def everything():
        norm = norm_of(129)
        out_nh, *saved = native.hidden(outer_nh, norm, None, 1.0)
        value_nh, value_m = native.sparse_linear(x, weight_gh)
        given = [value_nh, value_m, out_nh, native.sparse_linear_gradient(x, value_m, outer_nh), norm.running_var]
        given += native.hidden_gradient(outer_nh, out_nh, norm.weight, *saved, norm, True, 1.0)
        given.append(native.linear(outer_nh, weight_gh, biases[0]))
        given += native.linear_gradient(logits[0], library_n, outer_nh, weight_gh)
        given += [native.sums(logits[0], library_n, *rows) for rows in ((None, 1), (row_n, 4))]
        for kind in (torch.float32, torch.bfloat16):
            for n_logits, *theta in ((1, None, None), (1, theta_1g, None), (2, theta_rg, row_n), (2, logits[1], None)):
                of = [t.to(kind, copy=True) for t in logits[:n_logits]]
                value_n, tiles, theta_ng, grad_n = native.tile(x, of, biases[:n_logits], library_n, *theta, True)
                given += [value_n, *tiles, grad_n, *([] if theta_ng is None else [theta_ng])]
        return given

    torch.set_num_threads(1)
    first = everything()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True)), threads


def test_work_is_done_while_helpers_come_late_and_from_several_threads(monkeypatch):
    """Processors are busy; a forked process has no helpers at first; two threads of a program call at once."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(300, 70), torch.randn(500, 70), torch.randn(500)
    torch.set_num_threads(1)
    expected = native.linear(x, weight, bias)

    monkeypatch.setattr(native, "threads", lambda: 4)  # PyTorch's own do not bear to be forked

    def many(_=0):
        torch.set_num_threads(1)
        return all(torch.equal(native.linear(x, weight, bias), expected) for _ in range(200))

    assert many()
    busy = [multiprocessing.get_context("fork").Process(target=many) for _ in range(4)]
    for process in busy:
        process.start()
    with ThreadPoolExecutor(3) as pool:
        assert many() and all(pool.map(many, range(3)))
    for process in busy:
        process.join(60)
        assert process.exitcode == 0


def fit(monkeypatch=None, **how):
    """(network, history, held cells) of a fit, by plain PyTorch where monkeypatch comes along."""
    schema, counts = packed(cells(200), ("day",), ("age",))
    network = build(ModelConfig(**{"n_hidden": 16, "n_latent": 3, **how}), 25, len(schema.batches), 4, 0)
    held = np.arange(0, 200, 5)
    if monkeypatch is not None:
        monkeypatch.setattr(native, "library", None)
    config = brief(max_epochs=6, early_stopping=False, precision=how.pop("precision", "float32"))
    history = train(
        network, counts, np.setdiff1d(np.arange(200), held), held, config, 0, torch.device("cpu"), progress=False
    )
    return network, history, counts.subset(held)


@pytest.mark.parametrize(
    "how",
    [
        {"library": "latent"},
        {"n_layers": 2, "dispersion": "gene-batch", "likelihood": "nb"},
        {"dispersion": "gene-cell"},
        {"decoder": "linear", "loadings_l1": 0.2},
    ],
)
def test_fits_by_compiled_kernels_and_by_plain_pytorch_agree(monkeypatch, how):
    """But for the biases before a batch norm, which rounding moves and nothing reads but the norm's running mean."""
    ours, our_history, held = fit(**how)
    with monkeypatch.context() as patch:
        theirs, their_history, _ = fit(patch, **how)
    np.testing.assert_allclose(our_history["train_elbo"], their_history["train_elbo"], rtol=1e-6)
    np.testing.assert_allclose(our_history["validation_elbo"], their_history["validation_elbo"], rtol=5e-3)
    assert elbo_of(ours, held, 3) == pytest.approx(elbo_of(theirs, held, 3), rel=5e-3)
    assert our_history["validation_elbo"].iloc[-1] > our_history["validation_elbo"].iloc[0]
    other = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if not name.endswith(("linear.bias", "running_mean")):
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=5e-6, msg=name)


@pytest.mark.parametrize("how", ["compiled", "plain"])
@pytest.mark.parametrize(("eps", "decay"), [(1e-2, 1e-6), (1e-8, 0.1), (1e-8, 0.0)])
@pytest.mark.parametrize("n", [1, 33, 1000])
def test_adam_is_pytorchs(monkeypatch, how, eps, decay, n):
    choose(how, monkeypatch)
    torch.manual_seed(n)
    theirs = torch.nn.Parameter(torch.randn(n, dtype=torch.float64))
    ours, mean, square = theirs.detach().float(), torch.zeros(n), torch.zeros(n)
    optimiser = torch.optim.Adam([theirs], 1.0, eps=eps, weight_decay=decay)
    for step in range(1, 40):
        gradient = torch.randn(n) * 10.0 ** torch.randint(-4, 3, (n,))
        optimiser.param_groups[0]["lr"] = rate = 0.1 / step
        theirs.grad = gradient.double()
        optimiser.step()
        numbers = kernels.corrected(rate, step)
        kernels.adam([ours], [gradient], [mean], [square], [None], numbers, eps, decay)
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=3e-6)
    gradient[0] = torch.nan
    kernels.adam([ours], [gradient], [mean], [square], [None], kernels.corrected(0.1, 40), eps, decay)
    assert ours[0].isnan() and not ours[1:].isnan().any()


@pytest.mark.parametrize("how", ["compiled", "plain"])
def test_adam_of_several_tensors_some_of_which_stay(monkeypatch, how):
    """As of each alone; what stays keeps its bits and has no moments, whatever its gradient."""
    choose(how, monkeypatch)
    torch.manual_seed(0)
    shapes = (40_000,), (3, 5), (1,), (20, 30)
    start, masks = (
        [torch.randn(shape) for shape in shapes],
        [None, torch.rand(3, 5) < 0.5, None, torch.rand(20, 30) < 0.5],
    )
    together = [[w.clone() for w in start], *([torch.zeros_like(w) for w in start] for _ in range(2))]
    alone = [[w.clone() for w in start], *([torch.zeros_like(w) for w in start] for _ in range(2))]
    for step in range(1, 5):
        gradients = [torch.randn(shape) for shape in shapes]
        numbers = kernels.corrected(0.1, step)
        kernels.adam(together[0], gradients, *together[1:], masks, numbers, 1e-4, 0.1)
        for i, gradient in enumerate(gradients):
            kernels.adam(*([part[i]] for part in (alone[0], [gradient] * 4, *alone[1:])), [None], numbers, 1e-4, 0.1)
    for i, mask in enumerate(masks):
        mask = torch.ones_like(start[i], dtype=torch.bool) if mask is None else mask
        assert torch.equal(together[0][i][~mask], start[i][~mask]) and not together[1][i][~mask].any()
        assert not together[2][i][~mask].any() and (together[0][i][mask] != start[i][mask]).all()
        for mine, other in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[i][mask], other[i][mask], rtol=1e-6, atol=1e-7)


# ---- the hidden layer's kernel


def norm_of(width, kind="batch"):
    torch.manual_seed(width)
    norm = NORMS[kind](width)
    for name, value in norm.state_dict().items():
        if name in ("weight", "running_var"):
            value.uniform_(0.5, 2.0)
        elif value.is_floating_point():
            value.normal_()
    return norm.train()


@pytest.mark.parametrize("kind", ["batch", "frozen", "layer", "none"])
@pytest.mark.parametrize("width", [1, 7, 33, 128])
@pytest.mark.parametrize("n", [2, 3, 8, 17, 64, 130])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_hidden_layer(kind, width, n, dropout):
    """Norm, ReLU and a mask, and the way back, against autograd in float64."""
    norm, theirs = (norm_of(width, kind.replace("frozen", "batch")) for _ in range(2))
    for each in (norm, theirs.double()):
        each.train(kind != "frozen")
    a_nh, outer_nh = torch.randn(n, width) * 2 + torch.randn(width), torch.randn(n, width)
    if kind == "batch":
        a_nh[:, 0] += 100  # a mean far from 0 costs digits, not the result
    kept_nh = torch.rand(n, width) > dropout if dropout else None
    input_nh = a_nh.clone().requires_grad_()
    out_nh = kernels.hidden(input_nh, norm, kept_nh, dropout)
    assert type(out_nh.grad_fn).__name__ == "_HiddenBackward"
    out_nh.backward(outer_nh)

    exact_nh = a_nh.double().requires_grad_()
    expected_nh = torch.relu(theirs(exact_nh))
    if dropout:
        expected_nh = expected_nh * kept_nh / (1 - dropout)
    expected_nh.backward(outer_nh.double())
    for name, value in norm.named_buffers():
        torch.testing.assert_close(value, dict(theirs.named_buffers())[name].to(value.dtype), rtol=1e-6, atol=1e-6)
    if kind in ("batch", "frozen"):
        assert norm.num_batches_tracked == theirs.num_batches_tracked == (kind == "batch")
    same = (out_nh > 0) == (expected_nh > 0)
    assert (~same).sum() <= 1  # a pre-activation within rounding of 0
    if not same.all():
        return
    near = lambda got, expected: torch.testing.assert_close(  # noqa: E731
        got.double(), expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max()))
    )
    near(out_nh.detach(), expected_nh.detach())
    for mine, other in zip(norm.parameters(), theirs.parameters(), strict=True):
        near(mine.grad, other.grad)
    # beside the size of what the norm is handed: for 2 cells, or a lone unit, its gradient is all cancellation
    near(input_nh.grad, exact_nh.grad)


def test_hidden_layer_of_cells_that_are_all_alike_and_of_nan():
    norm, theirs = norm_of(5), norm_of(5)
    a_nh = torch.full((6, 5), 3.0)
    a_nh[:, 4] = torch.arange(6.0)
    out_nh, *saved = native.hidden(a_nh, norm, None, 1.0)
    torch.testing.assert_close(out_nh, torch.relu(theirs(a_nh)).detach())
    grad_nh, grad_h, _ = native.hidden_gradient(torch.ones(6, 5), out_nh, norm.weight, *saved, norm, True, 1.0)
    assert torch.isfinite(grad_nh).all() and (grad_h[:4] == 0).all()
    a_nh[2, 3] = torch.nan
    out_nh, *_ = native.hidden(a_nh, norm, None, 1.0)
    assert out_nh[:, 3].isnan().all() and not out_nh[:, :3].isnan().any() and norm.running_mean[3].isnan()


# ---- matrix products


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 300, 3), (13, 1, 40), (130, 129, 257), (300, 17, 128), (0, 3, 5)])
@pytest.mark.parametrize("scaled", [False, True])
def test_products_and_their_gradients(shape, scaled):
    """To the rounding of their sums; every part alone, and tensors that are not contiguous."""
    n, n_in, n_out = shape
    torch.manual_seed(n)
    x, weight, bias = torch.randn(n_in, n).T, torch.randn(n_in, n_out).T, torch.randn(n_out)
    outer, scale_n = torch.randn(n_out, n).T, torch.randn(n) if scaled else None
    rounded = lambda got, a, b: ((got.double() - a @ b).abs() <= 1e-6 * (a.abs() @ b.abs()) + 1e-7).all()  # noqa: E731
    ours = native.linear(x, weight, bias)
    ones = torch.ones(n, 1).double()
    assert rounded(ours, torch.cat([x, ones.float()], 1).double(), torch.cat([weight.T, bias[None]]).double())
    by = outer.double() if scale_n is None else outer.double() * scale_n[:, None]
    whole = native.linear_gradient(outer, scale_n, x, weight)
    for got, a, b in zip(whole, (by, by.T, by.T), (weight.double(), x.double(), ones), strict=True):
        assert rounded(got.view(a.shape[0], b.shape[1]), a, b)
    for wanted in itertools.product((False, True), repeat=3):
        for one, all_of_them, want in zip(
            native.linear_gradient(outer, scale_n, x, weight, wanted), whole, wanted, strict=True
        ):
            assert torch.equal(one, all_of_them) if want else one is None
