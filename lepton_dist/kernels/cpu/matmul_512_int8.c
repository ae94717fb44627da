/* Matmul with int8 weights, one scale an output feature, for AVX-512 with VNNI.
 *
 * A panel is [in / 4][32][4] bytes, each a weight plus 128; an `in` that is no multiple of 4 ends with zeros (of 128).
 */
#include "vector.h"
#if defined(HAS_AVX512) && defined(__x86_64__)
#include "matmul_512.h"

INLINE struct bytes_layout layout_of(const struct matmul_call *c) {
    const int64_t padded = up_to(c->in, 4);
    const int is_for_tiles = c->rows > MOST_ROWS && fits_tiles(padded);
    return (struct bytes_layout){.padded = padded, .share = DEPTH, .excess = 128, .is_for_tiles = is_for_tiles};
}

static TARGET_512 void multiply_rows(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {
    const struct bytes_layout layout = layout_of(c);
    const float *scales = (const float *)c->scales + number * PANEL;
    const uint8_t *weights = (const uint8_t *)panel + k * PANEL;
#define KERNEL(n) multiply_depth(&layout, block, weights, k, scales, values, ahead, n)
    FOR_ROWS_UP_TO_12(count, KERNEL)
#undef KERNEL
}

static TARGET_512 void round_rows(const struct matmul_call *c, int64_t from, int64_t count, void *block) {
    const struct bytes_layout layout = layout_of(c);
    round_to_bytes(c, &layout, from, count, block);
}

#if defined(HAS_TILES)
static TARGET_TILES void multiply_rows_by_tiles(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {
    const struct bytes_layout layout = layout_of(c);
    const float *scales = (const float *)c->scales + number * PANEL;
    multiply_depth_by_tiles(&layout, block, (const uint8_t *)panel + k * PANEL, k, scales, values, ahead, count);
}
#endif

/* scales float32 [out]. 0, or 1 when there is no memory. */
int lepton_matmul_int8_512(const struct matmul_call *c) {
    const struct bytes_layout layout = layout_of(c);
    struct matmul_kind kind = {
        .rows = MOST_ROWS,
        .unit = 1,
        .group = 1,
        .row_bytes = byte_row_bytes(&layout),
        .panel_bytes = layout.padded * PANEL,
        .depth = DEPTH,
        .lay_out = round_rows,
        .multiply = multiply_rows,
    };
#if defined(HAS_TILES)
    if (layout.is_for_tiles) use_tiles(&kind, multiply_rows_by_tiles);
#endif
    return matmul(c, &kind);
}

/* The row that begins at index `at`, zeros when that is negative, to every 32nd quad of `to`; returns its scale. */
static TARGET_512 float pack_row(const void *weights, int64_t kind, int64_t at, int64_t in, uint8_t *to) {
    __m512i most = _mm512_setzero_si512();
    if (at >= 0)
        for (int64_t k = 0; k < in; k += 16) most = larger_magnitudes(load_16(weights, kind, at + k, in - k), most);
    const struct steps steps = steps_of(_mm512_reduce_max_epu32(most), 127.0f);
    const __m512 inverse = _mm512_set1_ps(steps.inverse);
    for (int64_t k = 0; k < in; k += 16) {
        const __m512 values = load_16(weights, kind, at >= 0 ? at + k : 0, at >= 0 ? in - k : 0);
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
        uint8_t bytes[16];
        _mm_storeu_si128((__m128i *)bytes, _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
        for (int64_t q = 0; q < 4 && k + 4 * q < in; q++) memcpy(to + (k / 4 + q) * 4 * PANEL, bytes + 4 * q, 4);
    }
    return steps.size;
}

/* To panels of `in`, rounded up to 4, times 32 bytes, and scales: round to nearest, the largest of each row to 127. */
static void pack_panels(void *work, int64_t begin, int64_t end) {
    const struct packing *w = work;
    const struct panels *to = w->to;
    const void *rows = w->rows;
    const int64_t kind = w->kind, first = w->first, count = w->count;
    const int64_t in = to->in;
    for (int64_t p = begin; p < end; p++)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t row = p * PANEL + i;
            uint8_t *panel = (uint8_t *)to->bytes + (first + p * PANEL) * up_to(in, 4);
            to->scales[first + row] = pack_row(rows, kind, row < count ? row * in : -1, in, panel + i * 4);
        }
}

void lepton_pack_int8_512(
    const struct panels *to, const void *rows, int64_t kind, int64_t first, int64_t count, int64_t threads
) {
    struct packing work = {to, rows, kind, first, count};
    lepton_share(threads, num_panels(count), LONG_RUNS, pack_panels, &work);
}
#endif
