/* What Python fills in: every structure here has its mirror in structures.py.
 *
 * Change one, and change the other; raise LEPTON_ABI with every change of a structure or of a function's arguments, here and
 * there. A library whose number or sizes are others is not used.
 */
#ifndef LEPTON_STRUCTURES_H
#define LEPTON_STRUCTURES_H

#include <stdint.h>

#define LEPTON_ABI 3

/* A kind of numbers is 0 for float32, 1 for bfloat16. Strides are in elements. */

/* Panels of a weight [out, in]. */
struct panels {
    void *bytes;
    float *scales;     /* of int8 panels, one an output feature */
    int64_t in, group; /* neighbouring inputs that share a scale, of int4 panels: 32, 64 or 128 */
};

/* x [rows, in] times a weight -> y [rows, out]. A weight has one of these that tells of its panels; each call takes a copy. */
struct matmul_call {
    const void *x;
    void *y;
    const void *weights; /* panels, as the packing function of the kind wrote them */
    const void *scales;  /* of the quantised kinds */
    int64_t rows, in, out, x_stride, y_stride, x_kind, y_kind, threads;
    int64_t group; /* as in struct panels */
};

/* One matmul kernel, and what it needs to know of its weights. */
struct product {
    int (*matmul)(const struct matmul_call *);
    const struct matmul_call *call;
};

/* A decoder layer: the weights of its matmuls and norms, and its sizes on this rank. What a family lacks is NULL. */
struct layer {
    struct product qkv, output, up, down;
    const float *attention_norm, *mlp_norm;
    const float *qkv_bias, *up_bias; /* as long as the products' outputs */
    const float *q_norm, *k_norm;    /* [dim], both or none */
    int64_t hidden, heads, kv_heads, dim, ffn, kind, window;
    float attention_eps, mlp_eps, head_eps;
};

/* The arguments of a function, one behind the other: from Python one costs less than each of them alone. */
struct multiply_arguments {
    int (*matmul)(const struct matmul_call *);
    const struct matmul_call *weight;
    const void *x;
    void *y; /* [rows, out], contiguous */
    int64_t rows, x_stride, x_kind, y_kind, threads;
};

struct half_arguments {
    const struct layer *layer;
    float *hidden;
    const void *delta; /* or NULL */
    void *result;      /* of the layer's kind, like delta */
    int64_t rows;
    const float *cos, *sin; /* [rows, half] */
    int64_t half;
    const int64_t *slots; /* [rows]: where keys and values go in the arenas */
    const int64_t *tasks, *tables; /* as in struct paged_call, like what follows */
    int64_t num_tasks, table_width, level;
    void *keys, *values; /* the arenas */
    int64_t blocks, block_tokens, cache_kind, threads;
};

/* What attention works on. A batch has one of these that tells of its tasks; each call takes a copy. */
struct paged_call {
    const void *query;         /* [tokens, heads, dim] */
    const void *keys, *values; /* [blocks, kv_heads, block_tokens, dim] */
    void *output;              /* [tokens, heads, dim], contiguous */
    const int64_t *tasks;      /* [num_tasks, 4]: first row, rows, keys that the first row sees, its block table */
    const int64_t *tables;     /* [sequences, table_width] blocks */
    int64_t num_tasks, table_width, block_tokens, heads, kv_heads, dim, kind, cache_kind;
    int64_t query_stride;      /* from one token to the next */
    int64_t window;            /* keys that a token sees at most; 0 for all before it */
    int64_t threads;
    int64_t level;             /* enum vector_level: the instructions to use */
};

/* Take rows [count, in] of the kind (bfloat16 panels need 1), contiguous, from output feature `first` on, the first of a
   panel. What a last panel lacks is filled up with zeros. */
typedef void pack_function(
    const struct panels *to, const void *rows, int64_t kind, int64_t first, int64_t count, int64_t threads
);

/* Rows that lie behind one another in a file. */
struct row_run {
    pack_function *pack;
    struct panels to;
    int64_t kind;
    int64_t file, offset;             /* its descriptor, and where the first row begins */
    int64_t row_bytes, skipped, kept; /* of a stored row: all of it, what lies before the wanted columns, and those */
    int64_t first, rows, step;        /* the output feature of the first, how many, and how many at once */
    int64_t pieces_before;            /* those of the runs before it */
};

struct row_loading {
    const struct row_run *runs;
    int64_t num_runs, num_pieces;
    int64_t next;   /* piece that nobody has taken */
    int64_t failed; /* a run that could not be read, or -1 */
    int64_t error;  /* errno, or 0 where its file ends early */
};

#endif
