// bf16 matrices to fp8, as tensorwise scaling needs them: the largest magnitude, then the scaled cast and its transpose
// in one pass (2 B read, 1 + 1 B written per element). Hopper's fp8 GEMMs need the summed dim innermost in both
// factors, so every matrix is needed in both layouts.
//
// A thread casts 8 x 8 elements, transposes them in registers, and puts them in shared memory, from where the block's
// tile of 128 x 128 is written by rows of the transpose.
#include "flat.cuh"

#include <cuda_fp8.h>

#include <algorithm>

namespace {

using namespace megacoder;

constexpr int kTile = 128;
constexpr int kGroup = 8;  // rows and columns of one thread; kThreads = (kTile / kGroup)^2
constexpr int kGroups = kTile / kGroup;
constexpr int kPiece = 16;  // bytes of an access to the transpose
constexpr float kSmallest = 0x1p-100f;  // lower bound of the largest magnitude, so that the scale cannot overflow
static_assert(kThreads == kGroups * kGroups);

struct Matrix {
  int64_t rows;
  int64_t columns;
};

// Eight bf16 of a row, zeros beyond the matrix. `kWide`: the columns are a multiple of 8 and the start is aligned.
template <bool kWide>
__device__ uint4 load_group(const uint16_t* x, int64_t row, int64_t column, Matrix size) {
  uint4 group = {0, 0, 0, 0};
  if constexpr (kWide) {
    if (row < size.rows && column < size.columns)
      group = *reinterpret_cast<const uint4*>(x + row * size.columns + column);
  } else if (row < size.rows) {
    const auto word = [&](int64_t first) {
      const uint32_t low = first < size.columns ? x[row * size.columns + first] : 0;
      const uint32_t high = first + 1 < size.columns ? x[row * size.columns + first + 1] : 0;
      return low | high << 16;
    };
    group = {word(column), word(column + 2), word(column + 4), word(column + 6)};
  }
  return group;
}

// Stores the first bytes of `piece` at (row, column), those that are inside the matrix.
template <bool kWide, class Piece>
__device__ void store_piece(uint8_t* out, int64_t row, int64_t column, Matrix size, const Piece& piece) {
  if (row >= size.rows) return;
  uint8_t* to = out + row * size.columns + column;
  if constexpr (kWide) {
    if (column < size.columns) *reinterpret_cast<Piece*>(to) = piece;
  } else {
    const auto* bytes = reinterpret_cast<const uint8_t*>(&piece);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Piece)); ++i)
      if (column + i < size.columns) to[i] = bytes[i];
  }
}

// Saturates; rounds to nearest even; NaN stays NaN.
template <__nv_fp8_interpretation_t kFormat>
__device__ uint32_t cast_two(uint32_t two_bf16, float scale) {
  const float2 values = unpack(two_bf16);
  return __nv_cvt_float2_to_fp8x2({values.x * scale, values.y * scale}, __NV_SATFINITE, kFormat);
}

template <__nv_fp8_interpretation_t kFormat>
__device__ uint2 cast_group(uint4 group, float scale) {
  return {cast_two<kFormat>(group.x, scale) | cast_two<kFormat>(group.y, scale) << 16,
          cast_two<kFormat>(group.z, scale) | cast_two<kFormat>(group.w, scale) << 16};
}

// Four rows of four bytes become four columns.
__device__ void transpose_4x4(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t (&columns)[4]) {
  const uint32_t ab01 = __byte_perm(a, b, 0x5140), cd01 = __byte_perm(c, d, 0x5140);  // a0 b0 a1 b1
  const uint32_t ab23 = __byte_perm(a, b, 0x7362), cd23 = __byte_perm(c, d, 0x7362);
  columns[0] = __byte_perm(ab01, cd01, 0x5410);
  columns[1] = __byte_perm(ab01, cd01, 0x7632);
  columns[2] = __byte_perm(ab23, cd23, 0x5410);
  columns[3] = __byte_perm(ab23, cd23, 0x7632);
}

// The scale that maps the largest magnitude to the format's, computed by every thread itself: one division, where a
// separate kernel would cost a launch per matrix.
template <__nv_fp8_interpretation_t kFormat>
__device__ float scale_for(float amax, float* inverse) {
  constexpr float kLimit = kFormat == __NV_E5M2 ? 57344.f : 448.f;
  const float held = amax < kSmallest ? kSmallest : amax;  // NaN stays
  if (blockIdx.x == 0 && threadIdx.x == 0) *inverse = isfinite(held) ? held / kLimit : __int_as_float(0x7fc00000);
  return kLimit / held;
}

template <__nv_fp8_interpretation_t kFormat, bool kWide>
__global__ void __launch_bounds__(kThreads)
    cast_transpose_kernel(const uint16_t* __restrict__ x, Matrix size, const float* __restrict__ amax,
                          uint8_t* __restrict__ out, uint8_t* __restrict__ transposed,
                          float* __restrict__ inverse_scale) {
  // [column][group of rows ^ group of columns]: the XOR spreads a warp's reads and writes over all banks.
  __shared__ __align__(16) uint2 tile[kTile][kGroups];
  const int64_t tiles_across = max(int64_t{1}, (size.columns + kTile - 1) / kTile);
  const int64_t first_row = blockIdx.x / tiles_across * kTile, first_column = blockIdx.x % tiles_across * kTile;
  const int row_group = threadIdx.x / kGroups, column_group = threadIdx.x % kGroups;
  const int64_t row = first_row + row_group * kGroup, column = first_column + column_group * kGroup;

  uint4 loaded[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) loaded[i] = load_group<kWide>(x, row + i, column, size);
  const float factor = scale_for<kFormat>(*amax, inverse_scale);
  uint2 cast[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    cast[i] = cast_group<kFormat>(loaded[i], factor);
    store_piece<kWide>(out, row + i, column, size, cast[i]);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {  // columns 0 to 3, then 4 to 7
    uint32_t rows[kGroup], upper[4], lower[4];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) rows[i] = half == 0 ? cast[i].x : cast[i].y;
    transpose_4x4(rows[0], rows[1], rows[2], rows[3], upper);
    transpose_4x4(rows[4], rows[5], rows[6], rows[7], lower);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      tile[column_group * kGroup + half * 4 + j][row_group ^ column_group] = {upper[j], lower[j]};
  }
  __syncthreads();

  constexpr int kPieces = kTile / kPiece;  // of a row of the transpose
  const int piece = threadIdx.x % kPieces;
#pragma unroll
  for (int pass = 0; pass < kTile * kPieces / kThreads; ++pass) {
    const int line = pass * (kThreads / kPieces) + threadIdx.x / kPieces;  // column of the tile
    const int group = line / kGroup;
    uint4 bytes = reinterpret_cast<const uint4*>(tile[line])[piece ^ group / 2];
    if (group % 2) bytes = {bytes.z, bytes.w, bytes.x, bytes.y};  // the XOR swapped the two groups of a piece
    store_piece<kWide>(transposed, first_column + line, first_row + piece * kPiece, {size.columns, size.rows}, bytes);
  }
}

// Magnitudes of bf16 compare as their bits, two to a word, with NaN largest: a NaN anywhere makes the result NaN.
constexpr uint32_t kMagnitudes = 0x7fff7fffu;

// The order of a maximum does not matter, so atomics keep the result the same in every run.
__global__ void __launch_bounds__(kThreads) amax_kernel(const uint16_t* __restrict__ values, Cut cut, uint32_t* out) {
  __shared__ uint32_t of_block;
  if (threadIdx.x == 0) of_block = 0;
  __syncthreads();
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  uint32_t top = 0;
  for_each_vector(values, sizeof *values, cut, [&](uint4 words) {
    top = __vmaxu2(top, words.x & kMagnitudes), top = __vmaxu2(top, words.y & kMagnitudes);
    top = __vmaxu2(top, words.z & kMagnitudes), top = __vmaxu2(top, words.w & kMagnitudes);
  });
  for (int64_t i = global_thread(); i < cut.singles; i += threads) 
    top = __vmaxu2(top, values[cut.single(i)] & kMagnitudes);
  const uint32_t of_warp = __reduce_max_sync(~0u, max(top & 0xffffu, top >> 16));
  if (threadIdx.x % 32 == 0) atomicMax(&of_block, of_warp);
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(out, of_block << 16);
}

template <__nv_fp8_interpretation_t kFormat>
cudaError_t launch(const uint16_t* x, Matrix size, const float* amax, uint8_t* out, uint8_t* transposed,
                   float* inverse_scale, cudaStream_t stream) {
  const int64_t tiles = (size.rows + kTile - 1) / kTile * ((size.columns + kTile - 1) / kTile);
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(out) |
                              reinterpret_cast<uintptr_t>(transposed);
  const bool wide = size.columns % kGroup == 0 && size.rows % kPiece == 0 && addresses % 16 == 0;
  const auto kernel = wide ? cast_transpose_kernel<kFormat, true> : cast_transpose_kernel<kFormat, false>;
  kernel<<<std::max(int64_t{1}, tiles), kThreads, 0, stream>>>(x, size, amax, out, transposed, inverse_scale);
  return cudaGetLastError();
}

}  // namespace

// out (rows, columns) and transposed (columns, rows) receive x * scale in e4m3 or e5m2, where scale maps `amax` to the
// format's largest number; inverse_scale receives the inverse, NaN for an `amax` that is not finite.
extern "C" int cast_transpose(const void* x, int64_t rows, int64_t columns, const float* amax, int64_t is_e5m2,
                              void* out, void* transposed, float* inverse_scale, void* stream) {
  const auto launch_as = is_e5m2 ? launch<__NV_E5M2> : launch<__NV_E4M3>;
  return launch_as(static_cast<const uint16_t*>(x), {rows, columns}, amax, static_cast<uint8_t*>(out),
                   static_cast<uint8_t*>(transposed), inverse_scale, static_cast<cudaStream_t>(stream));
}

// `out` receives the largest magnitude of `count` bf16 values, 0 if there are none, NaN if any is NaN.
extern "C" int amax(const void* values, int64_t count, float* out, void* stream) {
  constexpr int64_t kMaxBlocks = 1024;
  const auto on = static_cast<cudaStream_t>(stream);
  const Cut parts = cut(count, 8, {{values, 2}});
  const int64_t blocks = std::min(blocks_for(std::max(parts.vectors, parts.singles)), kMaxBlocks);
  const cudaError_t cleared = cudaMemsetAsync(out, 0, sizeof *out, on);
  if (cleared != cudaSuccess || blocks == 0) return cleared;
  amax_kernel<<<blocks, kThreads, 0, on>>>(static_cast<const uint16_t*>(values), parts,
                                           reinterpret_cast<uint32_t*>(out));
  return cudaGetLastError();
}
