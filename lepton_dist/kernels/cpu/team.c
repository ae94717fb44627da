/* A caller publishes a loop, takes portions of it like everybody else, and at the end waits only for portions that others have
 * taken. So a helper whose core is busy with something else is missed, but not waited for. All waiting is bounded spinning,
 * then sleep: a thread that spins for one that has no core would keep it from getting this one.
 *
 * There is one loop at a time in a process. Helpers know it by `ticket`: the number of the loop and the first index that
 * nobody has taken, changed together. A helper reads what the loop is and then changes the ticket, which only succeeds
 * while that loop is open; and its caller does not close it before each portion that was taken is done.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include "team.h"

#define MOST_HELPERS 1023
#define CLOSED 0xffffffffu            /* as first index: nothing to take */
#define HELPER_PATIENCE_NS 200000     /* that a helper spins for another loop, before it sleeps */
#define CALLER_PATIENCE_NS 30000      /* that a caller spins for the last portions */

#define LINE __attribute__((aligned(128))) /* two cache lines: they are fetched in pairs */
static LINE uint64_t ticket = CLOSED;      /* number of the loop << 32 | first index that is left */
static LINE struct {
    range_function *run;
    void *work;
    uint32_t count, threads;
    enum portions portions;
} loop;
static LINE uint32_t done;       /* indices of the loop that are computed */
static LINE uint32_t published;  /* the number of the newest loop: what sleeping helpers wait for */
static uint32_t num_sleeping, is_caller_asleep;
static LINE uint32_t is_taken;   /* by a caller */
static uint32_t num_helpers;

static void sleep_while(uint32_t *word, uint32_t value) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
#else
    if (__atomic_load_n(word, __ATOMIC_SEQ_CST) == value) usleep(50);
#endif
}

static void wake(uint32_t *word, int count) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
#else
    (void)word, (void)count;
#endif
}

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* Spin while the word has this value; 0 where it still has it after so long. */
static int spin_while(const uint32_t *word, uint32_t value, int64_t patience_ns) {
    int64_t end = 0;
    for (;;) {
        for (int i = 0; i < 32; i++) {
            if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != value) return 1;
            pause_briefly();
        }
        const int64_t now = now_ns();
        if (end == 0) end = now + patience_ns;
        if (now > end) return 0;
    }
}

/* Take portions of the open loop until none is left. A helper whose place is beyond the loop's threads takes none. */
static void take_portions(uint32_t place) {
    for (;;) {
        uint64_t seen = __atomic_load_n(&ticket, __ATOMIC_ACQUIRE);
        const uint32_t first = (uint32_t)seen, count = __atomic_load_n(&loop.count, __ATOMIC_RELAXED);
        const uint32_t threads = __atomic_load_n(&loop.threads, __ATOMIC_RELAXED);
        if (first == CLOSED || first >= count || place >= threads) return;
        range_function *run = __atomic_load_n(&loop.run, __ATOMIC_RELAXED);
        void *work = __atomic_load_n(&loop.work, __ATOMIC_RELAXED);
        uint32_t size = __atomic_load_n(&loop.portions, __ATOMIC_RELAXED) == LONG_RUNS ? (count - first) / (2 * threads) : 1;
        if (size < 1) size = 1;
        if (!__atomic_compare_exchange_n(&ticket, &seen, seen + size, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) continue;
        run(work, first, (int64_t)first + size);
        const uint32_t sum = __atomic_add_fetch(&done, size, __ATOMIC_SEQ_CST);
        if (sum == count && __atomic_load_n(&is_caller_asleep, __ATOMIC_SEQ_CST)) wake(&done, 1);
    }
}

static void *help(void *place) {
    uint32_t seen = __atomic_load_n(&published, __ATOMIC_ACQUIRE) - 1; /* one may be open already */
    for (;;) {
        while (__atomic_load_n(&published, __ATOMIC_ACQUIRE) == seen) {
            if (spin_while(&published, seen, HELPER_PATIENCE_NS)) break;
            __atomic_add_fetch(&num_sleeping, 1, __ATOMIC_SEQ_CST);
            sleep_while(&published, seen);
            __atomic_sub_fetch(&num_sleeping, 1, __ATOMIC_SEQ_CST);
        }
        seen = __atomic_load_n(&published, __ATOMIC_ACQUIRE);
        take_portions((uint32_t)(intptr_t)place);
    }
    return NULL;
}

/* A child process has none of its parent's threads. */
static void begin_anew(void) {
    num_helpers = num_sleeping = is_caller_asleep = is_taken = 0;
    ticket = CLOSED;
}

static void have_helpers(uint32_t wanted) {
    static int has_handler;
    if (num_helpers >= wanted) return;
    if (!has_handler) has_handler = pthread_atfork(NULL, NULL, begin_anew) == 0;
    sigset_t all, before;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the business of other threads */
    while (num_helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, help, (void *)(intptr_t)(num_helpers + 1))) break; /* fewer will do */
        num_helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

static void wait_for_all(uint32_t count) {
    uint32_t sum;
    while ((sum = __atomic_load_n(&done, __ATOMIC_ACQUIRE)) != count) {
        if (spin_while(&done, sum, CALLER_PATIENCE_NS)) continue;
        __atomic_store_n(&is_caller_asleep, 1, __ATOMIC_SEQ_CST);
        while ((sum = __atomic_load_n(&done, __ATOMIC_SEQ_CST)) != count) sleep_while(&done, sum);
        __atomic_store_n(&is_caller_asleep, 0, __ATOMIC_SEQ_CST);
    }
}

void lepton_share(int64_t threads, int64_t count, enum portions portions, range_function *run, void *work) {
    if (count < 1) return;
    if (threads > count) threads = count;
    if (threads > MOST_HELPERS + 1) threads = MOST_HELPERS + 1;
    if (threads < 2 || count >= CLOSED || __atomic_exchange_n(&is_taken, 1, __ATOMIC_ACQUIRE)) {
        run(work, 0, count);
        return;
    }
    have_helpers((uint32_t)threads - 1);
    __atomic_store_n(&loop.run, run, __ATOMIC_RELAXED);
    __atomic_store_n(&loop.work, work, __ATOMIC_RELAXED);
    __atomic_store_n(&loop.count, (uint32_t)count, __ATOMIC_RELAXED);
    __atomic_store_n(&loop.threads, (uint32_t)threads, __ATOMIC_RELAXED);
    __atomic_store_n(&loop.portions, portions, __ATOMIC_RELAXED);
    __atomic_store_n(&done, 0, __ATOMIC_RELAXED);
    const uint32_t number = published + 1; /* only callers change it, one at a time */
    __atomic_store_n(&ticket, (uint64_t)number << 32, __ATOMIC_RELEASE);
    __atomic_store_n(&published, number, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&num_sleeping, __ATOMIC_SEQ_CST)) wake(&published, INT_MAX);
    take_portions(0);
    wait_for_all((uint32_t)count);
    __atomic_store_n(&ticket, (uint64_t)number << 32 | CLOSED, __ATOMIC_RELEASE);
    __atomic_store_n(&is_taken, 0, __ATOMIC_RELEASE);
}
