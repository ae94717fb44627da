#include <pthread.h>
#include <stdlib.h>

#include "scratch.h"

struct kept {
    void *memory;
    int64_t bytes;
};

static __thread struct kept kept[NUM_PURPOSES];
static pthread_key_t at_end; /* of a thread, whose memory would otherwise stay for ever */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int has_key;

static void free_all(void *all) {
    for (int i = 0; i < NUM_PURPOSES; i++) {
        struct kept *one = (struct kept *)all + i;
        free(one->memory);
        one->memory = NULL;
        one->bytes = 0;
    }
}

static void make_key(void) { has_key = pthread_key_create(&at_end, free_all) == 0; }

void *lepton_scratch(enum purpose purpose, int64_t bytes) {
    struct kept *one = &kept[purpose];
    if (one->memory == NULL || bytes > one->bytes) {
        pthread_once(&once, make_key);
        if (!has_key || pthread_setspecific(at_end, kept) != 0) return NULL;
        free(one->memory);
        one->bytes = bytes < 1 ? 4096 : (bytes + 4095) / 4096 * 4096;
        one->memory = aligned_alloc(4096, (size_t)one->bytes);
        if (one->memory == NULL) one->bytes = 0;
    }
    return one->memory;
}
