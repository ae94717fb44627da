/* Attention over a paged KV cache, straight over the blocks, for prefill and decode alike.
 *
 * One task is a few query tokens of one sequence and one KV head: all their query heads go over the keys together, so
 * each key and value is widened once for up to 32 rows. Softmax is computed online, 16 keys at a time, in float32
 * (arXiv:1805.02867); nothing of the cache is copied out of it (arXiv:2309.06180).
 */
#if defined(__x86_64__)
#include "decode_attention.h"
#if defined(HAS_AVX512)
#include "attention_512.h"
#endif

/* A task's rows, two at a time; an odd one has zeros beside it. All but the weights are [..][dim], one row directly
   behind the other: rows a power of two apart would push each other out of the cache. */
struct rows {
    float query[MAX_ROWS * MAX_DIM] __attribute__((aligned(64)));
    float mixed[MAX_ROWS * MAX_DIM] __attribute__((aligned(64)));
    float keys[KEYS * MAX_DIM] __attribute__((aligned(64)));
    float values[KEYS * MAX_DIM] __attribute__((aligned(64)));
    float weights[MAX_ROWS][KEYS] __attribute__((aligned(64)));
    float highest[MAX_ROWS], total[MAX_ROWS], shrink[MAX_ROWS];
};

/* Scores of rows r and r + 1 with all the keys: 2 x 4 sums at a time. */
INLINE TARGET void score(struct rows *w, int64_t r, int64_t dim) {
    for (int t = 0; t < KEYS; t += 4) {
        __m256 sum[8];
        UNROLL for (int i = 0; i < 8; i++) sum[i] = _mm256_setzero_ps();
        for (int64_t d = 0; d < dim; d += 8) {
            const __m256 first = _mm256_load_ps(w->query + r * dim + d), second = _mm256_load_ps(w->query + (r + 1) * dim + d);
            UNROLL for (int i = 0; i < 4; i++) {
                const __m256 key = _mm256_load_ps(w->keys + (t + i) * dim + d);
                sum[i] = _mm256_fmadd_ps(first, key, sum[i]);
                sum[4 + i] = _mm256_fmadd_ps(second, key, sum[4 + i]);
            }
        }
        _mm_store_ps(w->weights[r] + t, sums_of(sum[0], sum[1], sum[2], sum[3]));
        _mm_store_ps(w->weights[r + 1] + t, sums_of(sum[4], sum[5], sum[6], sum[7]));
    }
}

/* The scores of a row become weights; keys outside [from, to) of the 16 get none. */
INLINE TARGET void weigh(struct rows *w, int64_t r, int64_t from, int64_t to) {
    float *weights = w->weights[r];
    w->shrink[r] = 1;
    if (to <= 0 || from >= to || from >= KEYS) { /* by place, not by score: one that is no number is seen too */
        memset(weights, 0, KEYS * 4);
        return;
    }
    if (from > 0 || to < KEYS)
        for (int64_t t = 0; t < KEYS; t++) weights[t] = t < from || t >= to ? -INFINITY : weights[t];
    float best = w->highest[r];
    for (int64_t t = 0; t < KEYS; t++) best = larger(weights[t], best);
    if (best > w->highest[r]) {
        w->shrink[r] = exp_of(w->highest[r] - best);
        w->highest[r] = best;
    }
    float sum = 0;
    for (int64_t t = 0; t < KEYS; t++) {
        weights[t] = exp_of(weights[t] - best);
        sum += weights[t];
    }
    w->total[r] = w->total[r] * w->shrink[r] + sum;
}

/* Add the weighted values to rows r and r + 1, `vectors` of 8 channels from channel d on. */
INLINE TARGET void mix(struct rows *w, int64_t r, int64_t d, int64_t dim, int64_t count, const int vectors) {
    float *mixed0 = w->mixed + r * dim + d, *mixed1 = mixed0 + dim;
    __m256 sum[8];
    const __m256 shrink0 = _mm256_set1_ps(w->shrink[r]), shrink1 = _mm256_set1_ps(w->shrink[r + 1]);
    UNROLL for (int i = 0; i < vectors; i++) {
        sum[i] = _mm256_mul_ps(shrink0, _mm256_load_ps(mixed0 + 8 * i));
        sum[4 + i] = _mm256_mul_ps(shrink1, _mm256_load_ps(mixed1 + 8 * i));
    }
    for (int64_t t = 0; t < count; t++) {
        const __m256 weight0 = _mm256_broadcast_ss(w->weights[r] + t);
        const __m256 weight1 = _mm256_broadcast_ss(w->weights[r + 1] + t);
        UNROLL for (int i = 0; i < vectors; i++) {
            const __m256 value = _mm256_load_ps(w->values + t * dim + d + 8 * i);
            sum[i] = _mm256_fmadd_ps(weight0, value, sum[i]);
            sum[4 + i] = _mm256_fmadd_ps(weight1, value, sum[4 + i]);
        }
    }
    UNROLL for (int i = 0; i < vectors; i++) {
        _mm256_store_ps(mixed0 + 8 * i, sum[i]);
        _mm256_store_ps(mixed1 + 8 * i, sum[4 + i]);
    }
}

static TARGET void attend(const struct paged_call *c, const int64_t *task, int64_t kv_head, struct rows *w) {
    const int64_t dim = c->dim, group = c->heads / c->kv_heads;
    const int64_t row = task[0], tokens = task[1], seen = task[2], rows = tokens * group;
    const int64_t *table = c->tables + task[3] * c->table_width;
    const float scale = 1.0f / sqrtf((float)dim);

    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = (row + r / group) * c->query_stride + (kv_head * group + r % group) * dim;
        widen(c->query, c->kind, at, dim, w->query + r * dim);
        for (int64_t d = 0; d < dim; d++) w->query[r * dim + d] *= scale;
    }
    if (rows % 2) memset(w->query + rows * dim, 0, (size_t)dim * 4);
    for (int64_t r = 0; r < rows + rows % 2; r++) {
        memset(w->mixed + r * dim, 0, (size_t)dim * 4);
        w->highest[r] = -INFINITY;
        w->total[r] = 0;
    }
    const int64_t last = seen + tokens - 1;
    for (int64_t at = c->window && seen > c->window ? seen - c->window : 0; at < last;) {
        const int64_t inside = at % c->block_tokens;
        int64_t count = c->block_tokens - inside;
        if (count > KEYS) count = KEYS;
        if (count > last - at) count = last - at;
        const int64_t base = place(c, table, kv_head, at);
        if (at + count < last) {
            const int64_t next = place(c, table, kv_head, at + count);
            fetch(c->keys, c->cache_kind, next, KEYS * dim);
            fetch(c->values, c->cache_kind, next, KEYS * dim);
        }
        widen(c->keys, c->cache_kind, base, count * dim, w->keys);
        widen(c->values, c->cache_kind, base, count * dim, w->values);
        for (int64_t t = count; t < KEYS; t++) memset(w->keys + t * dim, 0, (size_t)dim * 4);
        for (int64_t r = 0; r < rows; r += 2) {
            score(w, r, dim);
            for (int64_t i = r; i < r + 2; i++) {
                const int64_t end = seen + (i < rows ? i : r) / group - at; /* keys of these 16 that row i may see */
                weigh(w, i, c->window ? end - c->window : 0, end < count ? end : count);
            }
            int64_t d = 0;
            for (; d + 32 <= dim; d += 32) mix(w, r, d, dim, count, 4);
            for (; d < dim; d += 8) mix(w, r, d, dim, count, 1);
        }
        at += count;
    }
    for (int64_t r = 0; r < rows; r++) {
        const float inverse = 1.0f / w->total[r];
        for (int64_t d = 0; d < dim; d++) w->mixed[r * dim + d] *= inverse;
        narrow(w->mixed + r * dim, dim, c->output, c->kind, ((row + r / group) * c->heads + kv_head * group + r % group) * dim);
    }
}

/* KV heads that a thread takes at a time, `most` of them at most. In a step of decoding many: memory is then read in its order.
   Not so many that a thread waits for another's last for more than a quarter of its time; one sequence falls into equal
   parts. */
INLINE int64_t kv_heads_a_time(const struct paged_call *c, int64_t most) {
    int64_t longest = 0, total = 0;
    for (int64_t i = 0; i < c->num_tasks; i++) {
        const int64_t tokens = c->tasks[4 * i + 1], keys = c->tasks[4 * i + 2];
        if (tokens > 1) return 1;
        total += keys;
        longest = keys > longest ? keys : longest;
    }
    for (int64_t heads = most; heads > 1; heads--) {
        if (c->kv_heads % heads) continue;
        if (4 * longest * heads * c->threads <= total * c->kv_heads) return heads;
        if (c->num_tasks == 1 && c->kv_heads / heads % c->threads == 0) return heads;
    }
    return 1;
}

/* A call, and how its tasks are taken: some KV heads at a time, `parts` times for all. */
struct attention {
    const struct paged_call *c;
    int64_t heads, parts;
    int few, tiles;
};

static void attend_some(void *work, int64_t begin, int64_t end) {
    const struct attention *w = work;
    const struct paged_call *c = w->c;
    const int64_t count = c->num_tasks * w->parts;
    union {
        struct rows rows;
#if defined(HAS_AVX512)
        struct tile_work tile;
#endif
    } room;
    /* The last tasks of a prompt see the most keys: the longest first, so that threads end together. */
    for (int64_t n = begin; n < end; n++) {
        const int64_t i = count - 1 - n, *task = c->tasks + i / w->parts * 4, first = i % w->parts * w->heads;
#if defined(HAS_AVX512)
        if (w->tiles) {
            attend_tiles(c, task, first, w->heads, &room.tile);
            continue;
        }
#endif
        if (w->few && task[1] == 1) decode(c, task, first, w->heads);
        else attend(c, task, first, &room.rows);
    }
}

/* 0, or 1 when the shape is outside what this file can do. The call is only read. */
int lepton_paged_attention(const struct paged_call *c) {
    const int64_t group = c->heads / c->kv_heads;
    if (c->dim % 8 || c->dim > MAX_DIM || c->heads % c->kv_heads || group > MAX_ROWS) return 1;
    const int few = c->cache_kind == 1 && c->dim % 16 == 0 && group <= 2 * FEW_ROWS;
#if defined(HAS_AVX512)
    const int is_bf16 = c->kind == 1 && c->cache_kind == 1;
    const int tiles = c->level == AVX512 && is_bf16 && c->dim % 32 == 0 && c->block_tokens % RUN == 0;
#else
    const int tiles = 0;
#endif
    const int64_t heads = kv_heads_a_time(c, tiles ? MAX_ROWS / group : few ? most_kv_heads(group) : 1);
    struct attention work = {c, heads, c->kv_heads / heads, few, tiles};
    lepton_share(c->threads, c->num_tasks * work.parts, ONE_BY_ONE, attend_some, &work);
    return 0;
}
#endif
