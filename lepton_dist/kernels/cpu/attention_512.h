/* Attention over a bfloat16 cache for bfloat16 queries, by the dot products of AVX-512 with BF16: prefill and decode alike.
 *
 * A task's rows, query tokens x the query heads of a KV head, go over the keys TILE at a time. Keys are turned over once for
 * all rows, so that a vector of products belongs to 16 keys and no sum has to be taken across it; values are laid side by
 * side in pairs of tokens, against pairs of weights rounded to bfloat16 (as in arXiv:2307.08691). Tiles begin at multiples
 * of TILE: what a row gets does not depend on the rows beside it. Where there are matrix instructions, more than a few rows go
 * through those.
 *
 * Decoding waits for memory more than it computes: what comes next is asked for a few lines at a time between the products.
 */
#ifndef LEPTON_ATTENTION_512_H
#define LEPTON_ATTENTION_512_H

#include "attention.h"
#include "tiles.h"
#include "vector_512.h"

#define TILE 32     /* keys: two runs of 16, each within a block */
#define RUN 16
#define FEW_ROWS_512 4 /* at a time: x 2 sums of scores, x 4 of mixed values */
#define AHEAD 2        /* tiles that are asked for before they are needed */

/* Arrays of `dim` columns are dense, whatever MAX_DIM: those of small heads stay in the first cache. */
struct tile_work {
    int32_t keys[MAX_DIM / 2 * TILE] __attribute__((aligned(64)));   /* [dim / 2][TILE] pairs of channels */
    int32_t values[TILE / 2 * MAX_DIM] __attribute__((aligned(64))); /* [TILE / 2][dim] pairs of tokens */
    int32_t query[MAX_ROWS * MAX_DIM / 2] __attribute__((aligned(64))); /* [rows][dim / 2] pairs of channels */
    float mixed[MAX_ROWS * MAX_DIM] __attribute__((aligned(64)));       /* [rows][dim], in the order of `values` */
    int32_t weights[MAX_ROWS][TILE / 2] __attribute__((aligned(64)));   /* pairs of tokens */
    float scores[MAX_ROWS][TILE] __attribute__((aligned(64)));
    float total[MAX_ROWS][16] __attribute__((aligned(64)));
    float highest[MAX_ROWS];
};

/* Where the two runs of a tile begin. */
struct tile_place {
    const uint16_t *keys[2], *values[2]; /* [RUN][dim] */
};

/* 16 keys [16][dim], 32 channels of them -> [16 pairs][TILE], 16 of each row. */
INLINE TARGET_512 void turn_over(const uint16_t *keys, int64_t dim, int32_t *to) {
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(keys + i * dim);
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4)
        UNROLL for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    /* a[4 q + j]: of keys 4 q to 4 q + 3, pairs j, 4 + j, 8 + j and 12 + j */
    UNROLL for (int j = 0; j < 4; j++) {
        const __m512i low0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), top0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
        const __m512i low1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
        const __m512i top1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
        _mm512_store_si512(to + j * TILE, _mm512_shuffle_i32x4(low0, low1, 0x88));
        _mm512_store_si512(to + (4 + j) * TILE, _mm512_shuffle_i32x4(low0, low1, 0xdd));
        _mm512_store_si512(to + (8 + j) * TILE, _mm512_shuffle_i32x4(top0, top1, 0x88));
        _mm512_store_si512(to + (12 + j) * TILE, _mm512_shuffle_i32x4(top0, top1, 0xdd));
    }
}

/* `count` of 16 values [16][dim] -> [8][dim] pairs: of each 32 channels 0-3, 8-11, .., then 4-7, 12-15, ... The others
   become zeros: what they hold is not of this sequence. */
INLINE TARGET_512 void pair_up(const uint16_t *values, int64_t dim, int64_t count, int32_t *to) {
    for (int64_t t = 0; t < RUN; t += 2)
        for (int64_t d = 0; d < dim; d += 32) {
            const __m512i zero = _mm512_setzero_si512();
            const __m512i first = t < count ? _mm512_loadu_si512(values + t * dim + d) : zero;
            const __m512i second = t + 1 < count ? _mm512_loadu_si512(values + (t + 1) * dim + d) : zero;
            _mm512_store_si512(to + t / 2 * dim + d, _mm512_unpacklo_epi16(first, second));
            _mm512_store_si512(to + t / 2 * dim + d + 16, _mm512_unpackhi_epi16(first, second));
        }
}

/* Scores of rows [r, r + rows) with a tile of keys. `next`, unless it is NULL, is where to ask for keys meanwhile. */
INLINE TARGET_512 void score_tile(
    struct tile_work *w, const struct tile_place *next, int64_t r, int64_t dim, const int rows
) {
    __m512i sum[2 * FEW_ROWS_512];
    UNROLL for (int i = 0; i < 2 * rows; i++) sum[i] = _mm512_setzero_si512();
    UNROLL for (int i = 0; i < 2; i++) { /* half of the channels, while a run of keys is asked for */
        const char *ahead = next == NULL ? NULL : (const char *)next->keys[i];
        const int32_t *query = w->query + r * dim / 2 + i * dim / 4, *keys = w->keys + i * dim / 4 * TILE;
        multiply_rows_of_words(query, 1, dim / 2, keys, dim / 4, rows, HALVES, ahead, sum);
    }
    UNROLL for (int i = 0; i < 2 * rows; i++) _mm512_store_ps(w->scores[r] + i * RUN, (__m512)sum[i]);
}

/* The scores of a row become weights; it sees the keys of the tile before `to`, or of them as many as the window has. */
INLINE TARGET_512 void weigh_tile(
    const struct paged_call *c, struct tile_work *w, int64_t r, int64_t dim, float scale, int64_t to
) {
    const int64_t from = c->window ? to - c->window : 0;
    const uint32_t below_to = to >= TILE ? 0xffffffff : to <= 0 ? 0 : (1u << to) - 1;
    const uint32_t below_from = from >= TILE ? 0xffffffff : from <= 0 ? 0 : (1u << from) - 1;
    const uint32_t seen = below_to & ~below_from;
    const __m512 none = _mm512_set1_ps(-INFINITY), factor = _mm512_set1_ps(scale);
    const __m512 low = _mm512_mask_mul_ps(none, (__mmask16)seen, _mm512_load_ps(w->scores[r]), factor);
    const __m512 top = _mm512_mask_mul_ps(none, (__mmask16)(seen >> 16), _mm512_load_ps(w->scores[r] + RUN), factor);
    const float before = w->highest[r], best = larger(_mm512_reduce_max_ps(_mm512_max_ps(low, top)), before);
    __m512 total = _mm512_load_ps(w->total[r]);
    if (best > before) {
        const __m512 shrink = exp_512(_mm512_set1_ps(before - best));
        total = _mm512_mul_ps(total, shrink);
        for (int64_t d = 0; d < dim; d += 16) {
            float *mixed = w->mixed + r * dim + d;
            _mm512_store_ps(mixed, _mm512_mul_ps(_mm512_load_ps(mixed), shrink));
        }
        w->highest[r] = best;
    }
    const __m512 highest = _mm512_set1_ps(best);
    const __m512 weights0 = _mm512_maskz_mov_ps((__mmask16)seen, exp_512(_mm512_sub_ps(low, highest)));
    const __m512 weights1 = _mm512_maskz_mov_ps((__mmask16)(seen >> 16), exp_512(_mm512_sub_ps(top, highest)));
    _mm512_store_ps(w->total[r], _mm512_add_ps(total, _mm512_add_ps(weights0, weights1)));
    _mm512_store_si512(w->weights[r], (__m512i)_mm512_cvtne2ps_pbh(weights1, weights0));
}

/* Add the weighted values to rows [r, r + rows), `vectors` of 16 channels from channel d on. `next` as above, for values. */
INLINE TARGET_512 void mix_tile(
    struct tile_work *w, const struct tile_place *next, int64_t r, int64_t d, int64_t dim, int64_t pairs, const int rows,
    const int vectors
) {
    __m512i sum[4 * FEW_ROWS_512]; /* of floats */
    float *mixed = w->mixed + r * dim + d;
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++) sum[4 * i + v] = _mm512_load_si512(mixed + i * dim + 16 * v);
    for (int64_t p = 0; p < pairs; p++) {
        if (next != NULL) { /* as many lines as these channels of two tokens are */
            const char *ahead = (const char *)next->values[p / (RUN / 2)] + d * RUN * 2 + p % (RUN / 2) * vectors * 64;
            UNROLL for (int v = 0; v < vectors; v += 2) read_ahead(ahead + v * 64);
        }
        __m512i values[4];
        UNROLL for (int v = 0; v < vectors; v++) values[v] = _mm512_load_si512(w->values + p * dim + d + 16 * v);
        UNROLL for (int i = 0; i < rows; i++) {
            const __m512i weight = _mm512_set1_epi32(w->weights[r + i][p]);
            UNROLL for (int v = 0; v < vectors; v++) sum[4 * i + v] = add_products_bf16(sum[4 * i + v], values[v], weight);
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++) _mm512_store_si512(mixed + i * dim + 16 * v, sum[4 * i + v]);
}

#if defined(HAS_TILES)
/* Scores of all rows of a task with a tile of keys, by matrix instructions. */
INLINE TARGET_TILES void score_by_matrices(struct tile_work *w, int64_t rows, int64_t dim) {
    const struct tile_strides strides = {dim * 2, 64, TILE * 4};
    zero_sums();
    multiply_tiles(w->query, w->keys, strides, dim / 32, rows > TILE_ROWS, HALVES, NULL);
    store_sums(w->scores, TILE * 4, rows > TILE_ROWS);
}

/* Add the weighted values to all rows, likewise. */
INLINE TARGET_TILES void mix_by_matrices(struct tile_work *w, int64_t rows, int64_t dim) {
    const struct tile_strides strides = {TILE / 2 * 4, 0, dim * 4};
    for (int64_t d = 0; d < dim; d += 32) {
        load_sums(w->mixed + d, dim * 4, rows > TILE_ROWS);
        multiply_tiles(w->weights, w->values + d, strides, 1, rows > TILE_ROWS, HALVES, NULL);
        store_sums(w->mixed + d, dim * 4, rows > TILE_ROWS);
    }
}
#endif

/* Row r, divided by the sum of its weights -> bfloat16 [dim]. */
INLINE TARGET_512 void put_row(const struct tile_work *w, int64_t r, int64_t dim, uint16_t *to) {
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(w->total[r])));
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t d = 0; d < dim; d += 32) {
        const __m512 low = _mm512_mul_ps(_mm512_load_ps(w->mixed + r * dim + d), inverse);
        const __m512 top = _mm512_mul_ps(_mm512_load_ps(w->mixed + r * dim + d + 16), inverse);
        const __m512bh both = _mm512_cvtne2ps_pbh(
            _mm512_permutex2var_ps(low, second, top), _mm512_permutex2var_ps(low, first, top)
        );
        _mm512_storeu_si512(to + d, (__m512i)both);
    }
}

/* The tile of a KV head at position `at`; a run behind the last key of the sequence is its last one again. */
INLINE struct tile_place find_tile(
    const struct paged_call *c, const int64_t *table, int64_t kv_head, int64_t at, int64_t last
) {
    struct tile_place found;
    UNROLL for (int i = 0; i < 2; i++) {
        const int64_t run = at + i * RUN < last ? at + i * RUN : (last - 1) / RUN * RUN;
        const int64_t base = place(c, table, kv_head, run);
        found.keys[i] = (const uint16_t *)c->keys + base;
        found.values[i] = (const uint16_t *)c->values + base;
    }
    return found;
}

/* The first `count` keys and values of a tile, as w->keys and w->values want them. */
INLINE TARGET_512 void take_tile(const struct tile_place *from, int64_t dim, int64_t count, struct tile_work *w) {
    for (int64_t i = 0; i < 2; i++) {
        int32_t *keys = w->keys + i * RUN, *values = w->values + i * RUN / 2 * dim;
        if (i * RUN < count) {
            for (int64_t d = 0; d < dim; d += 32) turn_over(from->keys[i] + d, dim, keys + d / 2 * TILE);
            pair_up(from->values[i], dim, count - i * RUN, values);
        } else {
            for (int64_t p = 0; p < dim / 2; p++) _mm512_store_si512(keys + p * TILE, _mm512_setzero_si512());
            memset(values, 0, (size_t)(RUN / 2 * dim * 4));
        }
    }
}

/* Ask for all of a tile. */
INLINE void fetch_tile(const struct tile_place *at, int64_t dim) {
    for (int i = 0; i < 2; i++) {
        fetch(at->keys[i], 1, 0, RUN * dim);
        fetch(at->values[i], 1, 0, RUN * dim);
    }
}

/* The query heads of KV heads [kv_head, kv_head + kv_heads) of a task. In a block the keys of a KV head lie behind those of
   its neighbour: several of them in turn go over memory in its order. Their rows together are at most MAX_ROWS. */
static TARGET_TILES void attend_tiles(
    const struct paged_call *c, const int64_t *task, int64_t kv_head, int64_t kv_heads, struct tile_work *w
) {
    const int64_t dim = c->dim, group = c->heads / c->kv_heads;
    const int64_t row = task[0], tokens = task[1], seen = task[2], rows = tokens * group, last = seen + tokens - 1;
    const int64_t *table = c->tables + task[3] * c->table_width;
    const float scale = 1.0f / sqrtf((float)dim);

    for (int64_t r = 0; r < kv_heads * rows; r++) {
        const int64_t head = (kv_head + r / rows) * group + r % group;
        const int64_t at = (row + r % rows / group) * c->query_stride + head * dim;
        memcpy(w->query + r * dim / 2, (const uint16_t *)c->query + at, (size_t)dim * 2);
        memset(w->mixed + r * dim, 0, (size_t)dim * 4);
        memset(w->total[r], 0, sizeof w->total[r]);
        w->highest[r] = -1e30f; /* below any score, and finite: differences are numbers */
    }
#if defined(HAS_TILES)
    const int by_matrices = kv_heads == 1 && rows > 2 * FEW_ROWS_512 && lepton_has_tiles();
    if (by_matrices) take_tiles();
#endif
    const int64_t start = c->window && seen > c->window ? (seen - c->window) / TILE * TILE : 0;
    for (int64_t at = start; at < last; at += TILE)
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t count = last - at < TILE ? last - at : TILE, from = h * rows, to = from + rows;
            const struct tile_place here = find_tile(c, table, kv_head + h, at, last);
            const int64_t later = h + AHEAD;
            const struct tile_place ahead =
                find_tile(c, table, kv_head + later % kv_heads, at + later / kv_heads * TILE, last);
            take_tile(&here, dim, count, w);
            const int64_t pairs = count > RUN ? RUN : RUN / 2;
#if defined(HAS_TILES)
            if (by_matrices) {
                fetch_tile(&ahead, dim);
                score_by_matrices(w, rows, dim);
                for (int64_t i = 0; i < rows; i++) weigh_tile(c, w, i, dim, scale, seen + i / group - at);
                mix_by_matrices(w, rows, dim);
                continue;
            }
#endif
            for (int64_t r = from; r < to; r += FEW_ROWS_512) {
                const struct tile_place *next = r == from ? &ahead : NULL;
#define KERNEL(n) score_tile(w, next, r, dim, n)
                FOR_ROWS_UP_TO_4(to - r, KERNEL)
#undef KERNEL
                for (int64_t i = r; i < to && i < r + FEW_ROWS_512; i++)
                    weigh_tile(c, w, i, dim, scale, seen + (i - from) / group - at);
                int64_t d = 0;
                for (; d + 64 <= dim; d += 64) {
#define KERNEL(n) mix_tile(w, next, r, d, dim, pairs, n, 4)
                    FOR_ROWS_UP_TO_4(to - r, KERNEL)
#undef KERNEL
                }
                for (; d < dim; d += 32) {
#define KERNEL(n) mix_tile(w, next, r, d, dim, pairs, n, 2)
                    FOR_ROWS_UP_TO_4(to - r, KERNEL)
#undef KERNEL
                }
            }
        }
#if defined(HAS_TILES)
    if (by_matrices) put_tiles_away();
#endif
    for (int64_t r = 0; r < kv_heads * rows; r++) {
        const int64_t head = (kv_head + r / rows) * group + r % group;
        put_row(w, r, dim, (uint16_t *)c->output + ((row + r % rows / group) * c->heads + head) * dim);
    }
}

#endif
