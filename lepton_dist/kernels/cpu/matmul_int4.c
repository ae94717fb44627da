/* Matmul with 4-bit weights in groups of 32 along `in`, a float16 scale a group, and activations rounded to int8 in
 * the same groups.
 *
 * A weight is (u - 8) * scale with u from 0 to 15; the products u * x are summed in 16-bit words (vpmaddubsw), where a
 * group's eight of at most 2 * 15 * 127 fit, and the 8 is taken off the sum: sum (u - 8) x = sum u x - 8 sum x.
 *
 * A panel is [in / 32] groups of two halves (8 output features each) of 4 x 32 bytes and 8 scales. Byte 4 i + j of row q
 * holds, for output feature i, k = 8 q + j in its low half and k = 8 q + 4 + j in its high half.
 */
#if defined(__x86_64__)
#include "matmul.h"

#define ROWS 4
#define GROUP 32
#define HALF_BYTES (4 * 32 + 8 * 2)
#define GROUP_BYTES (2 * HALF_BYTES)

/* A row's share of a group of x: its rounded values, its scale, and 8 times the sum of its values. */
struct x_group {
    int8_t values[GROUP];
    float scale;
    int32_t offset;
};

INLINE TARGET void multiply(const struct x_group *x, const uint8_t *panel, int64_t groups, float *sums, int rows) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256 sum[ROWS * 2];
    UNROLL for (int i = 0; i < rows * 2; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++, x += rows) {
        UNROLL for (int half = 0; half < 2; half++) {
            const uint8_t *at = panel + g * GROUP_BYTES + half * HALF_BYTES;
            __m256i products[ROWS];
            UNROLL for (int q = 0; q < 4; q++) {
                const __m256i both = _mm256_loadu_si256((const __m256i *)(at + q * 32));
                const __m256i low = _mm256_and_si256(both, nibble);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                UNROLL for (int r = 0; r < rows; r++) {
                    int32_t first, second;
                    memcpy(&first, x[r].values + q * 8, 4);
                    memcpy(&second, x[r].values + q * 8 + 4, 4);
                    const __m256i product = _mm256_add_epi16(
                        _mm256_maddubs_epi16(low, _mm256_set1_epi32(first)),
                        _mm256_maddubs_epi16(high, _mm256_set1_epi32(second))
                    );
                    products[r] = q == 0 ? product : _mm256_add_epi16(products[r], product);
                }
            }
            const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at + 4 * 32)));
            UNROLL for (int r = 0; r < rows; r++) {
                const __m256i exact =
                    _mm256_sub_epi32(_mm256_madd_epi16(products[r], ones), _mm256_set1_epi32(x[r].offset));
                const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(x[r].scale));
                sum[r * 2 + half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), factor, sum[r * 2 + half]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int half = 0; half < 2; half++) _mm256_storeu_ps(sums + r * PANEL + half * 8, sum[r * 2 + half]);
}

static TARGET void multiply_rows(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, float *values
) {
    const int64_t groups = (c->in + GROUP - 1) / GROUP;
    (void)number;
    switch (count) {
    case 1: multiply(block, panel, groups, values, 1); break;
    case 2: multiply(block, panel, groups, values, 2); break;
    case 3: multiply(block, panel, groups, values, 3); break;
    default: multiply(block, panel, groups, values, 4); break;
    }
}

/* A group's values from index `at` of an array of the kind; what lies behind `length` is zero. */
INLINE void widen_group(const void *from, int64_t kind, int64_t at, int64_t length, float *values) {
    if (length >= GROUP) {
        widen(from, kind, at, GROUP, values);
        return;
    }
    memset(values, 0, GROUP * 4);
    widen(from, kind, at, length, values);
}

/* Round rows [from, from + count) of x to [groups][count]. */
static TARGET void round_rows(const struct matmul_call *c, int64_t from, int64_t count, void *block) {
    const int64_t groups = (c->in + GROUP - 1) / GROUP;
    for (int64_t r = 0; r < count; r++)
        for (int64_t g = 0; g < groups; g++) {
            struct x_group *to = (struct x_group *)block + g * count + r;
            float values[GROUP];
            widen_group(c->x, c->x_kind, (from + r) * c->x_stride + g * GROUP, c->in - g * GROUP, values);
            const float highest = largest_magnitude(values, GROUP), inverse = highest > 0 ? 127.0f / highest : 0;
            int32_t rounded[GROUP], sum = 0;
            round_all(values, inverse, GROUP, rounded);
            for (int64_t k = 0; k < GROUP; k++) {
                to->values[k] = (int8_t)rounded[k];
                sum += rounded[k];
            }
            to->scale = highest / 127.0f;
            to->offset = 8 * sum;
        }
}

/* 0, or 1 when there is no memory. */
int lepton_matmul_int4(const struct matmul_call *c) {
    const int64_t groups = (c->in + GROUP - 1) / GROUP, row_bytes = groups * (int64_t)sizeof(struct x_group);
    return matmul(c, &(struct matmul_kind){ROWS, row_bytes, groups * GROUP_BYTES, round_rows, multiply_rows});
}

/* One group of one output feature: the value of the largest magnitude goes to -8, so that all 16 steps are used. */
static TARGET void pack_group(const float *values, uint8_t *half, int64_t i) {
    float extreme = 0;
    for (int64_t k = 0; k < GROUP; k++) extreme = fabsf(values[k]) > fabsf(extreme) ? values[k] : extreme;
    const uint16_t bits = (uint16_t)_cvtss_sh(extreme / -8.0f, _MM_FROUND_TO_NEAREST_INT);
    const float scale = _cvtsh_ss(bits), inverse = scale != 0 ? 1.0f / scale : 0;
    memcpy(half + 4 * 32 + i * 2, &bits, 2);
    int32_t steps[GROUP];
    round_all(values, inverse, GROUP, steps);
    for (int64_t k = 0; k < GROUP; k++) {
        const int32_t step = steps[k] + 8;
        steps[k] = step < 0 ? 0 : step > 15 ? 15 : step;
    }
    for (int64_t q = 0; q < 4; q++)
        for (int64_t j = 0; j < 4; j++)
            half[q * 32 + i * 4 + j] = (uint8_t)(steps[q * 8 + j] | steps[q * 8 + 4 + j] << 4);
}

/* weights [out, in] of the kind (0 float32, 1 bfloat16) -> panels of lepton_int4_bytes(out, in) bytes. */
void lepton_pack_int4(const void *weights, int64_t kind, int64_t out, int64_t in, uint8_t *panels, int64_t threads) {
    const int64_t groups = (in + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < num_panels(out); p++)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t row = p * PANEL + i;
            for (int64_t g = 0; g < groups; g++) {
                float values[GROUP] = {0};
                if (row < out) widen_group(weights, kind, row * in + g * GROUP, in - g * GROUP, values);
                pack_group(values, panels + (p * groups + g) * GROUP_BYTES + i / 8 * HALF_BYTES, i % 8);
            }
        }
}

int64_t lepton_int4_bytes(int64_t out, int64_t in) {
    return num_panels(out) * ((in + GROUP - 1) / GROUP) * GROUP_BYTES;
}
#endif
