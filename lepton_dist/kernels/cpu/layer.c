/* A decoder layer in two calls, one up to each sum over ranks: its matmuls, and all that lies between them.
 *
 * What is handed from kernel to kernel lies in memory that is kept from call to call, the same for all layers.
 */
#if defined(__x86_64__)
#include "attention.h"
#include "scratch.h"
#include "structures.h"
#include "vector.h"
#include "pointwise.h"

int lepton_paged_attention(const struct paged_call *c);

/* x [rows, in], rows `x_stride` apart, times a weight -> y. The weight's call is only read: several threads may multiply with
   one weight. As the matmul returns. */
int lepton_multiply(const struct multiply_arguments *a) {
    struct matmul_call c = *a->weight;
    c.x = a->x, c.y = a->y, c.rows = a->rows, c.threads = a->threads;
    c.x_stride = a->x_stride, c.y_stride = c.out, c.x_kind = a->x_kind, c.y_kind = a->y_kind;
    return a->rows < 1 ? 0 : a->matmul(&c);
}

static int multiply(const struct product *p, const void *x, void *y, int64_t rows, int64_t kind, int64_t threads) {
    const struct multiply_arguments a = {p->matmul, p->call, x, y, rows, p->call->in, kind, kind, threads};
    return lepton_multiply(&a);
}

/* hidden float32 [rows, hidden] += delta, where there is one; then norm, attention and the output's matmul -> result
   [rows, hidden]. 0, or 1 when there is no memory, 2 where a slot is outside of the arenas. */
int lepton_attention_half(const struct half_arguments *a) {
    const struct layer *l = a->layer;
    const int64_t size = l->kind ? 2 : 4, queries = l->heads * l->dim, width = l->kv_heads * l->dim, rows = a->rows;
    const int64_t stride = queries + 2 * width, threads = a->threads;
    char *normed = lepton_scratch(ACTIVATIONS, rows * (l->hidden + stride + queries) * size);
    if (normed == NULL) return 1;
    char *qkv = normed + rows * l->hidden * size, *mixed = qkv + rows * stride * size;
    lepton_rms_norm(a->hidden, a->delta, l->attention_norm, normed, rows, l->hidden, l->kind, l->attention_eps, threads);
    if (multiply(&l->qkv, normed, qkv, rows, l->kind, threads)) return 1;
    if (l->qkv_bias != NULL) lepton_add_bias(qkv, l->qkv_bias, rows, stride, l->kind, threads);
    if (l->q_norm != NULL)
        lepton_norm_heads(qkv, l->q_norm, l->k_norm, rows, l->heads, l->kv_heads, l->dim, stride, l->kind, l->head_eps, threads);
    lepton_rotate(qkv, a->cos, a->sin, rows, l->heads + l->kv_heads, l->dim, a->half, stride, l->kind, threads);
    const char *key = qkv + queries * size, *value = key + width * size;
    if (lepton_write_cache(
            key, value, a->slots, a->keys, a->values, rows, l->kv_heads, l->dim, a->block_tokens, a->blocks, stride, l->kind,
            a->cache_kind, threads
        ))
        return 2;
    const struct paged_call c = {
        .query = qkv, .keys = a->keys, .values = a->values, .output = mixed, .tasks = a->tasks, .tables = a->tables,
        .num_tasks = a->num_tasks, .table_width = a->table_width, .block_tokens = a->block_tokens, .heads = l->heads,
        .kv_heads = l->kv_heads, .dim = l->dim, .kind = l->kind, .cache_kind = a->cache_kind, .query_stride = stride,
        .window = l->window, .threads = threads, .level = a->level,
    };
    return lepton_paged_attention(&c) || multiply(&l->output, mixed, a->result, rows, l->kind, threads);
}

/* hidden += delta; then norm and the gated MLP -> result, as above; result may be delta. */
int lepton_mlp_half(const struct layer *l, float *hidden, const void *delta, void *result, int64_t rows, int64_t threads) {
    const int64_t size = l->kind ? 2 : 4;
    char *normed = lepton_scratch(ACTIVATIONS, rows * (l->hidden + 3 * l->ffn) * size);
    if (normed == NULL) return 1;
    char *inner = normed + rows * l->hidden * size, *gated = inner + rows * 2 * l->ffn * size;
    lepton_rms_norm(hidden, delta, l->mlp_norm, normed, rows, l->hidden, l->kind, l->mlp_eps, threads);
    if (multiply(&l->up, normed, inner, rows, l->kind, threads)) return 1;
    if (l->up_bias != NULL) lepton_add_bias(inner, l->up_bias, rows, 2 * l->ffn, l->kind, threads);
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
