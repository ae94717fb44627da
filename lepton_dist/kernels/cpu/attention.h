/* What the attention kernels share: the call, where keys and values lie, and sums across a vector. */
#ifndef LEPTON_ATTENTION_H
#define LEPTON_ATTENTION_H

#include "structures.h"
#include "team.h"
#include "vector.h"

#define KEYS 16 /* keys whose scores are held at a time */
#define MAX_DIM 256
#define MAX_ROWS 32 /* query tokens x query heads of a task */

/* The sums of four vectors. */
INLINE TARGET __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

/* Where the key or value at position `at` of a sequence begins. */
INLINE int64_t place(const struct paged_call *c, const int64_t *table, int64_t kv_head, int64_t at) {
    return ((table[at / c->block_tokens] * c->kv_heads + kv_head) * c->block_tokens + at % c->block_tokens) * c->dim;
}

/* Ask for memory ahead of need: blocks lie anywhere, and no hardware guesses the next. */
INLINE void fetch(const void *from, int64_t kind, int64_t at, int64_t count) {
    const char *first = (const char *)from + at * (kind ? 2 : 4);
    for (int64_t i = 0; i < count * (kind ? 2 : 4); i += 64) ask_for(first + i);
}

#endif
