/* Panels of a weight [out, in] in memory, and how its rows get there. */
#ifndef LEPTON_PANELS_H
#define LEPTON_PANELS_H

#include <stdint.h>

struct panels {
    void *bytes;
    float *scales;     /* of int8 panels, one an output feature */
    int64_t in, group; /* neighbouring inputs that share a scale, of int4 panels: 32, 64 or 128 */
};

/* Take rows [count, in] of the kind (0 float32, 1 bfloat16, which bfloat16 panels need), contiguous, from output feature
   `first` on, the first of a panel. What a last panel lacks is filled up with zeros. */
typedef void pack_function(
    const struct panels *to, const void *rows, int64_t kind, int64_t first, int64_t count, int64_t threads
);

#endif
