/* A decoder layer in two calls, one up to each sum over ranks: its matmuls, and all that lies between them.
 *
 * What is handed from kernel to kernel lies in memory that is kept from call to call, the same for all layers.
 */
#if defined(__x86_64__)
#include "attention.h"
#include "matmul.h"
#include "pointwise.h"

int lepton_paged_attention(const struct paged_call *c);

/* One matmul kernel, and what it needs to know of its weights. */
struct product {
    int (*matmul)(const struct matmul_call *);
    const struct matmul_call *call;
};

struct layer {
    struct product qkv, output, up, down;
    const float *attention_norm, *mlp_norm;
    int64_t hidden, heads, kv_heads, dim, ffn, kind, window;
    float attention_eps, mlp_eps;
};

/* Where a batch goes in the cache, and the rotations of its tokens: cos and sin float32 [rows, half]. */
struct places {
    const float *cos, *sin;
    const int64_t *slots;
    const struct paged_call *tasks; /* all but the tensors */
    void *keys, *values;
    int64_t half, block_tokens, cache_kind;
};

/* x [rows, in] times the weights -> y [rows, out], both of the kind. */
static int multiply(const struct product *p, const void *x, void *y, int64_t rows, int64_t kind, int64_t threads) {
    struct matmul_call c = *p->call;
    c.x = x, c.y = y, c.rows = rows, c.threads = threads;
    c.x_stride = c.in, c.y_stride = c.out, c.x_kind = c.y_kind = kind;
    return p->matmul(&c);
}

/* hidden float32 [rows, hidden] += delta, where there is one; then norm, attention and the output's matmul -> result
   [rows, hidden] of the kind. 0, or 1 when there is no memory. */
int lepton_attention_half(
    const struct layer *l, const struct places *at, float *hidden, const void *delta, void *result, int64_t rows, int64_t threads
) {
    const int64_t size = l->kind ? 2 : 4, queries = l->heads * l->dim, keys = l->kv_heads * l->dim;
    const int64_t stride = queries + 2 * keys;
    char *normed = scratch(ACTIVATIONS, rows * (l->hidden + stride + queries) * size);
    if (normed == NULL) return 1;
    char *qkv = normed + rows * l->hidden * size, *mixed = qkv + rows * stride * size;
    lepton_rms_norm(hidden, delta, l->attention_norm, normed, rows, l->hidden, l->kind, l->attention_eps, threads);
    if (multiply(&l->qkv, normed, qkv, rows, l->kind, threads)) return 1;
    lepton_rotate(qkv, at->cos, at->sin, rows, l->heads + l->kv_heads, l->dim, at->half, stride, l->kind, threads);
    const char *key = qkv + queries * size, *value = key + keys * size;
    lepton_write_cache(
        key, value, at->slots, at->keys, at->values, rows, l->kv_heads, l->dim, at->block_tokens, stride, l->kind,
        at->cache_kind, threads
    );
    struct paged_call c = *at->tasks;
    c.query = qkv, c.keys = at->keys, c.values = at->values, c.output = mixed;
    c.heads = l->heads, c.kv_heads = l->kv_heads, c.dim = l->dim, c.block_tokens = at->block_tokens;
    c.kind = l->kind, c.cache_kind = at->cache_kind, c.query_stride = stride, c.window = l->window;
    return lepton_paged_attention(&c) || multiply(&l->output, mixed, result, rows, l->kind, threads);
}

/* hidden += delta; then norm and the gated MLP -> result, as above; result may be delta. */
int lepton_mlp_half(const struct layer *l, float *hidden, const void *delta, void *result, int64_t rows, int64_t threads) {
    const int64_t size = l->kind ? 2 : 4;
    char *normed = scratch(ACTIVATIONS, rows * (l->hidden + 3 * l->ffn) * size);
    if (normed == NULL) return 1;
    char *inner = normed + rows * l->hidden * size, *gated = inner + rows * 2 * l->ffn * size;
    lepton_rms_norm(hidden, delta, l->mlp_norm, normed, rows, l->hidden, l->kind, l->mlp_eps, threads);
    if (multiply(&l->up, normed, inner, rows, l->kind, threads)) return 1;
    lepton_gated_silu(inner, gated, rows, l->ffn, l->kind, threads);
    return multiply(&l->down, gated, result, rows, l->kind, threads);
}

/* In place of a matmul whose time is not to count: y is 0. */
int lepton_matmul_nothing(const struct matmul_call *c) {
    for (int64_t r = 0; r < c->rows; r++)
        memset((char *)c->y + r * c->y_stride * (c->y_kind ? 2 : 4), 0, (size_t)(c->out * (c->y_kind ? 2 : 4)));
    return 0;
}
#endif
