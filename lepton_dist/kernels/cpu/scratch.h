/* Memory for a call, kept by its thread from one to the next: a step makes hundreds of calls of the same few sizes. */
#ifndef LEPTON_SCRATCH_H
#define LEPTON_SCRATCH_H

#include <stdint.h>

enum purpose { ACTIVATIONS, PRODUCT_ROWS, EXPANDED_PANEL, SUMS, NUM_PURPOSES };

/* At least so many bytes, on a page of their own, until the calling thread asks for more of the purpose or ends; NULL when
   there is no memory. */
void *lepton_scratch(enum purpose purpose, int64_t bytes);

#endif
