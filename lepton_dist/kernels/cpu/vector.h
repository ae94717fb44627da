/* What all kernels share: the instructions they may use, float formats, and e^x.
 *
 * The kernels are plain C functions, called through ctypes, on torch's OpenMP threads. They are written for AVX2 with FMA
 * and F16C, which every x86 server has had since 2013, and once more for AVX-512 with VNNI and BF16 where that pays;
 * lepton_vector_level says what this machine has.
 */
#ifndef LEPTON_VECTOR_H
#define LEPTON_VECTOR_H

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16") /* sums must stay in registers: every short loop around them is unrolled */
#define TARGET __attribute__((target("avx2,fma,f16c")))
#if defined(__clang__) || __GNUC__ >= 10 /* compilers that know these instructions */
#define HAS_AVX512
#endif
#if defined(HAS_AVX512) && defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAS_TILES
#endif
#if defined(EMULATED_512) /* a header, for tests on machines without AVX-512, that computes otherwise what it would */
#define TARGET_512 TARGET
#define TARGET_TILES TARGET
#else
#define FEATURES_512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,prefer-vector-width=512"
#define TARGET_512 __attribute__((target(FEATURES_512)))
#if defined(HAS_TILES)
#define TARGET_TILES __attribute__((target(FEATURES_512 ",amx-tile,amx-bf16,amx-int8")))
#else
#define TARGET_TILES TARGET_512
#endif
#endif

/* KERNEL(count) with a constant, so that its loops unroll; a larger count than the last takes the last. */
#define ROWS_1_TO_3(KERNEL) \
    case 1: KERNEL(1); break; \
    case 2: KERNEL(2); break; \
    case 3: KERNEL(3); break;
#define ROWS_4_AND_5(KERNEL) \
    case 4: KERNEL(4); break; \
    case 5: KERNEL(5); break;
#define ROWS_6_AND_7(KERNEL) \
    case 6: KERNEL(6); break; \
    case 7: KERNEL(7); break;
#define ROWS_8_TO_11(KERNEL) \
    case 8: KERNEL(8); break; \
    case 9: KERNEL(9); break; \
    case 10: KERNEL(10); break; \
    case 11: KERNEL(11); break;
#define FOR_ROWS_UP_TO_4(count, KERNEL) switch (count) { ROWS_1_TO_3(KERNEL) default: KERNEL(4); break; }
#define FOR_ROWS_UP_TO_6(count, KERNEL) \
    switch (count) { ROWS_1_TO_3(KERNEL) ROWS_4_AND_5(KERNEL) default: KERNEL(6); break; }
#define FOR_ROWS_UP_TO_8(count, KERNEL) \
    switch (count) { ROWS_1_TO_3(KERNEL) ROWS_4_AND_5(KERNEL) ROWS_6_AND_7(KERNEL) default: KERNEL(8); break; }
#define FOR_ROWS_UP_TO_12(count, KERNEL) \
    switch (count) { \
        ROWS_1_TO_3(KERNEL) ROWS_4_AND_5(KERNEL) ROWS_6_AND_7(KERNEL) ROWS_8_TO_11(KERNEL) default: KERNEL(12); break; \
    }

enum vector_level { NO_VECTORS, AVX2, AVX512 };

enum vector_level lepton_vector_level(void);
int lepton_has_tiles(void);

#if defined(__x86_64__)

INLINE float bf16_to_float(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint16_t float_to_bf16(float x) { /* round to nearest even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

/* Ask for a line of memory, 64 bytes, ahead of need, to the second cache: that measured faster than to the first. */
INLINE void ask_for(const void *line) { __builtin_prefetch(line, 0, 2); }

/* `count` values from index `at` of an array of the kind (0 float32, 1 bfloat16), as floats. */
INLINE void widen(const void *from, int64_t kind, int64_t at, int64_t count, float *to) {
    if (kind)
        for (int64_t k = 0; k < count; k++) to[k] = bf16_to_float(((const uint16_t *)from)[at + k]);
    else
        memcpy(to, (const float *)from + at, (size_t)count * 4);
}

/* The way back. */
INLINE void narrow(const float *from, int64_t count, void *to, int64_t kind, int64_t at) {
    if (kind)
        for (int64_t k = 0; k < count; k++) ((uint16_t *)to)[at + k] = float_to_bf16(from[k]);
    else
        memcpy((float *)to + at, from, (size_t)count * 4);
}

/* One instruction; fmaxf is a call. A NaN as `a` is passed over. */
INLINE float larger(float a, float b) { return a > b ? a : b; }

/* The bits of a float without its sign. They are in the order of magnitudes, infinity comes after all numbers, and NaN
   after infinity: unlike a maximum of floats, theirs never passes over a NaN. */
INLINE uint32_t magnitude_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE int is_number(uint32_t magnitude) { return magnitude < 0x7f800000; }

INLINE uint32_t larger_magnitude(uint32_t a, uint32_t b) { return a > b ? a : b; }

INLINE TARGET uint32_t largest_magnitude(const float *values, int64_t count) {
    const __m256i no_sign = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + 8 <= count; k += 8)
        most = _mm256_max_epi32(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)(values + k)), no_sign), most);
    uint32_t lanes[8], highest = 0;
    _mm256_storeu_si256((__m256i *)lanes, most);
    for (int i = 0; i < 8; i++) highest = larger_magnitude(lanes[i], highest);
    for (; k < count; k++) highest = larger_magnitude(magnitude_of(values[k]), highest);
    return highest;
}

/* Rounding to whole numbers, the largest of the values to `limit`: what they are multiplied with, and what a whole number
   stands for. That is NaN where one of the values is NaN or infinite, and so is every sum that it scales. */
struct steps {
    float inverse, size;
};

INLINE struct steps steps_of(uint32_t magnitude, float limit) {
    const float highest = float_of(magnitude);
    if (!is_number(magnitude)) return (struct steps){0, NAN};
    return (struct steps){highest > 0 ? limit / highest : 0, highest / limit};
}

/* The first of the values that have the largest magnitude, where `above` is the largest of them and of 0 and `below` that of
   the same turned around; 0 where all are zero. Without a branch on its sign, which would be guessed. All are numbers. */
INLINE float first_extreme(const float *values, int64_t count, float above, float below) {
    if (above != below) return larger(above, below) * (float)((above > below) - (below > above));
    int64_t first = 0;
    while (first < count - 1 && fabsf(values[first]) != above) first++;
    return above > 0 ? values[first] : 0;
}

/* values * factor to the nearest whole numbers, ties to even. `count` is a multiple of 8. */
INLINE TARGET void round_all(const float *values, float factor, int64_t count, int32_t *to) {
    const __m256 factors = _mm256_set1_ps(factor);
    for (int64_t k = 0; k < count; k += 8) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(values + k), factors);
        _mm256_storeu_si256((__m256i *)(to + k), _mm256_cvtps_epi32(scaled));
    }
}

/* The scale of a group of int4 weights as bits of a float16, where the largest of them is `extreme`; NaN where they are not
   all numbers, or the scale is beyond float16. */
INLINE TARGET uint16_t int4_scale(float extreme, int are_numbers) {
    const uint16_t bits = (uint16_t)_cvtss_sh(extreme / -8.0f, _MM_FROUND_TO_NEAREST_INT);
    return are_numbers && (bits & 0x7c00) != 0x7c00 ? bits : 0x7e00;
}

/* An 8 x 8 square of 32-bit words, turned over in place: rows become columns. */
INLINE TARGET void turn_square(__m256i *square) {
    __m256i mixed[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        mixed[i] = _mm256_unpacklo_epi32(square[i], square[i + 1]);
        mixed[i + 1] = _mm256_unpackhi_epi32(square[i], square[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4)
        UNROLL for (int j = 0; j < 2; j++) {
            square[i + 2 * j] = _mm256_unpacklo_epi64(mixed[i + j], mixed[i + j + 2]);
            square[i + 2 * j + 1] = _mm256_unpackhi_epi64(mixed[i + j], mixed[i + j + 2]);
        }
    UNROLL for (int j = 0; j < 4; j++) {
        const __m256i first = _mm256_permute2x128_si256(square[j], square[j + 4], 0x20);
        square[j + 4] = _mm256_permute2x128_si256(square[j], square[j + 4], 0x31);
        square[j] = first;
    }
}

/* e^x to 2 units in the last place (Cephes' expf), in a form that compilers turn into vectors. Below -87 it is 0. */
INLINE float exp_of(float x) {
    const float within = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float k = rintf(within * 1.44269504088896341f);
    const float r = fmaf(k, 2.12194440e-4f, fmaf(k, -0.693359375f, within));
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)k + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return x < -87.0f ? 0.0f : y * scale;
}

#endif
#endif
