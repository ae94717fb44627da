/* Matrix instructions (AMX): 16 rows of x at a time, 64 bytes of each, with 64 bytes of 16 output features, in tiles.
 *
 * Eight tile registers hold 16 rows of 64 bytes each: two with rows of x, two with weights, four with the sums of 32 rows
 * and 32 features, a panel. Weights are read as they lie in the panels of matmul_512.h: words (two bfloat16, or four
 * bytes) of neighbouring k, [words][2 x 16 features].
 */
#ifndef LEPTON_TILES_H
#define LEPTON_TILES_H

#include "vector_512.h"

#define TILE_ROWS 16
#define MOST_TILE_ROWS (2 * TILE_ROWS)                   /* of x, whose sums are held */
#define TILE_WORDS 16                                    /* words of k that an instruction goes over */
#define PANEL_STRIDE 128                                 /* bytes from one word, or row of sums, of a panel to the next */

/* Rows of x for a matmul lie in blocks as tiles are: [words / 16][rows][16 words]. */
INLINE int64_t tile_place(int64_t word, int64_t row, int64_t rows) {
    return (word / TILE_WORDS * rows + row) * TILE_WORDS + word % TILE_WORDS;
}

#if defined(HAS_TILES)

/* All tiles whole. For the calling thread, until `put_tiles_away`; others than us may use them in between. */
INLINE TARGET_TILES void take_tiles(void) {
    /* Constant: compilers do not know that all of it is read. */
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } whole = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS},
    };
    _tile_loadconfig(&whole);
}

INLINE TARGET_TILES void put_tiles_away(void) { _tile_release(); }

INLINE TARGET_TILES void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Sums of 16 or, if `is_wide`, 32 rows and 32 features, `stride` bytes from row to row, from and to memory. */
INLINE TARGET_TILES void load_sums(const void *sums, int64_t stride, int is_wide) {
    const char *at = sums, *below = at + TILE_ROWS * stride;
    _tile_loadd(0, at, stride);
    _tile_loadd(1, at + 64, stride);
    if (!is_wide) return;
    _tile_loadd(2, below, stride);
    _tile_loadd(3, below + 64, stride);
}

INLINE TARGET_TILES void store_sums(void *sums, int64_t stride, int is_wide) {
    char *at = sums, *below = at + TILE_ROWS * stride;
    _tile_stored(0, at, stride);
    _tile_stored(1, at + 64, stride);
    if (!is_wide) return;
    _tile_stored(2, below, stride);
    _tile_stored(3, below + 64, stride);
}

/* What a product goes over: rows of x, `x_stride` bytes from one to the next and `x_step` from an instruction's words to
   the next one's; weights likewise. */
struct tile_strides {
    int64_t x_stride, x_step, weight_stride;
};

/* `multiply_tiles` where `is_wide` and `word` are constants. */
INLINE TARGET_TILES void multiply_tiles_of(
    const char *x, const char *weights, struct tile_strides by, int64_t steps, const int is_wide, const enum word word,
    const char *ahead
) {
    for (int64_t s = 0; s < steps; s++, x += by.x_step, weights += TILE_WORDS * by.weight_stride) {
        if (ahead != NULL)
            for (int64_t i = 0; i < TILE_WORDS; i++) read_ahead(ahead + (s * TILE_WORDS + i) * PANEL_STRIDE);
        _tile_loadd(6, weights, by.weight_stride);
        _tile_loadd(7, weights + 64, by.weight_stride);
        _tile_loadd(4, x, by.x_stride);
        if (is_wide) _tile_loadd(5, x + TILE_ROWS * by.x_stride, by.x_stride);
        if (word == HALVES) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (is_wide) _tile_dpbf16ps(2, 5, 6);
            if (is_wide) _tile_dpbf16ps(3, 5, 7);
        } else { /* x is signed, weights are not */
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            if (is_wide) _tile_dpbsud(2, 5, 6);
            if (is_wide) _tile_dpbsud(3, 5, 7);
        }
    }
}

/* Add x [rows][steps][16 words] times weights [steps][16 words][2 x 16 features] to the sums. `ahead` is what to ask memory
   for meanwhile, or NULL. `word` is a constant where this is called. */
INLINE TARGET_TILES void multiply_tiles(
    const void *x, const void *weights, struct tile_strides by, int64_t steps, int is_wide, const enum word word,
    const char *ahead
) {
    __asm__ volatile("" ::: "memory"); /* compilers do not know that tiles are loaded from memory: all must be there */
    if (is_wide) multiply_tiles_of(x, weights, by, steps, 1, word, ahead);
    else multiply_tiles_of(x, weights, by, steps, 0, word, ahead);
}

/* Rows of a matmul's block, times a panel, added to the sums. */
INLINE TARGET_TILES void multiply_block(
    const void *x, const void *panel, int64_t steps, int is_wide, const enum word word, const char *ahead
) {
    const struct tile_strides strides = {64, (is_wide ? MOST_TILE_ROWS : TILE_ROWS) * 64, PANEL_STRIDE};
    multiply_tiles(x, panel, strides, steps, is_wide, word, ahead);
}

#endif
#endif
