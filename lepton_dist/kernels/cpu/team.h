/* Loops that several threads share: whoever calls is helped, and waits for nobody but those who are at a piece. */
#ifndef LEPTON_TEAM_H
#define LEPTON_TEAM_H

#include <stdint.h>

/* Indices [first, last) of a loop. */
typedef void range_function(void *work, int64_t first, int64_t last);

/* How many indices a thread takes at a time: one, or a part of what is left, so that long runs come first. */
enum portions { ONE_BY_ONE, LONG_RUNS };

/* `run` over all indices from 0 to `count`, by the caller and up to `threads` - 1 others, each index once. Returns when all
   are done. Where the others are at a loop of another caller, this one computes alone. */
void lepton_share(int64_t threads, int64_t count, enum portions portions, range_function *run, void *work);

#endif
