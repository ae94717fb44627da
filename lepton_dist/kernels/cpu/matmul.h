/* What the matmul kernels share: y = x W^T with W packed in panels of output features (rows of W, side by side). */
#ifndef LEPTON_MATMUL_H
#define LEPTON_MATMUL_H

#include "scratch.h"
#include "structures.h"
#include "team.h"
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
    void (*enter)(void), (*leave)(void); /* by each thread, before and after some shares; or NULL */
    void (*expand)(const struct matmul_call *c, const void *panel, int64_t k, void *expanded); /* NULL: not expanded */
    void (*lay_out)(const struct matmul_call *c, int64_t from, int64_t count, void *block);
    multiply_function *multiply;
};

/* Panels that a thread takes together: `group` of them where rows fill many blocks, but no fewer shares than level out. */
INLINE int64_t panels_a_share(const struct matmul_call *c, int64_t group, int64_t blocks) {
    const int64_t fair = num_panels(c->out) / (4 * c->threads), most = fair < group ? fair : group;
    return blocks < MANY_BLOCKS || most < 1 ? 1 : most;
}

/* What a packing function was given, for those who share its panels. */
struct packing {
    const struct panels *to;
    const void *rows;
    int64_t kind, first, count;
};

/* A chunk of rows on its way over the weights. */
struct chunk {
    const struct matmul_call *c;
    const struct matmul_kind *kind;
    char *packed;
    int64_t from, rows, room, block_rows, blocks, share;
    int has_memory;
};

static PANEL_TARGET void lay_out_blocks(void *work, int64_t first_block, int64_t last_block) {
    const struct chunk *w = work;
    for (int64_t b = first_block; b < last_block; b++) {
        const int64_t first = b * w->block_rows, left = w->rows - first;
        w->kind->lay_out(w->c, w->from + first, left < w->block_rows ? left : w->block_rows, w->packed + first * w->kind->row_bytes);
    }
}

/* Panels [begin, end), a share, with all rows of the chunk: sums [share][room][PANEL] -> y. */
INLINE PANEL_TARGET void multiply_share(const struct chunk *w, int64_t begin, int64_t end, float *sums, void *expanded) {
    const struct matmul_call *c = w->c;
    const struct matmul_kind *kind = w->kind;
    const char *first_panel = (const char *)c->weights + begin * kind->panel_bytes;
    const char *nothing = kind->can_skip ? NULL : w->packed;
    for (int64_t k = 0; k < c->in; k += kind->depth)
        for (int64_t p = begin; p < end; p++) {
            const char *panel = first_panel + (p - begin) * kind->panel_bytes;
            const char *here = panel + kind->panel_bytes * k / c->in;
            /* What comes behind: this depth of the next panel, the first one's next depth, or another share. */
            const char *next = panel + kind->panel_bytes;
            if (p < end - 1) next = here + kind->panel_bytes;
            else if (k + kind->depth < c->in) next = first_panel + kind->panel_bytes * (k + kind->depth) / c->in;
            if (expanded != NULL) kind->expand(c, panel, k, expanded);
            for (int64_t b = 0; b < w->blocks; b++) {
                const int64_t first = b * w->block_rows, left = w->rows - first;
                /* Weights to ask for meanwhile: the next ones during the last block, those just ahead during
                   the only one, unless that is done faster than memory comes. */
                const char *soon = w->blocks > 1 ? next : here + READ_AHEAD;
                const char *ahead = b < w->blocks - 1 || w->rows < READ_AHEAD_ROWS ? nothing : soon;
                kind->multiply(
                    c, w->packed + first * kind->row_bytes, left < w->block_rows ? left : w->block_rows,
                    expanded != NULL ? expanded : panel, p, k, sums + ((p - begin) * w->room + first) * PANEL, ahead
                );
            }
        }
    for (int64_t p = begin; p < end; p++)
        for (int64_t r = 0; r < w->rows; r++) write_y(c, w->from + r, p, sums + ((p - begin) * w->room + r) * PANEL);
}

static PANEL_TARGET void multiply_shares(void *work, int64_t first, int64_t last) {
    struct chunk *w = work;
    const struct matmul_kind *kind = w->kind;
    const int64_t panels = num_panels(w->c->out);
    void *expanded = kind->expand == NULL ? NULL : lepton_scratch(EXPANDED_PANEL, kind->expanded_bytes);
    float *sums = lepton_scratch(SUMS, w->share * w->room * PANEL * 4);
    if (sums == NULL || (kind->expand != NULL && expanded == NULL)) {
        __atomic_store_n(&w->has_memory, 0, __ATOMIC_RELAXED);
        return;
    }
    if (kind->enter != NULL) kind->enter();
    for (int64_t s = first; s < last; s++) {
        const int64_t end = (s + 1) * w->share < panels ? (s + 1) * w->share : panels;
        multiply_share(w, s * w->share, end, sums, expanded);
    }
    if (kind->leave != NULL) kind->leave();
}

/* All rows with all panels. A chunk of rows at a time goes over the weights, each share of panels by one thread. 0, or 1 when
   there is no memory. */
static inline PANEL_TARGET int matmul(const struct matmul_call *c, const struct matmul_kind *kind) {
    const int64_t most = c->rows < CHUNK_ROWS ? c->rows : CHUNK_ROWS, room = up_to(most, kind->unit);
    char *packed = lepton_scratch(PRODUCT_ROWS, room * kind->row_bytes);
    struct chunk w = {.c = c, .kind = kind, .packed = packed, .room = room, .has_memory = packed != NULL};
    for (; w.has_memory && w.from < c->rows; w.from += CHUNK_ROWS) {
        w.rows = c->rows - w.from < CHUNK_ROWS ? c->rows - w.from : CHUNK_ROWS;
        const int64_t least = (w.rows + kind->rows - 1) / kind->rows;
        w.block_rows = up_to((w.rows + least - 1) / least, kind->unit);
        w.blocks = (w.rows + w.block_rows - 1) / w.block_rows;
        w.share = panels_a_share(c, kind->group, w.blocks);
        lepton_share(c->threads, w.blocks, ONE_BY_ONE, lay_out_blocks, &w);
        /* Long runs of panels first, for what is asked for ahead of a panel is the next one; short ones level what is left. */
        lepton_share(c->threads, (num_panels(c->out) + w.share - 1) / w.share, LONG_RUNS, multiply_shares, &w);
    }
    return !w.has_memory;
}

#endif
