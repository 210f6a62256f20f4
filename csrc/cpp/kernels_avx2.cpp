// The CPU kernels for AVX2 with FMA.
#include "kernels.h"

#ifdef MEGACODER_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif
#define MEGACODER_ISA avx2
#define MEGACODER_ISA_NAME "avx2"
#define MEGACODER_LANES 8
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
