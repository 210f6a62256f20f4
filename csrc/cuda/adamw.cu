// AdamW (arXiv:1711.05101) on flat buffers: fp32 master weights and moments, the model's copy written in the same pass.
//
// The scalars that change from step to step are read from device memory, where `adamw_scalars` puts them: no step waits
// for the host, and a CUDA graph can replay it. Memory-bound: 28 B per parameter, 30 with a bf16 copy. The gradient is
// zeroed elsewhere: with the zeros stored here 1.3e9 parameters took 23.6 ms on an H200, the two passes 9.8 + 1.2 ms.
#include "flat.cuh"

#include <cmath>
#include <type_traits>

namespace {

using namespace megacoder;

struct AdamWScalars {
  float lr;
  float grad_scale;   // clipping factor / number of tokens
  float correction1;  // 1 - beta1^step
  float correction2;
  float skip;  // not 0: weights and state stay unchanged
};

struct AdamWConstants {
  float beta1, complement1;  // 1 - beta1, rounded once: from a rounded beta1 it would be 2e-7 off
  float beta2, complement2;
  float eps;
  float weight_decay;
};

struct MasterOnly {};  // the weight is its own master: written once

template <class Weight>
struct AdamWBuffers {
  Weight* weight;
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  const float* grad;
};

// N is 4 (one 16-byte access to each fp32 buffer) or 1.
template <int N>
__device__ void load(const float* from, float (&values)[N]) {
  if constexpr (N == 4) {
    const float4 vector = *reinterpret_cast<const float4*>(from);
    values[0] = vector.x, values[1] = vector.y, values[2] = vector.z, values[3] = vector.w;
  } else {
    values[0] = *from;
  }
}

template <int N>
__device__ void store(float* to, const float (&values)[N]) {
  if constexpr (N == 4) *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
  else *to = values[0];
}

template <int N>
__device__ void store(__nv_bfloat16* to, const float (&values)[N]) {
  if constexpr (N == 4) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(values[0], values[1]),
                                     __floats2bfloat162_rn(values[2], values[3])};
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
  } else {
    *to = __float2bfloat16_rn(values[0]);
  }
}

template <int N, class Weight>
__device__ void update(const AdamWBuffers<Weight>& buffers, int64_t at, const AdamWScalars& now,
                       const AdamWConstants& fixed) {
  float master[N], exp_avg[N], exp_avg_sq[N], grad[N];
  load(buffers.grad + at, grad);
  load(buffers.master + at, master);
  load(buffers.exp_avg + at, exp_avg);
  load(buffers.exp_avg_sq + at, exp_avg_sq);
  const AdamWScalars scalars = now;  // after the other loads have been issued, so that a thread waits only once
  if (scalars.skip != 0.0f) return;
  const float step_size = scalars.lr / scalars.correction1;
  const float inverse_root = 1.0f / sqrtf(scalars.correction2);
  const float shrink = scalars.lr * fixed.weight_decay;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float g = grad[i] * scalars.grad_scale;
    exp_avg[i] = fmaf(fixed.beta1, exp_avg[i], fixed.complement1 * g);
    exp_avg_sq[i] = fmaf(fixed.beta2, exp_avg_sq[i], fixed.complement2 * g * g);
    // Not master * (1 - shrink): the factor's rounding error is the same in every step, 1e-6 after a hundred steps.
    const float kept = fmaf(-shrink, master[i], master[i]);
    master[i] = kept - step_size * exp_avg[i] / (sqrtf(exp_avg_sq[i]) * inverse_root + fixed.eps);
  }
  store(buffers.exp_avg + at, exp_avg);
  store(buffers.exp_avg_sq + at, exp_avg_sq);
  store(buffers.master + at, master);
  if constexpr (!std::is_same_v<Weight, MasterOnly>) store(buffers.weight + at, master);
}

// A thread updates one vector, or one of the single elements around the vectors.
template <class Weight>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(AdamWBuffers<Weight> buffers, Cut cut, const AdamWScalars* __restrict__ scalars, AdamWConstants fixed) {
  const int64_t index = global_thread();
  const int64_t single = index - cut.vectors;
  if (single < 0) update<4>(buffers, cut.vector(index), *scalars, fixed);
  else if (single < cut.singles) update<1>(buffers, cut.single(single), *scalars, fixed);
}

__global__ void adamw_scalars_kernel(const double* squares, const double* num_tokens, const float* lr, int64_t* step,
                                     double max_grad_norm, double beta1, double beta2, AdamWScalars* scalars,
                                     double* norm) {
  const double mean_norm = sqrt(*squares) / *num_tokens;
  if (!isfinite(mean_norm)) {
    *norm = INFINITY;
    scalars->skip = 1.0f;
    return;
  }
  const double clip = fmin(1.0, max_grad_norm / (mean_norm + 1e-6));
  const double updates = static_cast<double>(*step += 1);
  *norm = mean_norm;
  scalars->lr = *lr;
  scalars->grad_scale = static_cast<float>(clip / *num_tokens);
  scalars->correction1 = static_cast<float>(1.0 - pow(beta1, updates));
  scalars->correction2 = static_cast<float>(1.0 - pow(beta2, updates));
  scalars->skip = 0.0f;
}

template <class Weight>
cudaError_t launch(const AdamWBuffers<Weight>& buffers, const Cut& cut, const AdamWScalars* scalars,
                   const AdamWConstants& fixed, cudaStream_t stream) {
  const int64_t blocks = blocks_for(cut.vectors + cut.singles);
  if (blocks > 0) adamw_kernel<<<blocks, kThreads, 0, stream>>>(buffers, cut, scalars, fixed);
  return cudaGetLastError();
}

}  // namespace

// `weight` is bf16 or fp32; in fp32 it may be `master` itself.
extern "C" int adamw(void* weight, int64_t weight_is_bf16, float* master, float* exp_avg, float* exp_avg_sq,
                     const float* grad, int64_t count, const void* scalars, double beta1, double beta2, double eps,
                     double weight_decay, void* stream) {
  const auto rounded = [](double value) { return static_cast<float>(value); };
  const AdamWConstants fixed = {rounded(beta1), rounded(1.0 - beta1), rounded(beta2), rounded(1.0 - beta2),
                                rounded(eps), rounded(weight_decay)};
  const Cut parts = cut(
      count, 4, {{weight, weight_is_bf16 ? 2 : 4}, {master, 4}, {exp_avg, 4}, {exp_avg_sq, 4}, {grad, 4}});
  const auto launch_with = [&](auto* typed_weight) {
    using Weight = std::remove_pointer_t<decltype(typed_weight)>;
    return launch(AdamWBuffers<Weight>{typed_weight, master, exp_avg, exp_avg_sq, grad}, parts,
                  static_cast<const AdamWScalars*>(scalars), fixed, static_cast<cudaStream_t>(stream));
  };
  if (weight == master) return launch_with(static_cast<MasterOnly*>(nullptr));
  if (weight_is_bf16) return launch_with(static_cast<__nv_bfloat16*>(weight));
  return launch_with(static_cast<float*>(weight));
}

// Computes the scalars of one update from the sum of squared gradient sums; a non-finite norm is written as infinity and
// skips the update. `step` counts the updates that were not skipped, including this one.
extern "C" int adamw_scalars(const double* squares, const double* num_tokens, const float* lr, int64_t* step,
                             double max_grad_norm, double beta1, double beta2, void* scalars, double* norm,
                             void* stream) {
  adamw_scalars_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(
      squares, num_tokens, lr, step, max_grad_norm, beta1, beta2, static_cast<AdamWScalars*>(scalars), norm);
  return cudaGetLastError();
}

extern "C" int64_t launchers_version() { return megacoder::kLaunchersVersion; }

// What a launcher's return value means.
extern "C" const char* error_string(int64_t code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
