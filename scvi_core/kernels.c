/* The compiled form of scvi_core/kernels.py: the same equations, one pass over a tile of cells x genes while it is in
 * cache, and an encoder layer and a minibatch that touch only the non-zero counts.
 *
 * Plain C called through pointers: it needs neither Python's nor PyTorch's headers, so one build serves every version
 * of both. Elementary functions are written out below, as loops that call the C library's do not become vector
 * instructions; GCC compiles each loop for several CPUs and the fastest is chosen when the library is loaded.
 * Compiled without -ffast-math: log1p relies on the order of its sums. Threads are OpenMP's, of the runtime that
 * PyTorch has loaded; work is cut so that results do not depend on their number.
 *
 * Suffixes as in model.py: n cells, g genes, h hidden units, m the non-zeros of a minibatch.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

enum { POISSON, NB, ZINB };

/* ---- elementary functions ---------------------------------------------------------------------------------------- */

INLINE float float_of(int32_t i) { float f; memcpy(&f, &i, 4); return f; }
INLINE int32_t bits_of(float f) { int32_t i; memcpy(&i, &f, 4); return i; }
INLINE double double_of(int64_t i) { double f; memcpy(&f, &i, 8); return f; }
INLINE int64_t bits_of_double(double f) { int64_t i; memcpy(&i, &f, 8); return i; }

/* e^x - 1 and e^x, for x up to 88; beyond, as there; e^x is 0 below -87, where float32 loses its digits. */
INLINE float expm1_32(float x, float *exp_x) {
    float one = x < -87.0f ? 0.0f : 1.0f;
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the last bits */
    float shifted = x * 1.44269504f + round;
    float n = shifted - round;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts: the first is exact in n's products */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    float power = one * float_of((int32_t)((uint32_t)bits_of(shifted) << 23) + 0x3f800000);
    *exp_x = (p * r + 1.0f) * power;
    return p * r * power + (power - 1.0f);
}

INLINE float exp32(float x) {
    float exp_x;
    expm1_32(x, &exp_x);
    return exp_x;
}

/* log x for positive normal x (NaN for NaN), by log((1+f)/(1-f)) = 2 (f + f^3/3 + ...), |f| < 0.172. */
INLINE float log32(float x) {
    int32_t i = bits_of(x) - 0x3f3504f3; /* of sqrt(1/2) */
    float e = (float)(i >> 23);
    float m = float_of((i & 0x007fffff) + 0x3f3504f3);
    float f = (m - 1.0f) / (m + 1.0f);
    float q = f * f;
    float p = 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    return e * 0.693359375f + (2.0f * f + (2.0f * f * q * p - e * 2.12194440e-4f)) + (x - x);
}

INLINE double exp64(double x) {
    x = x < -700.0 ? -700.0 : x;
    x = x > 700.0 ? 700.0 : x;
    const double round = 6755399441055744.0; /* 1.5 * 2^52 */
    double shifted = x * 1.4426950408889634 + round;
    double n = shifted - round;
    double r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
    double p = 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    return p * double_of((int64_t)((uint64_t)bits_of_double(shifted) << 52) + 0x3ff0000000000000);
}

INLINE double log64(double x) {
    int64_t i = bits_of_double(x) - 0x3fe6a09e667f3bcd;
    /* the exponent as a double, by bits alone: there is no vector instruction for it before AVX-512 */
    double e = double_of((int64_t)((((uint64_t)i + (2048ull << 52)) >> 52) | 0x4330000000000000)) - (4503599627370496.0 + 2048);
    double m = double_of((i & 0x000fffffffffffff) + 0x3fe6a09e667f3bcd);
    double f = (m - 1.0) / (m + 1.0);
    double q = f * f;
    double p = 1.0 / 19;
    p = p * q + 1.0 / 17;
    p = p * q + 1.0 / 15;
    p = p * q + 1.0 / 13;
    p = p * q + 1.0 / 11;
    p = p * q + 1.0 / 9;
    p = p * q + 1.0 / 7;
    p = p * q + 1.0 / 5;
    p = p * q + 1.0 / 3;
    return e * 0.693147180369123816490 + (2.0 * f + (2.0 * f * q * p + e * 1.90821492927058770002e-10)) + (x - x);
}

/* log(1 + x) for x >= 0, to full relative precision: what rounding 1 + x loses is given back to first order */
INLINE double log1p64(double x) {
    double u = 1.0 + x;
    return log64(u) + (x - (u - 1.0)) / u;
}

/* Stirling's series: log Gamma(y) beyond (y - 1/2) log y - y + log(2 pi)/2, and its derivative beyond log y; y >= 8 */
INLINE double tail(double y) {
    double w = 1.0 / y, q = w * w;
    return w * (1.0 / 12 - q * (1.0 / 360 - q * (1.0 / 1260 - q * (1.0 / 1680 - q * (1.0 / 1188)))));
}
INLINE double slope_tail(double y) {
    double w = 1.0 / y, q = w * w;
    return -w * (0.5 + w * (1.0 / 12 - q * (1.0 / 120 - q * (1.0 / 252 - q * (1.0 / 240 - q * (1.0 / 132))))));
}

/* ---- the likelihood ---------------------------------------------------------------------------------------------- */

static const double LIMIT = 60; /* |log theta| beyond is as good as this, as in kernels.py */
enum { BLOCK = 256 }; /* genes summed in float32 before the sum goes on in float64; also non-zeros taken at once */

/* One cell: its rows of the inputs, room to work in, and its rows of the outputs, which are always written. */
typedef struct {
    int64_t n_genes, n_nonzero;
    const int32_t *gene_m;
    const float *x_m, *logit_rho, *log_theta, *theta, *theta_inverse, *logit_pi;
    double log_library;
    float *mu, *value; /* room */
    double *log_likelihood;
    float *grad_rho, *grad_library, *grad_theta, *grad_pi;
} Cell;

/* B(x, theta) = log Gamma(x + theta) - log Gamma(theta) - x log theta = sum_{k<x} log(1 + k / theta), and log x! = B(x, 1).
 * Factors up to k = 7 one by one: *log_near = B - log x! for x <= 8, *slope_near = dB / d log theta. */
INLINE void rising_near(double x, double theta, double *log_near, double *slope_near) {
    double inverse = 1 / theta, product = 1, derivative = 0, factorial = 1;
    for (int k = 1; k < 8; k++) {
        double factor = k < x ? k : 0.0;
        factorial *= 1 + factor;
        factor *= inverse;
        derivative = derivative * (1 + factor) + product * factor;
        product *= 1 + factor;
    }
    *log_near = log64(product / factorial);
    *slope_near = -derivative / product;
}

/* What the factors from k = 8 on add to B(x, theta), for x > 8, by Stirling's series; and to its slope. */
INLINE double rising_far(double x, double theta, double *slope_far) {
    double d = x - 8, a = theta + 8, log_ratio = log1p64(d / a);
    *slope_far = theta * (log_ratio + slope_tail(a + d) - slope_tail(a)) - d;
    return (a + d - 0.5) * log_ratio + d * log1p64(8 / theta) - d + tail(a + d) - tail(a);
}

/* log p(x) summed over genes, and its gradients by logit_rho, log library, log theta and logit_pi; see kernels.py. */
INLINE void cell(int kind, Cell c) {
    const int64_t n_genes = c.n_genes;
    float *mu = c.mu, *grad_mu = c.grad_rho;
    float top = c.logit_rho[0];
    #pragma omp simd reduction(max : top)
    for (int64_t g = 0; g < n_genes; g++) top = c.logit_rho[g] > top ? c.logit_rho[g] : top;
    double sum = 0;
    for (int64_t start = 0; start < n_genes; start += BLOCK) {
        int64_t stop = start + BLOCK < n_genes ? start + BLOCK : n_genes;
        float part = 0;
        #pragma omp simd reduction(+ : part)
        for (int64_t g = start; g < stop; g++) {
            mu[g] = exp32(c.logit_rho[g] - top);
            part += mu[g];
        }
        sum += part;
    }
    double library = exp64(c.log_library), log_scale = c.log_library - top - log64(sum);
    float scale = (float)(library / sum);

    /* every gene as if its count were zero */
    double value = 0, slope = 0; /* slope: of the value by log library, the sum of gradients by log mu */
    for (int64_t start = 0; start < n_genes; start += BLOCK) {
        int64_t stop = start + BLOCK < n_genes ? start + BLOCK : n_genes;
        float part = 0, part_slope = 0;
        #pragma omp simd reduction(+ : part, part_slope)
        for (int64_t g = start; g < stop; g++) {
            float mu_g = mu[g] * scale, value_g = -mu_g, slope_g = -mu_g;
            if (kind != POISSON) {
                float odds = mu_g * c.theta_inverse[g], u = 1.0f + odds, inverse = 1.0f / u;
                value_g = -c.theta[g] * (log32(u) + (odds - (u - 1.0f)) * inverse); /* log NB(0) */
                slope_g *= inverse;
                float slope_theta = value_g - slope_g;
                if (kind == ZINB) {
                    float h = c.logit_pi[g];
                    h = h < -80.0f ? -80.0f : h;
                    h = h > 80.0f ? 80.0f : h;
                    float odds_pi = exp32(h), nb, nb_less_1 = expm1_32(value_g, &nb);
                    float keep = 1.0f / (1.0f + odds_pi), share = 1.0f / (odds_pi + nb);
                    value_g = log32((odds_pi + nb) * keep);
                    c.grad_pi[g] = -nb_less_1 * (odds_pi * share) * keep; /* without the cancellation of share - pi */
                    slope_g *= nb * share;
                    slope_theta *= nb * share;
                }
                c.grad_theta[g] = slope_theta;
            }
            mu[g] = mu_g;
            grad_mu[g] = slope_g;
            part += value_g;
            part_slope += slope_g;
            c.value[g] = value_g;
        }
        value += part;
        slope += part_slope;
    }
    if (kind == POISSON) value = slope = -library; /* what the means of all genes add up to */

    /* the non-zeros, in float64: their terms cancel to far below their own size */
    for (int64_t start = 0; start < c.n_nonzero; start += BLOCK) {
        int64_t n = c.n_nonzero - start < BLOCK ? c.n_nonzero - start : BLOCK;
        const int32_t *gene = c.gene_m + start;
        const float *x_m = c.x_m + start;
        double log_mu_m[BLOCK], theta_m[BLOCK], logit_m[BLOCK], slope_m[BLOCK], slope_theta_m[BLOCK];
        int32_t far[BLOCK];
        int64_t n_far = 0;
        for (int64_t m = 0; m < n; m++) {
            int32_t g = gene[m];
            far[n_far] = (int32_t)m;
            n_far += x_m[m] > 8;
            log_mu_m[m] = c.logit_rho[g] + log_scale;
            if (kind != POISSON) theta_m[m] = c.log_theta[g];
            if (kind == ZINB) logit_m[m] = c.logit_pi[g];
            if (kind != POISSON) value -= c.value[g], slope -= grad_mu[g];
        }
        double added = 0, added_slope = 0;
        #pragma omp simd reduction(+ : added, added_slope)
        for (int64_t m = 0; m < n; m++) {
            double x = x_m[m], mu_m = exp64(log_mu_m[m]), v, slope_near;
            if (kind == POISSON) {
                rising_near(x, INFINITY, &v, &slope_near); /* B vanishes: what is left is -log x! */
                v += x * log_mu_m[m];
                slope_m[m] = x - mu_m;
                added_slope += x;
            } else {
                double log_theta = theta_m[m] < -LIMIT ? -LIMIT : theta_m[m] > LIMIT ? LIMIT : theta_m[m];
                double theta = exp64(log_theta), odds = mu_m / theta, s = log1p64(odds);
                rising_near(x, theta, &v, &slope_near);
                v += x * log_mu_m[m] - (x + theta) * s;
                theta_m[m] = theta;
                slope_m[m] = (x - mu_m) / (1 + odds);
                slope_theta_m[m] = x + slope_near - theta * s - slope_m[m];
            }
            if (kind == ZINB) { /* log(1 - pi) = -softplus(logit) */
                double h = logit_m[m], e = exp64(h > 0 ? -h : h);
                v -= log1p64(e) + (h > 0 ? h : 0.0);
                logit_m[m] = -(h > 0 ? 1.0 : e) / (1 + e);
            }
            added += v;
            if (kind != POISSON) added_slope += slope_m[m];
        }
        #pragma omp simd reduction(+ : added)
        for (int64_t i = 0; i < n_far; i++) {
            double x = x_m[far[i]], slope_far;
            added -= rising_far(x, 1.0, &slope_far);
            if (kind != POISSON) {
                added += rising_far(x, theta_m[far[i]], &slope_far);
                slope_theta_m[far[i]] += slope_far;
            }
        }
        value += added;
        slope += added_slope;
        for (int64_t m = 0; m < n; m++) {
            grad_mu[gene[m]] = (float)slope_m[m];
            if (kind != POISSON) c.grad_theta[gene[m]] = (float)slope_theta_m[m];
            if (kind == ZINB) c.grad_pi[gene[m]] = (float)logit_m[m];
        }
    }
    *c.log_likelihood = value;
    *c.grad_library = (float)slope;

    /* through the softmax */
    float share = (float)(slope / library);
    for (int64_t g = 0; g < n_genes; g++) c.grad_rho[g] = grad_mu[g] - mu[g] * share;
}

EVERY_CPU static void cell_poisson(const Cell *c) { cell(POISSON, *c); }
EVERY_CPU static void cell_nb(const Cell *c) { cell(NB, *c); }
EVERY_CPU static void cell_zinb(const Cell *c) { cell(ZINB, *c); }

EVERY_CPU static void exponents(int64_t n, const float *log_theta, float *theta, float *inverse) {
    for (int64_t g = 0; g < n; g++) {
        float t = log_theta[g] < -(float)LIMIT ? -(float)LIMIT : log_theta[g];
        t = t > (float)LIMIT ? (float)LIMIT : t;
        theta[g] = exp32(t);
        inverse[g] = exp32(-t);
    }
}

/* bfloat16 is the upper half of a float32. */
EVERY_CPU static void widen(int64_t n, const uint16_t *half, const float *bias, float *out) {
    for (int64_t g = 0; g < n; g++) out[g] = float_of((int32_t)((uint32_t)half[g] << 16)) + bias[g];
}

/* A row of gradients, scaled: added to the sums over cells and written to the tile, where either is wanted. */
EVERY_CPU static void give(int64_t n, float scale, const float *row, float *sum, float *out, uint16_t *half) {
    if (sum)
        for (int64_t g = 0; g < n; g++) sum[g] += row[g] * scale;
    if (out)
        for (int64_t g = 0; g < n; g++) out[g] = row[g] * scale;
    if (half)
        for (int64_t g = 0; g < n; g++) {
            uint32_t bits = (uint32_t)bits_of(row[g] * scale);
            half[g] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* to the nearest, ties to even */
        }
}

enum { CHUNK = 8, ROOM = 9 }; /* cells summed one after the other; rows to work in */

/* Every cell of a minibatch.
 *
 * The logits are float32, or bfloat16 (is_half) to which biases are added here. log_theta has one row or n_cells; logit_pi
 * and log_theta are NULL where the likelihood has none. Gradients are multiplied by scale; any pointer to them may be NULL:
 * tiles of rho and pi, in the type of the logits; a float32 tile of theta; sums over cells, one a gene. The sums are of
 * chunks of cells, in order, whatever the number of threads. Returns 0, or 1 without memory. */
int scvi_log_likelihood(
    int kind, int is_half, int64_t n_cells, int64_t n_genes, const int64_t *indptr_n, const int32_t *gene_m,
    const float *x_m, const void *logit_rho_ng, const float *bias_rho_g, const float *log_library_n,
    const float *log_theta_ng, int64_t n_theta, const void *logit_pi_ng, const float *bias_pi_g, float scale,
    double *log_likelihood_n, void *grad_rho_ng, float *grad_library_n, float *grad_theta_ng, void *grad_pi_ng,
    float *sum_rho_g, float *sum_theta_g, float *sum_pi_g) {
    int64_t n_chunks = (n_cells + CHUNK - 1) / CHUNK;
    int failed = 0, summing = sum_rho_g || sum_theta_g || sum_pi_g;
    float *theta_g = malloc(2 * n_genes * sizeof(float));
    float *partial = summing ? calloc(3 * n_chunks * n_genes, sizeof(float)) : NULL;
    if (!theta_g || (summing && !partial)) {
        free(theta_g);
        free(partial);
        return 1;
    }
    if (kind != POISSON && n_theta == 1) exponents(n_genes, log_theta_ng, theta_g, theta_g + n_genes);
    #pragma omp parallel
    {
        float *room = malloc(ROOM * n_genes * sizeof(float));
        #pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < n_chunks; chunk++)
        for (int64_t n = chunk * CHUNK; n < n_cells && n < (chunk + 1) * CHUNK; n++) {
            if (!room) {
                failed = 1;
                continue;
            }
            int64_t at = n * n_genes;
            Cell c = {
                .n_genes = n_genes, .n_nonzero = indptr_n[n + 1] - indptr_n[n],
                .gene_m = gene_m + indptr_n[n], .x_m = x_m + indptr_n[n],
                .logit_rho = (const float *)logit_rho_ng + at, .logit_pi = (const float *)logit_pi_ng + at,
                .log_theta = log_theta_ng, .theta = theta_g, .theta_inverse = theta_g + n_genes,
                .log_library = log_library_n[n], .mu = room, .value = room + n_genes,
                .grad_rho = room + 2 * n_genes, .grad_theta = room + 3 * n_genes, .grad_pi = room + 4 * n_genes,
                .log_likelihood = log_likelihood_n + n, .grad_library = grad_library_n + n,
            };
            if (is_half) {
                widen(n_genes, (const uint16_t *)logit_rho_ng + at, bias_rho_g, room + 7 * n_genes);
                c.logit_rho = room + 7 * n_genes;
                if (kind == ZINB) widen(n_genes, (const uint16_t *)logit_pi_ng + at, bias_pi_g, room + 8 * n_genes);
                c.logit_pi = room + 8 * n_genes;
            }
            if (kind != POISSON && n_theta > 1) {
                c.log_theta = log_theta_ng + at, c.theta = room + 5 * n_genes, c.theta_inverse = room + 6 * n_genes;
                exponents(n_genes, c.log_theta, room + 5 * n_genes, room + 6 * n_genes);
            }
            (kind == POISSON ? cell_poisson : kind == NB ? cell_nb : cell_zinb)(&c);
            grad_library_n[n] *= scale;
            float *sums = partial ? partial + 3 * chunk * n_genes : NULL;
            float *rho = is_half ? NULL : grad_rho_ng, *pi = is_half ? NULL : grad_pi_ng;
            uint16_t *rho_half = is_half ? grad_rho_ng : NULL, *pi_half = is_half ? grad_pi_ng : NULL;
            give(n_genes, scale, c.grad_rho, sum_rho_g ? sums : NULL, rho ? rho + at : NULL, rho_half ? rho_half + at : NULL);
            if (kind != POISSON)
                give(n_genes, scale, c.grad_theta, sum_theta_g ? sums + n_genes : NULL, grad_theta_ng ? grad_theta_ng + at : NULL, NULL);
            if (kind == ZINB)
                give(n_genes, scale, c.grad_pi, sum_pi_g ? sums + 2 * n_genes : NULL, pi ? pi + at : NULL, pi_half ? pi_half + at : NULL);
        }
        free(room);
    }
    float *sum[] = {sum_rho_g, sum_theta_g, sum_pi_g};
    for (int i = 0; i < 3; i++)
        if (sum[i]) {
            memset(sum[i], 0, n_genes * sizeof(float));
            for (int64_t k = 0; k < n_chunks; k++) give(n_genes, 1.0f, partial + (3 * k + i) * n_genes, sum[i], NULL, NULL);
        }
    free(partial);
    free(theta_g);
    return failed;
}

/* ---- a hidden layer ----------------------------------------------------------------------------------------------- */

/* Batch norm over cells, ReLU and dropout (kept: 0 or 1 for each entry; NULL without). What the way back needs is left in
 * normal_nh and inverse_h; the running moments move towards the minibatch's. */
EVERY_CPU void scvi_hidden(
    int64_t n_cells, int64_t n_hidden, const float *restrict a_nh, const float *restrict weight_h, const float *restrict bias_h, float eps,
    float momentum, const uint8_t *restrict kept_nh, float kept_scale, float *restrict mean_h, float *restrict variance_h, float *restrict normal_nh,
    float *restrict inverse_h, float *restrict out_nh) {
    float *mean = out_nh, *variance = inverse_h; /* room: the first row of out is written last */
    for (int64_t h = 0; h < n_hidden; h++) mean[h] = variance[h] = 0;
    for (int64_t n = 0; n < n_cells; n++)
        for (int64_t h = 0; h < n_hidden; h++) mean[h] += a_nh[n * n_hidden + h];
    for (int64_t h = 0; h < n_hidden; h++) mean[h] /= n_cells;
    for (int64_t n = 0; n < n_cells; n++)
        for (int64_t h = 0; h < n_hidden; h++) {
            float d = a_nh[n * n_hidden + h] - mean[h];
            normal_nh[n * n_hidden + h] = d;
            variance[h] += d * d;
        }
    for (int64_t h = 0; h < n_hidden; h++) {
        mean_h[h] += momentum * (mean[h] - mean_h[h]);
        variance_h[h] += momentum * (variance[h] / (n_cells - 1) - variance_h[h]);
        inverse_h[h] = 1.0f / sqrtf(variance[h] / n_cells + eps);
    }
    for (int64_t n = 0; n < n_cells; n++)
        for (int64_t h = 0; h < n_hidden; h++) {
            int64_t at = n * n_hidden + h;
            normal_nh[at] *= inverse_h[h];
            float out = normal_nh[at] * weight_h[h] + bias_h[h];
            out_nh[at] = out > 0 ? out : out - out; /* NaN stays */
        }
    if (kept_nh)
        for (int64_t at = 0; at < n_cells * n_hidden; at++) out_nh[at] *= kept_nh[at] * kept_scale;
}

/* And back: from the gradient by out to those by a, weight and bias. */
EVERY_CPU void scvi_hidden_gradient(
    int64_t n_cells, int64_t n_hidden, const float *restrict outer_nh, const float *restrict out_nh, float kept_scale, const float *restrict normal_nh,
    const float *restrict inverse_h, const float *restrict weight_h, float *restrict grad_a_nh, float *restrict grad_weight_h, float *restrict grad_bias_h) {
    for (int64_t h = 0; h < n_hidden; h++) grad_weight_h[h] = grad_bias_h[h] = 0;
    for (int64_t n = 0; n < n_cells; n++)
        for (int64_t h = 0; h < n_hidden; h++) {
            int64_t at = n * n_hidden + h;
            float d = out_nh[at] > 0 ? outer_nh[at] * kept_scale : 0.0f;
            grad_a_nh[at] = d;
            grad_bias_h[h] += d;
            grad_weight_h[h] += d * normal_nh[at];
        }
    float share = 1.0f / n_cells;
    for (int64_t n = 0; n < n_cells; n++)
        for (int64_t h = 0; h < n_hidden; h++) {
            int64_t at = n * n_hidden + h;
            float d = grad_a_nh[at] - share * (grad_bias_h[h] + normal_nh[at] * grad_weight_h[h]);
            grad_a_nh[at] = d * inverse_h[h] * weight_h[h];
        }
}

/* ---- the encoder's first layer, and the minibatch ---------------------------------------------------------------- */

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias)); /* 16 hidden units */
enum { LANES = 16, STRIP = 4 * LANES };                                      /* as many as stay in registers */

INLINE void sums(
    int64_t n, int64_t n_hidden, int n_lanes, const int32_t *gene_m, const float *value_m, const float *weight, float *out) {
    Lanes sum[4] = {{0}};
    for (int64_t m = 0; m < n; m++) {
        const Lanes *row = (const Lanes *)(weight + gene_m[m] * n_hidden);
        for (int i = 0; i < n_lanes; i++) sum[i] += row[i] * value_m[m];
    }
    for (int i = 0; i < n_lanes; i++) ((Lanes *)out)[i] = sum[i];
}

EVERY_CPU static void sums_of_cell(
    int64_t n, int64_t n_hidden, const int32_t *gene_m, const float *value_m, const float *weight_gh, float *out_h) {
    int64_t h = 0;
    for (; h + STRIP <= n_hidden; h += STRIP) sums(n, n_hidden, 4, gene_m, value_m, weight_gh + h, out_h + h);
    for (; h + LANES <= n_hidden; h += LANES) sums(n, n_hidden, 1, gene_m, value_m, weight_gh + h, out_h + h);
    for (; h < n_hidden; h++) {
        float sum = 0;
        for (int64_t m = 0; m < n; m++) sum += value_m[m] * weight_gh[gene_m[m] * n_hidden + h];
        out_h[h] = sum;
    }
}

/* out_nh = sum over each cell's non-zeros of value_m * weight_gh[gene_m] */
void scvi_sparse_linear(
    int64_t n_cells, int64_t n_hidden, const int64_t *indptr_n, const int32_t *gene_m, const float *value_m,
    const float *weight_gh, float *out_nh) {
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < n_cells; n++) {
        int64_t at = indptr_n[n];
        sums_of_cell(indptr_n[n + 1] - at, n_hidden, gene_m + at, value_m + at, weight_gh, out_nh + n * n_hidden);
    }
}

EVERY_CPU static void spread(
    int64_t n_cells, int64_t width, int64_t n_hidden, const int64_t *indptr_n, const int32_t *gene_m, const float *value_m,
    const float *out, float *weight) {
    for (int64_t n = 0; n < n_cells; n++, out += n_hidden)
        for (int64_t m = indptr_n[n]; m < indptr_n[n + 1]; m++) {
            float *row = weight + gene_m[m] * n_hidden;
            if (width == STRIP) {
                for (int i = 0; i < 4; i++) ((Lanes *)row)[i] += ((const Lanes *)out)[i] * value_m[m];
            } else
                for (int64_t h = 0; h < width; h++) row[h] += value_m[m] * out[h];
        }
}

/* Its gradient: grad_weight_gh = sum of value_m * grad_out_nh over the gene's non-zeros. Threads share no hidden unit. */
void scvi_sparse_linear_gradient(
    int64_t n_cells, int64_t n_hidden, const int64_t *indptr_n, const int32_t *gene_m, const float *value_m,
    int64_t n_genes, const float *grad_out_nh, float *grad_weight_gh) {
    memset(grad_weight_gh, 0, n_genes * n_hidden * sizeof(float));
    #pragma omp parallel for schedule(static)
    for (int64_t h = 0; h < n_hidden; h += STRIP) {
        int64_t width = n_hidden - h < STRIP ? n_hidden - h : STRIP;
        spread(n_cells, width, n_hidden, indptr_n, gene_m, value_m, grad_out_nh + h, grad_weight_gh + h);
    }
}

#define WIDEN(to, from, type) \
    for (int64_t m = 0; m < length; m++) (to)[m] = ((const type *)(from))[start + m]

/* Cells of packed counts, which begin at starts_n: genes of 2 or 4 bytes, values of 1, 2 or 4. Those of 1 and 2 bytes
   have no sign. */
void scvi_gather(
    int64_t n_cells, const int64_t *starts_n, const void *genes, int gene_bytes, const void *values, int value_bytes,
    const int64_t *out_indptr_n, int32_t *out_gene_m, float *out_x_m) {
    for (int64_t n = 0; n < n_cells; n++) {
        int64_t start = starts_n[n], length = out_indptr_n[n + 1] - out_indptr_n[n];
        int32_t *gene_m = out_gene_m + out_indptr_n[n];
        float *x_m = out_x_m + out_indptr_n[n];
        if (gene_bytes == 2) WIDEN(gene_m, genes, uint16_t);
        else WIDEN(gene_m, genes, int32_t);
        if (value_bytes == 1) WIDEN(x_m, values, uint8_t);
        else if (value_bytes == 2) WIDEN(x_m, values, uint16_t);
        else WIDEN(x_m, values, int32_t);
    }
}

/* The same cells as they are packed: `bytes` each. */
void scvi_gather_packed(
    int64_t n_cells, const int64_t *starts_n, const char *from, int64_t bytes, const int64_t *out_indptr_n, char *to) {
    for (int64_t n = 0; n < n_cells; n++)
        memcpy(to + bytes * out_indptr_n[n], from + bytes * starts_n[n], bytes * (out_indptr_n[n + 1] - out_indptr_n[n]));
}

/* ---- the optimiser ----------------------------------------------------------------------------------------------- */

EVERY_CPU static void adam(
    int64_t n, float *restrict weight, const float *restrict gradient, float *restrict mean, float *restrict square,
    float rate, float mean_rate, float square_rate, float eps, float decay, float square_scale) {
    for (int64_t i = 0; i < n; i++) {
        float g = gradient[i] + decay * weight[i];
        mean[i] += mean_rate * (g - mean[i]);
        square[i] += square_rate * (g * g - square[i]);
        weight[i] -= rate * mean[i] / (sqrtf(square[i]) * square_scale + eps);
    }
}

/* One step of Adam; see kernels.py. */
void scvi_adam(
    int64_t n, float *weight, const float *gradient, float *mean, float *square, float rate, float mean_rate,
    float square_rate, float eps, float decay, float square_scale) {
    const int64_t piece = 1 << 14;
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += piece)
        adam(n - i < piece ? n - i : piece, weight + i, gradient + i, mean + i, square + i, rate, mean_rate, square_rate, eps, decay, square_scale);
}

/* ---- Log fold changes over pairs of posterior samples; see de.py. */

/* The differences of one gene's pairs, as numbers and as keys that rise with them; their sum, that of their squares,
 * and how many lie beyond +-delta. */
EVERY_CPU static void differences(
    int64_t n, const int32_t *a_at, const int32_t *b_at, const float *values, float delta, float *lfc, uint32_t *key,
    double *moments, int64_t *beyond) {
    float total = 0, square = 0;
    int32_t above = 0, below = 0;
    #pragma omp simd reduction(+ : total, above, below)
    for (int64_t i = 0; i < n; i++) {
        float d = values[a_at[i]] - values[b_at[i]] + 0.0f; /* no negative zero */
        int32_t bits = bits_of(d);
        lfc[i] = d;
        key[i] = (uint32_t)(bits ^ ((bits >> 31) | INT32_MIN));
        total += d;
        above += d > delta;
        below += d < -delta;
    }
    float mean = total / n;
    #pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++)
        square += (lfc[i] - mean) * (lfc[i] - mean);
    moments[0] = mean, moments[1] = square, beyond[0] = above, beyond[1] = below;
}

/* How many keys have each value of some of their bits. */
static void tally(int64_t n, const uint32_t *key, int shift, uint32_t mask, int32_t *count) {
    memset(count, 0, (mask + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < n; i++)
        count[(key[i] >> shift) & mask]++;
}

/* The key of a rank among some that share their upper bits: by the next bits, and of those that share these by the last. */
static uint32_t key_of_rank(int64_t n, uint32_t *key, int64_t rank) {
    int32_t count[2048];
    for (int level = 0; level < 2; level++) {
        const int shift = level ? 0 : 10;
        const uint32_t mask = level ? 1023 : 2047;
        uint32_t bin = 0;
        int64_t kept = 0;
        tally(n, key, shift, mask, count);
        for (; rank >= count[bin]; bin++)
            rank -= count[bin];
        for (int64_t i = 0; i < n; i++) {
            uint32_t one = key[i];
            key[kept] = one;
            kept += ((one >> shift) & mask) == bin;
        }
        n = kept;
    }
    return key[0];
}

/* The keys of three rising ranks. `few` has room for three times as many keys. */
static void keys_of_ranks(int64_t n, const uint32_t *key, const int64_t *ranks, uint32_t *few, uint32_t *found) {
    int32_t count[2048];
    uint32_t bin[3];
    int64_t below = 0, within[3], kept[3] = {0};
    tally(n, key, 21, 2047, count);
    for (uint32_t r = 0, b = 0; r < 3; r++) {
        for (; below + count[b] <= ranks[r]; b++)
            below += count[b];
        bin[r] = b, within[r] = ranks[r] - below;
    }
    uint32_t *low = few, *middle = few + n, *high = few + 2 * n;
    for (int64_t i = 0; i < n; i++) {
        uint32_t one = key[i], upper = one >> 21;
        low[kept[0]] = middle[kept[1]] = high[kept[2]] = one;
        kept[0] += upper == bin[0], kept[1] += upper == bin[1], kept[2] += upper == bin[2];
    }
    for (int r = 0; r < 3; r++)
        found[r] = key_of_rank(kept[r], few + r * n, within[r]);
}

/* For each gene: mean, standard deviation, shares above delta and below -delta, and the values of three ranks, of
 * values[gene][a_at[i]] - values[gene][b_at[i]] over i. values is (genes, samples); out (genes, 7). Returns 1 where
 * memory is lacking. */
int scvi_fold_changes(
    int64_t n_genes, int64_t n_samples, int64_t n_pairs, const float *values, const int32_t *a_at, const int32_t *b_at,
    float delta, const int64_t *ranks, double *out) {
    int failed = 0;
    #pragma omp parallel reduction(| : failed)
    {
        float *lfc = malloc(n_pairs * sizeof(float));
        uint32_t *key = malloc((4 * n_pairs + 1) * sizeof(uint32_t));
        failed = !lfc || !key;
        #pragma omp for schedule(static)
        for (int64_t g = 0; g < n_genes; g++) {
            if (failed)
                continue;
            double moments[2], *to = out + 7 * g;
            int64_t beyond[2];
            uint32_t found[3];
            differences(n_pairs, a_at, b_at, values + g * n_samples, delta, lfc, key, moments, beyond);
            to[0] = moments[0], to[1] = sqrt(moments[1] / (n_pairs - 1));
            to[2] = (double)beyond[0] / n_pairs, to[3] = (double)beyond[1] / n_pairs;
            keys_of_ranks(n_pairs, key, ranks, key + n_pairs, found);
            for (int r = 0; r < 3; r++) {
                int32_t bits = (int32_t)found[r];
                to[4 + r] = float_of(bits ^ (bits < 0 ? INT32_MIN : -1));
            }
        }
        free(lfc), free(key);
    }
    return failed;
}

/* Of the signatures above; native.py refuses a library built from others. */
int scvi_interface(void) { return 3; }
