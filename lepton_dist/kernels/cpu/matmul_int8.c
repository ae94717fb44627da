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
            .unit = 1,
            .group = 1,
            .row_bytes = word_row_bytes(c->in),
            .panel_bytes = padded * PANEL,
            .depth = c->in,
            .lay_out = round_rows,
            .multiply = multiply_rows,
        }
    );
}

/* 32 values times a factor, rounded to bytes. */
INLINE TARGET __m256i round_to_32_bytes(const void *weights, int64_t kind, int64_t at, float factor) {
    float values[32];
    int32_t whole[32];
    widen(weights, kind, at, 32, values);
    round_all(values, factor, 32, whole);
    const __m256i *four = (const __m256i *)whole;
    const __m256i low = _mm256_packs_epi32(_mm256_loadu_si256(four), _mm256_loadu_si256(four + 1));
    const __m256i high = _mm256_packs_epi32(_mm256_loadu_si256(four + 2), _mm256_loadu_si256(four + 3));
    /* Packing goes by halves of a vector: words 0 and 4 are neighbours in the end. */
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* 32 k of all rows of a panel: words of four bytes are turned over, eight rows at a time, then halved. */
INLINE TARGET void pack_32(const void *weights, int64_t kind, int64_t at, int64_t in, const float *factors, int8_t *to) {
    const __m256i low_half = _mm256_set1_epi32(0xffff);
    __m256i words[PANEL];
    for (int64_t i = 0; i < PANEL; i++) words[i] = round_to_32_bytes(weights, kind, at + i * in, factors[i]);
    turn_square(words);
    turn_square(words + 8);
    UNROLL for (int j = 0; j < 8; j++) {
        const __m256i a = words[j], b = words[8 + j];
        const __m256i first = _mm256_packus_epi32(_mm256_and_si256(a, low_half), _mm256_and_si256(b, low_half));
        const __m256i second = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
        _mm256_storeu_si256((__m256i *)to + 2 * j, _mm256_permute4x64_epi64(first, 0xd8));
        _mm256_storeu_si256((__m256i *)to + 2 * j + 1, _mm256_permute4x64_epi64(second, 0xd8));
    }
}

/* Up to 16 rows from index `at` on, those that are not there zeros; and the scale of each. */
static TARGET void pack_panel(
    const void *weights, int64_t kind, int64_t at, int64_t rows, int64_t in, int8_t *panel, float *scales
) {
    float factors[PANEL];
    for (int64_t i = 0; i < PANEL; i++) {
        const struct steps steps = steps_of(i < rows ? highest_of_row(weights, kind, at + i * in, in) : 0, 127.0f);
        factors[i] = steps.inverse;
        scales[i] = steps.size;
    }
    int64_t k = 0;
    if (rows >= PANEL)
        for (; k + 32 <= in; k += 32) pack_32(weights, kind, at + k, in, factors, panel + k * PANEL);
    for (; k < in; k += 2)
        for (int64_t i = 0; i < PANEL; i++) {
            float values[8] = {0};
            int32_t whole[8];
            if (i < rows) widen(weights, kind, at + i * in + k, in - k < 2 ? 1 : 2, values);
            round_all(values, factors[i], 8, whole);
            const int8_t pair[2] = {(int8_t)whole[0], (int8_t)whole[1]};
            memcpy(panel + k * PANEL + i * 2, pair, 2);
        }
}

/* To panels of (in + in % 2) * 16 bytes, and scales: round to nearest, the largest of each row to 127. */
static void pack_panels(void *work, int64_t begin, int64_t end) {
    const struct packing *w = work;
    const struct panels *to = w->to;
    const void *rows = w->rows;
    const int64_t kind = w->kind, first = w->first, count = w->count;
    const int64_t in = to->in, padded = in + in % 2;
    for (int64_t p = begin; p < end; p++) {
        const int64_t row = p * PANEL, feature = first + row;
        pack_panel(rows, kind, row * in, count - row, in, (int8_t *)to->bytes + feature * padded, to->scales + feature);
    }
}

void lepton_pack_int8(
    const struct panels *to, const void *rows, int64_t kind, int64_t first, int64_t count, int64_t threads
) {
    struct packing work = {to, rows, kind, first, count};
    lepton_share(threads, num_panels(count), LONG_RUNS, pack_panels, &work);
}
#endif
