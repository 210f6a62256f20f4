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
  void (*rms_norm_forward)(const T* x, const T* residual, const T* weight, T* summed, T* out, float* rstd,
                           int64_t rows, int64_t dim, float eps);
  void (*rms_norm_backward)(const T* grad_out, const T* x, const T* weight, const float* rstd, const T* grad_residual,
                            T* grad_x, float* grad_weight, int64_t rows, int64_t dim);
  void (*rope)(T* qkv, const float* cosine, const float* sine, const int64_t* positions, int64_t rows,
               int64_t row_stride, int64_t heads, int64_t head_dim, float sign);
  void (*norm_rope_forward)(const T* qkv, const T* query_weight, const T* key_weight, const float* cosine,
                            const float* sine, const int64_t* positions, T* out, int64_t rows, int64_t row_stride,
                            int64_t heads, int64_t kv_heads, int64_t head_dim, float eps);
  void (*norm_rope_backward)(T* grad, const T* qkv, const T* query_weight, const T* key_weight, const float* cosine,
                             const float* sine, const int64_t* positions, float* grad_query, float* grad_key,
                             int64_t rows, int64_t row_stride, int64_t heads, int64_t kv_heads, int64_t head_dim,
                             float eps);
  void (*swiglu_forward)(const T* gate_up, T* out, int64_t rows, int64_t dim);
  void (*swiglu_backward)(const T* grad_out, T* gate_up, T* activation, int64_t rows, int64_t dim);
  void (*cross_entropy)(T* logits, const int64_t* labels, float* loss, int64_t rows, int64_t width, int64_t vocab);
  void (*attention_softmax)(T* scores, float* lse, const int64_t* first_keys, int64_t rows, int64_t queries,
                            int64_t keys, int64_t visible, float scale);
  void (*attention_softmax_backward)(T* scores, T* grad, const float* lse, const float* delta,
                                     const int64_t* first_keys, int64_t rows, int64_t queries, int64_t keys,
                                     int64_t visible, float scale);
  void (*adamw)(float* master, float* exp_avg, float* exp_avg_sq, const float* grad, T* weight, int64_t count,
                double grad_scale, double lr, double beta1, double beta2, double eps, double decay, double correction1,
                double correction2);
  void (*accumulate)(float* total, const T* addend, int64_t count);
  void (*few_rows_linear)(const T* x, const T* weight, T* out, int64_t rows, int64_t dim, int64_t width);
  void (*decode_attention)(const T* x, const T* residual, const T* norm, const T* qkv_weight, const T* query_norm,
                           const T* key_norm, const T* out_weight, const float* cosine, const float* sine,
                           const int64_t* padding, T* keys, T* values, T* out, int64_t rows, int64_t dim,
                           int64_t heads, int64_t groups, int64_t head_dim, int64_t capacity, int64_t column,
                           float eps);
  void (*decode_feed_forward)(const T* x, const T* residual, const T* norm, const T* gate_up_weight,
                              const T* down_weight, T* out, int64_t rows, int64_t dim, int64_t inner_dim, float eps);
};

struct Kernels {
  const char* isa;
  TypedKernels<float> fp32;
  TypedKernels<bf16> bf16_;
  void (*adamw_split)(int16_t* low, float* exp_avg, float* exp_avg_sq, const float* grad, bf16* weight, int64_t count,
                      double grad_scale, double lr, double beta1, double beta2, double eps, double decay,
                      double correction1, double correction2);
  double (*sum_of_squares)(const float* values, int64_t count);
  void (*minhash)(const uint8_t* text, const int64_t* offsets, int64_t documents, const uint32_t* addends,
                  int64_t num_hashes, int64_t ngram, uint32_t* signatures, int64_t* num_words);
  int64_t (*word_hashes)(const uint8_t* text, int64_t size, uint64_t* hashes);
  void (*find_grams)(const uint8_t* text, int64_t size, const int64_t* lengths, int64_t num_lengths,
                     const uint8_t* table, int64_t shift, const uint64_t* hashes, int64_t num_hashes,
                     std::vector<uint64_t>& found);
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
