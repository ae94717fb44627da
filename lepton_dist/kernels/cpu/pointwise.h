/* What pointwise.c has for a layer; described there. */
#ifndef LEPTON_POINTWISE_H
#define LEPTON_POINTWISE_H

#include <stdint.h>

void lepton_rms_norm(
    float *hidden, const void *delta, const float *weight, void *y, int64_t rows, int64_t dim, int64_t kind, float eps,
    int64_t threads
);
void lepton_add_bias(void *y, const float *bias, int64_t rows, int64_t out, int64_t kind, int64_t threads);
void lepton_norm_heads(
    void *x, const float *q_norm, const float *k_norm, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
    int64_t stride, int64_t kind, float eps, int64_t threads
);
void lepton_gated_silu(const void *x, void *y, int64_t rows, int64_t ffn, int64_t kind, int64_t threads);
void lepton_rotate(
    void *x, const float *cos, const float *sin, int64_t rows, int64_t heads, int64_t dim, int64_t half, int64_t stride,
    int64_t kind, int64_t threads
);
int lepton_write_cache(
    const void *key, const void *value, const int64_t *slots, void *keys, void *values, int64_t rows, int64_t heads,
    int64_t dim, int64_t block_tokens, int64_t blocks, int64_t stride, int64_t kind, int64_t cache_kind, int64_t threads
);

#endif
