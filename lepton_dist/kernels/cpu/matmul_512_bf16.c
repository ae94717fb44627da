/* Matmul with bfloat16 weights and activations for AVX-512 with BF16: two neighbouring k an instruction (vdpbf16ps), summed
 * in float32. Where there are matrix instructions, whole tiles are multiplied by those: one row too, for that is no slower,
 * and so a sum depends on its own row and feature only.
 *
 * A panel is [in / 2][32][2] halves; an odd `in` ends with zeros.
 */
#include "vector.h"
#if defined(HAS_AVX512) && defined(__x86_64__)
#include "matmul_512.h"

#define PAIR_DEPTH 1024 /* k at a time: the sums of a block stay in registers meanwhile */

/* x [pairs][rows][2] times a panel [pairs][32][2], added to values [rows][32], or put there when it is the first. */
INLINE TARGET_512 void multiply(
    const int32_t *x, const uint16_t *panel, int64_t pairs, int is_first, int rows, float *values, const char *ahead
) {
    __m512i sum[2 * MOST_ROWS];
    UNROLL for (int i = 0; i < 2 * rows; i++)
        sum[i] = is_first ? _mm512_setzero_si512() : (__m512i)_mm512_loadu_ps(values + i * 16);
    multiply_rows_of_words(x, rows, 1, panel, pairs, rows, HALVES, ahead, sum);
    UNROLL for (int i = 0; i < 2 * rows; i++) _mm512_storeu_ps(values + i * 16, (__m512)sum[i]);
}

static TARGET_512 void multiply_rows(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {
    const int64_t left = (c->in - k + 1) / 2, pairs = left < PAIR_DEPTH / 2 ? left : PAIR_DEPTH / 2;
    const int32_t *x = (const int32_t *)block + k / 2 * count;
    const uint16_t *weights = (const uint16_t *)panel + k * PANEL;
    (void)number;
#define KERNEL(n) multiply(x, weights, pairs, k == 0, n, values, ahead)
    FOR_ROWS_UP_TO_12(count, KERNEL)
#undef KERNEL
}

/* Rows [from, from + count) of x, rounded to bfloat16 -> [pairs][count][2]. */
static TARGET_512 void lay_out(const struct matmul_call *c, int64_t from, int64_t count, void *block) {
    for (int64_t r = 0; r < count; r++)
        for (int64_t k = 0; k < c->in; k += 16) {
            const __m512 values = load_16(c->x, c->x_kind, (from + r) * c->x_stride + k, c->in - k);
            int32_t pairs[8];
            _mm256_storeu_si256((__m256i *)pairs, (__m256i)_mm512_cvtneps_pbh(values));
            for (int64_t p = 0; p < 8 && k + 2 * p < c->in; p++) ((int32_t *)block)[(k / 2 + p) * count + r] = pairs[p];
        }
}

#if defined(HAS_TILES)
/* Likewise -> [in / 32][count, or more][32], for tiles. `in` is a multiple of 32. */
static TARGET_512 void lay_out_tiles(const struct matmul_call *c, int64_t from, int64_t count, void *block) {
    const int64_t rows = up_to(count, TILE_ROWS);
    for (int64_t r = 0; r < count; r++)
        for (int64_t k = 0; k < c->in; k += 32) {
            const int64_t at = (from + r) * c->x_stride + k;
            int32_t *to = (int32_t *)block + tile_place(k / 2, r, rows);
            if (c->x_kind) memcpy(to, (const uint16_t *)c->x + at, 64);
            else {
                const __m512 low = load_16(c->x, 0, at, 16), top = load_16(c->x, 0, at + 16, 16);
                _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(top, low));
            }
        }
}

static TARGET_TILES void multiply_rows_by_tiles(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {
    const int64_t left = c->in - k, steps = (left < DEPTH ? left : DEPTH) / 32;
    const int is_wide = count > TILE_ROWS;
    const char *x = (const char *)block + k * (is_wide ? MOST_TILE_ROWS : TILE_ROWS) * 2;
    const char *weights = (const char *)panel + k * PANEL * 2;
    (void)number;
    if (k == 0) zero_sums();
    else load_sums(values, PANEL_STRIDE, is_wide);
    multiply_block(x, weights, steps, is_wide, HALVES, ahead);
    store_sums(values, PANEL_STRIDE, is_wide);
}
#endif

/* 0, or 1 when there is no memory. */
int lepton_matmul_bf16_512(const struct matmul_call *c) {
    struct matmul_kind kind = {
        .rows = MOST_ROWS,
        .unit = 1,
        .group = 1,
        .row_bytes = up_to(c->in, 2) * 2,
        .panel_bytes = up_to(c->in, 2) * PANEL * 2,
        .depth = PAIR_DEPTH,
        .lay_out = lay_out,
        .multiply = multiply_rows,
    };
#if defined(HAS_TILES)
    if (fits_tiles(c->in * 2)) {
        use_tiles(&kind, multiply_rows_by_tiles);
        kind.depth = DEPTH;
        kind.lay_out = lay_out_tiles;
    }
#endif
    return matmul(c, &kind);
}

/* Eight pairs of k, from pair `k` on, of all rows of a panel, eight rows at a time. AVX2 is enough: it waits for memory. */
static TARGET void pack_pairs(const uint16_t *weights, int64_t in, int64_t k, uint32_t *to) {
    for (int64_t i = 0; i < PANEL; i += 8) {
        __m256i words[8];
        UNROLL for (int j = 0; j < 8; j++) words[j] = _mm256_loadu_si256((const __m256i *)(weights + (i + j) * in + 2 * k));
        turn_square(words);
        UNROLL for (int j = 0; j < 8; j++) _mm256_storeu_si256((__m256i *)(to + (k + j) * PANEL + i), words[j]);
    }
}

/* To panels of ceil(in / 2) * 32 words of 32 bits. */
static void pack_panels(void *work, int64_t begin, int64_t end) {
    const struct packing *w = work;
    const struct panels *to = w->to;
    const void *rows = w->rows;
    const int64_t kind = w->kind, first = w->first, count = w->count;
    const int64_t in = to->in, pairs = up_to(in, 2) / 2;
    const uint16_t *weights = rows;
    (void)kind;
    for (int64_t p = begin; p < end; p++) {
        uint32_t *panel = (uint32_t *)to->bytes + (first + p * PANEL) * pairs;
        int64_t k = 0;
        if ((p + 1) * PANEL <= count)
            for (; 2 * k + 16 <= in; k += 8) pack_pairs(weights + p * PANEL * in, in, k, panel);
        for (; k < pairs; k++)
            for (int64_t i = 0; i < PANEL; i++) {
                const int64_t row = p * PANEL + i;
                uint32_t pair = 0;
                if (row < count) memcpy(&pair, weights + row * in + 2 * k, 2 * k + 1 < in ? 4 : 2);
                panel[k * PANEL + i] = pair;
            }
    }
}

void lepton_pack_bf16_512(
    const struct panels *to, const void *rows, int64_t kind, int64_t first, int64_t count, int64_t threads
) {
    struct packing work = {to, rows, kind, first, count};
    lepton_share(threads, num_panels(count), LONG_RUNS, pack_panels, &work);
}
#endif
