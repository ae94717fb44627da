/* What the matmul kernels share: y = x W^T with W packed in panels of 16 output features (16 rows of W, side by side). */
#ifndef LEPTON_MATMUL_H
#define LEPTON_MATMUL_H

#include "vector.h"

#define PANEL 16        /* output features that a kernel computes together: two vectors of 8 floats */
#define CHUNK_ROWS 192  /* rows of x that go over the weights together: they stay in the cache meanwhile */

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

/* Put the 16 results of a row and panel in place; the last panel may reach over the end. */
INLINE void write_y(const struct matmul_call *c, int64_t row, int64_t panel, const float *values) {
    const int64_t first = panel * PANEL, count = c->out - first < PANEL ? c->out - first : PANEL;
    const int64_t at = row * c->y_stride + first;
    narrow(values, count, c->y, c->y_kind, at);
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
