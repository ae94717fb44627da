/* Products of 16-bit words, which int8 weights and wide batches of int4 weights share.
 *
 * Two neighbouring k are multiplied and added in one instruction (vpmaddwd), whose sums of 32 bits are exact as long as
 * they fit. Activations are rounded to at most 11 bits a row: next to nothing beside the rounding of the weights.
 */
#ifndef LEPTON_WORDS_H
#define LEPTON_WORDS_H

#include "matmul.h"

#define WORD_ROWS 6
#define WORD_LIMIT 1023.0f /* the largest rounded |x| */

/* Two vectors of pairs of weights, for 8 output features each, from a panel of bytes or of words [pairs][16][2]. */
INLINE TARGET void load_pairs(const void *panel, int64_t pair, int is_wide, __m256i *low, __m256i *top) {
    if (is_wide) {
        const __m256i *at = (const __m256i *)((const int16_t *)panel + pair * 2 * PANEL);
        *low = _mm256_load_si256(at);
        *top = _mm256_load_si256(at + 1);
    } else {
        const __m128i *at = (const __m128i *)((const int8_t *)panel + pair * 2 * PANEL);
        *low = _mm256_cvtepi8_epi16(_mm_loadu_si128(at));
        *top = _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1));
    }
}

/* Add the products of one pair of k of x [rows][2] to sums [rows][2 vectors]. */
INLINE TARGET void add_pair(const int16_t *x, const void *panel, int64_t pair, int rows, int is_wide, __m256i *sum) {
    __m256i low, top;
    load_pairs(panel, pair, is_wide, &low, &top);
    UNROLL for (int r = 0; r < rows; r++) {
        int32_t word;
        memcpy(&word, x + (pair * rows + r) * 2, 4);
        const __m256i factor = _mm256_set1_epi32(word);
        sum[r * 2] = _mm256_add_epi32(sum[r * 2], _mm256_madd_epi16(factor, low));
        sum[r * 2 + 1] = _mm256_add_epi32(sum[r * 2 + 1], _mm256_madd_epi16(factor, top));
    }
}

/* x [pairs][rows][2] times a panel -> sums [rows][16]. Few rows take several pairs at once, each with sums of its own:
   one chain of additions would wait for itself. */
INLINE TARGET void multiply_words(
    const int16_t *x, const void *panel, int64_t pairs, int32_t *sums, int rows, int steps, int is_wide
) {
    __m256i sum[12];
    UNROLL for (int i = 0; i < rows * steps * 2; i++) sum[i] = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + steps <= pairs; k += steps)
        UNROLL for (int s = 0; s < steps; s++) add_pair(x, panel, k + s, rows, is_wide, sum + s * rows * 2);
    for (; k < pairs; k++) add_pair(x, panel, k, rows, is_wide, sum);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int half = 0; half < 2; half++) {
            __m256i total = sum[r * 2 + half];
            UNROLL for (int s = 1; s < steps; s++) total = _mm256_add_epi32(total, sum[(s * rows + r) * 2 + half]);
            _mm256_storeu_si256((__m256i *)(sums + r * PANEL + half * 8), total);
        }
}

/* Bytes of a row of x as words: its values, an odd count filled up, and its scale. */
INLINE int64_t word_row_bytes(int64_t in) { return (in + in % 2) * 2 + 4; }

/* The scales of the rows of a block of x, behind its values. */
INLINE float *word_scales(const void *block, int64_t in, int64_t count) {
    return (float *)block + (in + 1) / 2 * count;
}

/* The largest magnitude of the row that begins at index `at`. */
INLINE TARGET uint32_t highest_of_row(const void *from, int64_t kind, int64_t at, int64_t in) {
    float values[256];
    uint32_t highest = 0;
    for (int64_t k = 0; k < in; k += 256) {
        const int64_t length = in - k < 256 ? in - k : 256;
        widen(from, kind, at + k, length, values);
        highest = larger_magnitude(largest_magnitude(values, length), highest);
    }
    return highest;
}

/* Rows [from, from + count) of x, the largest of each rounded to `limit` -> [pairs][count][2] words, then their scales. */
INLINE TARGET void round_to_words(const struct matmul_call *c, int64_t from, int64_t count, void *block, float limit) {
    float *row_scales = word_scales(block, c->in, count), values[256];
    int32_t rounded[256];
    for (int64_t r = 0; r < count; r++) {
        const int64_t at = (from + r) * c->x_stride;
        const struct steps steps = steps_of(highest_of_row(c->x, c->x_kind, at, c->in), limit);
        row_scales[r] = steps.size;
        for (int64_t k0 = 0; k0 < c->in; k0 += 256) {
            const int64_t length = c->in - k0 < 256 ? c->in - k0 : 256;
            widen(c->x, c->x_kind, at + k0, length, values);
            memset(values + length, 0, (size_t)(256 - length) * 4);
            round_all(values, steps.inverse, 256, rounded);
            for (int64_t k = 0; k < length; k += 2) {
                const int32_t pair = (rounded[k] & 0xffff) | (int32_t)((uint32_t)rounded[k + 1] << 16);
                memcpy((int32_t *)block + (k0 + k) / 2 * count + r, &pair, 4);
            }
        }
    }
}

#endif
