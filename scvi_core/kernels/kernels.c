/* The compiled form of plain.py: the same equations, one pass over a tile of cells x genes while it is in
 * cache, an encoder layer and a minibatch that touch only the non-zero counts, and the matrix products between them.
 *
 * Plain C called through pointers: it needs neither Python's nor PyTorch's headers, so one build serves every version
 * of both. Elementary functions are written out below, as loops that call the C library's do not become vector
 * instructions; GCC compiles each loop for several CPUs and the fastest is chosen when the library is loaded.
 * Compiled without -ffast-math: log1p relies on the order of its sums. Work is cut into pieces by its size alone, so
 * results depend neither on the number of threads nor on which of them takes a piece.
 *
 * Suffixes as in model.py: n cells, g genes, h hidden units, m the non-zeros of a minibatch.
 */

#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

enum { POISSON, NB, ZINB };

/* ---- threads ----------------------------------------------------------------------------------------------------- */

/* A call hands out the pieces of its work to whoever comes: itself, and helpers as far as the system lets them run. It
 * waits for the helpers that are at a piece, never for one that has not come: on cores that others use, a barrier would
 * cost more than the work. A helper looks for the next call for SPIN nanoseconds, then sleeps. */

typedef void (*Piece)(const void *of, int64_t piece);
enum { SPIN = 50000 };

static struct {
    pthread_mutex_t caller, lock; /* one call at a time; what follows */
    pthread_cond_t begun, ended;
    Piece piece;
    const void *of;
    int64_t n_pieces;
    _Atomic int64_t next;
    _Atomic uint32_t call; /* number of the one at hand */
    _Atomic int inside;    /* helpers that are at its pieces */
    int helpers, places;   /* that there are; that may still join it */
} team = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .begun = PTHREAD_COND_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER};

INLINE int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

INLINE void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take(void) {
    for (int64_t i; (i = atomic_fetch_add(&team.next, 1)) < team.n_pieces;) team.piece(team.of, i);
}

static void *help(void *nothing) {
    uint32_t seen = 0;
    for (;;) {
        for (int64_t until = nanoseconds() + SPIN; atomic_load(&team.call) == seen && nanoseconds() < until;) relax();
        pthread_mutex_lock(&team.lock);
        while (team.call == seen) pthread_cond_wait(&team.begun, &team.lock);
        seen = team.call;
        int joins = team.places > 0;
        if (joins) team.places--, team.inside++;
        pthread_mutex_unlock(&team.lock);
        if (!joins) continue;
        take();
        pthread_mutex_lock(&team.lock);
        if (--team.inside == 0) pthread_cond_signal(&team.ended);
        pthread_mutex_unlock(&team.lock);
    }
    return nothing;
}

/* In a process that was forked there are no helpers yet. */
static void alone(void) {
    pthread_mutex_init(&team.caller, NULL), pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.begun, NULL), pthread_cond_init(&team.ended, NULL);
    team.helpers = team.places = team.inside = 0;
}
__attribute__((constructor)) static void when_forked(void) { pthread_atfork(NULL, NULL, alone); }

static void recruit(int wanted) {
    sigset_t all, before; /* signals are for the threads of the program */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; team.helpers < wanted && !pthread_create(&thread, NULL, help, NULL); team.helpers++)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Each piece once, on up to so many threads. */
static void in_pieces(int threads, int64_t n_pieces, Piece piece, const void *of) {
    if (threads > n_pieces) threads = (int)n_pieces;
    if (threads < 2 || pthread_mutex_trylock(&team.caller)) { /* or another thread of the program has the helpers */
        for (int64_t i = 0; i < n_pieces; i++) piece(of, i);
        return;
    }
    pthread_mutex_lock(&team.lock);
    recruit(threads - 1);
    team.piece = piece, team.of = of, team.n_pieces = n_pieces, team.places = threads - 1;
    team.next = 0;
    team.call++;
    pthread_cond_broadcast(&team.begun);
    pthread_mutex_unlock(&team.lock);
    take();
    pthread_mutex_lock(&team.lock);
    team.places = 0;
    if (team.inside) {
        pthread_mutex_unlock(&team.lock);
        for (int64_t until = nanoseconds() + SPIN; team.inside && nanoseconds() < until;) relax();
        pthread_mutex_lock(&team.lock);
        while (team.inside) pthread_cond_wait(&team.ended, &team.lock);
    }
    pthread_mutex_unlock(&team.lock);
    pthread_mutex_unlock(&team.caller);
}

/* ---- matrix products --------------------------------------------------------------------------------------------- */

/* Our own, as those of a library bring their own threads and barriers. A tile of sums stays in registers: by target, the
 * type of a register, how many rows of it and how many registers a row. Each sum goes through `depth` in order, so all
 * targets give the same bits, but for fused multiply-adds where there are none. */
enum { DEPTH = 256, WIDTH = 128 };

/* A(i, k) = a[i a_i + k a_k], B(k, j) = b[k b_k + j b_j], C(i, j) = c[i c_i + j]. */
typedef struct {
    int64_t rows, columns, depth;
    const float *a, *b;
    int64_t a_i, a_k, b_k, b_j;
    float *c;
    int64_t c_i;
    int add;
} Product;

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Places __attribute__((vector_size(16)));
#if defined(__clang__)
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (Places){i, j, k, l})
#endif

/* A panel of C columns (or rows), of which `there` exist, each `deep`: beside one another at each depth, with zeros for
 * those that do not exist. from[k by_k + j by_j], one of the two steps being 1. */
INLINE void pack(int64_t C, int64_t there, int64_t deep, const float *from, int64_t by_k, int64_t by_j, float *to) {
    if (there < C) memset(to, 0, deep * C * sizeof(float));
    int64_t j0 = 0;
    if (by_j == 1) {
        if (there == C)
            for (int64_t k = 0; k < deep; k++)
                for (int64_t j = 0; j < C; j++) to[k * C + j] = from[k * by_k + j];
        else
            for (int64_t k = 0; k < deep; k++)
                for (int64_t j = 0; j < there; j++) to[k * C + j] = from[k * by_k + j];
        j0 = there;
    }
    for (; j0 + 4 <= there; j0 += 4) { /* four by four, turned about */
        const float *f = from + j0 * by_j;
        int64_t k = 0;
        for (; k + 4 <= deep; k += 4) {
            Four a = *(const Four *)(f + k), b = *(const Four *)(f + by_j + k), c = *(const Four *)(f + 2 * by_j + k), d = *(const Four *)(f + 3 * by_j + k);
            Four ab = PICK(a, b, 0, 4, 1, 5), cd = PICK(c, d, 0, 4, 1, 5), AB = PICK(a, b, 2, 6, 3, 7), CD = PICK(c, d, 2, 6, 3, 7);
            float *t = to + k * C + j0;
            *(Four *)t = PICK(ab, cd, 0, 1, 4, 5), *(Four *)(t + C) = PICK(ab, cd, 2, 3, 6, 7);
            *(Four *)(t + 2 * C) = PICK(AB, CD, 0, 1, 4, 5), *(Four *)(t + 3 * C) = PICK(AB, CD, 2, 3, 6, 7);
        }
        for (; k < deep; k++)
            for (int64_t j = 0; j < 4; j++) to[k * C + j0 + j] = f[k + j * by_j];
    }
    for (; j0 < there; j0++)
        for (int64_t k = 0; k < deep; k++) to[k * C + j0] = from[k + j0 * by_j];
}

typedef void (*Tiler)(int64_t depth, const float *a, int64_t a_k, const float *b, int64_t b_k, float *c, int64_t c_i, int add);

INLINE void product_of(int64_t R, int64_t C, Tiler tile, const Product *p) {
    if (!p->depth && !p->add)
        for (int64_t i = 0; i < p->rows; i++) memset(p->c + i * p->c_i, 0, p->columns * sizeof(float));
    float packed_a[DEPTH * R], packed_b[DEPTH * WIDTH], room[R * C];
    for (int64_t j0 = 0; j0 < p->columns; j0 += WIDTH)
        for (int64_t k0 = 0; k0 < p->depth; k0 += DEPTH) {
            const int64_t deep = p->depth - k0 < DEPTH ? p->depth - k0 : DEPTH, wide = p->columns - j0 < WIDTH ? p->columns - j0 : WIDTH;
            const float *from_b = p->b + k0 * p->b_k + j0 * p->b_j;
            const int add = p->add || k0;
            for (int64_t j = 0; j < wide; j += C) /* but panels that lie there as they are wanted */
                if (p->b_j != 1 || wide - j < C) pack(C, wide - j < C ? wide - j : C, deep, from_b + j * p->b_j, p->b_k, p->b_j, packed_b + j * deep);
            for (int64_t i0 = 0; i0 < p->rows; i0 += R) {
                const int64_t high = p->rows - i0 < R ? p->rows - i0 : R;
                pack(R, high, deep, p->a + i0 * p->a_i + k0 * p->a_k, p->a_k, p->a_i, packed_a);
                for (int64_t j = 0; j < wide; j += C) {
                    const int64_t there = wide - j < C ? wide - j : C;
                    const int packed = p->b_j != 1 || there < C;
                    const float *panel = packed ? packed_b + j * deep : from_b + j;
                    float *to = p->c + i0 * p->c_i + j0 + j;
                    if (high == R && there == C) {
                        tile(deep, packed_a, R, panel, packed ? C : p->b_k, to, p->c_i, add);
                        continue;
                    }
                    tile(deep, packed_a, R, panel, packed ? C : p->b_k, room, C, 0);
                    for (int64_t i = 0; i < high; i++, to += p->c_i)
                        for (int64_t g = 0; g < there; g++) to[g] = add ? to[g] + room[i * C + g] : room[i * C + g];
                }
            }
        }
}

#define REGISTERS_OF(NAME, TARGET, BYTES, ROWS, REGISTERS)                                                                  \
    typedef float NAME##_register __attribute__((vector_size(BYTES), aligned(4), may_alias));                          \
    TARGET static void NAME##_tile(                                                                                    \
        int64_t depth, const float *a, int64_t a_k, const float *b, int64_t b_k, float *c, int64_t c_i, int add) {     \
        NAME##_register sum[ROWS][REGISTERS];                                                                          \
        memset(sum, 0, sizeof sum);                                                                                    \
        for (int64_t k = 0; k < depth; k++, a += a_k, b += b_k) {                                                      \
            NAME##_register row[REGISTERS];                                                                            \
            UNROLL for (int j = 0; j < REGISTERS; j++) row[j] = ((const NAME##_register *)b)[j];                       \
            UNROLL for (int i = 0; i < ROWS; i++)                                                                      \
                UNROLL for (int j = 0; j < REGISTERS; j++) sum[i][j] += a[i] * row[j];                                 \
        }                                                                                                              \
        UNROLL for (int i = 0; i < ROWS; i++)                                                                          \
            UNROLL for (int j = 0; j < REGISTERS; j++) {                                                               \
                NAME##_register *to = (NAME##_register *)(c + i * c_i) + j;                                            \
                if (add) *to += sum[i][j];                                                                             \
                else *to = sum[i][j];                                                                                  \
            }                                                                                                          \
    }                                                                                                                  \
    TARGET static void NAME##_product(const Product *p) { product_of(ROWS, REGISTERS * BYTES / 4, NAME##_tile, p); }  \
    /* out_h = sum over m of value_m times row gene_m of the weights; as many units at a time as stay in registers */  \
    TARGET static void NAME##_sums(int64_t n, int64_t n_hidden, const int32_t *gene_m, const float *value_m, const float *weight_gh, float *out_h) { \
        int64_t h = 0;                                                                                                 \
        for (; h + 2 * BYTES <= n_hidden; h += 2 * BYTES) {                                                            \
            NAME##_register sum[8];                                                                                    \
            memset(sum, 0, sizeof sum);                                                                                \
            for (int64_t m = 0; m < n; m++) {                                                                          \
                const NAME##_register *row = (const NAME##_register *)(weight_gh + gene_m[m] * n_hidden + h);          \
                UNROLL for (int i = 0; i < 8; i++) sum[i] += value_m[m] * row[i];                                      \
            }                                                                                                          \
            UNROLL for (int i = 0; i < 8; i++) ((NAME##_register *)(out_h + h))[i] = sum[i];                           \
        }                                                                                                              \
        for (; h < n_hidden; h++) {                                                                                    \
            float sum = 0;                                                                                             \
            for (int64_t m = 0; m < n; m++) sum += value_m[m] * weight_gh[gene_m[m] * n_hidden + h];                   \
            out_h[h] = sum;                                                                                            \
        }                                                                                                              \
    }

#define UNROLL _Pragma("GCC unroll 16")
REGISTERS_OF(any, , 16, 6, 2)
static void (*product)(const Product *) = any_product;
static void (*sums_of_cell)(int64_t, int64_t, const int32_t *, const float *, const float *, float *) = any_sums;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
REGISTERS_OF(v3, __attribute__((target("avx2,fma"))), 32, 6, 2)
REGISTERS_OF(v4, __attribute__((target("avx512f"))), 64, 12, 2)
__attribute__((constructor)) static void choose_registers(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) product = v4_product, sums_of_cell = v4_sums;
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) product = v3_product, sums_of_cell = v3_sums;
}
#endif

/* A dense layer and its way back, in pieces of so many cells and outputs. */
typedef struct {
    int64_t n_cells, n_in, n_out;
    const float *x, *weight, *bias, *grad, *scale_n, *scaled; /* x times scale_n */
    float *out, *grad_x, *grad_weight, *grad_bias;
    int64_t cells; /* of a piece */
} Linear;

static void linear_piece(const void *of, int64_t piece) {
    const Linear *l = of;
    int64_t blocks = (l->n_out + WIDTH - 1) / WIDTH, o = piece % blocks * WIDTH, n0 = piece / blocks * l->cells;
    int64_t wide = l->n_out - o < WIDTH ? l->n_out - o : WIDTH, cells = l->n_cells - n0 < l->cells ? l->n_cells - n0 : l->cells;
    float *out = l->out + n0 * l->n_out + o;
    for (int64_t n = 0; n < cells; n++) memcpy(out + n * l->n_out, l->bias + o, wide * sizeof(float));
    product(&(Product){
        .rows = cells, .columns = wide, .depth = l->n_in, .a = l->x + n0 * l->n_in, .a_i = l->n_in, .a_k = 1,
        .b = l->weight + o * l->n_in, .b_k = 1, .b_j = l->n_in, .c = out, .c_i = l->n_out, .add = 1,
    });
}

/* out_no = x_ni weight_oi' + bias_o */
void scvi_linear(
    int threads, int64_t n_cells, int64_t n_in, int64_t n_out, const float *x, const float *weight, const float *bias, float *out) {
    Linear l = {.n_cells = n_cells, .n_in = n_in, .n_out = n_out, .x = x, .weight = weight, .bias = bias, .out = out, .cells = 256};
    in_pieces(threads, (n_out + WIDTH - 1) / WIDTH * ((n_cells + l.cells - 1) / l.cells), linear_piece, &l);
}

/* sum_g = sum over cells, in order, of scale_n times a row of (cells, all), from column g0 on */
EVERY_CPU static void weighted_sum(int64_t n_cells, int64_t all, int64_t g0, int64_t wide, const float *tile, const float *scale_n, float *sum) {
    memset(sum, 0, wide * sizeof(float));
    for (int64_t n = 0; n < n_cells; n++) {
        float scale = scale_n ? scale_n[n] : 1.0f;
        const float *row = tile + n * all + g0;
        for (int64_t g = 0; g < wide; g++) sum[g] += row[g] * scale;
    }
}

static void linear_gradient_piece(const void *of, int64_t piece) {
    const Linear *l = of;
    int64_t by_cells = l->grad_x ? (l->n_cells + l->cells - 1) / l->cells : 0;
    if (piece < by_cells) {
        int64_t n0 = piece * l->cells, cells = l->n_cells - n0 < l->cells ? l->n_cells - n0 : l->cells;
        float *to = l->grad_x + n0 * l->n_in;
        product(&(Product){
            .rows = cells, .columns = l->n_in, .depth = l->n_out, .a = l->grad + n0 * l->n_out, .a_i = l->n_out, .a_k = 1,
            .b = l->weight, .b_k = l->n_in, .b_j = 1, .c = to, .c_i = l->n_in,
        });
        if (l->scale_n)
            for (int64_t n = 0; n < cells; n++)
                for (int64_t i = 0; i < l->n_in; i++) to[n * l->n_in + i] *= l->scale_n[n0 + n];
        return;
    }
    int64_t o = (piece - by_cells) * WIDTH, wide = l->n_out - o < WIDTH ? l->n_out - o : WIDTH;
    if (l->grad_weight)
        product(&(Product){
            .rows = wide, .columns = l->n_in, .depth = l->n_cells, .a = l->grad + o, .a_i = 1, .a_k = l->n_out,
            .b = l->scaled ? l->scaled : l->x, .b_k = l->n_in, .b_j = 1, .c = l->grad_weight + o * l->n_in, .c_i = l->n_in,
        });
    if (l->grad_bias) weighted_sum(l->n_cells, l->n_out, o, wide, l->grad, l->scale_n, l->grad_bias + o);
}

/* Its gradients, from grad_no, whose rows are to be multiplied by scale_n if given; those wanted, others NULL.
 * Returns 0, or 1 without memory. */
int scvi_linear_gradient(
    int threads, int64_t n_cells, int64_t n_in, int64_t n_out, const float *grad, const float *scale_n, const float *x,
    const float *weight, float *grad_x, float *grad_weight, float *grad_bias) {
    Linear l = {
        .n_cells = n_cells, .n_in = n_in, .n_out = n_out, .x = x, .weight = weight, .grad = grad, .scale_n = scale_n,
        .grad_x = grad_x, .grad_weight = grad_weight, .grad_bias = grad_bias, .cells = 48,
    };
    float *scaled = scale_n && grad_weight ? malloc(n_cells * n_in * sizeof(float)) : NULL;
    if (scale_n && grad_weight && !scaled) return 1;
    for (int64_t n = 0; scaled && n < n_cells; n++)
        for (int64_t i = 0; i < n_in; i++) scaled[n * n_in + i] = x[n * n_in + i] * scale_n[n];
    l.scaled = scaled;
    int64_t by_cells = grad_x ? (n_cells + l.cells - 1) / l.cells : 0, by_outputs = grad_weight || grad_bias ? (n_out + WIDTH - 1) / WIDTH : 0;
    in_pieces(threads, by_cells + by_outputs, linear_gradient_piece, &l);
    free(scaled);
    return 0;
}

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

static const double LIMIT = 60; /* |log theta| beyond is as good as this, as in plain.py */
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

/* log p(x) summed over genes, and its gradients by logit_rho, log library, log theta and logit_pi; see plain.py. */
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

/* A row of gradients, to where it is wanted; as bfloat16 to the nearest, ties to even. */
EVERY_CPU static void give(int64_t n, const float *row, void *to, int is_half) {
    if (!to) return;
    if (!is_half) {
        memcpy(to, row, n * sizeof(float));
        return;
    }
    uint16_t *half = to;
    for (int64_t g = 0; g < n; g++) {
        uint32_t bits = (uint32_t)bits_of(row[g]);
        half[g] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

enum { CELLS = 8, ROOM = 9 }; /* cells of a piece; rows to work in */

typedef struct {
    int kind, is_half;
    int64_t n_cells, n_genes, n_theta;
    const int64_t *indptr_n, *row_n;
    const int32_t *gene_m;
    const float *x_m, *bias_rho_g, *log_library_n, *log_theta_rg, *bias_pi_g, *theta_g;
    const void *logit_rho_ng, *logit_pi_ng;
    double *log_likelihood_n;
    void *grad_rho_ng, *grad_pi_ng;
    float *grad_library_n, *grad_theta_ng;
    _Atomic int failed;
} Tile;

static void likelihood_piece(const void *of, int64_t piece) {
    Tile *t = (Tile *)of;
    const int64_t n_genes = t->n_genes, bytes = n_genes * (t->is_half ? 2 : 4);
    float *room = malloc(ROOM * n_genes * sizeof(float));
    if (!room) t->failed = 1;
    for (int64_t n = piece * CELLS; room && n < t->n_cells && n < (piece + 1) * CELLS; n++) {
        const char *rho = (const char *)t->logit_rho_ng + n * bytes, *pi = (const char *)t->logit_pi_ng + n * bytes;
        Cell c = {
            .n_genes = n_genes, .n_nonzero = t->indptr_n[n + 1] - t->indptr_n[n],
            .gene_m = t->gene_m + t->indptr_n[n], .x_m = t->x_m + t->indptr_n[n],
            .logit_rho = (const float *)rho, .logit_pi = (const float *)pi,
            .log_theta = t->log_theta_rg, .theta = t->theta_g, .theta_inverse = t->theta_g + n_genes,
            .log_library = t->log_library_n[n], .mu = room, .value = room + n_genes,
            .grad_rho = room + 2 * n_genes, .grad_theta = room + 3 * n_genes, .grad_pi = room + 4 * n_genes,
            .log_likelihood = t->log_likelihood_n + n, .grad_library = t->grad_library_n + n,
        };
        if (t->is_half) {
            widen(n_genes, (const uint16_t *)rho, t->bias_rho_g, room + 7 * n_genes);
            c.logit_rho = room + 7 * n_genes;
            if (t->kind == ZINB) widen(n_genes, (const uint16_t *)pi, t->bias_pi_g, room + 8 * n_genes);
            c.logit_pi = room + 8 * n_genes;
        }
        if (t->kind != POISSON && t->n_theta > 1) {
            c.log_theta += (t->row_n ? t->row_n[n] : n) * n_genes, c.theta = room + 5 * n_genes, c.theta_inverse = room + 6 * n_genes;
            exponents(n_genes, c.log_theta, room + 5 * n_genes, room + 6 * n_genes);
        }
        (t->kind == POISSON ? cell_poisson : t->kind == NB ? cell_nb : cell_zinb)(&c);
        give(n_genes, c.grad_rho, t->grad_rho_ng ? (char *)t->grad_rho_ng + n * bytes : NULL, t->is_half);
        if (t->kind != POISSON) give(n_genes, c.grad_theta, t->grad_theta_ng ? t->grad_theta_ng + n * n_genes : NULL, 0);
        if (t->kind == ZINB) give(n_genes, c.grad_pi, t->grad_pi_ng ? (char *)t->grad_pi_ng + n * bytes : NULL, t->is_half);
    }
    free(room);
}

/* Every cell of a minibatch.
 *
 * The logits are float32, or bfloat16 (is_half) to which biases are added here. log_theta has n_theta rows: one; or those
 * that row_n names; or, where row_n is NULL, one a cell. logit_pi and log_theta are NULL where the likelihood has none.
 * Gradients of each cell's value, in tiles, may take the place of the logits, or be NULL: of rho and pi, in the type of
 * the logits; a float32 tile of theta. Returns 0, or 1 without memory. */
int scvi_log_likelihood(
    int threads, int kind, int is_half, int64_t n_cells, int64_t n_genes, const int64_t *indptr_n, const int32_t *gene_m,
    const float *x_m, const void *logit_rho_ng, const float *bias_rho_g, const float *log_library_n,
    const float *log_theta_rg, int64_t n_theta, const int64_t *row_n, const void *logit_pi_ng, const float *bias_pi_g,
    double *log_likelihood_n, void *grad_rho_ng, float *grad_library_n, float *grad_theta_ng, void *grad_pi_ng) {
    float *theta_g = malloc(2 * n_genes * sizeof(float));
    if (!theta_g) return 1;
    if (kind != POISSON && n_theta == 1) exponents(n_genes, log_theta_rg, theta_g, theta_g + n_genes);
    Tile t = {
        .kind = kind, .is_half = is_half, .n_cells = n_cells, .n_genes = n_genes, .n_theta = n_theta, .indptr_n = indptr_n,
        .row_n = row_n, .gene_m = gene_m, .x_m = x_m, .bias_rho_g = bias_rho_g, .log_library_n = log_library_n,
        .log_theta_rg = log_theta_rg, .bias_pi_g = bias_pi_g, .theta_g = theta_g, .logit_rho_ng = logit_rho_ng,
        .logit_pi_ng = logit_pi_ng, .log_likelihood_n = log_likelihood_n, .grad_rho_ng = grad_rho_ng,
        .grad_pi_ng = grad_pi_ng, .grad_library_n = grad_library_n, .grad_theta_ng = grad_theta_ng,
    };
    in_pieces(threads, (n_cells + CELLS - 1) / CELLS, likelihood_piece, &t);
    free(theta_g);
    return t.failed;
}

typedef struct {
    int64_t n_cells, n_genes, n_rows;
    const float *tile_ng, *scale_n;
    const int64_t *row_n;
    float *sum_rg;
} Sums;

EVERY_CPU static void sums_piece(const void *of, int64_t piece) {
    const Sums *s = of;
    int64_t g0 = piece * WIDTH, wide = s->n_genes - g0 < WIDTH ? s->n_genes - g0 : WIDTH;
    for (int64_t r = 0; r < s->n_rows; r++) memset(s->sum_rg + r * s->n_genes + g0, 0, wide * sizeof(float));
    for (int64_t n = 0; n < s->n_cells; n++) {
        const float *from = s->tile_ng + n * s->n_genes + g0;
        float *to = s->sum_rg + (s->row_n ? s->row_n[n] : 0) * s->n_genes + g0;
        for (int64_t g = 0; g < wide; g++) to[g] += from[g] * s->scale_n[n];
    }
}

/* sum_rg = sum over cells, in order, of scale_n tile_ng, into the row that row_n names; all into one where it is NULL */
void scvi_sums(
    int threads, int64_t n_cells, int64_t n_genes, int64_t n_rows, const float *tile_ng, const float *scale_n, const int64_t *row_n, float *sum_rg) {
    Sums s = {.n_cells = n_cells, .n_genes = n_genes, .n_rows = n_rows, .tile_ng = tile_ng, .scale_n = scale_n, .row_n = row_n, .sum_rg = sum_rg};
    in_pieces(threads, (n_genes + WIDTH - 1) / WIDTH, sums_piece, &s);
}

/* ---- a hidden layer ----------------------------------------------------------------------------------------------- */

enum { NONE, LAYER, BATCH, FROZEN }; /* norms; a frozen batch norm goes by its running moments */

/* A norm, ReLU and dropout (kept: 0 or 1 for each entry; NULL without). What the way back needs is left in normal_nh, and
 * in inverse: one a unit, or with a layer norm one a cell. The running moments of a batch norm that is not frozen move
 * towards the minibatch's. */
EVERY_CPU void scvi_hidden(
    int norm, int64_t n_cells, int64_t n_hidden, const float *restrict a_nh, const float *restrict weight_h, const float *restrict bias_h, float eps,
    float momentum, const uint8_t *restrict kept_nh, float kept_scale, float *restrict mean_h, float *restrict variance_h, float *restrict normal_nh,
    float *restrict inverse, float *restrict out_nh) {
    if (norm == BATCH) {
        float *mean = out_nh, *variance = inverse; /* room: the first row of out is written last */
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
            inverse[h] = 1.0f / sqrtf(variance[h] / n_cells + eps);
        }
    } else if (norm == FROZEN) {
        for (int64_t h = 0; h < n_hidden; h++) inverse[h] = 1.0f / sqrtf(variance_h[h] + eps);
        for (int64_t n = 0; n < n_cells; n++)
            for (int64_t h = 0; h < n_hidden; h++) normal_nh[n * n_hidden + h] = a_nh[n * n_hidden + h] - mean_h[h];
    } else if (norm == LAYER)
        for (int64_t n = 0; n < n_cells; n++) {
            const float *a = a_nh + n * n_hidden;
            float mean = 0, variance = 0, *normal = normal_nh + n * n_hidden;
            #pragma omp simd reduction(+ : mean)
            for (int64_t h = 0; h < n_hidden; h++) mean += a[h];
            mean /= n_hidden;
            #pragma omp simd reduction(+ : variance)
            for (int64_t h = 0; h < n_hidden; h++) normal[h] = a[h] - mean, variance += normal[h] * normal[h];
            inverse[n] = 1.0f / sqrtf(variance / n_hidden + eps);
        }
    for (int64_t n = 0; n < n_cells; n++)
        for (int64_t h = 0; h < n_hidden; h++) {
            int64_t at = n * n_hidden + h;
            float out = a_nh[at];
            if (norm != NONE) out = normal_nh[at] *= norm == LAYER ? inverse[n] : inverse[h];
            if (norm >= BATCH) out = out * weight_h[h] + bias_h[h];
            out_nh[at] = out > 0 ? out : out - out; /* NaN stays */
        }
    if (kept_nh)
        for (int64_t at = 0; at < n_cells * n_hidden; at++) out_nh[at] *= kept_nh[at] * kept_scale;
}

/* And back: from the gradient by out to those by a and, of a batch norm, by weight and bias. */
EVERY_CPU void scvi_hidden_gradient(
    int norm, int64_t n_cells, int64_t n_hidden, const float *restrict outer_nh, const float *restrict out_nh, float kept_scale, const float *restrict normal_nh,
    const float *restrict inverse, const float *restrict weight_h, float *restrict grad_a_nh, float *restrict grad_weight_h, float *restrict grad_bias_h) {
    for (int64_t at = 0; at < n_cells * n_hidden; at++) grad_a_nh[at] = out_nh[at] > 0 ? outer_nh[at] * kept_scale : 0.0f;
    if (norm == LAYER)
        for (int64_t n = 0; n < n_cells; n++) {
            float *grad = grad_a_nh + n * n_hidden, mean = 0, slope = 0;
            const float *normal = normal_nh + n * n_hidden;
            #pragma omp simd reduction(+ : mean, slope)
            for (int64_t h = 0; h < n_hidden; h++) mean += grad[h], slope += grad[h] * normal[h];
            mean /= n_hidden, slope /= n_hidden;
            for (int64_t h = 0; h < n_hidden; h++) grad[h] = (grad[h] - mean - normal[h] * slope) * inverse[n];
        }
    if (norm < BATCH) return;
    for (int64_t h = 0; h < n_hidden; h++) grad_weight_h[h] = grad_bias_h[h] = 0;
    for (int64_t n = 0; n < n_cells; n++)
        for (int64_t h = 0; h < n_hidden; h++) {
            float d = grad_a_nh[n * n_hidden + h];
            grad_bias_h[h] += d;
            grad_weight_h[h] += d * normal_nh[n * n_hidden + h];
        }
    float share = norm == FROZEN ? 0.0f : 1.0f / n_cells; /* of what the minibatch's moments take back */
    for (int64_t n = 0; n < n_cells; n++)
        for (int64_t h = 0; h < n_hidden; h++) {
            int64_t at = n * n_hidden + h;
            float d = grad_a_nh[at] - share * (grad_bias_h[h] + normal_nh[at] * grad_weight_h[h]);
            grad_a_nh[at] = d * inverse[h] * weight_h[h];
        }
}

/* ---- the encoder's first layer, and the minibatch ---------------------------------------------------------------- */

typedef struct {
    int64_t n_cells, n_hidden, n_genes;
    const int64_t *indptr_n;
    const int32_t *gene_m;
    const float *x_m, *weight_gh, *grad_nh;
    float *value_m, *out;
} Sparse;

EVERY_CPU static void logs(int64_t n, const float *x, float *log1p_x) {
    for (int64_t m = 0; m < n; m++) log1p_x[m] = log32(1.0f + x[m]);
}

static void sparse_piece(const void *of, int64_t piece) {
    const Sparse *s = of;
    for (int64_t n = piece * CELLS; n < s->n_cells && n < (piece + 1) * CELLS; n++) {
        int64_t at = s->indptr_n[n];
        logs(s->indptr_n[n + 1] - at, s->x_m + at, s->value_m + at);
        sums_of_cell(s->indptr_n[n + 1] - at, s->n_hidden, s->gene_m + at, s->value_m + at, s->weight_gh, s->out + n * s->n_hidden);
    }
}

/* value_m = log(1 + x_m); out_nh = sum over each cell's non-zeros of value_m * weight_gh[gene_m] */
void scvi_sparse_linear(
    int threads, int64_t n_cells, int64_t n_hidden, const int64_t *indptr_n, const int32_t *gene_m, const float *x_m,
    const float *weight_gh, float *value_m, float *out_nh) {
    Sparse s = {
        .n_cells = n_cells, .n_hidden = n_hidden, .indptr_n = indptr_n, .gene_m = gene_m, .x_m = x_m, .value_m = value_m,
        .weight_gh = weight_gh, .out = out_nh,
    };
    in_pieces(threads, (n_cells + CELLS - 1) / CELLS, sparse_piece, &s);
}

enum { GENES = 128 }; /* of a piece: their rows of weights stay in cache */

INLINE void spread(int64_t n, int64_t n_hidden, const int32_t *gene_m, const float *value_m, const float *restrict grad_h, float *out_gh) {
    for (int64_t m = 0; m < n; m++) {
        float *restrict row = out_gh + gene_m[m] * n_hidden, value = value_m[m];
        for (int64_t h = 0; h < n_hidden; h++) row[h] += value * grad_h[h];
    }
}

EVERY_CPU static void sparse_gradient_piece(const void *of, int64_t piece) {
    const Sparse *s = of;
    int64_t g0 = piece * GENES, g1 = g0 + GENES < s->n_genes ? g0 + GENES : s->n_genes;
    memset(s->out + g0 * s->n_hidden, 0, (g1 - g0) * s->n_hidden * sizeof(float));
    for (int64_t n = 0; n < s->n_cells; n++) {
        int64_t ends[2];
        for (int i = 0; i < 2; i++) { /* the cell's first non-zero from this gene on */
            int64_t low = s->indptr_n[n], high = s->indptr_n[n + 1], gene = i ? g1 : g0;
            while (low < high) {
                int64_t middle = (low + high) / 2;
                if (s->gene_m[middle] < gene) low = middle + 1;
                else high = middle;
            }
            ends[i] = low;
        }
        spread(ends[1] - ends[0], s->n_hidden, s->gene_m + ends[0], s->value_m + ends[0], s->grad_nh + n * s->n_hidden, s->out);
    }
}

/* Its gradient: grad_weight_gh = sum of value_m * grad_out_nh over the gene's non-zeros. Genes rise within each cell. */
void scvi_sparse_linear_gradient(
    int threads, int64_t n_cells, int64_t n_hidden, const int64_t *indptr_n, const int32_t *gene_m, const float *value_m,
    int64_t n_genes, const float *grad_out_nh, float *grad_weight_gh) {
    Sparse s = {
        .n_cells = n_cells, .n_hidden = n_hidden, .n_genes = n_genes, .indptr_n = indptr_n, .gene_m = gene_m, .value_m = (float *)value_m,
        .grad_nh = grad_out_nh, .out = grad_weight_gh,
    };
    in_pieces(threads, (n_genes + GENES - 1) / GENES, sparse_gradient_piece, &s);
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

typedef struct {
    int64_t n_tensors;
    const int64_t *size, *first_piece;
    float *const *weight, *const *mean, *const *square;
    const float *const *gradient;
    const uint8_t *const *trainable;
    float rate, mean_rate, square_rate, eps, decay, square_scale;
} Adam;

enum { WEIGHTS = 1 << 14 }; /* of a piece */

EVERY_CPU static void adam_piece(const void *of, int64_t piece) {
    const Adam *a = of;
    int64_t t = 0;
    while (t + 1 < a->n_tensors && a->first_piece[t + 1] <= piece) t++;
    int64_t at = (piece - a->first_piece[t]) * WEIGHTS, n = a->size[t] - at < WEIGHTS ? a->size[t] - at : WEIGHTS;
    float *restrict weight = a->weight[t] + at, *restrict mean = a->mean[t] + at, *restrict square = a->square[t] + at;
    const float *restrict gradient = a->gradient[t] + at;
    const uint8_t *trainable = a->trainable[t] ? a->trainable[t] + at : NULL;
    const float rate = a->rate, mean_rate = a->mean_rate, square_rate = a->square_rate, eps = a->eps, decay = a->decay, scale = a->square_scale;
    #define STEP(g)                                                            \
        mean[i] += mean_rate * ((g) - mean[i]);                                \
        square[i] += square_rate * ((g) * (g) - square[i]);                    \
        weight[i] -= rate * mean[i] / (sqrtf(square[i]) * scale + eps);
    if (trainable)
        for (int64_t i = 0; i < n; i++) {
            float g = trainable[i] ? gradient[i] + decay * weight[i] : 0.0f;
            STEP(g)
        }
    else
        for (int64_t i = 0; i < n; i++) {
            float g = gradient[i] + decay * weight[i];
            STEP(g)
        }
}

/* One step of Adam on several tensors; see plain.py. trainable[t]: NULL, or 0 for each weight that stays. */
void scvi_adam(
    int threads, int64_t n_tensors, const int64_t *size, float *const *weight, const float *const *gradient, float *const *mean,
    float *const *square, const uint8_t *const *trainable, float rate, float mean_rate, float square_rate, float eps, float decay,
    float square_scale) {
    int64_t first_piece[n_tensors + 1], n_pieces = 0;
    for (int64_t t = 0; t < n_tensors; t++) first_piece[t] = n_pieces, n_pieces += (size[t] + WEIGHTS - 1) / WEIGHTS;
    Adam a = {
        n_tensors, size, first_piece, weight, mean, square, gradient, trainable, rate, mean_rate, square_rate, eps, decay, square_scale,
    };
    in_pieces(threads, n_pieces, adam_piece, &a);
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

typedef struct {
    int64_t n_samples, n_pairs;
    const float *values;
    const int32_t *a_at, *b_at;
    float delta;
    const int64_t *ranks;
    double *out;
    _Atomic int failed;
} Changes;

static void changes_of_gene(const void *of, int64_t g) {
    Changes *c = (Changes *)of;
    const int64_t n = c->n_pairs;
    float *lfc = malloc(n * sizeof(float));
    uint32_t *key = malloc((4 * n + 1) * sizeof(uint32_t)), found[3];
    double moments[2], *to = c->out + 7 * g;
    int64_t beyond[2];
    if (lfc && key) {
        differences(n, c->a_at, c->b_at, c->values + g * c->n_samples, c->delta, lfc, key, moments, beyond);
        to[0] = moments[0], to[1] = sqrt(moments[1] / (n - 1));
        to[2] = (double)beyond[0] / n, to[3] = (double)beyond[1] / n;
        keys_of_ranks(n, key, c->ranks, key + n, found);
        for (int r = 0; r < 3; r++) {
            int32_t bits = (int32_t)found[r];
            to[4 + r] = float_of(bits ^ (bits < 0 ? INT32_MIN : -1));
        }
    } else
        c->failed = 1;
    free(lfc), free(key);
}

/* For each gene: mean, standard deviation, shares above delta and below -delta, and the values of three ranks, of
 * values[gene][a_at[i]] - values[gene][b_at[i]] over i. values is (genes, samples); out (genes, 7). Returns 1 where
 * memory is lacking. */
int scvi_fold_changes(
    int threads, int64_t n_genes, int64_t n_samples, int64_t n_pairs, const float *values, const int32_t *a_at, const int32_t *b_at,
    float delta, const int64_t *ranks, double *out) {
    Changes c = {.n_samples = n_samples, .n_pairs = n_pairs, .values = values, .a_at = a_at, .b_at = b_at, .delta = delta, .ranks = ranks, .out = out};
    in_pieces(threads, n_genes, changes_of_gene, &c);
    return c.failed;
}

/* Of the signatures above; native.py refuses a library built from others. */
int scvi_interface(void) { return 4; }
