/* Matmul with 4-bit weights in groups of 32, 64 or 128 along `in`, a float16 scale a group.
 *
 * A weight is (u - 8) * scale with u from 0 to 15. For a few rows of x, rounded to int8 in the same groups, the products
 * u * x are summed in 16-bit words (vpmaddubsw), where eight of at most 2 * 15 * 127 fit, and the 8 is taken off the sum:
 * sum (u - 8) x = sum u x - 8 sum x. For many rows a panel is expanded to 16-bit words first (words.h): that is done
 * once for all of them.
 *
 * A panel is groups of two halves (8 output features each) of [group / 32] pieces of 4 x 32 bytes, and 8 scales. Byte 4 i +
 * j of row q of a piece holds, for output feature i, k = 8 q + j in its low half and k = 8 q + 4 + j in its high half.
 */
#if defined(__x86_64__)
#include "words.h"

#define FEW_ROWS 4  /* that go over a panel as it is together */
#define MANY_ROWS 33 /* of x from which expanding pays */
#define PIECE 32
#define PIECE_BYTES (4 * 32)
#define DEPTH 512    /* k whose sums fit when expanded: 512 * 8 * 511 * 1023 < 2^31 */
#define STEPS 511.0f /* of an expanded weight's scale, for the largest of a row */

INLINE int64_t half_bytes(const struct matmul_call *c) { return c->group / PIECE * PIECE_BYTES + 8 * 2; }
INLINE int64_t num_groups(const struct matmul_call *c) { return (c->in + c->group - 1) / c->group; }

/* The scales of a half of a group, behind its pieces. */
INLINE TARGET __m256 load_scales(const struct matmul_call *c, const uint8_t *half) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + c->group / PIECE * PIECE_BYTES)));
}

/* A row's share of a piece of x: its rounded values, the scale of its group, and 8 times the sum of its values. */
struct x_piece {
    int8_t values[PIECE];
    float scale;
    int32_t offset;
};

/* Rows of x as [pieces][rows] times a panel -> sums [rows][16]. */
INLINE TARGET void multiply_few(
    const struct matmul_call *c, const struct x_piece *x, const uint8_t *panel, float *sums, int rows
) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int64_t pieces = c->group / PIECE;
    __m256 sum[FEW_ROWS * 2];
    UNROLL for (int i = 0; i < rows * 2; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < num_groups(c); g++, x += pieces * rows)
        UNROLL for (int half = 0; half < 2; half++, panel += half_bytes(c)) {
            __m256i exact[FEW_ROWS];
            UNROLL for (int r = 0; r < rows; r++) exact[r] = _mm256_setzero_si256();
            for (int64_t piece = 0; piece < pieces; piece++) {
                const struct x_piece *at = x + piece * rows;
                __m256i products[FEW_ROWS];
                UNROLL for (int q = 0; q < 4; q++) {
                    const __m256i both = _mm256_loadu_si256((const __m256i *)(panel + piece * PIECE_BYTES) + q);
                    const __m256i low = _mm256_and_si256(both, nibble);
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                    UNROLL for (int r = 0; r < rows; r++) {
                        int32_t first, second;
                        memcpy(&first, at[r].values + q * 8, 4);
                        memcpy(&second, at[r].values + q * 8 + 4, 4);
                        const __m256i product = _mm256_add_epi16(
                            _mm256_maddubs_epi16(low, _mm256_set1_epi32(first)),
                            _mm256_maddubs_epi16(high, _mm256_set1_epi32(second))
                        );
                        products[r] = q == 0 ? product : _mm256_add_epi16(products[r], product);
                    }
                }
                UNROLL for (int r = 0; r < rows; r++) {
                    const __m256i total = _mm256_madd_epi16(products[r], ones);
                    exact[r] = _mm256_add_epi32(exact[r], _mm256_sub_epi32(total, _mm256_set1_epi32(at[r].offset)));
                }
            }
            const __m256 scale = load_scales(c, panel);
            UNROLL for (int r = 0; r < rows; r++) {
                const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(x[r].scale));
                sum[r * 2 + half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact[r]), factor, sum[r * 2 + half]);
            }
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int half = 0; half < 2; half++) _mm256_storeu_ps(sums + r * PANEL + half * 8, sum[r * 2 + half]);
}

static TARGET void multiply_few_rows(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {
    (void)ahead;
    (void)number, (void)k;
#define KERNEL(n) multiply_few(c, block, panel, values, n)
    FOR_ROWS_UP_TO_4(count, KERNEL)
#undef KERNEL
}

/* `count` values from index `at` of an array of the kind; what lies behind `length` is zero. */
INLINE void widen_group(const void *from, int64_t kind, int64_t at, int64_t length, int64_t count, float *values) {
    if (length >= count) {
        widen(from, kind, at, count, values);
        return;
    }
    memset(values, 0, (size_t)count * 4);
    if (length > 0) widen(from, kind, at, length, values);
}

/* Round rows [from, from + count) of x to [pieces][count]. */
static TARGET void round_to_bytes(const struct matmul_call *c, int64_t from, int64_t count, void *block) {
    const int64_t pieces = c->group / PIECE;
    for (int64_t r = 0; r < count; r++)
        for (int64_t g = 0; g < num_groups(c); g++) {
            float values[128];
            widen_group(
                c->x, c->x_kind, (from + r) * c->x_stride + g * c->group, c->in - g * c->group, c->group, values
            );
            const struct steps steps = steps_of(largest_magnitude(values, c->group), 127.0f);
            int32_t rounded[128];
            round_all(values, steps.inverse, c->group, rounded);
            for (int64_t piece = 0; piece < pieces; piece++) {
                struct x_piece *to = (struct x_piece *)block + (g * pieces + piece) * count + r;
                int32_t sum = 0;
                for (int64_t k = 0; k < PIECE; k++) {
                    to->values[k] = (int8_t)rounded[piece * PIECE + k];
                    sum += to->values[k];
                }
                to->scale = steps.size;
                to->offset = 8 * sum;
            }
        }
}

/* DEPTH of `in` of a panel as words [pairs][16][2] of (u - 8) * whole steps, what the scales are multiplied with to become
   whole, and the width of a step. A group's scale becomes a whole number of up to 511 steps of the largest of its row: finer
   than what rounding to 4 bits left. */
struct expanded {
    int16_t words[DEPTH * PANEL];
    float inverse[PANEL], step[PANEL];
};

/* Two pairs of k of eight output features from the bytes 0 to 3 of each. */
INLINE TARGET void expand_pairs(__m256i bytes, __m256i steps, __m256i *to) {
    const __m256i eight = _mm256_set1_epi16(8);
    const __m256i first_pair = _mm256_set_epi8(
        -1, 13, -1, 12, -1, 9, -1, 8, -1, 5, -1, 4, -1, 1, -1, 0, -1, 13, -1, 12, -1, 9, -1, 8, -1, 5, -1, 4, -1, 1, -1, 0
    );
    const __m256i second_pair = _mm256_add_epi8(first_pair, _mm256_set1_epi16(2));
    const __m256i first = _mm256_sub_epi16(_mm256_shuffle_epi8(bytes, first_pair), eight);
    const __m256i second = _mm256_sub_epi16(_mm256_shuffle_epi8(bytes, second_pair), eight);
    _mm256_store_si256(to, _mm256_mullo_epi16(first, steps));
    _mm256_store_si256(to + 2, _mm256_mullo_epi16(second, steps));
}

static TARGET void expand(const struct matmul_call *c, const void *panel, int64_t k, void *to) {
    struct expanded *expanded = to;
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i no_sign = _mm256_set1_epi32(0x7fffffff);
    const int64_t groups = num_groups(c), half = half_bytes(c), last = (k + DEPTH) / c->group;
    if (k == 0)
        for (int i = 0; i < 2; i++) {
            __m256i most = _mm256_castps_si256(_mm256_set1_ps(1e-30f)); /* as bits: a NaN is the largest, see vector.h */
            for (int64_t g = 0; g < groups; g++) {
                const __m256 scales = load_scales(c, (const uint8_t *)panel + (2 * g + i) * half);
                most = _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(scales), no_sign), most);
            }
            const __m256 largest = _mm256_castsi256_ps(most);
            _mm256_store_ps(expanded->inverse + 8 * i, _mm256_div_ps(_mm256_set1_ps(STEPS), largest));
            _mm256_store_ps(expanded->step + 8 * i, _mm256_mul_ps(largest, _mm256_set1_ps(1.0f / STEPS)));
        }
    __m256i *words = (__m256i *)expanded->words;
    for (int64_t g = k / c->group; g < (last < groups ? last : groups); g++, words += c->group) {
        const uint8_t *at[2] = {(const uint8_t *)panel + 2 * g * half, (const uint8_t *)panel + (2 * g + 1) * half};
        __m256i steps[2];
        for (int i = 0; i < 2; i++) {
            const __m256 whole = _mm256_mul_ps(load_scales(c, at[i]), _mm256_load_ps(expanded->inverse + 8 * i));
            const __m256i wide = _mm256_cvtps_epi32(whole);
            steps[i] = _mm256_blend_epi16(wide, _mm256_slli_epi32(wide, 16), 0xaa);
        }
        for (int64_t q = 0; q < c->group / 8; q++)
            UNROLL for (int i = 0; i < 2; i++) {
                const __m256i both = _mm256_loadu_si256((const __m256i *)at[i] + q);
                expand_pairs(_mm256_and_si256(both, nibble), steps[i], words + q * 8 + i);
                expand_pairs(_mm256_and_si256(_mm256_srli_epi16(both, 4), nibble), steps[i], words + q * 8 + i + 4);
            }
    }
}

static TARGET void multiply_expanded(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
) {
    (void)ahead;
    const int64_t left = (c->in - k + 1) / 2, pairs = left < DEPTH / 2 ? left : DEPTH / 2;
    const struct expanded *expanded = panel;
    const int16_t *x = (const int16_t *)block + k * count;
    int32_t sums[WORD_ROWS * PANEL] __attribute__((aligned(64)));
    (void)number;
#define KERNEL(n) multiply_words(x, expanded->words, pairs, sums, n, n == 1 ? 6 : n == 2 ? 3 : n == 3 ? 2 : 1, 1)
    FOR_ROWS_UP_TO_6(count, KERNEL)
#undef KERNEL
    for (int64_t i = 0; i < count * PANEL; i++) values[i] = (k == 0 ? 0 : values[i]) + (float)sums[i];
    if (left > DEPTH / 2) return;
    const float *row_scales = word_scales(block, c->in, count);
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < PANEL; i++) values[r * PANEL + i] *= row_scales[r] * expanded->step[i];
}

static TARGET void round_rows(const struct matmul_call *c, int64_t from, int64_t count, void *block) {
    round_to_words(c, from, count, block, WORD_LIMIT);
}

/* 0, or 1 when there is no memory. */
int lepton_matmul_int4(const struct matmul_call *c) {
    const struct matmul_kind few = {
        .rows = FEW_ROWS,
        .unit = 1,
        .group = 1,
        .row_bytes = num_groups(c) * c->group / PIECE * (int64_t)sizeof(struct x_piece),
        .panel_bytes = num_groups(c) * 2 * half_bytes(c),
        .depth = c->in,
        .lay_out = round_to_bytes,
        .multiply = multiply_few_rows,
    };
    const struct matmul_kind many = {
        .rows = WORD_ROWS,
        .unit = 1,
        .group = 1,
        .row_bytes = word_row_bytes(c->in),
        .panel_bytes = few.panel_bytes,
        .depth = DEPTH,
        .expanded_bytes = sizeof(struct expanded),
        .expand = expand,
        .lay_out = round_rows,
        .multiply = multiply_expanded,
    };
    return matmul(c, c->rows < MANY_ROWS ? &few : &many);
}

INLINE TARGET float highest_lane(__m256 x) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

/* The scale, as bits, that the value of the largest magnitude gives. */
INLINE TARGET uint16_t scale_of(const float *values, int64_t count) {
    __m256 most = _mm256_setzero_ps(), least = _mm256_setzero_ps(), unlike = _mm256_setzero_ps();
    for (int64_t k = 0; k < count; k += 8) {
        const __m256 here = _mm256_loadu_ps(values + k);
        most = _mm256_max_ps(here, most);
        least = _mm256_min_ps(here, least);
        unlike = _mm256_or_ps(unlike, _mm256_cmp_ps(here, here, _CMP_UNORD_Q));
    }
    const float above = highest_lane(most), below = highest_lane(_mm256_sub_ps(_mm256_setzero_ps(), least));
    return int4_scale(first_extreme(values, count, above, below), !_mm256_movemask_ps(unlike));
}

/* One group of one output feature: the value of the largest magnitude goes to -8, so that all 16 steps are used. */
INLINE TARGET void pack_group(const float *values, int64_t group, uint8_t *half, int64_t i) {
    const uint16_t bits = scale_of(values, group);
    const float scale = _cvtsh_ss(bits);
    memcpy(half + group / PIECE * PIECE_BYTES + i * 2, &bits, 2);
    const __m256 inverse = _mm256_set1_ps(scale != 0 ? 1.0f / scale : 0);
    for (int64_t q = 0; q < group / 8; q++) {
        __m256i steps = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + q * 8), inverse));
        steps = _mm256_max_epi32(_mm256_add_epi32(steps, _mm256_set1_epi32(8)), _mm256_setzero_si256());
        steps = _mm256_min_epi32(steps, _mm256_set1_epi32(15));
        __m128i both = _mm_slli_epi32(_mm256_extracti128_si256(steps, 1), 4);
        both = _mm_or_si128(both, _mm256_castsi256_si128(steps));
        both = _mm_packus_epi16(_mm_packs_epi32(both, both), both);
        const int32_t word = _mm_cvtsi128_si32(both);
        memcpy(half + q * 32 + i * 4, &word, 4);
    }
}

/* The row that begins at index `at`, zeros when that is negative, as feature `i` of a panel. */
static TARGET void pack_row(
    const struct matmul_call *sizes, const void *weights, int64_t kind, int64_t at, uint8_t *panel, int64_t i
) {
    const int64_t group = sizes->group, half = half_bytes(sizes);
    for (int64_t g = 0; g < num_groups(sizes); g++) {
        float values[128];
        widen_group(weights, kind, at + g * group, at < 0 ? 0 : sizes->in - g * group, group, values);
        pack_group(values, group, panel + (g * 2 + i / 8) * half, i % 8);
    }
}

/* To panels of ceil(in / group) * (group * 8 + 32) bytes. */
static void pack_panels(void *work, int64_t begin, int64_t end) {
    const struct packing *w = work;
    const struct panels *to = w->to;
    const void *rows = w->rows;
    const int64_t kind = w->kind, first = w->first, count = w->count;
    const struct matmul_call sizes = {.in = to->in, .group = to->group};
    const int64_t panel_bytes = num_groups(&sizes) * 2 * half_bytes(&sizes);
    for (int64_t p = begin; p < end; p++)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t row = p * PANEL + i;
            uint8_t *panel = (uint8_t *)to->bytes + (first / PANEL + p) * panel_bytes;
            pack_row(&sizes, rows, kind, row < count ? row * to->in : -1, panel, i);
        }
}

void lepton_pack_int4(
    const struct panels *to, const void *rows, int64_t kind, int64_t first, int64_t count, int64_t threads
) {
    struct packing work = {to, rows, kind, first, count};
    lepton_share(threads, num_panels(count), LONG_RUNS, pack_panels, &work);
}
#endif
