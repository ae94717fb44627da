/* What the matmul kernels for AVX-512 share: panels of 32 output features, and activations rounded to bytes.
 *
 * Rows of x are rounded to 8 bits, with a scale for each DEPTH of their values, and multiplied with bytes four neighbouring
 * k at a time (vpdpbusd: unsigned weights, signed x). A sum depends on its own row and feature only, whatever the number
 * of rows: all of them are added up in the same order.
 */
#ifndef LEPTON_MATMUL_512_H
#define LEPTON_MATMUL_512_H

#define PANEL 32
#define PANEL_TARGET TARGET_512
#define NARROW narrow_512
#include "vector_512.h"

#include "matmul.h"
#include "tiles.h"

#define DEPTH 512 /* k of x that share a scale; 512 x 32 bytes of weights stay in the first cache */

/* How a block of rounded rows lies: bytes [padded in / 4][count][4], scales [depths][count], and sums of the rounded values
   times `excess` [depths * DEPTH / share][count]: what the products with unsigned weights are too large by. For tiles the
   bytes are [padded in / 64][count][64], and `count` is a multiple of 16. */
struct bytes_layout {
    int64_t padded, share;
    int32_t excess;
    int is_for_tiles;
};

/* Whether matrix instructions can take rows of so many bytes: whole tiles. */
INLINE int fits_tiles(int64_t bytes) { return bytes % (TILE_WORDS * 4) == 0 && lepton_has_tiles(); }

INLINE int64_t num_depths(const struct bytes_layout *l) { return (l->padded + DEPTH - 1) / DEPTH; }
INLINE int64_t byte_row_bytes(const struct bytes_layout *l) {
    return l->padded + num_depths(l) * 4 + num_depths(l) * (DEPTH / l->share) * 4;
}
INLINE const float *byte_scales(const struct bytes_layout *l, const void *block, int64_t count) {
    return (const float *)((const char *)block + l->padded * count);
}
INLINE const int32_t *byte_excess(const struct bytes_layout *l, const void *block, int64_t count) {
    return (const int32_t *)(byte_scales(l, block, count) + num_depths(l) * count);
}

/* Rows [from, from + count) of x, the largest of each DEPTH rounded to 127. */
INLINE TARGET_512 void round_to_bytes(
    const struct matmul_call *c, const struct bytes_layout *l, int64_t from, int64_t count, void *block
) {
    const int64_t rows = l->is_for_tiles ? up_to(count, TILE_ROWS) : count;
    float *scales = (float *)byte_scales(l, block, rows);
    int32_t *excess = (int32_t *)byte_excess(l, block, rows);
    for (int64_t r = 0; r < count; r++)
        for (int64_t k0 = 0; k0 < l->padded; k0 += DEPTH) {
            const int64_t at = (from + r) * c->x_stride + k0, left = c->in - k0;
            const int64_t depth = l->padded - k0 < DEPTH ? l->padded - k0 : DEPTH, number = k0 / DEPTH;
            __m512 values[DEPTH / 16];
            __m512i most = _mm512_setzero_si512();
            for (int64_t k = 0; k < depth; k += 16) {
                values[k / 16] = load_16(c->x, c->x_kind, at + k, left - k);
                most = larger_magnitudes(values[k / 16], most);
            }
            const struct steps steps = steps_of(_mm512_reduce_max_epu32(most), 127.0f);
            const __m512 inverse = _mm512_set1_ps(steps.inverse);
            scales[number * rows + r] = steps.size;
            for (int64_t k1 = 0; k1 < depth; k1 += l->share) {
                __m512i sum = _mm512_setzero_si512();
                for (int64_t k = k1; k < k1 + l->share && k < depth; k += 16) {
                    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(values[k / 16], inverse));
                    int32_t quads[4];
                    sum = _mm512_add_epi32(sum, whole);
                    _mm_storeu_si128((__m128i *)quads, _mm512_cvtepi32_epi8(whole));
                    for (int64_t q = 0; q < 4 && k + 4 * q < depth; q++) {
                        const int64_t quad = (k0 + k) / 4 + q;
                        ((int32_t *)block)[l->is_for_tiles ? tile_place(quad, r, rows) : quad * rows + r] = quads[q];
                    }
                }
                /* Without a sign: what is no number becomes the lowest whole one, whose products go round. */
                const uint32_t product = (uint32_t)_mm512_reduce_add_epi32(sum) * (uint32_t)l->excess;
                excess[(number * (DEPTH / l->share) + k1 / l->share) * rows + r] = (int32_t)product;
            }
        }
}

/* Sums of 16 features times the scales of their row and of their own: added to `values`, or put there when they are the first. */
INLINE TARGET_512 void put_scaled(__m512i sum, float row_scale, const float *scales, int is_first, float *values) {
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row_scale), _mm512_loadu_ps(scales));
    const __m512 before = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(values);
    _mm512_storeu_ps(values, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, before));
}

/* DEPTH of x, rounded to bytes, times that of bytes of weights with a scale a feature [32]: added to values [count][32], or
   put there when it is the first. */
INLINE TARGET_512 void multiply_depth(
    const struct bytes_layout *l, const void *block, const void *weights, int64_t k, const float *scales, float *values,
    const char *ahead, int rows
) {
    const int64_t depth = l->padded - k < DEPTH ? l->padded - k : DEPTH, number = k / DEPTH;
    const int32_t *x = (const int32_t *)block + k / 4 * rows, *excess = byte_excess(l, block, rows) + number * rows;
    const float *row_scales = byte_scales(l, block, rows) + number * rows;
    __m512i sum[2 * MOST_ROWS];
    UNROLL for (int i = 0; i < 2 * rows; i++) sum[i] = _mm512_set1_epi32(-excess[i / 2]);
    multiply_rows_of_words(x, rows, 1, weights, depth / 4, rows, BYTES, ahead, sum);
    UNROLL for (int i = 0; i < 2 * rows; i++) put_scaled(sum[i], row_scales[i / 2], scales + i % 2 * 16, k == 0, values + i * 16);
}

#if defined(HAS_TILES)
/* Have blocks of whole tiles, for `multiply`. Of 512 rows half a megabyte of x, and another one of sums for each of two threads
   on a core, stay in a cache of two. */
INLINE void use_tiles(struct matmul_kind *kind, multiply_function *multiply) {
    kind->rows = MOST_TILE_ROWS;
    kind->unit = TILE_ROWS;
    kind->group = 8;
    kind->can_skip = 1;
    kind->enter = take_tiles;
    kind->leave = put_tiles_away;
    kind->multiply = multiply;
}

/* As `multiply_depth`, with the same results, for up to 32 rows. */
INLINE TARGET_TILES void multiply_depth_by_tiles(
    const struct bytes_layout *l, const void *block, const void *weights, int64_t k, const float *scales, float *values,
    const char *ahead, int64_t count
) {
    const int64_t depth = l->padded - k < DEPTH ? l->padded - k : DEPTH, number = k / DEPTH;
    const int64_t rows = up_to(count, TILE_ROWS);
    const char *x = (const char *)block + k * rows;
    const int32_t *excess = byte_excess(l, block, rows) + number * rows;
    const float *row_scales = byte_scales(l, block, rows) + number * rows;
    int32_t sums[MOST_TILE_ROWS * PANEL] __attribute__((aligned(64)));
    zero_sums();
    multiply_block(x, weights, depth / 64, count > TILE_ROWS, BYTES, ahead);
    store_sums(sums, PANEL_STRIDE, count > TILE_ROWS);
    for (int64_t i = 0; i < 2 * count; i++) {
        const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + i * 16), _mm512_set1_epi32(excess[i / 2]));
        put_scaled(sum, row_scales[i / 2], scales + i % 2 * 16, k == 0, values + i * 16);
    }
}
#endif

#endif
