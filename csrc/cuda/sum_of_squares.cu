// The sum of squares of a flat buffer, in fp64 from the first product on, so that no gradient overflows it.
//
// Two stages and no atomics: the order of summation depends only on the number of elements, the workspace and the
// buffer's alignment, so that two runs, and two ranks, agree to the last bit.
#include "flat.cuh"

#include <algorithm>

namespace {

using namespace megacoder;

__device__ double square(float value) { return static_cast<double>(value) * value; }

// What a word of the buffer holds: a float, or two bf16.
template <class T>
__device__ double squares_in(uint32_t word) {
  if constexpr (sizeof(T) == 4) return square(__uint_as_float(word));
  const float2 values = unpack(word);
  return square(values.x) + square(values.y);
}

// The sum over the block's threads, in thread 0.
__device__ double block_sum(double value) {
  __shared__ double of_warp[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (double sum : of_warp) total += sum;
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    partial_sums_kernel(const T* __restrict__ values, Cut cut, double* __restrict__ partials) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  double sum = 0.0;
  for_each_vector(values, sizeof(T), cut, [&](uint4 words) {
    sum += (squares_in<T>(words.x) + squares_in<T>(words.y)) + (squares_in<T>(words.z) + squares_in<T>(words.w));
  });
  for (int64_t i = global_thread(); i < cut.singles; i += threads)
    sum += square(static_cast<float>(values[cut.single(i)]));
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* __restrict__ partials, int64_t count, double* out) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) *out = total;
}

template <class T>
cudaError_t launch(const T* values, int64_t count, double* workspace, int64_t workspace_count, double* out,
                   cudaStream_t stream) {
  const Cut parts = cut(count, 16 / sizeof(T), {{values, sizeof(T)}});
  const int64_t wanted = blocks_for(std::max(parts.vectors, parts.singles));
  const int64_t blocks = std::min(std::max<int64_t>(wanted, 1), workspace_count);
  partial_sums_kernel<<<blocks, kThreads, 0, stream>>>(values, parts, workspace);
  total_kernel<<<1, kThreads, 0, stream>>>(workspace, blocks, out);
  return cudaGetLastError();
}

}  // namespace

// The workspace holds a partial sum for each block: its size limits the grid.
extern "C" int sum_of_squares(const void* values, int64_t is_bf16, int64_t count, double* workspace,
                              int64_t workspace_count, double* out, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (is_bf16)
    return launch(static_cast<const __nv_bfloat16*>(values), count, workspace, workspace_count, out, on);
  return launch(static_cast<const float*>(values), count, workspace, workspace_count, out, on);
}
