/* What the matmul kernels share: y = x W^T with W packed in panels of 16 output features (16 rows of W, side by side).
 *
 * A plain C interface, called through ctypes; see matmul.py. The kernels are written for AVX2 with FMA and F16C, which
 * every x86 server has had since 2013; lepton_matmul_is_supported says whether this machine does.
 */
#ifndef LEPTON_MATMUL_H
#define LEPTON_MATMUL_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PANEL 16        /* output features that a kernel computes together: two vectors of 8 floats */
#define CHUNK_ROWS 192  /* rows of x that go over the weights together: they stay in the cache meanwhile */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16") /* the sums of a kernel must all be registers: every short loop is unrolled */
#define TARGET __attribute__((target("avx2,fma,f16c")))

/* x [rows, in] and y [rows, out]; a kind of 0 is float32, 1 is bfloat16. Strides are in elements. */
struct matmul_call {
    const void *x;
    void *y;
    const void *weights; /* panels, as the packing function of the kind wrote them */
    const void *scales;  /* of the quantised kinds */
    int64_t rows, in, out, x_stride, y_stride, x_kind, y_kind, threads;
};

INLINE int64_t num_panels(int64_t out) { return (out + PANEL - 1) / PANEL; }

/* Memory for a call, kept from one to the next: a step makes hundreds of calls of the same few sizes. */
static inline void *scratch(int64_t bytes) {
    static __thread void *kept;
    static __thread int64_t capacity;
    if (bytes > capacity) {
        free(kept);
        capacity = (bytes + 4095) / 4096 * 4096;
        kept = aligned_alloc(4096, (size_t)capacity);
        if (kept == NULL) capacity = 0;
    }
    return kept;
}

INLINE float bf16_to_float(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint16_t float_to_bf16(float x) { /* round to nearest even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* `count` values from index `at` of an array of the kind, as floats. */
INLINE void widen(const void *from, int64_t kind, int64_t at, int64_t count, float *to) {
    if (kind)
        for (int64_t k = 0; k < count; k++) to[k] = bf16_to_float(((const uint16_t *)from)[at + k]);
    else
        memcpy(to, (const float *)from + at, (size_t)count * 4);
}

INLINE float largest_magnitude(const float *values, int64_t count) {
    float highest = 0;
    for (int64_t k = 0; k < count; k++) highest = fmaxf(highest, fabsf(values[k]));
    return highest;
}

/* Put the 16 results of a row and panel in place; the last panel may reach over the end. */
INLINE void write_y(const struct matmul_call *c, int64_t row, int64_t panel, const float *values) {
    const int64_t first = panel * PANEL, count = c->out - first < PANEL ? c->out - first : PANEL;
    const int64_t at = row * c->y_stride + first;
    if (c->y_kind)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)c->y)[at + i] = float_to_bf16(values[i]);
    else
        memcpy((float *)c->y + at, values, (size_t)count * 4);
}

/* Runs KERNEL(rows) for the number of rows left, a constant in each case, so that its loops unroll. */
#define FOR_ROWS_UP_TO_6(left, KERNEL) \
    switch (left) { \
    case 1: KERNEL(1); break; \
    case 2: KERNEL(2); break; \
    case 3: KERNEL(3); break; \
    case 4: KERNEL(4); break; \
    case 5: KERNEL(5); break; \
    default: KERNEL(6); break; \
    }

#endif
