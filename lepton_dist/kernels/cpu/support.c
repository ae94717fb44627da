#include <omp.h>

#include "vector.h"

/* What the calling thread computes, torch's work too, is its own alone from here on: no team of threads is made for it. */
void lepton_work_alone(void) { omp_set_num_threads(1); }

/* Which of the kernels this machine has the instructions for. */
enum vector_level lepton_vector_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return NO_VECTORS;
#if defined(HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
        return AVX512;
#endif
    return AVX2;
#else
    return NO_VECTORS;
#endif
}
