/* Rows of stored matrices on their way from files into panels, some at a time by every thread that helps.
 *
 * A piece is packed while it is still in the cache of the thread that read it. No lock of Python's is held meanwhile, so
 * one thread can be at it while the process still imports torch, and others join it later.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "structures.h"

/* Returns 0, a system error's number, or -1 where the file ends before. */
static int fetch(int file, char *to, int64_t bytes, int64_t offset) {
    while (bytes > 0) {
        const ssize_t got = pread(file, to, (size_t)bytes, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) return -1;
        to += got, offset += got, bytes -= got;
    }
    return 0;
}

static void give_up(struct row_loading *l, int64_t run, int error) {
#pragma omp critical
    if (l->failed < 0) l->failed = run, l->error = error;
    __atomic_store_n(&l->next, l->num_pieces, __ATOMIC_RELAXED);
}

static void load_piece(struct row_loading *l, int64_t number, int64_t piece, char *buffer) {
    const struct row_run *run = l->runs + number;
    const int64_t from = (piece - run->pieces_before) * run->step;
    const int64_t count = run->rows - from < run->step ? run->rows - from : run->step;
    const int problem = fetch((int)run->file, buffer, count * run->row_bytes, run->offset + from * run->row_bytes);
    if (problem) {
        give_up(l, number, problem > 0 ? problem : 0);
        return;
    }
    if (run->kept < run->row_bytes)
        for (int64_t r = 0; r < count; r++) memmove(buffer + r * run->kept, buffer + r * run->row_bytes + run->skipped, run->kept);
    run->pack(&run->to, buffer, run->kind, run->first + from, count, 1);
}

/* Take pieces until none is left. Threads of other calls may take some of the same loading, and still be at their last. */
void lepton_load_rows(struct row_loading *l, int64_t threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < l->num_runs; i++)
        if (l->runs[i].step * l->runs[i].row_bytes > most) most = l->runs[i].step * l->runs[i].row_bytes;
#pragma omp parallel num_threads(threads)
    {
        char *buffer = malloc((size_t)(most > 0 ? most : 1));
        int64_t number = 0, piece;
        if (buffer == NULL) give_up(l, 0, ENOMEM);
        while ((piece = __atomic_fetch_add(&l->next, 1, __ATOMIC_RELAXED)) < l->num_pieces) {
            while (number + 1 < l->num_runs && l->runs[number + 1].pieces_before <= piece) number++;
            load_piece(l, number, piece, buffer);
        }
        free(buffer);
    }
}
