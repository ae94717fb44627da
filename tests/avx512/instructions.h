/* The instructions of AVX-512 and AMX that the kernels use, computed without them: in the order and with the roundings of
 * Intel's manual (Software Developer's Manual, volume 2), but that numbers too small for a normal float are not flushed to
 * zero.
 *
 * vector_512.h includes this where EMULATED_512 names it.
 */
#ifndef LEPTON_EMULATED_INSTRUCTIONS_H
#define LEPTON_EMULATED_INSTRUCTIONS_H

#include <immintrin.h>

#define VECTOR(type) type __attribute__((vector_size(64), may_alias))
typedef VECTOR(float) e_floats;
typedef VECTOR(int32_t) e_words; /* what whole numbers of any width travel as */
typedef VECTOR(int64_t) e_quads;
typedef VECTOR(uint16_t) e_halves;
typedef VECTOR(uint8_t) e_bytes;
#undef VECTOR

#define __m512 e_floats
#define __m512i e_words
#define __m512bh e_words
#define E INLINE TARGET __attribute__((unused))
#define EACH(count) _Pragma("GCC unroll 1") for (int i = 0; i < (count); i++)

/* Memory. Those that want aligned addresses get what they want. */
E e_words e_load(const void *from) {
    e_words to;
    memcpy(&to, from, sizeof to);
    return to;
}
E void e_store(void *to, e_words from) { memcpy(to, &from, sizeof from); }
E e_words e_aligned_load(const void *from) { return *(const e_words *)from; }
E void e_aligned_store(void *to, e_words from) { *(e_words *)to = from; }
#define _mm512_loadu_si512 e_load
#define _mm512_loadu_ps(from) ((e_floats)e_load(from))
#define _mm512_load_si512 e_aligned_load
#define _mm512_load_ps(from) ((e_floats)e_aligned_load(from))
#define _mm512_storeu_si512 e_store
#define _mm512_storeu_ps(to, from) e_store(to, (e_words)(from))
#define _mm512_store_si512 e_aligned_store
#define _mm512_store_ps(to, from) e_aligned_store(to, (e_words)(from))

E e_floats e_maskz_loadu_ps(__mmask16 mask, const float *from) {
    e_floats to = {0};
    EACH(16) if (mask >> i & 1) to[i] = from[i];
    return to;
}
E __m256i e_maskz_loadu_epi16(__mmask16 mask, const void *from) {
    uint16_t to[16] = {0};
    EACH(16) if (mask >> i & 1) memcpy(to + i, (const uint16_t *)from + i, 2);
    return _mm256_loadu_si256((const __m256i *)to);
}
#define _mm512_maskz_loadu_ps e_maskz_loadu_ps
#define _mm256_maskz_loadu_epi16 e_maskz_loadu_epi16

/* The same everywhere. */
E e_words e_set1_epi32(int32_t x) { return (e_words){0} + x; }
E e_words e_set1_epi16(int16_t x) { return (e_words)((e_halves){0} + (uint16_t)x); }
E e_words e_set1_epi8(int8_t x) { return (e_words)((e_bytes){0} + (uint8_t)x); }
E e_floats e_set1_ps(float x) {
    e_floats to;
    EACH(16) to[i] = x;
    return to;
}
#define _mm512_set1_epi32 e_set1_epi32
#define _mm512_set1_epi16 e_set1_epi16
#define _mm512_set1_epi8 e_set1_epi8
#define _mm512_set1_ps e_set1_ps
#define _mm512_setzero_si512() ((e_words){0})
#define _mm512_setzero_ps() ((e_floats){0})
#undef _mm512_setr_epi32
#define _mm512_setr_epi32(...) ((e_words){__VA_ARGS__})

/* Arithmetic, lane by lane. */
#define _mm512_add_epi32(a, b) ((a) + (b))
#define _mm512_sub_epi32(a, b) ((a) - (b))
#define _mm512_add_epi16(a, b) ((e_words)((e_halves)(a) + (e_halves)(b)))
#define _mm512_sub_epi16(a, b) ((e_words)((e_halves)(a) - (e_halves)(b)))
#define _mm512_mullo_epi16(a, b) ((e_words)((e_halves)(a) * (e_halves)(b)))
#define _mm512_slli_epi32(a, bits) ((a) << (bits))
#define _mm512_slli_epi16(a, bits) ((e_words)((e_halves)(a) << (bits)))
#define _mm512_srli_epi16(a, bits) ((e_words)((e_halves)(a) >> (bits)))
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_and_ps(a, b) ((e_floats)((e_words)(a) & (e_words)(b)))
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_div_ps(a, b) ((a) / (b))
E e_floats e_fmadd_ps(e_floats a, e_floats b, e_floats c) {
    EACH(16) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
E e_floats e_max_ps(e_floats a, e_floats b) { /* the second where one is no number */
    EACH(16) b[i] = a[i] > b[i] ? a[i] : b[i];
    return b;
}
E e_floats e_min_ps(e_floats a, e_floats b) {
    EACH(16) b[i] = a[i] < b[i] ? a[i] : b[i];
    return b;
}
E e_words e_max_epi32(e_words a, e_words b) {
    EACH(16) b[i] = a[i] > b[i] ? a[i] : b[i];
    return b;
}
E e_words e_max_epu32(e_words a, e_words b) {
    EACH(16) b[i] = (uint32_t)a[i] > (uint32_t)b[i] ? a[i] : b[i];
    return b;
}
E e_words e_min_epi32(e_words a, e_words b) {
    EACH(16) b[i] = a[i] < b[i] ? a[i] : b[i];
    return b;
}
E e_floats e_round(e_floats a) {
    EACH(16) a[i] = rintf(a[i]);
    return a;
}
E e_floats e_scalef_ps(e_floats a, e_floats b) {
    EACH(16) a[i] = ldexpf(a[i], (int)floorf(b[i]));
    return a;
}
#define _mm512_fmadd_ps e_fmadd_ps
#define _mm512_max_ps e_max_ps
#define _mm512_min_ps e_min_ps
#define _mm512_max_epi32 e_max_epi32
#define _mm512_max_epu32 e_max_epu32
#define _mm512_min_epi32 e_min_epi32
#define _mm512_roundscale_ps(a, places) e_round(a) /* to whole numbers is all that is asked for */
#define _mm512_scalef_ps e_scalef_ps

/* Where a bit of the mask is set the second, elsewhere the first. */
E e_floats e_mask_mul_ps(e_floats from, __mmask16 mask, e_floats a, e_floats b) {
    EACH(16) from[i] = mask >> i & 1 ? a[i] * b[i] : from[i];
    return from;
}
E e_floats e_maskz_mov_ps(__mmask16 mask, e_floats a) {
    EACH(16) a[i] = mask >> i & 1 ? a[i] : 0;
    return a;
}
E e_words e_mask_mov_epi16(e_words from, uint32_t mask, e_words a) {
    e_halves to = (e_halves)from;
    EACH(32) if (mask >> i & 1) to[i] = ((e_halves)a)[i];
    return (e_words)to;
}
E e_words e_mask_mov_epi8(e_words from, uint64_t mask, e_words a) {
    e_bytes to = (e_bytes)from;
    EACH(64) if (mask >> i & 1) to[i] = ((e_bytes)a)[i];
    return (e_words)to;
}
#define _mm512_mask_mul_ps e_mask_mul_ps
#define _mm512_maskz_mov_ps e_maskz_mov_ps
#define _mm512_mask_mov_epi16 e_mask_mov_epi16
#define _mm512_mask_mov_epi8 e_mask_mov_epi8

/* From one kind of number to another. */
E e_words e_cvtps_epi32(e_floats a) { /* to nearest, ties to even */
    e_words to;
    EACH(16) to[i] = _mm_cvtss_si32(_mm_set_ss(a[i]));
    return to;
}
E e_floats e_cvtepi32_ps(e_words a) { return __builtin_convertvector(a, e_floats); }
E __m128i e_cvtepi32_epi8(e_words a) { /* their low bits */
    int8_t to[16];
    EACH(16) to[i] = (int8_t)a[i];
    return _mm_loadu_si128((const __m128i *)to);
}
E e_words e_cvtepu16_epi32(__m256i a) {
    uint16_t from[16];
    e_words to;
    memcpy(from, &a, sizeof from);
    EACH(16) to[i] = from[i];
    return to;
}
E e_floats e_cvtph_ps(__m256i a) {
    uint16_t from[16];
    e_floats to;
    memcpy(from, &a, sizeof from);
    EACH(16) to[i] = _cvtsh_ss(from[i]);
    return to;
}
E __m256i e_cvtneps_pbh(e_floats a) {
    uint16_t to[16];
    EACH(16) to[i] = float_to_bf16(a[i]);
    return _mm256_loadu_si256((const __m256i *)to);
}
E e_words e_cvtne2ps_pbh(e_floats high, e_floats low) {
    e_halves to;
    EACH(16) to[i] = float_to_bf16(low[i]);
    EACH(16) to[16 + i] = float_to_bf16(high[i]);
    return (e_words)to;
}
#define _mm512_castsi512_ps(a) ((e_floats)(a))
#define _mm512_castps_si512(a) ((e_words)(a))
#define _mm512_cvtps_epi32 e_cvtps_epi32
#define _mm512_cvtepi32_ps e_cvtepi32_ps
#define _mm512_cvtepi32_epi8 e_cvtepi32_epi8
#define _mm512_cvtepu16_epi32 e_cvtepu16_epi32
#define _mm512_cvtph_ps e_cvtph_ps
#define _mm512_cvtneps_pbh e_cvtneps_pbh
#define _mm512_cvtne2ps_pbh e_cvtne2ps_pbh

/* Products of neighbours, summed a lane: vpdpbusd and vdpbf16ps. */
E e_words add_products(e_words sum, e_words a, e_words b) { /* unsigned times signed bytes */
    EACH(16) for (int j = 0; j < 32; j += 8) sum[i] += (int32_t)((uint32_t)a[i] >> j & 255) * (int8_t)((uint32_t)b[i] >> j);
    return sum;
}
E e_words add_products_bf16(e_words sums, e_words a, e_words b) { /* the second of a pair first */
    e_floats sum = (e_floats)sums;
    EACH(16) {
        sum[i] += bf16_to_float((uint16_t)((uint32_t)a[i] >> 16)) * bf16_to_float((uint16_t)((uint32_t)b[i] >> 16));
        sum[i] += bf16_to_float((uint16_t)a[i]) * bf16_to_float((uint16_t)b[i]);
    }
    return (e_words)sum;
}

/* Over all lanes: one half with the other, again and again. */
#define REDUCE(name, type, vector, operation) \
    E type name(vector a) { \
        for (int half = 8; half; half /= 2) \
            EACH(half) { \
                const type one = a[i], other = a[i + half]; \
                a[i] = operation; \
            } \
        return a[0]; \
    }
REDUCE(e_reduce_add_ps, float, e_floats, one + other)
REDUCE(e_reduce_max_ps, float, e_floats, one > other ? one : other)
REDUCE(e_reduce_min_ps, float, e_floats, one < other ? one : other)
REDUCE(e_reduce_add_epi32, int32_t, e_words, one + other)
REDUCE(e_reduce_max_epu32, uint32_t, e_words, one > other ? one : other)
#undef REDUCE
#define _mm512_reduce_add_ps e_reduce_add_ps
#define _mm512_reduce_max_ps e_reduce_max_ps
#define _mm512_reduce_min_ps e_reduce_min_ps
#define _mm512_reduce_max_epu32 e_reduce_max_epu32
#define _mm512_reduce_add_epi32 e_reduce_add_epi32

/* From place to place. */
E e_words e_shuffle_i32x4(e_words a, e_words b, int places) { /* 128 bits at a time: two of a, two of b */
    e_words to;
    EACH(16) to[i] = (i < 8 ? a : b)[(places >> i / 4 * 2 & 3) * 4 + i % 4];
    return to;
}
E e_floats e_permutex2var_ps(e_floats a, e_words places, e_floats b) {
    e_floats to;
    EACH(16) to[i] = (places[i] & 16 ? b : a)[places[i] & 15];
    return to;
}
/* Of each 128 bits (`run` lanes) the lower or upper half of a and of b, lane about. */
#define UNPACK(name, vector, run, upper) \
    E e_words name(e_words a, e_words b) { \
        vector to; \
        EACH((int)(sizeof to / sizeof to[0])) \
        to[i] = ((vector)(i % 2 ? b : a))[i / run * run + (upper) * run / 2 + i % run / 2]; \
        return (e_words)to; \
    }
UNPACK(e_unpacklo_epi16, e_halves, 8, 0)
UNPACK(e_unpackhi_epi16, e_halves, 8, 1)
UNPACK(e_unpacklo_epi32, e_words, 4, 0)
UNPACK(e_unpackhi_epi32, e_words, 4, 1)
UNPACK(e_unpacklo_epi64, e_quads, 2, 0)
UNPACK(e_unpackhi_epi64, e_quads, 2, 1)
#undef UNPACK
#define _mm512_shuffle_i32x4 e_shuffle_i32x4
#define _mm512_permutex2var_ps e_permutex2var_ps
#define _mm512_unpacklo_epi16 e_unpacklo_epi16
#define _mm512_unpackhi_epi16 e_unpackhi_epi16
#define _mm512_unpacklo_epi32 e_unpacklo_epi32
#define _mm512_unpackhi_epi32 e_unpackhi_epi32
#define _mm512_unpacklo_epi64 e_unpacklo_epi64
#define _mm512_unpackhi_epi64 e_unpackhi_epi64

/* Tiles, all of them whole: 16 rows of 64 bytes. EMULATED_TILES says whether the kernels are to use them. */
union e_tile {
    uint8_t bytes[16][64];
    int8_t signed_bytes[16][64];
    uint16_t halves[16][32];
    int32_t words[16][16];
    float floats[16][16];
};
static __thread union e_tile e_tiles[8];
E void e_tile_load(int to, const void *from, int64_t stride) {
    EACH(16) memcpy(e_tiles[to].bytes[i], (const char *)from + i * stride, 64);
}
E void e_tile_store(int from, void *to, int64_t stride) {
    EACH(16) memcpy((char *)to + i * stride, e_tiles[from].bytes[i], 64);
}
/* Every result apart: even and odd products of a step are summed each on their own, then together, then to the rest. */
E void e_tile_dpbf16ps(int to, int a, int b) {
    for (int row = 0; row < 16; row++)
        EACH(16) {
            float even = 0, odd = 0;
            for (int k = 0; k < 16; k++) {
                even += bf16_to_float(e_tiles[a].halves[row][2 * k]) * bf16_to_float(e_tiles[b].halves[k][2 * i]);
                odd += bf16_to_float(e_tiles[a].halves[row][2 * k + 1]) * bf16_to_float(e_tiles[b].halves[k][2 * i + 1]);
            }
            e_tiles[to].floats[row][i] += even + odd;
        }
}
E void e_tile_dpbsud(int to, int a, int b) {
    for (int row = 0; row < 16; row++)
        EACH(16) for (int k = 0; k < 64; k++)
            e_tiles[to].words[row][i] += e_tiles[a].signed_bytes[row][k] * e_tiles[b].bytes[k / 4][4 * i + k % 4];
}
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(shapes) ((void)(shapes), memset(e_tiles, 0, sizeof e_tiles))
#define _tile_release() ((void)memset(e_tiles, 255, sizeof e_tiles))
#define _tile_zero(tile) ((void)memset(e_tiles + (tile), 0, sizeof e_tiles[0]))
#define _tile_loadd e_tile_load
#define _tile_stored e_tile_store
#define _tile_dpbf16ps e_tile_dpbf16ps
#define _tile_dpbsud e_tile_dpbsud

#undef E
#undef EACH
#endif
