// Kernels for processors that multiply tiles of bf16 (AMX; tiles.h). They serve training steps, in which a library's
// products of bf16 are fast, but what lies between two of them is not: rounding sums to bf16 and adding them up in
// another pass, storing scores, reading a factor against the order in which it is stored.
#include "kernels.h"

#ifdef MEGACODER_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of what gcc's own intrinsics leave undefined
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif
#include "amx_attention.inc"
#include "amx_weight_grad.inc"

namespace megacoder {
namespace amx {

bool available() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & (1u << 22)) || !(d & (1u << 24)) || !__builtin_cpu_supports("avx512bf16")) return false;  // AMX-BF16, -TILE
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace amx
}  // namespace megacoder
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
