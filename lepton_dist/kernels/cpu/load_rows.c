/* Rows of stored matrices on their way from files into panels, some at a time by every thread that helps.
 *
 * A piece is packed while it is still in the cache of the thread that read it. No lock of Python's is held meanwhile, so
 * one thread can be at it while the process still imports torch, and others join it later.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "structures.h"
#include "team.h"

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

/* Of a row are read only the wanted columns where at least so many bytes of it are not: fewer are copied faster than a
 * call for each row takes. */
#define LEAST_SPARED 4096

/* Whether the system has this in its memory, so that a read only copies it. */
static int is_cached(int file, int64_t offset) {
#ifdef RWF_NOWAIT
    char byte;
    const struct iovec place = {&byte, 1};
    return preadv2(file, &place, 1, (off_t)offset, RWF_NOWAIT) == 1;
#else
    (void)file, (void)offset;
    return 0;
#endif
}

/* The wanted columns of `count` rows from `offset` on, one row behind another.
 *
 * What a disk or a file system must be asked for is read whole, since requests for single rows are far slower, and other
 * ranks of the node want the rest. What is there is copied row by row, without the rest.
 */
static int fetch_columns(const struct row_run *run, char *to, int64_t count, int64_t offset) {
    const int file = (int)run->file;
    const int64_t spared = run->row_bytes - run->kept, last = offset + (count - 1) * run->row_bytes + run->skipped;
    int problem = 0;
    if (spared >= LEAST_SPARED && is_cached(file, offset + run->skipped) && is_cached(file, last)) {
        for (int64_t r = 0; r < count && !problem; r++)
            problem = fetch(file, to + r * run->kept, run->kept, offset + r * run->row_bytes + run->skipped);
        return problem;
    }
    problem = fetch(file, to, count * run->row_bytes, offset);
    if (!problem && spared > 0)
        for (int64_t r = 0; r < count; r++) memmove(to + r * run->kept, to + r * run->row_bytes + run->skipped, run->kept);
    return problem;
}

static void give_up(struct row_loading *l, int64_t run, int error) {
    static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&one_at_a_time);
    if (l->failed < 0) l->failed = run, l->error = error;
    pthread_mutex_unlock(&one_at_a_time);
    __atomic_store_n(&l->next, l->num_pieces, __ATOMIC_RELAXED);
}

static void load_piece(struct row_loading *l, int64_t number, int64_t piece, char *buffer) {
    const struct row_run *run = l->runs + number;
    const int64_t from = (piece - run->pieces_before) * run->step;
    const int64_t count = run->rows - from < run->step ? run->rows - from : run->step;
    const int problem = fetch_columns(run, buffer, count, run->offset + from * run->row_bytes);
    if (problem) {
        give_up(l, number, problem > 0 ? problem : 0);
        return;
    }
    run->pack(&run->to, buffer, run->kind, run->first + from, count, 1);
}

/* Take pieces until none is left. */
static void load_pieces(void *work, int64_t begin, int64_t end) {
    struct row_loading *l = work;
    int64_t most = 1, number = 0, piece;
    (void)begin, (void)end; /* which of the threads this is */
    for (int64_t i = 0; i < l->num_runs; i++)
        if (l->runs[i].step * l->runs[i].row_bytes > most) most = l->runs[i].step * l->runs[i].row_bytes;
    char *buffer = malloc((size_t)most);
    if (buffer == NULL) give_up(l, 0, ENOMEM);
    while ((piece = __atomic_fetch_add(&l->next, 1, __ATOMIC_RELAXED)) < l->num_pieces) {
        while (number + 1 < l->num_runs && l->runs[number + 1].pieces_before <= piece) number++;
        load_piece(l, number, piece, buffer);
    }
    free(buffer);
}

/* All pieces that nobody has taken. Threads of other calls may take some of the same loading, and still be at their last. */
void lepton_load_rows(struct row_loading *l, int64_t threads) {
    lepton_share(threads, threads, ONE_BY_ONE, load_pieces, l);
}
