/* Matmul with int8 weights, one scale an output feature, and activations rounded to 11 bits a row.
 *
 * Two neighbouring k are multiplied and added in one instruction on 16-bit words (vpmaddwd), whose sums of 32 bits are
 * exact: 1023 * 127 * in stays below 2^31 for `in` up to 16,500, and x gets fewer steps beyond that. Rounding x to 11
 * bits costs next to nothing beside the rounding of the weights. A panel is [in / 2][16][2] bytes; an odd `in` ends
 * with zeros.
 */
#if defined(__x86_64__)
#include "matmul.h"

#define ROWS 6

/* The largest rounded |x|: what a sum over `in` products with 127 can hold, and no more than 11 bits. */
INLINE float largest(int64_t in) {
    const int64_t fits = (INT32_MAX / 127) / in;
    return fits < 1023 ? (float)fits : 1023.0f;
}

INLINE TARGET void multiply(const int16_t *x, const int8_t *panel, int64_t pairs, int32_t *sums, int rows, int steps) {
    __m256i sum[12];
    UNROLL for (int i = 0; i < rows * steps * 2; i++) sum[i] = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + steps <= pairs; k += steps) {
        UNROLL for (int s = 0; s < steps; s++) {
            const int8_t *at = panel + (k + s) * 2 * PANEL;
            const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at));
            const __m256i top = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(at + PANEL)));
            UNROLL for (int r = 0; r < rows; r++) {
                int32_t word;
                memcpy(&word, x + ((k + s) * rows + r) * 2, 4);
                const __m256i factor = _mm256_set1_epi32(word);
                const int at_sum = (s * rows + r) * 2;
                sum[at_sum] = _mm256_add_epi32(sum[at_sum], _mm256_madd_epi16(factor, low));
                sum[at_sum + 1] = _mm256_add_epi32(sum[at_sum + 1], _mm256_madd_epi16(factor, top));
            }
        }
    }
    for (; k < pairs; k++) {
        const int8_t *at = panel + k * 2 * PANEL;
        const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at));
        const __m256i top = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(at + PANEL)));
        UNROLL for (int r = 0; r < rows; r++) {
            int32_t word;
            memcpy(&word, x + (k * rows + r) * 2, 4);
            const __m256i factor = _mm256_set1_epi32(word);
            sum[r * 2] = _mm256_add_epi32(sum[r * 2], _mm256_madd_epi16(factor, low));
            sum[r * 2 + 1] = _mm256_add_epi32(sum[r * 2 + 1], _mm256_madd_epi16(factor, top));
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int half = 0; half < 2; half++) {
            __m256i total = sum[r * 2 + half];
            UNROLL for (int s = 1; s < steps; s++) total = _mm256_add_epi32(total, sum[(s * rows + r) * 2 + half]);
            _mm256_storeu_si256((__m256i *)(sums + r * PANEL + half * 8), total);
        }
}

/* A block: [pairs][count][2] rounded values of x, then the scales of its rows. */
static TARGET void multiply_rows(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, float *values
) {
    const int64_t pairs = (c->in + 1) / 2;
    const float *row_scales = (const float *)block + pairs * count, *scales = (const float *)c->scales + number * PANEL;
    int32_t sums[ROWS * PANEL] __attribute__((aligned(64)));
#define KERNEL(n) multiply(block, panel, pairs, sums, n, n == 1 ? 6 : n == 2 ? 3 : n == 3 ? 2 : 1)
    FOR_ROWS_UP_TO_6(count, KERNEL)
#undef KERNEL
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < PANEL; i++)
            values[r * PANEL + i] = (float)sums[r * PANEL + i] * row_scales[r] * scales[i];
}

static TARGET void round_rows(const struct matmul_call *c, int64_t from, int64_t count, void *block) {
    const int64_t pairs = (c->in + 1) / 2;
    const float limit = largest(c->in);
    float *row_scales = (float *)block + pairs * count, values[256];
    int32_t rounded[256];
    for (int64_t r = 0; r < count; r++) {
        const int64_t at = (from + r) * c->x_stride;
        float highest = 0;
        for (int64_t k0 = 0; k0 < c->in; k0 += 256) {
            const int64_t length = c->in - k0 < 256 ? c->in - k0 : 256;
            widen(c->x, c->x_kind, at + k0, length, values);
            highest = larger(largest_magnitude(values, length), highest);
        }
        const float inverse = highest > 0 ? limit / highest : 0;
        row_scales[r] = highest / limit;
        for (int64_t k0 = 0; k0 < c->in; k0 += 256) {
            const int64_t length = c->in - k0 < 256 ? c->in - k0 : 256;
            widen(c->x, c->x_kind, at + k0, length, values);
            memset(values + length, 0, (size_t)(256 - length) * 4);
            round_all(values, inverse, 256, rounded);
            for (int64_t k = 0; k < length; k += 2) {
                const int32_t pair = (rounded[k] & 0xffff) | (int32_t)((uint32_t)rounded[k + 1] << 16);
                memcpy((int32_t *)block + (k0 + k) / 2 * count + r, &pair, 4);
            }
        }
    }
}

/* scales float32 [out]. 0, or 1 when there is no memory. */
int lepton_matmul_int8(const struct matmul_call *c) {
    const int64_t padded = c->in + c->in % 2;
    return matmul(c, &(struct matmul_kind){ROWS, padded * 2 + 4, padded * PANEL, round_rows, multiply_rows});
}

/* The row that begins at index `at`, zeros when that is negative, to every 16th pair of `to`; returns its scale. */
static TARGET float pack_row(const void *weights, int64_t kind, int64_t at, int64_t in, int8_t *to) {
    float values[256], highest = 0;
    if (at >= 0)
        for (int64_t k0 = 0; k0 < in; k0 += 256) {
            const int64_t length = in - k0 < 256 ? in - k0 : 256;
            widen(weights, kind, at + k0, length, values);
            highest = larger(largest_magnitude(values, length), highest);
        }
    const float inverse = highest > 0 ? 127.0f / highest : 0;
    for (int64_t k0 = 0; k0 < in; k0 += 256) {
        const int64_t length = in - k0 < 256 ? in - k0 : 256;
        int32_t whole[256];
        int8_t rounded[256];
        memset(values, 0, sizeof values);
        if (at >= 0) widen(weights, kind, at + k0, length, values);
        round_all(values, inverse, 256, whole);
        for (int64_t k = 0; k < 256; k++) rounded[k] = (int8_t)whole[k];
        for (int64_t k = 0; k < length; k += 2) memcpy(to + (k0 + k) * PANEL, rounded + k, 2);
    }
    return highest / 127.0f;
}

/* weights [out, in] of the kind (0 float32, 1 bfloat16) -> panels of num_panels(out) * (in + in % 2) * 16 bytes, and
   scales float32 [num_panels(out) * 16]: round to nearest, the largest of each row to 127. */
void lepton_pack_int8(
    const void *weights, int64_t kind, int64_t out, int64_t in, int8_t *panels, float *scales, int64_t threads
) {
    const int64_t padded = in + in % 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < num_panels(out); p++)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t row = p * PANEL + i;
            scales[row] = pack_row(weights, kind, row < out ? row * in : -1, in, panels + p * padded * PANEL + i * 2);
        }
}
#endif
