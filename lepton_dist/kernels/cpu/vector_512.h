/* What the kernels for AVX-512 share: loads of either float format, rows of dot products, and e^x. */
#ifndef LEPTON_VECTOR_512_H
#define LEPTON_VECTOR_512_H

#include "vector.h"
#if defined(EMULATED_512)
#include EMULATED_512
#endif

/* 16 values from index `at` of an array of the kind; those from `left` on are zero. */
INLINE TARGET_512 __m512 load_16(const void *from, int64_t kind, int64_t at, int64_t left) {
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    if (!kind) return _mm512_maskz_loadu_ps(mask, (const float *)from + at);
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* The larger of the magnitudes of 16 values, a lane, and of others: see `magnitude_of`. */
INLINE TARGET_512 __m512i larger_magnitudes(__m512 values, __m512i others) {
    return _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7fffffff)), others);
}

/* `count` values to index `at` of an array of the kind: 32 at once, or those at the edge. */
INLINE TARGET_512 void narrow_512(const float *from, int64_t count, void *to, int64_t kind, int64_t at) {
    if (!kind || count != 32) narrow(from, count, to, kind, at);
    else _mm512_storeu_si512((uint16_t *)to + at, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from)));
}

#if !defined(EMULATED_512)
/* sum + four products of unsigned and signed bytes a lane. Not the intrinsic: around that, compilers copy every sum. */
INLINE TARGET_512 __m512i add_products(__m512i sum, __m512i weights, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
    return sum;
}

/* float sum + two products of bfloat16 a lane, likewise. The sum goes as __m512i: between the two types every sum is copied. */
INLINE TARGET_512 __m512i add_products_bf16(__m512i sum, __m512i a, __m512i b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
#endif

/* Ask for 128 bytes of memory, as many as a step over a panel reads. */
INLINE void read_ahead(const char *at) {
    ask_for(at);
    ask_for(at + 64);
}

#define MOST_ROWS 12 /* whose 2 sums each stay in registers, with two vectors of weights and a factor */

enum word { BYTES, HALVES }; /* four bytes, or two bfloat16 */

/* Words of rows of x, `step` apart along k and `row` apart from row to row, times weights [count][2 vectors]: added to sums
   [rows][2 vectors], of whole numbers or, for bfloat16, of floats. `ahead` is what to ask for meanwhile, or NULL. All but
   the numbers of words are constants where this is called. */
INLINE TARGET_512 void multiply_rows_of_words(
    const int32_t *x, int64_t step, int64_t row, const void *weights, int64_t count, const int rows, const enum word word,
    const char *ahead, __m512i *sum
) {
    __m512i held[2 * MOST_ROWS]; /* not `sum`: what has an address is stored again and again */
    UNROLL for (int i = 0; i < 2 * rows; i++) held[i] = sum[i];
    for (int64_t k = 0; k < count; k++) {
        if (ahead != NULL) read_ahead(ahead + k * 128);
        const __m512i *at = (const __m512i *)weights + 2 * k;
        const __m512i vectors[2] = {_mm512_loadu_si512(at), _mm512_loadu_si512(at + 1)};
        UNROLL for (int r = 0; r < rows; r++) {
            const __m512i factor = _mm512_set1_epi32(x[k * step + r * row]);
            UNROLL for (int i = 2 * r; i < 2 * r + 2; i++)
                held[i] = word == BYTES ? add_products(held[i], vectors[i % 2], factor)
                                        : add_products_bf16(held[i], vectors[i % 2], factor);
        }
    }
    UNROLL for (int i = 0; i < 2 * rows; i++) sum[i] = held[i];
}

/* e^x to 2 units in the last place (Cephes' expf); below -100 that of -100. Of a NaN the maximum is the second: it stays. */
INLINE TARGET_512 __m512 exp_512(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-100.0f), x);
    const __m512 k = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fmadd_ps(k, _mm512_set1_ps(-0.693359375f), x);
    r = _mm512_fmadd_ps(k, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(y, r), r, r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, k);
}

#endif
