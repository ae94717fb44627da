/* Attention of a few query tokens over a paged KV cache, straight over the blocks, without copying them.
 *
 * A plain C interface, called through ctypes; see paged.py. Built at installation where a compiler is found; without it
 * the torch path gives the same results. Compiled for several CPUs at once (target_clones): the loader picks.
 *
 * One task is one query token and one KV head: its `group` query heads go over the keys together, so each key and
 * value is read and widened once. Softmax is computed online, a block at a time, in float32 (arXiv:1805.02867).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 16 /* floats in a vector; the head_dim must be a multiple of it */
#define MAX_DIM 256
#define MAX_GROUP 16
#define CHUNK 16 /* keys whose scores are held at a time */

typedef float floats __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

/* What a call works on; strides are in elements. `kind` 0 is float32, 1 is bfloat16. */
struct paged_call {
    const void *query;           /* [tokens, heads, dim] */
    const void *keys, *values;   /* [blocks, block_tokens, kv_heads, dim] */
    void *output;                /* as query */
    const int64_t *rows;         /* [tasks] row of the query token */
    const int64_t *first;        /* [tasks] first key that it may see */
    const int64_t *last;         /* [tasks] one behind the last */
    const int64_t *tables;       /* [tasks, table_width] blocks */
    int64_t tasks, table_width, block_tokens, heads, kv_heads, dim, kind;
    int64_t query_stride;        /* from one token to the next */
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE floats load_bf16(const uint16_t *p) {
    halves raw;
    memcpy(&raw, p, sizeof raw);
    return (floats)(__builtin_convertvector(raw, words) << 16);
}

INLINE floats load_f32(const float *p) {
    floats x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE floats load(const void *base, int64_t index, int kind) {
    return kind ? load_bf16((const uint16_t *)base + index) : load_f32((const float *)base + index);
}

INLINE uint16_t to_bf16(float x) { /* round to nearest even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float sum(floats x) {
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += x[i];
    return total;
}

/* e^x for x <= 0, to 2 units in the last place: Cephes' expf. Anything below -87 gives 0. */
INLINE floats exp_nonpositive(floats x) {
    const floats zero = {0};
    ints is_tiny = x < zero - 87.0f;
    x = (floats)(((ints)x & ~is_tiny) | ((ints)(zero - 87.0f) & is_tiny));
    floats shifted = x * 1.44269504088896341f - 0.5f;
    ints n = __builtin_convertvector(shifted, ints); /* towards zero, which for negatives rounds to nearest here */
    floats k = __builtin_convertvector(n, floats);
    x = x - k * 0.693359375f + k * 2.12194440e-4f;
    floats y = zero + 1.9875691500e-4f;
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    floats scale = (floats)((n + 127) << 23);
    return (floats)((ints)(y * scale) & ~is_tiny);
}

INLINE void attend(const struct paged_call *c, int64_t task, int64_t kv_head, int kind, int steps, int group) {
    float query[MAX_GROUP * MAX_DIM] __attribute__((aligned(64)));
    floats mixed[MAX_GROUP][MAX_DIM / WIDTH];
    float scores[MAX_GROUP][CHUNK] __attribute__((aligned(64)));
    float highest[MAX_GROUP], total[MAX_GROUP];
    const int64_t dim = c->dim, token_stride = c->kv_heads * dim;
    const int64_t *table = c->tables + task * c->table_width;
    const float scale = 1.0f / sqrtf((float)dim);
    const int64_t origin = c->rows[task] * c->query_stride + kv_head * group * dim;

    for (int g = 0; g < group; g++) {
        for (int s = 0; s < steps; s++) {
            floats q = load(c->query, origin + g * dim + s * WIDTH, kind) * scale;
            memcpy(query + g * dim + s * WIDTH, &q, sizeof q);
            mixed[g][s] = (floats){0};
        }
        highest[g] = -INFINITY;
        total[g] = 0;
    }
    for (int64_t at = c->first[task]; at < c->last[task];) {
        const int64_t inside = at % c->block_tokens;
        int64_t count = c->block_tokens - inside;
        if (count > CHUNK) count = CHUNK;
        if (count > c->last[task] - at) count = c->last[task] - at;
        const int64_t base = (table[at / c->block_tokens] * c->block_tokens + inside) * token_stride + kv_head * dim;

        for (int t = 0; t < CHUNK; t++) {
            if (t >= count) {
                for (int g = 0; g < group; g++) scores[g][t] = -INFINITY;
                continue;
            }
            floats key[MAX_DIM / WIDTH];
            for (int s = 0; s < steps; s++) key[s] = load(c->keys, base + t * token_stride + s * WIDTH, kind);
            for (int g = 0; g < group; g++) {
                floats dot = {0};
                for (int s = 0; s < steps; s++) dot += load_f32(query + g * dim + s * WIDTH) * key[s];
                scores[g][t] = sum(dot);
            }
        }
        for (int g = 0; g < group; g++) {
            float best = highest[g];
            for (int t = 0; t < CHUNK; t++) best = scores[g][t] > best ? scores[g][t] : best;
            if (best > highest[g]) {
                const float shrink = expf(highest[g] - best);
                total[g] *= shrink;
                for (int s = 0; s < steps; s++) mixed[g][s] *= shrink;
                highest[g] = best;
            }
            floats weight = exp_nonpositive(load_f32(scores[g]) - best);
            memcpy(scores[g], &weight, sizeof weight);
            total[g] += sum(weight);
        }
        for (int t = 0; t < count; t++) {
            floats value[MAX_DIM / WIDTH];
            for (int s = 0; s < steps; s++) value[s] = load(c->values, base + t * token_stride + s * WIDTH, kind);
            for (int g = 0; g < group; g++)
                for (int s = 0; s < steps; s++) mixed[g][s] += scores[g][t] * value[s];
        }
        at += count;
    }
    const int64_t target = (c->rows[task] * c->heads + kv_head * group) * dim;
    for (int g = 0; g < group; g++) {
        const float inverse = 1.0f / total[g];
        for (int s = 0; s < steps; s++) {
            floats y = mixed[g][s] * inverse;
            for (int i = 0; i < WIDTH; i++) {
                const int64_t index = target + g * dim + s * WIDTH + i;
                if (kind) ((uint16_t *)c->output)[index] = to_bf16(y[i]);
                else ((float *)c->output)[index] = y[i];
            }
        }
    }
}

/* The usual shapes with their loops unrolled, the others in general. */
INLINE void dispatch(const struct paged_call *c, int64_t task, int64_t kv_head, int kind) {
    const int steps = (int)(c->dim / WIDTH), group = (int)(c->heads / c->kv_heads);
    if (steps == 4 && group == 4) attend(c, task, kv_head, kind, 4, 4);
    else if (steps == 4 && group == 3) attend(c, task, kv_head, kind, 4, 3);
    else if (steps == 4 && group == 1) attend(c, task, kv_head, kind, 4, 1);
    else if (steps == 8 && group == 4) attend(c, task, kv_head, kind, 8, 4);
    else if (steps == 8 && group == 3) attend(c, task, kv_head, kind, 8, 3);
    else attend(c, task, kv_head, kind, steps, group);
}

CLONES static void attend_f32(const struct paged_call *c, int64_t task, int64_t kv_head) { dispatch(c, task, kv_head, 0); }
CLONES static void attend_bf16(const struct paged_call *c, int64_t task, int64_t kv_head) { dispatch(c, task, kv_head, 1); }

/* 0, or 1 when the shape is outside what this file can do. */
int lepton_paged_attention(const struct paged_call *c, int threads) {
    if (c->dim % WIDTH || c->dim > MAX_DIM || c->heads % c->kv_heads || c->heads / c->kv_heads > MAX_GROUP) return 1;
    const int64_t count = c->tasks * c->kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        if (c->kind) attend_bf16(c, i / c->kv_heads, i % c->kv_heads);
        else attend_f32(c, i / c->kv_heads, i % c->kv_heads);
    }
    return 0;
}
