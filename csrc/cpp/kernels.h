// The table of CPU kernels, filled in once per instruction set (see kernels.inc); the module picks one table at import.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

namespace megacoder {

struct bf16 {
  uint16_t bits;
};

constexpr int64_t kRowBlocks = 64;       // partial sums of the norm's weight gradient
constexpr int64_t kVocabBlock = 4096;    // terms summed in fp32 before they are added to the fp64 total
constexpr int64_t kNormBlock = 1 << 16;  // elements per partial sum of the gradient norm

// Limits of fast_exp, defined in a separate file so that the compiler does not know them: for known limits gcc emits
// the code after the exponential once per limit, and runs all copies for every vector. SwiGLU, where that code is a
// division, then takes four times as long.
extern const float kLeastExponent, kLargestExponent;

// Uninitialized memory, aligned to cache lines; its owner writes before it reads.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count) : data(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* const data;
};

template <class T>
struct TypedKernels {
  void (*rms_norm_forward)(const T*, const T*, const T*, T*, T*, float*, int64_t, int64_t, float);
  void (*rms_norm_backward)(const T*, const T*, const T*, const float*, const T*, T*, float*, int64_t, int64_t);
  void (*rope)(T*, const float*, const float*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float);
  void (*swiglu_forward)(const T*, T*, int64_t, int64_t);
  void (*swiglu_backward)(const T*, T*, T*, int64_t, int64_t);
  void (*cross_entropy)(T*, const int64_t*, float*, int64_t, int64_t, int64_t);
  void (*attention_softmax)(T*, float*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float);
  void (*attention_softmax_backward)(T*, T*, const float*, const float*, const int64_t*, int64_t, int64_t, int64_t,
                                     int64_t, float);
  void (*adamw)(float*, float*, float*, const float*, T*, int64_t, double, double, double, double, double, double,
                double, double);
  void (*accumulate)(float*, const T*, int64_t);
  void (*few_rows_linear)(const T*, const T*, T*, int64_t, int64_t, int64_t);
  void (*decode_attention)(const T*, const T*, const T*, const T*, const T*, const float*, const float*, const int64_t*,
                           T*, T*, T*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);
  void (*decode_feed_forward)(const T*, const T*, const T*, const T*, const T*, T*, int64_t, int64_t, int64_t, float);
};

struct Kernels {
  const char* isa;
  TypedKernels<float> fp32;
  TypedKernels<bf16> bf16_;
  void (*adamw_split)(int16_t*, float*, float*, const float*, bf16*, int64_t, double, double, double, double, double,
                      double, double, double);
  double (*sum_of_squares)(const float*, int64_t);
  void (*minhash)(const uint8_t*, const int64_t*, int64_t, const uint32_t*, int64_t, int64_t, uint32_t*, int64_t*);
  int64_t (*word_hashes)(const uint8_t*, int64_t, uint64_t*);
  void (*find_grams)(const uint8_t*, int64_t, const int64_t*, int64_t, const uint8_t*, int64_t, const uint64_t*, int64_t,
                     std::vector<uint64_t>&);
};

namespace baseline { const Kernels& kernels(); }
#if defined(__x86_64__) && defined(__GNUC__)
#define MEGACODER_X86 1
namespace avx2 { const Kernels& kernels(); }
namespace avx512 { const Kernels& kernels(); }
namespace avx512_bf16 { const Kernels& kernels(); }
#endif
#if defined(MEGACODER_X86) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define MEGACODER_AMX 1
// kernels_amx.cpp. Not in the table: an op that cannot use them takes another backend.
namespace amx {

// Rows of K values, by sequence, head and token; strides in elements.
struct HeadRows {
  const bf16* at;
  int64_t batch, head, token;
  const bf16* of(int64_t sequence, int64_t in_head, int64_t row) const {
    return at + sequence * batch + in_head * head + row * token;
  }
};

struct AttentionShape {
  int64_t batch, heads, groups, queries, keys, dim, start;  // `start`: token of the first query; the first key is token 0
  float scale;
};

bool available();  // to be asked before any of the others is called
void weight_grad(float*, const bf16*, const bf16*, int64_t, int64_t, int64_t);
void attention_forward(bf16*, float*, const HeadRows&, const HeadRows&, const HeadRows&, const int64_t*,
                       const AttentionShape&);
void attention_backward(bf16*, bf16*, bf16*, const HeadRows&, const HeadRows&, const HeadRows&, const HeadRows&,
                        const HeadRows&, const float*, const int64_t*, const AttentionShape&);

}  // namespace amx
#endif

}  // namespace megacoder
