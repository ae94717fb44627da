/* Attention of one query token, a few query heads a KV head, over a bfloat16 cache: decoding.
 *
 * Too few rows share a key to pay for widening it into memory: keys and values are widened in registers, 16 channels as
 * their even and odd ones, for up to 4 heads at a time. In a block the keys of a KV head lie behind those of its neighbour:
 * a task takes several KV heads and goes over memory in its order, so that what the hardware reads ahead is of use. What
 * comes next is asked for besides, a line at a time between the multiplications: asked for all of it at once, a core
 * waits until it may ask again.
 */
#ifndef LEPTON_DECODE_ATTENTION_H
#define LEPTON_DECODE_ATTENTION_H

#include "attention.h"

#define FEW_ROWS 4
#define MOST_FEW 8 /* so many rows of them go over a block in turn */
#define LINE 32 /* bfloat16 values of a cache line */

/* Up to 4 query heads of a KV head, on their way over the keys. Every array is a multiple of 32 bytes long. */
struct few {
    float query[FEW_ROWS * MAX_DIM] __attribute__((aligned(64))); /* per 16 channels: the even, then the odd */
    float mixed[FEW_ROWS * MAX_DIM] __attribute__((aligned(64))); /* likewise */
    float weights[KEYS + 2][FEW_ROWS] __attribute__((aligned(64)));
    /* Of each row, twice. */
    float highest[2 * FEW_ROWS], total[2 * FEW_ROWS];
    int64_t head, rows;
    int64_t offset; /* of its keys in a block, from those of the task's first KV head */
};

INLINE TARGET void widen_16(const uint16_t *at, __m256 *even, __m256 *odd) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)at);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int32_t)0xffff0000)));
}

INLINE TARGET void score_few(
    struct few *w, const uint16_t *keys, const uint16_t *next, int64_t count, int64_t dim, const int rows
) {
    for (int64_t t = 0; t < count; t += 2) {
        for (int64_t d = 0; d < 2 * dim; d += LINE) ask_for(next + t * dim + d);
        const uint16_t *first = keys + t * dim, *second = t + 1 < count ? first + dim : first;
        __m256 sum[2 * FEW_ROWS];
        UNROLL for (int i = 0; i < 2 * FEW_ROWS; i++) sum[i] = _mm256_setzero_ps();
        for (int64_t d = 0; d < dim; d += 16) {
            __m256 even0, odd0, even1, odd1;
            widen_16(first + d, &even0, &odd0);
            widen_16(second + d, &even1, &odd1);
            UNROLL for (int r = 0; r < rows; r++) {
                const __m256 even = _mm256_load_ps(w->query + r * dim + d), odd = _mm256_load_ps(w->query + r * dim + d + 8);
                sum[r] = _mm256_fmadd_ps(even, even0, sum[r]);
                sum[FEW_ROWS + r] = _mm256_fmadd_ps(even, even1, sum[FEW_ROWS + r]);
                sum[r] = _mm256_fmadd_ps(odd, odd0, sum[r]);
                sum[FEW_ROWS + r] = _mm256_fmadd_ps(odd, odd1, sum[FEW_ROWS + r]);
            }
        }
        _mm_store_ps(w->weights[t], sums_of(sum[0], sum[1], sum[2], sum[3]));
        _mm_store_ps(w->weights[t + 1], sums_of(sum[4], sum[5], sum[6], sum[7]));
    }
    for (int64_t t = count; t < KEYS; t++)
        for (int r = 0; r < FEW_ROWS; r++) w->weights[t][r] = -INFINITY;
}

/* Scores become weights: two keys of four rows in a vector. Behind them, what the sums so far shrink by. */
INLINE TARGET void weigh_few(struct few *w) {
    float *weights = w->weights[0];
    const __m256 before = _mm256_load_ps(w->highest);
    __m256 best = before, sum = _mm256_setzero_ps();
    UNROLL for (int i = 0; i < KEYS * FEW_ROWS; i += 8) best = _mm256_max_ps(_mm256_load_ps(weights + i), best);
    best = _mm256_max_ps(best, _mm256_permute2f128_ps(best, best, 1));
    _mm256_store_ps(w->highest, best);
    _mm256_store_ps(w->weights[KEYS], before);
    UNROLL for (int i = 0; i < (KEYS + 2) * FEW_ROWS; i += 8)
        _mm256_store_ps(weights + i, _mm256_sub_ps(_mm256_load_ps(weights + i), best));
    for (int i = 0; i < (KEYS + 2) * FEW_ROWS; i++) weights[i] = exp_of(weights[i]);
    UNROLL for (int i = 0; i < KEYS * FEW_ROWS; i += 8) sum = _mm256_add_ps(sum, _mm256_load_ps(weights + i));
    sum = _mm256_add_ps(sum, _mm256_permute2f128_ps(sum, sum, 1));
    const __m256 shrunk = _mm256_mul_ps(_mm256_load_ps(w->total), _mm256_load_ps(w->weights[KEYS]));
    _mm256_store_ps(w->total, _mm256_add_ps(shrunk, sum));
}

INLINE TARGET void mix_few(
    struct few *w, const uint16_t *values, const uint16_t *next, int64_t count, int64_t dim, const int rows
) {
    for (int64_t d = 0; d < dim; d += 16) {
        __m256 sum[2 * FEW_ROWS];
        UNROLL for (int r = 0; r < rows; r++) {
            const __m256 shrink = _mm256_set1_ps(w->weights[KEYS][r]);
            sum[2 * r] = _mm256_mul_ps(shrink, _mm256_load_ps(w->mixed + r * dim + d));
            sum[2 * r + 1] = _mm256_mul_ps(shrink, _mm256_load_ps(w->mixed + r * dim + d + 8));
        }
        for (int64_t t = 0; t < count; t++) {
            __m256 even, odd;
            widen_16(values + t * dim + d, &even, &odd);
            if (d % LINE == 0) ask_for(next + t * dim + d);
            UNROLL for (int r = 0; r < rows; r++) {
                const __m256 weight = _mm256_broadcast_ss(w->weights[t] + r);
                sum[2 * r] = _mm256_fmadd_ps(weight, even, sum[2 * r]);
                sum[2 * r + 1] = _mm256_fmadd_ps(weight, odd, sum[2 * r + 1]);
            }
        }
        UNROLL for (int r = 0; r < rows; r++) {
            _mm256_store_ps(w->mixed + r * dim + d, sum[2 * r]);
            _mm256_store_ps(w->mixed + r * dim + d + 8, sum[2 * r + 1]);
        }
    }
}

/* Of the token in row `row`. */
INLINE TARGET void begin_few(struct few *w, const struct paged_call *c, int64_t row) {
    const int64_t dim = c->dim;
    const float scale = 1.0f / sqrtf((float)dim);
    float plain[MAX_DIM];
    for (int64_t r = 0; r < w->rows; r++) {
        widen(c->query, c->kind, row * c->query_stride + (w->head + r) * dim, dim, plain);
        for (int64_t d = 0; d < dim; d++) w->query[r * dim + d / 16 * 16 + d % 2 * 8 + d % 16 / 2] = plain[d] * scale;
        memset(w->mixed + r * dim, 0, (size_t)dim * 4);
    }
    for (int r = 0; r < 2 * FEW_ROWS; r++) {
        w->highest[r] = -1e30f; /* below any score, and finite: differences are numbers */
        w->total[r] = 0;
    }
}

INLINE TARGET void end_few(const struct few *w, const struct paged_call *c, int64_t row) {
    const int64_t dim = c->dim;
    float plain[MAX_DIM];
    for (int64_t r = 0; r < w->rows; r++) {
        const float inverse = 1.0f / w->total[r];
        for (int64_t d = 0; d < dim; d++) plain[d] = w->mixed[r * dim + d / 16 * 16 + d % 2 * 8 + d % 16 / 2] * inverse;
        narrow(plain, dim, c->output, c->kind, (row * c->heads + w->head + r) * dim);
    }
}

/* Over `count` keys from element `at` of the cache on, while what lies from `next` on is asked for. */
static TARGET void pass_few(struct few *w, const struct paged_call *c, int64_t at, int64_t next, int64_t count) {
    const uint16_t *keys = c->keys, *values = c->values;
#define KERNEL(rows) \
    do { \
        score_few(w, keys + at, keys + next, count, c->dim, rows); \
        weigh_few(w); \
        mix_few(w, values + at, values + next, count, c->dim, rows); \
    } while (0)
    FOR_ROWS_UP_TO_4(w->rows, KERNEL)
#undef KERNEL
}

/* How many KV heads one call of `decode` can take. */
INLINE int64_t most_kv_heads(int64_t group) { return MOST_FEW / ((group + FEW_ROWS - 1) / FEW_ROWS); }

/* The query heads of KV heads [kv_head, kv_head + kv_heads) of a task of one token. */
static TARGET void decode(const struct paged_call *c, const int64_t *task, int64_t kv_head, int64_t kv_heads) {
    const int64_t group = c->heads / c->kv_heads, row = task[0], last = task[2];
    const int64_t *table = c->tables + task[3] * c->table_width;
    struct few few[MOST_FEW];
    int64_t parts = 0;

    for (int64_t h = 0; h < kv_heads; h++)
        for (int64_t r = 0; r < group; r += FEW_ROWS) {
            struct few *w = &few[parts++];
            w->head = (kv_head + h) * group + r;
            w->rows = group - r < FEW_ROWS ? group - r : FEW_ROWS;
            w->offset = h * c->block_tokens * c->dim;
            begin_few(w, c, row);
        }
    for (int64_t at = c->window && last > c->window ? last - c->window : 0; at < last;) {
        int64_t count = c->block_tokens - at % c->block_tokens;
        if (count > KEYS) count = KEYS;
        if (count > last - at) count = last - at;
        const int64_t first = place(c, table, kv_head, at);
        at += count;
        const int64_t after = at < last ? place(c, table, kv_head, at) : first;
        for (int64_t i = 0; i < parts; i++)
            pass_few(&few[i], c, first + few[i].offset, i + 1 < parts ? first + few[i + 1].offset : after, count);
    }
    for (int64_t i = 0; i < parts; i++) end_few(&few[i], c, row);
}

#endif
