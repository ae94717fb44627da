#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "structures.h"
#include "vector.h"

/* For Python to compare with its mirrors. */
const int64_t lepton_structures[] = {
    LEPTON_ABI, sizeof(struct panels), sizeof(struct matmul_call), sizeof(struct layer), sizeof(struct row_run),
    sizeof(struct row_loading), sizeof(struct multiply_arguments), sizeof(struct half_arguments), sizeof(struct paged_call),
};

/* What the calling thread computes, torch's work too, is its own alone from here on: no team of threads is made for it. */
void lepton_work_alone(void) { omp_set_num_threads(1); }

/* Which of the kernels this machine has the instructions for. */
enum vector_level lepton_vector_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return NO_VECTORS;
#if defined(EMULATED_512)
    return AVX512;
#elif defined(HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
        return AVX512;
#endif
    return AVX2;
#else
    return NO_VECTORS;
#endif
}

#if defined(HAS_TILES) && !defined(EMULATED_512)
/* Linux gives the registers of tiles, whose state is large, only to processes that ask for them. */
static int may_use_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned a, b, c, d;
    const unsigned needed = 1u << 24 | 1u << 22 | 1u << 25; /* tiles, their products of bfloat16 and of bytes */
    return lepton_vector_level() == AVX512 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & needed) == needed &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

/* Whether this process may use matrix instructions, in kernels of ours. */
int lepton_has_tiles(void) {
#if defined(EMULATED_TILES)
    return 1;
#elif defined(HAS_TILES) && !defined(EMULATED_512)
    static int found = -1; /* threads that come here together find the same */
    if (found < 0) found = may_use_tiles();
    return found;
#else
    return 0;
#endif
}

/* Whether oneDNN's product in bfloat16 beats ours here: by matrix instructions that ours lack, or by AVX-512 where that
   lacks BF16. */
int lepton_leaves_bf16(void) {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    const int has_tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1);
    const int has_512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return (has_tiles && !lepton_has_tiles()) || (has_512 && lepton_vector_level() < AVX512);
#else
    return 0;
#endif
}
