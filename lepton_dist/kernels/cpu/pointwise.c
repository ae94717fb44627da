/* What lies between the matmuls of a layer, each in one pass: norms with the residual, rope, KV writes, gating.
 *
 * A kind of 0 is float32, 1 is bfloat16. Everything is computed in float32.
 */
#if defined(__x86_64__)
#include "pointwise.h"
#include "team.h"
#include "vector.h"

#define SMALL 16384 /* values that one thread handles before a second could have woken up */

/* hidden float32 [rows, dim] += delta [rows, dim] of the kind, where there is one; then its root mean square norm
   (arXiv:1910.07467) times weight float32 [dim] -> y [rows, dim] of the kind. */
struct rms_norm {
    float *hidden;
    const void *delta;
    const float *weight;
    void *y;
    int64_t dim;
    int64_t kind;
    float eps;
};

static TARGET void rms_norm_of_rows(void *work, int64_t first_row, int64_t last_row) {
    const struct rms_norm *w = work;
    float *hidden = w->hidden;
    const void *delta = w->delta;
    const float *weight = w->weight;
    void *y = w->y;
    const int64_t dim = w->dim;
    const int64_t kind = w->kind;
    const float eps = w->eps;
    for (int64_t r = first_row; r < last_row; r++) {
        float *x = hidden + r * dim, added[64];
        float squares = 0;
        for (int64_t k0 = 0; k0 < dim; k0 += 64) {
            const int64_t count = dim - k0 < 64 ? dim - k0 : 64;
            if (delta != NULL) {
                widen(delta, kind, r * dim + k0, count, added);
                for (int64_t k = 0; k < count; k++) x[k0 + k] += added[k];
            }
            for (int64_t k = 0; k < count; k++) squares += x[k0 + k] * x[k0 + k];
        }
        const float factor = 1.0f / sqrtf(squares / (float)dim + eps);
        for (int64_t k0 = 0; k0 < dim; k0 += 64) {
            const int64_t count = dim - k0 < 64 ? dim - k0 : 64;
            for (int64_t k = 0; k < count; k++) added[k] = x[k0 + k] * factor * weight[k0 + k];
            narrow(added, count, y, kind, r * dim + k0);
        }
    }
}

void lepton_rms_norm(
    float *hidden, const void *delta, const float *weight, void *y, int64_t rows, int64_t dim, int64_t kind, float eps,
    int64_t threads
) {
    struct rms_norm work = {hidden, delta, weight, y, dim, kind, eps};
    lepton_share(rows * dim > SMALL ? threads : 1, rows, LONG_RUNS, rms_norm_of_rows, &work);
}

/* y [rows, out] += bias float32 [out]. */
struct add_bias {
    void *y;
    const float *bias;
    int64_t out;
    int64_t kind;
};

static TARGET void add_bias_of_rows(void *work, int64_t first_row, int64_t last_row) {
    const struct add_bias *w = work;
    void *y = w->y;
    const float *bias = w->bias;
    const int64_t out = w->out;
    const int64_t kind = w->kind;
    for (int64_t r = first_row; r < last_row; r++)
        for (int64_t k0 = 0; k0 < out; k0 += 64) {
            const int64_t count = out - k0 < 64 ? out - k0 : 64;
            float part[64];
            widen(y, kind, r * out + k0, count, part);
            for (int64_t k = 0; k < count; k++) part[k] += bias[k0 + k];
            narrow(part, count, y, kind, r * out + k0);
        }
}

void lepton_add_bias(void *y, const float *bias, int64_t rows, int64_t out, int64_t kind, int64_t threads) {
    struct add_bias work = {y, bias, out, kind};
    lepton_share(rows * out > SMALL ? threads : 1, rows, LONG_RUNS, add_bias_of_rows, &work);
}

/* The root mean square norm of each of the first `heads` heads of x [rows, stride], times q_norm float32 [dim], and of the
   `kv_heads` behind them, times k_norm, in place. `dim` is at most 256. */
struct norm_heads {
    void *x;
    const float *q_norm;
    const float *k_norm;
    int64_t heads;
    int64_t kv_heads;
    int64_t dim;
    int64_t stride;
    int64_t kind;
    float eps;
};

static TARGET void norm_heads_of_rows(void *work, int64_t first_row, int64_t last_row) {
    const struct norm_heads *w = work;
    void *x = w->x;
    const float *q_norm = w->q_norm;
    const float *k_norm = w->k_norm;
    const int64_t heads = w->heads;
    const int64_t kv_heads = w->kv_heads;
    const int64_t dim = w->dim;
    const int64_t stride = w->stride;
    const int64_t kind = w->kind;
    const float eps = w->eps;
    for (int64_t r = first_row; r < last_row; r++)
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            const float *weight = h < heads ? q_norm : k_norm;
            float head[256], squares = 0;
            widen(x, kind, r * stride + h * dim, dim, head);
            for (int64_t k = 0; k < dim; k++) squares += head[k] * head[k];
            const float factor = 1.0f / sqrtf(squares / (float)dim + eps);
            for (int64_t k = 0; k < dim; k++) head[k] *= factor * weight[k];
            narrow(head, dim, x, kind, r * stride + h * dim);
        }
}

void lepton_norm_heads(
    void *x, const float *q_norm, const float *k_norm, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
    int64_t stride, int64_t kind, float eps, int64_t threads
) {
    struct norm_heads work = {x, q_norm, k_norm, heads, kv_heads, dim, stride, kind, eps};
    lepton_share(rows * (heads + kv_heads) * dim > SMALL ? threads : 1, rows, LONG_RUNS, norm_heads_of_rows, &work);
}

/* Up to 64 values from index k of row r of x [rows, 2 ffn], which holds gate, then up: silu(gate) * up -> y [rows, ffn]. */
INLINE void gate_some(const void *x, void *y, int64_t r, int64_t k, int64_t ffn, int64_t kind) {
    const int64_t count = ffn - k < 64 ? ffn - k : 64;
    float gate[64], up[64];
    widen(x, kind, r * 2 * ffn + k, count, gate);
    widen(x, kind, r * 2 * ffn + ffn + k, count, up);
    for (int64_t i = 0; i < count; i++) gate[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
    narrow(gate, count, y, kind, r * ffn + k);
}

struct gating {
    const void *x;
    void *y;
    int64_t ffn, parts, kind;
};

/* The same code for either width of vectors: parts of up to 64 channels, those of a row behind one another. */
#define GATE_ALL(NAME, INSTRUCTIONS) \
    static INSTRUCTIONS void NAME(void *work, int64_t first, int64_t last) { \
        const struct gating *w = work; \
        for (int64_t i = first; i < last; i++) gate_some(w->x, w->y, i / w->parts, i % w->parts * 64, w->ffn, w->kind); \
    }
GATE_ALL(gate_all, TARGET)
#if defined(HAS_AVX512)
GATE_ALL(gate_all_512, TARGET_512)
#endif

/* All of x [rows, 2 ffn] -> y [rows, ffn]. */
void lepton_gated_silu(const void *x, void *y, int64_t rows, int64_t ffn, int64_t kind, int64_t threads) {
    struct gating work = {x, y, ffn, (ffn + 63) / 64, kind};
    range_function *run = gate_all;
#if defined(HAS_AVX512)
    if (lepton_vector_level() == AVX512) run = gate_all_512;
#endif
    lepton_share(rows * ffn > SMALL ? threads : 1, rows * work.parts, LONG_RUNS, run, &work);
}

/* Rotate the first 2 * half channels of each of the first `heads` heads of x [rows, stride], in place, by
   cos and sin float32 [rows, half] (arXiv:2104.09864, halves against each other). */
struct rotate {
    void *x;
    const float *cos;
    const float *sin;
    int64_t heads;
    int64_t dim;
    int64_t half;
    int64_t stride;
    int64_t kind;
};

static TARGET void rotate_of_rows(void *work, int64_t first_row, int64_t last_row) {
    const struct rotate *w = work;
    void *x = w->x;
    const float *cos = w->cos;
    const float *sin = w->sin;
    const int64_t heads = w->heads;
    const int64_t dim = w->dim;
    const int64_t half = w->half;
    const int64_t stride = w->stride;
    const int64_t kind = w->kind;
    for (int64_t r = first_row; r < last_row; r++)
        for (int64_t h = 0; h < heads; h++) {
            float first[256], second[256], turned[256];
            const int64_t at = r * stride + h * dim;
            widen(x, kind, at, half, first);
            widen(x, kind, at + half, half, second);
            const float *c = cos + r * half, *s = sin + r * half;
            for (int64_t k = 0; k < half; k++) turned[k] = first[k] * c[k] - second[k] * s[k];
            narrow(turned, half, x, kind, at);
            for (int64_t k = 0; k < half; k++) turned[k] = second[k] * c[k] + first[k] * s[k];
            narrow(turned, half, x, kind, at + half);
        }
}

void lepton_rotate(
    void *x, const float *cos, const float *sin, int64_t rows, int64_t heads, int64_t dim, int64_t half, int64_t stride,
    int64_t kind, int64_t threads
) {
    struct rotate work = {x, cos, sin, heads, dim, half, stride, kind};
    lepton_share(rows * heads * dim > SMALL ? threads : 1, rows, LONG_RUNS, rotate_of_rows, &work);
}

/* Put key and value [rows, heads, dim] of the kind, rows `stride` apart, into slots (block * block_tokens + place) of the
   arenas [blocks, heads, block_tokens, dim]. 0, or 1, and nothing written, where a slot is outside of them. */
struct entering {
    const void *from[2];
    const int64_t *slots;
    void *to[2];
    int64_t heads, dim, block_tokens, stride, kind, cache_kind;
};

static TARGET void enter_rows(void *work, int64_t first_row, int64_t last_row) {
    const struct entering *w = work;
    const int64_t dim = w->dim;
    for (int64_t r = first_row; r < last_row; r++)
        for (int i = 0; i < 2; i++)
            for (int64_t h = 0; h < w->heads; h++) {
                const int64_t block = w->slots[r] / w->block_tokens, inside = w->slots[r] % w->block_tokens;
                const int64_t at = ((block * w->heads + h) * w->block_tokens + inside) * dim;
                for (int64_t k0 = 0; k0 < dim; k0 += 64) {
                    const int64_t count = dim - k0 < 64 ? dim - k0 : 64;
                    float part[64];
                    widen(w->from[i], w->kind, r * w->stride + h * dim + k0, count, part);
                    narrow(part, count, w->to[i], w->cache_kind, at + k0);
                }
            }
}

int lepton_write_cache(
    const void *key, const void *value, const int64_t *slots, void *keys, void *values, int64_t rows, int64_t heads,
    int64_t dim, int64_t block_tokens, int64_t blocks, int64_t stride, int64_t kind, int64_t cache_kind, int64_t threads
) {
    struct entering work = {{key, value}, slots, {keys, values}, heads, dim, block_tokens, stride, kind, cache_kind};
    for (int64_t r = 0; r < rows; r++)
        if (slots[r] < 0 || slots[r] >= blocks * block_tokens) return 1;
    lepton_share(rows * heads * dim > SMALL ? threads : 1, rows, LONG_RUNS, enter_rows, &work);
    return 0;
}

/* For each row of scores float32 [rows, count] the index of its largest, the lowest at a tie -> ids [rows], and that
   score -> largest [rows]; NaN where one of the scores is NaN. */
struct arg_max {
    const float *scores;
    float *largest;
    int64_t *ids;
    int64_t count;
};

static TARGET void arg_max_of_rows(void *work, int64_t first_row, int64_t last_row) {
    const struct arg_max *w = work;
    const float *scores = w->scores;
    float *largest = w->largest;
    int64_t *ids = w->ids;
    const int64_t count = w->count;
    for (int64_t r = first_row; r < last_row; r++) {
        const float *x = scores + r * count;
        float most = -INFINITY;
        int64_t start = 0; /* of the first 1,024 scores that hold the largest */
        int is_nan = 0;
        for (int64_t k0 = 0; k0 < count; k0 += 1024) {
            const int64_t end = count - k0 < 1024 ? count : k0 + 1024;
            __m256 unlike[4], highest[4];
            for (int i = 0; i < 4; i++) highest[i] = _mm256_set1_ps(-INFINITY), unlike[i] = _mm256_setzero_ps();
            int64_t k = k0;
            for (; k + 32 <= end; k += 32)
                UNROLL for (int i = 0; i < 4; i++) {
                    const __m256 here = _mm256_loadu_ps(x + k + 8 * i);
                    highest[i] = _mm256_max_ps(here, highest[i]);
                    unlike[i] = _mm256_or_ps(unlike[i], _mm256_cmp_ps(here, here, _CMP_UNORD_Q));
                }
            float lanes[32], here = -INFINITY;
            for (int i = 0; i < 4; i++) _mm256_storeu_ps(lanes + 8 * i, highest[i]), is_nan |= _mm256_movemask_ps(unlike[i]);
            for (int i = 0; i < 32; i++) here = larger(lanes[i], here);
            for (; k < end; k++) here = larger(x[k], here), is_nan |= x[k] != x[k];
            if (here > most) most = here, start = k0;
        }
        while (!is_nan && start + 1 < count && x[start] != most) start++;
        largest[r] = is_nan ? NAN : most;
        ids[r] = start;
    }
}

void lepton_arg_max(const float *scores, float *largest, int64_t *ids, int64_t rows, int64_t count, int64_t threads) {
    struct arg_max work = {scores, largest, ids, count};
    lepton_share(rows * count > 4 * SMALL ? threads : 1, rows, LONG_RUNS, arg_max_of_rows, &work);
}
#endif
