// The CPU kernels for AVX-512 (F, BW, DQ, VL).
#include "kernels.h"

#ifdef MEGACODER_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512")
#endif
#define MEGACODER_ISA avx512
#define MEGACODER_ISA_NAME "avx512"
#define MEGACODER_LANES 16
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
