/* Matmul with int8 weights, one scale an output feature.
 *
 * Sums run over the whole of a row: 1023 * 127 * in stays below 2^31 for `in` up to 16,500, and x gets fewer steps beyond
 * that. A panel is [in / 2][16][2] bytes; an odd `in` ends with zeros.
 */
#if defined(__x86_64__)
#include "words.h"

/* The largest rounded |x|: what a sum over `in` products with 127 can hold, and no more than 11 bits. */
INLINE float largest(int64_t in) {
    const int64_t fits = (INT32_MAX / 127) / in;
    return fits < 1023 ? (float)fits : WORD_LIMIT;
}

static TARGET void multiply_rows(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {
    (void)ahead;
    const int64_t pairs = (c->in + 1) / 2;
    (void)k;
    const float *row_scales = word_scales(block, c->in, count), *scales = (const float *)c->scales + number * PANEL;
    int32_t sums[WORD_ROWS * PANEL] __attribute__((aligned(64)));
#define KERNEL(n) multiply_words(block, panel, pairs, sums, n, n == 1 ? 6 : n == 2 ? 3 : n == 3 ? 2 : 1, 0)
    FOR_ROWS_UP_TO_6(count, KERNEL)
#undef KERNEL
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < PANEL; i++)
            values[r * PANEL + i] = (float)sums[r * PANEL + i] * row_scales[r] * scales[i];
}

static TARGET void round_rows(const struct matmul_call *c, int64_t from, int64_t count, void *block) {
    round_to_words(c, from, count, block, largest(c->in));
}

/* scales float32 [out]. 0, or 1 when there is no memory. */
int lepton_matmul_int8(const struct matmul_call *c) {
    const int64_t padded = c->in + c->in % 2;
    return matmul(
        c,
        &(struct matmul_kind){
            .rows = WORD_ROWS,
            .row_bytes = word_row_bytes(c->in),
            .panel_bytes = padded * PANEL,
            .depth = c->in,
            .lay_out = round_rows,
            .multiply = multiply_rows,
        }
    );
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
