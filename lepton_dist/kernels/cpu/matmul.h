/* What the matmul kernels share: y = x W^T with W packed in panels of output features (rows of W, side by side). */
#ifndef LEPTON_MATMUL_H
#define LEPTON_MATMUL_H

#include "scratch.h"
#include "structures.h"
#include "vector.h"

#ifndef PANEL            /* output features that a kernel computes together: two vectors of floats */
#define PANEL 16
#define PANEL_TARGET TARGET
#define NARROW narrow
#endif
#define CHUNK_ROWS 516    /* rows of x that go over the weights together: they stay in the cache meanwhile */
#define MANY_BLOCKS 4     /* of rows, from which on a thread may take several panels together */
#define READ_AHEAD_ROWS 6 /* of x from which weights are asked for ahead of need: fewer wait for memory all the time */
#define READ_AHEAD 7168   /* bytes of weights, by measurement: nearer ones come too late where memory is fast */

INLINE int64_t num_panels(int64_t out) { return (out + PANEL - 1) / PANEL; }
INLINE int64_t up_to(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

/* Put the results of a row and panel in place; the last panel may reach over the end. */
INLINE PANEL_TARGET void write_y(const struct matmul_call *c, int64_t row, int64_t panel, const float *values) {
    const int64_t first = panel * PANEL, count = c->out - first < PANEL ? c->out - first : PANEL;
    const int64_t at = row * c->y_stride + first;
    NARROW(values, count, c->y, c->y_kind, at);
}

typedef void multiply_function(
    const struct matmul_call *c, const void *block, int64_t count, const void *panel, int64_t number, int64_t k,
    float *values, const char *ahead
);

/* What tells the kinds apart: x is laid out in blocks of up to `rows` rows, `row_bytes` each, and a block is multiplied
   with a panel of `panel_bytes`: at once, or `depth` of `in` after `depth`, each expanded once for all blocks, in which
   case `multiply` adds to `values` from the second on. Blocks are multiples of `unit` rows but the last, which has room for
   one. Blocks that together are larger than the second cache stay there a depth at a time while `group` panels go by. */
struct matmul_kind {
    int64_t rows, row_bytes, panel_bytes, depth, expanded_bytes, unit, group;
    int can_skip; /* whether `ahead` may be NULL, or is memory that is there already: asking again costs less than a branch */
    void (*enter)(void), (*leave)(void); /* by each thread, before and after all its blocks; or NULL */
    void (*expand)(const struct matmul_call *c, const void *panel, int64_t k, void *expanded); /* NULL: not expanded */
    void (*lay_out)(const struct matmul_call *c, int64_t from, int64_t count, void *block);
    multiply_function *multiply;
};

/* Panels that a thread takes together: `group` of them where rows fill many blocks, but no fewer shares than level out. */
INLINE int64_t panels_a_share(const struct matmul_call *c, int64_t group, int64_t blocks) {
    const int64_t fair = num_panels(c->out) / (4 * c->threads), most = fair < group ? fair : group;
    return blocks < MANY_BLOCKS || most < 1 ? 1 : most;
}

/* All rows with all panels. A chunk of rows at a time goes over the weights, each share of panels by one thread. 0, or 1 when
   there is no memory. */
static inline PANEL_TARGET int matmul(const struct matmul_call *c, const struct matmul_kind *kind) {
    const int64_t most = c->rows < CHUNK_ROWS ? c->rows : CHUNK_ROWS, room = up_to(most, kind->unit);
    char *packed = lepton_scratch(PRODUCT_ROWS, room * kind->row_bytes);
    int has_memory = packed != NULL;
    for (int64_t from = 0; has_memory && from < c->rows; from += CHUNK_ROWS) {
        const int64_t rows = c->rows - from < CHUNK_ROWS ? c->rows - from : CHUNK_ROWS;
        const int64_t least = (rows + kind->rows - 1) / kind->rows;
        const int64_t block_rows = up_to((rows + least - 1) / least, kind->unit), blocks = (rows + block_rows - 1) / block_rows;
        const int64_t panels = num_panels(c->out), share = panels_a_share(c, kind->group, blocks);
        const char *nothing = kind->can_skip ? NULL : packed;
#pragma omp parallel num_threads(c->threads)
        {
            void *expanded = kind->expand == NULL ? NULL : lepton_scratch(EXPANDED_PANEL, kind->expanded_bytes);
            float *sums = lepton_scratch(SUMS, share * room * PANEL * 4); /* [share][room][PANEL] */
            const int can_run = sums != NULL && (kind->expand == NULL || expanded != NULL);
            if (!can_run) {
#pragma omp atomic write
                has_memory = 0;
            }
            if (kind->enter != NULL) kind->enter();
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = b * block_rows, left = rows - first;
                kind->lay_out(c, from + first, left < block_rows ? left : block_rows, packed + first * kind->row_bytes);
            }
/* Long runs of panels first, for what is asked for ahead of a panel is the next one; short ones level what is left. */
#pragma omp for schedule(guided, 1)
            for (int64_t begin = 0; begin < panels; begin += share) {
                const int64_t end = begin + share < panels ? begin + share : panels;
                const char *first_panel = (const char *)c->weights + begin * kind->panel_bytes;
                for (int64_t k = 0; can_run && k < c->in; k += kind->depth)
                    for (int64_t p = begin; p < end; p++) {
                        const char *panel = first_panel + (p - begin) * kind->panel_bytes;
                        const char *here = panel + kind->panel_bytes * k / c->in;
                        /* What comes behind: this depth of the next panel, the first one's next depth, or another share. */
                        const char *next = panel + kind->panel_bytes;
                        if (p < end - 1) next = here + kind->panel_bytes;
                        else if (k + kind->depth < c->in) next = first_panel + kind->panel_bytes * (k + kind->depth) / c->in;
                        if (expanded != NULL) kind->expand(c, panel, k, expanded);
                        for (int64_t b = 0; b < blocks; b++) {
                            const int64_t first = b * block_rows, left = rows - first;
                            /* Weights to ask for meanwhile: the next ones during the last block, those just ahead during
                               the only one, unless that is done faster than memory comes. */
                            const char *soon = blocks > 1 ? next : here + READ_AHEAD;
                            const char *ahead = b < blocks - 1 || rows < READ_AHEAD_ROWS ? nothing : soon;
                            kind->multiply(
                                c, packed + first * kind->row_bytes, left < block_rows ? left : block_rows,
                                expanded != NULL ? expanded : panel, p, k, sums + ((p - begin) * room + first) * PANEL, ahead
                            );
                        }
                    }
                for (int64_t p = begin; can_run && p < end; p++)
                    for (int64_t r = 0; r < rows; r++) write_y(c, from + r, p, sums + ((p - begin) * room + r) * PANEL);
            }
            if (kind->leave != NULL) kind->leave();
        }
    }
    return !has_memory;
}

#endif
