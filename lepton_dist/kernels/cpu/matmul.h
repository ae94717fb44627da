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

/* What tells the kinds apart: x is laid out in blocks of up to `rows` rows, `row_bytes` each, and a block is multiplied
   with a panel of `panel_bytes`. */
struct matmul_kind {
    int64_t rows, row_bytes, panel_bytes;
    void (*lay_out)(const struct matmul_call *c, int64_t from, int64_t count, void *block);
    void (*multiply)(
        const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, float *values
    );
};

/* All rows with all panels. A chunk of rows at a time goes over the weights, each panel by one thread. 0, or 1 when there is
   no memory. */
static inline int matmul(const struct matmul_call *c, const struct matmul_kind *kind) {
    const int64_t most = c->rows < CHUNK_ROWS ? c->rows : CHUNK_ROWS;
    char *packed = scratch(most * kind->row_bytes);
    if (packed == NULL) return 1;
    for (int64_t from = 0; from < c->rows; from += CHUNK_ROWS) {
        const int64_t rows = c->rows - from < CHUNK_ROWS ? c->rows - from : CHUNK_ROWS;
        const int64_t blocks = (rows + kind->rows - 1) / kind->rows;
#pragma omp parallel num_threads(c->threads)
        {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = b * kind->rows, left = rows - first;
                kind->lay_out(c, from + first, left < kind->rows ? left : kind->rows, packed + first * kind->row_bytes);
            }
#pragma omp for schedule(dynamic, 2)
            for (int64_t p = 0; p < num_panels(c->out); p++) {
                const char *panel = (const char *)c->weights + p * kind->panel_bytes;
                for (int64_t b = 0; b < blocks; b++) {
                    const int64_t first = b * kind->rows, left = rows - first;
                    const int64_t count = left < kind->rows ? left : kind->rows;
                    float values[6 * PANEL] __attribute__((aligned(64)));
                    kind->multiply(c, packed + first * kind->row_bytes, count, panel, p, values);
                    for (int64_t r = 0; r < count; r++) write_y(c, from + first + r, p, values + r * PANEL);
                }
            }
        }
    }
    return 0;
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
