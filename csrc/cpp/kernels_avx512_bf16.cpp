// The CPU kernels for AVX-512 with BF16, which multiplies pairs of bf16 and adds the products in fp32.
#include "kernels.h"

#ifdef MEGACODER_X86
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512")
#endif
#define MEGACODER_ISA avx512_bf16
#define MEGACODER_ISA_NAME "avx512_bf16"
#define MEGACODER_LANES 16
#define MEGACODER_BF16_PAIRS 1
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
