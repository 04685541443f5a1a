"""``kernels.c`` for GPUs, in Triton: the equations of :mod:`scvi_core.kernels.plain`, called through ``gpu.py``.

A program takes one cell. Values come first: :func:`zeros_kernel` finds the softmax's denominator, and the value as if
every count were zero; :func:`nonzeros_kernel` what the non-zeros change. Gradients need the value's slopes summed over
all genes, and come after: :func:`zeros_gradient_kernel` writes a tile as if every count were zero, and
:func:`nonzeros_gradient_kernel` the non-zeros over it. Genes are float32; the non-zeros, whose terms cancel to far
below their own size, and all sums over genes are float64. There are no atomic sums, so results are the same at every
run.

Elementary functions in float32 are written out, as in ``kernels.c``, where terms cancel: the hardware's are good to
fewer digits than ``theta log(1 + mu / theta)`` needs. Its exponential, whose relative error is 2e-7 and 6e-8 times the
argument, serves where an error stays as small as it is: for the softmax and the odds of dropout.

Cells are rows of packed counts, left where they lie: cell n has the non-zeros from ``begin_n[n]`` to ``end_n[n]``.
"""

import triton
import triton.language as tl

POISSON, NB, ZINB = (tl.constexpr(kind) for kind in range(3))
LIMIT = tl.constexpr(60.0)  # as in plain.py


@triton.jit
def _expm1(x):
    """e^x - 1 and e^x, float32, for x up to 88; beyond, as there; e^x is 0 below -87."""
    one = tl.where(x < -87.0, 0.0, 1.0)
    x = tl.where(x < -87.0, -87.0, x)
    x = tl.where(x > 88.0, 88.0, x)
    shifted = x * 1.44269504 + 12582912.0  # 1.5 * 2^23: leaves the nearest integer in the last bits
    n = shifted - 12582912.0
    r = x - n * 0.693359375 + n * 2.12194440e-4  # ln 2 in two parts
    p = r * (1 / 5040) + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    power = one * ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return p * r * power + (power - 1.0), (p * r + 1.0) * power


@triton.jit
def _log(x):
    """Log x, float32, for positive normal x; by log((1 + f) / (1 - f)) = 2 (f + f^3 / 3 + ...)."""
    i = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # of sqrt(1/2)
    e = (i >> 23).to(tl.float32)
    m = ((i & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = (m - 1.0) / (m + 1.0)
    q = f * f
    p = q * (1 / 11) + 1 / 9
    p = p * q + 1 / 7
    p = p * q + 1 / 5
    p = p * q + 1 / 3
    return e * 0.693359375 + (2.0 * f + (2.0 * f * q * p - e * 2.12194440e-4)) + (x - x)


@triton.jit
def _log1p(x):
    """Log(1 + x), x >= 0, float64; what rounding 1 + x loses is given back to first order."""
    u = x + 1.0
    return tl.log(u) + (x - (u - 1.0)) / u


@triton.jit
def _tail(y):
    """Stirling's series of log Gamma(y) beyond (y - 1/2) log y - y + log(2 pi) / 2, y >= 8, float64."""
    w = 1.0 / y
    q = w * w
    return w * (1 / 12 - q * (1 / 360 - q * (1 / 1260 - q * (1 / 1680 - q * (1 / 1188)))))


@triton.jit
def _slope_tail(y):
    """The same of digamma(y) beyond log y."""
    w = 1.0 / y
    q = w * w
    return -w * (0.5 + w * (1 / 12 - q * (1 / 120 - q * (1 / 252 - q * (1 / 240 - q * (1 / 132))))))


@triton.jit
def _rising_near(x, inverse_theta):
    """B(x, theta) - log x! and dB / d log theta by the factors up to k = 7: all there are for x <= 8. Float64."""
    product = x * 0.0 + 1.0
    factorial = product
    derivative = x * 0.0
    for k in tl.static_range(1, 8):
        factor = tl.where(x > k, k, 0.0).to(tl.float64)
        factorial *= factor + 1.0
        factor *= inverse_theta
        derivative = derivative * (factor + 1.0) + product * factor
        product *= factor + 1.0
    return tl.log(product / factorial), -derivative / product


@triton.jit
def _rising_far(x, theta):
    """What the factors from k = 8 on add to B(x, theta) and to its slope; 0 for x <= 8. Float64."""
    d = tl.where(x > 8.0, x - 8.0, 0.0)
    a = theta + 8.0
    log_ratio = _log1p(d / a)
    slope = theta * (log_ratio + _slope_tail(a + d) - _slope_tail(a)) - d
    return (a + d - 0.5) * log_ratio + d * _log1p(8.0 / theta) - d + _tail(a + d) - _tail(a), slope


@triton.jit
def _theta(log_theta):
    """Theta and its inverse, float32."""
    log_theta = tl.where(log_theta < -LIMIT, -LIMIT, log_theta)
    log_theta = tl.where(log_theta > LIMIT, LIMIT, log_theta)
    _, theta = _expm1(log_theta)
    _, inverse_theta = _expm1(-log_theta)
    return theta, inverse_theta


@triton.jit
def _zero(KIND: tl.constexpr, mu, theta, inverse_theta, logit_pi):
    """Log p(0), and its slopes by log mu, log theta and the logit of pi; float32. What a likelihood lacks is mu."""
    value = -mu
    slope = -mu
    slope_theta = mu
    slope_pi = mu
    if KIND != POISSON:
        odds = mu * inverse_theta
        u = odds + 1.0
        inverse = 1.0 / u
        value = -theta * (_log(u) + (odds - (u - 1.0)) * inverse)
        slope *= inverse
        slope_theta = value - slope
    if KIND == ZINB:
        h = tl.where(logit_pi < -80.0, -80.0, logit_pi)
        h = tl.where(h > 80.0, 80.0, h)
        odds_pi = tl.exp(h)
        nb_less_1, nb = _expm1(value)
        keep = 1.0 / (odds_pi + 1.0)
        share = 1.0 / (odds_pi + nb)
        value = _log((odds_pi + nb) * keep)
        slope_pi = -nb_less_1 * (odds_pi * share) * keep
        slope *= nb * share
        slope_theta *= nb * share
    return value, slope, slope_theta, slope_pi


@triton.jit
def _some(KIND: tl.constexpr, x, log_mu, log_theta, logit_pi):
    """Log p(x), x > 0, and its slopes; float64. What a likelihood lacks is mu."""
    mu = tl.exp(log_mu)
    slope = x - mu
    slope_theta = mu
    slope_pi = mu
    far_factorial, _ = _rising_far(x, x * 0.0 + 1.0)
    if KIND == POISSON:
        near, _ = _rising_near(x, 0.0)
        value = near - far_factorial + x * log_mu  # -mu is in the sum over all genes
    else:
        log_theta = tl.where(log_theta < -LIMIT, -LIMIT, log_theta)
        log_theta = tl.where(log_theta > LIMIT, LIMIT, log_theta)
        theta = tl.exp(log_theta)
        odds = mu / theta
        s = _log1p(odds)
        near, slope_near = _rising_near(x, 1.0 / theta)
        far, slope_far = _rising_far(x, theta)
        value = near + far - far_factorial + x * log_mu - (x + theta) * s
        slope = slope / (odds + 1.0)
        slope_theta = x + slope_near + slope_far - theta * s - slope
    if KIND == ZINB:
        e = tl.exp(-tl.abs(logit_pi))
        value -= _log1p(e) + tl.where(logit_pi > 0.0, logit_pi, 0.0)
        slope_pi = -tl.where(logit_pi > 0.0, 1.0, e) / (e + 1.0)
    return value, slope, slope_theta, slope_pi


@triton.jit
def _packed(of, at, mask):
    """Some gene numbers or counts; those of 16 bits have no sign."""
    value = tl.load(of + at, mask=mask, other=0)
    if of.dtype.element_ty == tl.int16:
        value = value.to(tl.int32) & 0xFFFF
    return value


@triton.jit
def _logits(BIASED: tl.constexpr, row, bias, gene, mask):
    """Some genes' logits of one cell, float32; a bias is added to those that come in bfloat16."""
    logit = tl.load(row + gene, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        logit += tl.load(bias + gene, mask=mask, other=0.0)
    return logit


@triton.jit
def _parameters(KIND: tl.constexpr, BIASED: tl.constexpr, theta, pi, bias_pi, gene, mask):
    """Theta, or what else is there of each gene, and the logit of pi, as far as the likelihood has them."""
    of_theta = 0.0
    logit_pi = 0.0
    if KIND != POISSON:
        of_theta = tl.load(theta + gene, mask=mask, other=0.0)
    if KIND == ZINB:
        logit_pi = _logits(BIASED, pi, bias_pi, gene, mask)
    return of_theta, logit_pi


@triton.jit
def _zeros(KIND: tl.constexpr, BIASED: tl.constexpr, mu, theta, inverse_theta, pi, bias_pi, gene, mask):
    """:func:`_zero` of some genes of one cell, whose theta and its inverse are in memory."""
    of_theta, logit_pi = _parameters(KIND, BIASED, theta, pi, bias_pi, gene, mask)
    of_inverse = 0.0
    if KIND != POISSON:
        of_inverse = tl.load(inverse_theta + gene, mask=mask, other=0.0)
    return _zero(KIND, mu, of_theta, of_inverse, logit_pi)


@triton.jit
def theta_kernel(n, log_theta, theta, inverse_theta, BLOCK: tl.constexpr):
    """Theta and its inverse: once a gene where cells share them, and not for each of the cells."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, inverse = _theta(tl.load(log_theta + at, mask=at < n, other=0.0))
    tl.store(theta + at, value, mask=at < n)
    tl.store(inverse_theta + at, inverse, mask=at < n)


@triton.jit
def zeros_kernel(
    KIND: tl.constexpr, BIASED: tl.constexpr, n_genes, rho, bias_rho, pi, bias_pi, theta_stride, theta, inverse_theta,
    log_library_n, state_n5, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log p(0), all genes summed, a program a cell. `state_n5` gets what the other kernels need: the largest logit, log
    of library over the softmax's denominator beneath it, that ratio, and the sums of slopes by log mu and of values.
    """
    n = tl.program_id(0).to(tl.int64)
    rho += n * n_genes
    pi += n * n_genes
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, n_genes, BLOCK):
        gene = start + tl.arange(0, BLOCK)
        logit = _logits(BIASED, rho, bias_rho, gene, gene < n_genes)
        top = tl.maximum(top, tl.where(gene < n_genes, logit, float("-inf")))
    top = tl.max(top, 0)
    total = tl.zeros([1], tl.float64)
    for start in range(0, n_genes, BLOCK):
        gene = start + tl.arange(0, BLOCK)
        share = tl.exp(_logits(BIASED, rho, bias_rho, gene, gene < n_genes) - top)
        total += tl.sum(tl.where(gene < n_genes, share, 0.0), 0).to(tl.float64)
    total = tl.sum(total, 0)
    log_library = tl.load(log_library_n + n).to(tl.float64)
    library = tl.exp(log_library)
    scale = (library / total).to(tl.float32)
    value = tl.zeros([1], tl.float64)
    slope = tl.zeros([1], tl.float64)
    if KIND == POISSON:  # what the means of all genes add up to
        value -= library
        slope -= library
    else:
        theta += n * theta_stride
        inverse_theta += n * theta_stride
        for start in range(0, n_genes, BLOCK):
            gene = start + tl.arange(0, BLOCK)
            mask = gene < n_genes
            share = tl.exp(_logits(BIASED, rho, bias_rho, gene, mask) - top)
            v, s, _, _ = _zeros(KIND, BIASED, share * scale, theta, inverse_theta, pi, bias_pi, gene, mask)
            value += tl.sum(tl.where(mask, v, 0.0), 0).to(tl.float64)
            slope += tl.sum(tl.where(mask, s, 0.0), 0).to(tl.float64)
    state = state_n5 + 5 * n
    tl.store(state, top.to(tl.float64))
    tl.store(state + 1, log_library - top.to(tl.float64) - tl.log(total))
    tl.store(state + 2, library / total)
    tl.store(state + 3, tl.sum(slope, 0))
    tl.store(state + 4, tl.sum(value, 0))


@triton.jit
def nonzeros_kernel(
    KIND: tl.constexpr, BIASED: tl.constexpr, n_genes, rho, bias_rho, pi, bias_pi, theta_stride, log_theta,
    begin_n, end_n, genes_m, values_m, log_library_n, state_n5, value_n, slope_n, SOME: tl.constexpr,
):  # fmt: skip
    """Log p(x) and its slope by log library: what the non-zeros change in the sums of :func:`zeros_kernel`."""
    n = tl.program_id(0).to(tl.int64)
    rho += n * n_genes
    pi += n * n_genes
    log_theta += n * theta_stride
    state = state_n5 + 5 * n
    top = tl.load(state).to(tl.float32)
    log_scale = tl.load(state + 1)
    scale = tl.load(state + 2).to(tl.float32)
    slope = tl.zeros([1], tl.float64) + tl.load(state + 3)
    value = tl.zeros([1], tl.float64) + tl.load(state + 4)
    begin = tl.load(begin_n + n)
    length = (tl.load(end_n + n) - begin).to(tl.int32)
    for start in range(0, length, SOME):
        m = start + tl.arange(0, SOME)
        mask = m < length
        gene = _packed(genes_m, begin + m, mask).to(tl.int32)
        x = _packed(values_m, begin + m, mask).to(tl.float64)
        theta, logit_pi = _parameters(KIND, BIASED, log_theta, pi, bias_pi, gene, mask)
        logit = _logits(BIASED, rho, bias_rho, gene, mask)
        v, s, _, _ = _some(KIND, x, logit.to(tl.float64) + log_scale, _double(theta, x), _double(logit_pi, x))
        if KIND == POISSON:
            s = x
        else:
            share = tl.exp(logit - top)
            of_theta, of_inverse = _theta(theta)
            v_zero, s_zero, _, _ = _zero(KIND, share * scale, of_theta, of_inverse, logit_pi)
            v -= v_zero.to(tl.float64)
            s -= s_zero.to(tl.float64)
        value += tl.sum(tl.where(mask, v, 0.0), 0)
        slope += tl.sum(tl.where(mask, s, 0.0), 0)
    value = tl.sum(value, 0)
    slope = tl.sum(slope, 0)
    tl.store(value_n + n, value.to(tl.float32))
    tl.store(slope_n + n, slope.to(tl.float32))
    tl.store(state + 3, slope)


@triton.jit
def _double(value, like):
    """As float64, in the shape of `like`, also where it is a constant."""
    return like * 0.0 + value


@triton.jit
def zeros_gradient_kernel(
    KIND: tl.constexpr, BIASED: tl.constexpr, n_genes, rho, bias_rho, pi, bias_pi, theta_stride, theta, inverse_theta,
    log_library_n, state_n5, outer_n, grad_rho, grad_pi, grad_theta, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of every gene as if its count were zero, times `outer_n`; a program a cell and block of genes."""
    n = tl.program_id(0).to(tl.int64)
    gene = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = gene < n_genes
    at = n * n_genes
    top = tl.load(state_n5 + 5 * n).to(tl.float32)
    scale = tl.load(state_n5 + 5 * n + 2).to(tl.float32)
    share = (tl.load(state_n5 + 5 * n + 3) / tl.exp(tl.load(log_library_n + n).to(tl.float64))).to(tl.float32)
    outer = tl.load(outer_n + n)
    mu = tl.exp(_logits(BIASED, rho + at, bias_rho, gene, mask) - top) * scale
    by_theta = n * theta_stride
    _, slope, slope_theta, slope_pi = _zeros(
        KIND, BIASED, mu, theta + by_theta, inverse_theta + by_theta, pi + at, bias_pi, gene, mask
    )
    kind = grad_rho.dtype.element_ty
    tl.store(grad_rho + at + gene, ((slope - mu * share) * outer).to(kind), mask=mask)
    if KIND != POISSON:
        tl.store(grad_theta + at + gene, (slope_theta * outer).to(grad_theta.dtype.element_ty), mask=mask)
    if KIND == ZINB:
        tl.store(grad_pi + at + gene, (slope_pi * outer).to(kind), mask=mask)


@triton.jit
def nonzeros_gradient_kernel(
    KIND: tl.constexpr, BIASED: tl.constexpr, n_genes, rho, bias_rho, pi, bias_pi, theta_stride, log_theta,
    begin_n, end_n, genes_m, values_m, log_library_n, state_n5, outer_n, grad_rho, grad_pi, grad_theta,
    SOME: tl.constexpr,
):  # fmt: skip
    """Gradients of the non-zeros, over those of :func:`zeros_gradient_kernel`; a program a cell."""
    n = tl.program_id(0).to(tl.int64)
    at = n * n_genes
    log_scale = tl.load(state_n5 + 5 * n + 1)
    share = tl.load(state_n5 + 5 * n + 3) / tl.exp(tl.load(log_library_n + n).to(tl.float64))
    outer = tl.load(outer_n + n).to(tl.float64)
    kind = grad_rho.dtype.element_ty
    begin = tl.load(begin_n + n)
    length = (tl.load(end_n + n) - begin).to(tl.int32)
    for start in range(0, length, SOME):
        m = start + tl.arange(0, SOME)
        mask = m < length
        gene = _packed(genes_m, begin + m, mask).to(tl.int32)
        x = _packed(values_m, begin + m, mask).to(tl.float64)
        theta, logit_pi = _parameters(KIND, BIASED, log_theta + n * theta_stride, pi + at, bias_pi, gene, mask)
        log_mu = _logits(BIASED, rho + at, bias_rho, gene, mask).to(tl.float64) + log_scale
        _, slope, slope_theta, slope_pi = _some(KIND, x, log_mu, _double(theta, x), _double(logit_pi, x))
        # through float32, as the zeros' go
        slope = (slope - tl.exp(log_mu) * share) * outer
        tl.store(grad_rho + at + gene, slope.to(tl.float32).to(kind), mask=mask)
        if KIND != POISSON:
            slope_theta = (slope_theta * outer).to(tl.float32)
            tl.store(grad_theta + at + gene, slope_theta.to(grad_theta.dtype.element_ty), mask=mask)
        if KIND == ZINB:
            tl.store(grad_pi + at + gene, (slope_pi * outer).to(tl.float32).to(kind), mask=mask)


@triton.jit
def log1p_kernel(n_genes, begin_n, end_n, genes_m, values_m, out_ng, SOME: tl.constexpr):
    """Log(1 + counts) of each cell's non-zeros, written into a tile of zeros; a program a cell."""
    n = tl.program_id(0).to(tl.int64)
    begin = tl.load(begin_n + n)
    length = (tl.load(end_n + n) - begin).to(tl.int32)
    for start in range(0, length, SOME):
        m = start + tl.arange(0, SOME)
        mask = m < length
        gene = _packed(genes_m, begin + m, mask).to(tl.int32)
        x = _packed(values_m, begin + m, mask).to(tl.float32)
        tl.store(out_ng + n * n_genes + gene, _log(x + 1.0), mask=mask)


@triton.jit
def adam_kernel(
    MASKED: tl.constexpr, n, weights, gradient, mean, square, trainable, numbers_2, mean_rate, square_rate, eps, decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``kernels.adam``; its rate and the scale of the root, with their bias corrections, lie on the device."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    rate = tl.load(numbers_2)
    square_scale = tl.load(numbers_2 + 1)
    w = tl.load(weights + at, mask=mask, other=0.0)
    g = tl.load(gradient + at, mask=mask, other=0.0) + w * decay
    if MASKED:
        g = tl.where(tl.load(trainable + at, mask=mask, other=0) != 0, g, 0.0)
    a = tl.load(mean + at, mask=mask, other=0.0)
    b = tl.load(square + at, mask=mask, other=0.0)
    a += (g - a) * mean_rate
    b += (g * g - b) * square_rate
    tl.store(mean + at, a, mask=mask)
    tl.store(square + at, b, mask=mask)
    tl.store(weights + at, w - rate * a / (tl.sqrt(b) * square_scale + eps), mask=mask)
