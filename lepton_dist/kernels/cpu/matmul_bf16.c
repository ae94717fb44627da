/* Matmul with bfloat16 weights, in float32: every weight is widened on its way to the multiplication.
 *
 * A panel is [in][8] words of two weights: the low half belongs to output feature i, the high half to feature i + 8, so
 * that one load and two instructions give two vectors of floats.
 */
#if defined(__x86_64__)
#include "matmul.h"

#define ROWS 6 /* 6 x 2 sums, two weights and a factor: all 16 registers but one */

/* x [depth][rows] times a panel -> sums [rows][16]. Few rows take several steps of k at once, each with sums of its
   own: one chain of additions would wait for itself. */
INLINE TARGET void multiply(const float *x, const uint16_t *panel, int64_t depth, float *sums, int rows, int steps) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    __m256 sum[12];
    UNROLL for (int i = 0; i < rows * steps * 2; i++) sum[i] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + steps <= depth; k += steps) {
        UNROLL for (int s = 0; s < steps; s++) {
            const __m256i pair = _mm256_loadu_si256((const __m256i *)(panel + (k + s) * PANEL));
            const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
            const __m256 top = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
            UNROLL for (int r = 0; r < rows; r++) {
                const __m256 factor = _mm256_broadcast_ss(x + (k + s) * rows + r);
                sum[(s * rows + r) * 2] = _mm256_fmadd_ps(factor, low, sum[(s * rows + r) * 2]);
                sum[(s * rows + r) * 2 + 1] = _mm256_fmadd_ps(factor, top, sum[(s * rows + r) * 2 + 1]);
            }
        }
    }
    for (; k < depth; k++) {
        const __m256i pair = _mm256_loadu_si256((const __m256i *)(panel + k * PANEL));
        const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
        const __m256 top = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
        UNROLL for (int r = 0; r < rows; r++) {
            const __m256 factor = _mm256_broadcast_ss(x + k * rows + r);
            sum[r * 2] = _mm256_fmadd_ps(factor, low, sum[r * 2]);
            sum[r * 2 + 1] = _mm256_fmadd_ps(factor, top, sum[r * 2 + 1]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int half = 0; half < 2; half++) {
            __m256 total = sum[r * 2 + half];
            UNROLL for (int s = 1; s < steps; s++) total = _mm256_add_ps(total, sum[(s * rows + r) * 2 + half]);
            _mm256_storeu_ps(sums + r * PANEL + half * 8, total);
        }
}

static TARGET void multiply_rows(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {
    (void)ahead;
    (void)number, (void)k;
#define KERNEL(n) multiply(block, panel, c->in, values, n, n == 1 ? 6 : n == 2 ? 3 : n == 3 ? 2 : 1)
    FOR_ROWS_UP_TO_6(count, KERNEL)
#undef KERNEL
}

/* Rows [from, from + count) of x as [in][count] floats. */
static TARGET void lay_out(const struct matmul_call *c, int64_t from, int64_t count, void *block) {
    float values[256];
    for (int64_t r = 0; r < count; r++)
        for (int64_t k0 = 0; k0 < c->in; k0 += 256) {
            const int64_t length = c->in - k0 < 256 ? c->in - k0 : 256;
            float *to = (float *)block + k0 * count + r;
            widen(c->x, c->x_kind, (from + r) * c->x_stride + k0, length, values);
            for (int64_t k = 0; k < length; k++) to[k * count] = values[k];
        }
}

/* 0, or 1 when there is no memory. */
int lepton_matmul_bf16(const struct matmul_call *c) {
    return matmul(
        c,
        &(struct matmul_kind){
            .rows = ROWS,
            .unit = 1,
            .group = 1,
            .row_bytes = c->in * 4,
            .panel_bytes = c->in * PANEL * 2,
            .depth = c->in,
            .lay_out = lay_out,
            .multiply = multiply_rows,
        }
    );
}

/* Eight steps of k of a panel: rows i and i + 8 side by side give words, whose 8 x 8 square is then turned over. */
static TARGET void pack_square(const uint16_t *const *rows, int64_t k, uint16_t *to) {
    __m256i words[8];
    UNROLL for (int i = 0; i < 8; i++) {
        const __m128i low = _mm_loadu_si128((const __m128i *)(rows[i] + k));
        const __m128i top = _mm_loadu_si128((const __m128i *)(rows[i + 8] + k));
        words[i] = _mm256_set_m128i(_mm_unpackhi_epi16(low, top), _mm_unpacklo_epi16(low, top));
    }
    turn_square(words);
    UNROLL for (int i = 0; i < 8; i++) _mm256_storeu_si256((__m256i *)(to + i * PANEL), words[i]);
}

/* To panels of [in][16] words of 16 bits. */
static void pack_panels(void *work, int64_t begin, int64_t end) {
    const struct packing *w = work;
    const struct panels *to = w->to;
    const void *rows = w->rows;
    const int64_t kind = w->kind, first = w->first, count = w->count;
    const int64_t in = to->in;
    const uint16_t *weights = rows;
    (void)kind;
    for (int64_t p = begin; p < end; p++) {
        uint16_t *panel = (uint16_t *)to->bytes + (first + p * PANEL) * in;
        const uint16_t *of_panel[PANEL];
        int64_t k = 0;
        if (p * PANEL + PANEL <= count) {
            for (int i = 0; i < PANEL; i++) of_panel[i] = weights + (p * PANEL + i) * in;
            for (; k + 8 <= in; k += 8) pack_square(of_panel, k, panel + k * PANEL);
        }
        for (; k < in; k++)
            for (int64_t i = 0; i < PANEL; i++) {
                const int64_t row = p * PANEL + i;
                panel[k * PANEL + (i % 8) * 2 + i / 8] = row < count ? weights[row * in + k] : 0;
            }
    }
}

void lepton_pack_bf16(
    const struct panels *to, const void *rows, int64_t kind, int64_t first, int64_t count, int64_t threads
) {
    struct packing work = {to, rows, kind, first, count};
    lepton_share(threads, num_panels(count), LONG_RUNS, pack_panels, &work);
}
#endif
