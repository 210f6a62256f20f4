// Shared by the kernels on flat buffers: 16-byte accesses to buffers that may start and end anywhere.
//
// Contract of every launcher (extern "C", called through ctypes by megacoder/ops/cuda.py): addresses of contiguous
// device memory, sizes in elements, a stream; it allocates nothing, waits for nothing, and returns the cudaError_t.
// Arithmetic is fp32 or fp64, rounded as IEEE says: the build uses no fast math.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

namespace megacoder {

constexpr int kThreads = 256;
constexpr int kLaunchersVersion = 1;  // megacoder/core/device.py has it, too

// `count` elements as aligned vectors of `width`, and single elements before the first and after the last of them.
struct Cut {
  int64_t head;  // single elements before the first vector
  int64_t vectors;
  int64_t singles;  // all of them, head and tail
  int64_t width;

  __device__ int64_t vector(int64_t index) const { return head + index * width; }
  __device__ int64_t single(int64_t index) const { return index < head ? index : index + vectors * width; }
};

struct Stream {
  const void* start;
  int64_t element_bytes;
};

// Buffers that never reach a vector boundary at the same element are cut into single elements: correct but slower, and
// not the case for training's flat buffers.
inline Cut cut(int64_t count, int64_t width, std::initializer_list<Stream> streams) {
  for (int64_t head = 0; head < width && head <= count; ++head) {
    bool aligned = true;
    for (const Stream& stream : streams) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(stream.start) + head * stream.element_bytes;
      aligned = aligned && address % (width * stream.element_bytes) == 0;
    }
    if (aligned) {
      const int64_t vectors = (count - head) / width;
      return {head, vectors, count - vectors * width, width};
    }
  }
  return {0, 0, count, width};
}

inline int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

__device__ inline int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// A grid-stride loop over the thread's vectors, four loads in flight at a time.
template <class Use>
__device__ void for_each_vector(const void* values, int64_t element_bytes, Cut cut, Use use) {
  constexpr int kInFlight = 4;
  const auto* vectors = reinterpret_cast<const uint4*>(static_cast<const char*>(values) + cut.head * element_bytes);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = global_thread();
  for (; i + (kInFlight - 1) * threads < cut.vectors; i += kInFlight * threads) {
    uint4 arrived[kInFlight];
#pragma unroll
    for (int ahead = 0; ahead < kInFlight; ++ahead) arrived[ahead] = __ldg(vectors + i + ahead * threads);
#pragma unroll
    for (const uint4& vector : arrived) use(vector);
  }
  for (; i < cut.vectors; i += threads) use(__ldg(vectors + i));
}

// The two bf16 of a word, the one at the lower address first.
__device__ inline float2 unpack(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

}  // namespace megacoder
