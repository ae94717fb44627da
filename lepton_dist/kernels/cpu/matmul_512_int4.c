/* Matmul with 4-bit weights in groups of 32, 64 or 128 along `in`, a float16 scale a group, for AVX-512 with VNNI.
 *
 * A weight is (u - 8) * scale with u from 0 to 15. For a few rows of x the products u * x of a group are summed as they are,
 * and the 8 is taken off the sum: sum (u - 8) x = sum u x - 8 sum x. For many rows DEPTH of a panel is expanded once for all
 * of them: to bytes as those of int8 weights, with one scale a feature, the largest of its groups.
 *
 * A panel is groups of [group / 8][32][4] bytes and 32 scales. Byte j of feature i of row q of a group holds k = 8 q + j in
 * its low half and k = 8 q + 4 + j in its high half.
 */
#include "vector.h"
#if defined(HAS_AVX512) && defined(__x86_64__)
#include "matmul_512.h"

#define FEW_ROWS 8 /* in a block: their sums of a group and of all groups are as many as there are registers */
#define MANY_ROWS 64 /* from which on expanding a panel takes less than scaling the sums of groups; as measured */

INLINE int64_t group_bytes(int64_t group) { return group / 2 * PANEL + PANEL * 2; }

/* The scales of a group, behind its weights, of 16 features. */
INLINE TARGET_512 __m512 load_scales(const uint8_t *group, int64_t size, int half) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(group + size / 2 * PANEL) + half));
}

/* Matrix instructions want bytes to multiply, so that with them fewer rows are many. */
INLINE int has_many_rows(const struct matmul_call *c) {
    return c->rows >= (lepton_has_tiles() ? 12 + c->group / 4 : MANY_ROWS);
}

INLINE struct bytes_layout layout_of(const struct matmul_call *c) {
    const int64_t padded = up_to(c->in, c->group);
    if (!has_many_rows(c)) return (struct bytes_layout){.padded = padded, .share = c->group, .excess = 8};
    return (struct bytes_layout){.padded = padded, .share = DEPTH, .excess = 128, .is_for_tiles = fits_tiles(padded)};
}

/* DEPTH of x, rounded to bytes, times that of a panel, added to values [rows][32], or put there when it is the first. */
INLINE TARGET_512 void multiply(
    const struct bytes_layout *l, const void *block, const uint8_t *panel, int64_t k, float *values, const char *ahead, int rows
) {
    const int64_t size = l->share, depth = l->padded - k < DEPTH ? l->padded - k : DEPTH;
    const int32_t *x = (const int32_t *)block + k / 4 * rows, *excess = byte_excess(l, block, rows) + k / size * rows;
    const float *row_scales = byte_scales(l, block, rows) + k / DEPTH * rows;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 total[2 * FEW_ROWS];
    UNROLL for (int i = 0; i < 2 * rows; i++) total[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < depth / size; g++, panel += group_bytes(size), excess += rows) {
        __m512i sum[2 * FEW_ROWS];
        UNROLL for (int r = 0; r < rows; r++) sum[2 * r] = sum[2 * r + 1] = _mm512_set1_epi32(-excess[r]);
        for (int64_t q = 0; q < size / 8; q++, x += 2 * rows, ahead += 128) {
            read_ahead(ahead);
            const __m512i first = _mm512_loadu_si512(panel + q * 128), second = _mm512_loadu_si512(panel + q * 128 + 64);
            const __m512i low[2] = {_mm512_and_si512(first, nibble), _mm512_and_si512(second, nibble)};
            const __m512i high[2] = {
                _mm512_and_si512(_mm512_srli_epi16(first, 4), nibble), _mm512_and_si512(_mm512_srli_epi16(second, 4), nibble)
            };
            UNROLL for (int r = 0; r < rows; r++) {
                const __m512i factor = _mm512_set1_epi32(x[r]), next = _mm512_set1_epi32(x[rows + r]);
                UNROLL for (int i = 0; i < 2; i++) {
                    sum[2 * r + i] = add_products(sum[2 * r + i], low[i], factor);
                    sum[2 * r + i] = add_products(sum[2 * r + i], high[i], next);
                }
            }
        }
        const __m512 scales[2] = {load_scales(panel, size, 0), load_scales(panel, size, 1)};
        UNROLL for (int i = 0; i < 2 * rows; i++)
            total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), scales[i % 2], total[i]);
    }
    UNROLL for (int i = 0; i < 2 * rows; i++) {
        const __m512 before = k == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(values + i * 16);
        _mm512_storeu_ps(values + i * 16, _mm512_fmadd_ps(total[i], _mm512_set1_ps(row_scales[i / 2]), before));
    }
}

static TARGET_512 void multiply_few_rows(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {

    const struct bytes_layout layout = layout_of(c);
    const uint8_t *weights = (const uint8_t *)panel + k / c->group * group_bytes(c->group);
    (void)number;
#define KERNEL(n) multiply(&layout, block, weights, k, values, ahead, n)
    FOR_ROWS_UP_TO_8(count, KERNEL)
#undef KERNEL
}

/* DEPTH of `in` of a panel as bytes [quads][32][4], each a weight plus 128, in steps of a scale a feature. */
struct expanded {
    uint8_t weights[DEPTH * PANEL];
    float scales[PANEL];
};

static TARGET_512 void expand(const struct matmul_call *c, const void *panel, int64_t k, void *to) {
    struct expanded *expanded = to;
    const int64_t padded = up_to(c->in, c->group), groups = (padded - k < DEPTH ? padded - k : DEPTH) / c->group;
    const __m512i nibble = _mm512_set1_epi8(15), low_byte = _mm512_set1_epi16(255);
    const uint8_t *first = (const uint8_t *)panel + k / c->group * group_bytes(c->group);
    UNROLL for (int i = 0; i < 2; i++) {
        __m512i most = _mm512_castps_si512(_mm512_set1_ps(1e-30f));
        for (int64_t g = 0; g < groups; g++)
            most = larger_magnitudes(load_scales(first + g * group_bytes(c->group), c->group, i), most);
        const __m512 largest = _mm512_castsi512_ps(most);
        /* A weight of 8 of the largest scale becomes 127, in 16 bits with 8 of them behind the point. */
        const __m512 steps_a_scale = _mm512_div_ps(_mm512_set1_ps(127.0f / 8 * 256), largest);
        _mm512_storeu_ps(expanded->scales + 16 * i, _mm512_mul_ps(largest, _mm512_set1_ps(8.0f / 127)));
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t *group = first + g * group_bytes(c->group);
            __m512i *at = (__m512i *)expanded->weights + g * c->group / 2 + i;
            __m512i steps = _mm512_cvtps_epi32(_mm512_mul_ps(load_scales(group, c->group, i), steps_a_scale));
            steps = _mm512_mask_mov_epi16(steps, 0xaaaaaaaa, _mm512_slli_epi32(steps, 16));
            /* (u - 8) * steps, a half to round, and 128 */
            const __m512i offset = _mm512_sub_epi16(_mm512_set1_epi16((int16_t)0x8080), _mm512_slli_epi16(steps, 3));
            for (int64_t q = 0; q < c->group / 8; q++) {
                const __m512i both = _mm512_loadu_si512(group + q * 128 + i * 64);
                const __m512i halves[2] = {
                    _mm512_and_si512(both, nibble), _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble)
                };
                UNROLL for (int j = 0; j < 2; j++) {
                    const __m512i even = _mm512_mullo_epi16(_mm512_and_si512(halves[j], low_byte), steps);
                    const __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(halves[j], 8), steps);
                    const __m512i even_byte = _mm512_srli_epi16(_mm512_add_epi16(even, offset), 8);
                    _mm512_storeu_si512(
                        at + q * 4 + j * 2, _mm512_mask_mov_epi8(_mm512_add_epi16(odd, offset), 0x5555555555555555, even_byte)
                    );
                }
            }
        }
    }
}

static TARGET_512 void multiply_many_rows(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {

    const struct bytes_layout layout = layout_of(c);
    const struct expanded *expanded = panel;
    (void)number;
#define KERNEL(n) multiply_depth(&layout, block, expanded->weights, k, expanded->scales, values, ahead, n)
    FOR_ROWS_UP_TO_12(count, KERNEL)
#undef KERNEL
}

#if defined(HAS_TILES)
static TARGET_TILES void multiply_many_rows_by_tiles(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {
    const struct bytes_layout layout = layout_of(c);
    const struct expanded *expanded = panel;
    (void)number;
    multiply_depth_by_tiles(&layout, block, expanded->weights, k, expanded->scales, values, ahead, count);
}
#endif

static TARGET_512 void round_rows(const struct matmul_call *c, int64_t from, int64_t count, void *block) {
    const struct bytes_layout layout = layout_of(c);
    round_to_bytes(c, &layout, from, count, block);
}

/* 0, or 1 when there is no memory. */
int lepton_matmul_int4_512(const struct matmul_call *c) {
    const int is_expanded = has_many_rows(c);
    const struct bytes_layout layout = layout_of(c);
    struct matmul_kind kind = {
        .rows = is_expanded ? MOST_ROWS : FEW_ROWS,
        .unit = 1,
        .group = 1,
        .row_bytes = byte_row_bytes(&layout),
        .panel_bytes = layout.padded / c->group * group_bytes(c->group),
        .depth = DEPTH,
        .expanded_bytes = sizeof(struct expanded),
        .expand = is_expanded ? expand : NULL,
        .lay_out = round_rows,
        .multiply = is_expanded ? multiply_many_rows : multiply_few_rows,
    };
#if defined(HAS_TILES)
    if (layout.is_for_tiles) use_tiles(&kind, multiply_many_rows_by_tiles);
#endif
    return matmul(c, &kind);
}

/* One group of one output feature: the value of the largest magnitude goes to -8, so that all 16 steps are used. */
static TARGET_512 void pack_group(const void *weights, int64_t kind, int64_t at, int64_t left, int64_t size, uint8_t *group, int64_t i) {
    float values[128] __attribute__((aligned(64)));
    int8_t steps[128];
    __m512 most = _mm512_setzero_ps(), least = _mm512_setzero_ps();
    __m512i magnitudes = _mm512_setzero_si512();
    for (int64_t k = 0; k < size; k += 16) {
        const __m512 next = load_16(weights, kind, at + k, left - k);
        magnitudes = larger_magnitudes(next, magnitudes);
        most = _mm512_max_ps(next, most);
        least = _mm512_min_ps(next, least);
        _mm512_store_ps(values + k, next);
    }
    const float extreme = first_extreme(values, size, _mm512_reduce_max_ps(most), -_mm512_reduce_min_ps(least));
    const uint16_t bits = int4_scale(extreme, is_number(_mm512_reduce_max_epu32(magnitudes)));
    const float scale = _cvtsh_ss(bits);
    memcpy(group + size / 2 * PANEL + i * 2, &bits, 2);
    const __m512 inverse = _mm512_set1_ps(scale != 0 ? 1.0f / scale : 0);
    for (int64_t k = 0; k < size; k += 16) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(values + k), inverse));
        whole = _mm512_add_epi32(whole, _mm512_set1_epi32(8));
        whole = _mm512_min_epi32(_mm512_max_epi32(whole, _mm512_setzero_si512()), _mm512_set1_epi32(15));
        _mm_storeu_si128((__m128i *)(steps + k), _mm512_cvtepi32_epi8(whole));
    }
    for (int64_t q = 0; q < size / 8; q++) {
        uint32_t low, high;
        memcpy(&low, steps + q * 8, 4);
        memcpy(&high, steps + q * 8 + 4, 4);
        low |= high << 4;
        memcpy(group + (q * PANEL + i) * 4, &low, 4);
    }
}

/* To panels of ceil(in / group) * (group * 16 + 64) bytes. */
static void pack_panels(void *work, int64_t begin, int64_t end) {
    const struct packing *w = work;
    const struct panels *to = w->to;
    const void *rows = w->rows;
    const int64_t kind = w->kind, first = w->first, count = w->count;
    const int64_t in = to->in, group = to->group, groups = (in + group - 1) / group;
    for (int64_t p = begin; p < end; p++)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t row = p * PANEL + i;
            uint8_t *panel = (uint8_t *)to->bytes + (first / PANEL + p) * groups * group_bytes(group);
            for (int64_t g = 0; g < groups; g++)
                pack_group(
                    rows, kind, row * in + g * group, row < count ? in - g * group : 0, group, panel + g * group_bytes(group), i
                );
        }
}

void lepton_pack_int4_512(
    const struct panels *to, const void *rows, int64_t kind, int64_t first, int64_t count, int64_t threads
) {
    struct packing work = {to, rows, kind, first, count};
    lepton_share(threads, num_panels(count), LONG_RUNS, pack_panels, &work);
}
#endif
