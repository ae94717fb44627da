#include "vector.h"

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
