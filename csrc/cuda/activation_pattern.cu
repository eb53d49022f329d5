// Forward: one thread a unit (or MaxMin pair) of one sample; blocks (chunk, sample) leave partial sums of the sparsity
// terms. Backward: one thread a unit (or pair) over the whole batch, so that what is summed over the batch stays in its
// registers; a block leaves a partial sum of the radius's gradient for every sample. Loads are coalesced over units in
// both.
#include "../activation_pattern.h"

#include "launch.cuh"

namespace locallip::cuda {
namespace {

// Offset of the first (or only) unit of item `i`, a unit or a pair; the second is `inner` further on.
template <bool kPaired>
__device__ int64_t unit_of(int64_t i, int64_t inner) {
  return kPaired ? (i / inner) * 2 * inner + i % inner : i;
}

template <bool kBox, typename T>
__device__ Bounds<T> load_bounds(const ActivationInput<T>& in, int64_t at, int64_t shared_at, T radius) {
  return intersect<T>(in.clean[at], radius * row_norm(in.squared_row_norms[shared_at]), kBox,
                      kBox ? in.centre[at] : T(0), kBox ? in.half_width[at] : T(0));
}

template <typename T>
__device__ void store(const ActivationOutput<T>& out, int64_t at, Bounds<T> value, int row, int column) {
  out.clean[at] = value.clean;
  out.centre[at] = (value.lower + value.upper) / 2;
  out.half_width[at] = (value.upper - value.lower) / 2;
  out.row_mask[at] = row;
  out.col_mask[at] = column;
}

template <Activation kActivation, bool kBox, typename T>
__global__ void forward_kernel(ActivationInput<T> in, ActivationOutput<T> out) {
  constexpr bool kPaired = is_paired(kActivation), kClipped = kActivation == Activation::kClippedMaxMin;
  __shared__ T scratch[kThreads / 32];
  const int64_t items = in.outer * in.inner, units = kPaired ? 2 * items : items, b = blockIdx.y;
  const int64_t item = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  T slack[2] = {0, 0};
  if (item < items) {
    const int64_t unit = unit_of<kPaired>(item, in.inner), at = b * units + unit,
                  shared_at = in.row_norms_shared ? unit : at;
    const T radius = in.radius[b];
    const Bounds<T> a = load_bounds<kBox>(in, at, shared_at, radius);
    if constexpr (kPaired) {
      const Bounds<T> c = load_bounds<kBox>(in, at + in.inner, shared_at + in.inner, radius);
      const auto r =
          pair_forward<kClipped, T>(a, c, kClipped ? in.first[item] : T(0), kClipped ? in.second[item] : T(0));
      store(out, at, r.largest, r.row_a, r.column_largest);
      store(out, at + in.inner, r.smallest, r.row_b, r.column_smallest);
      slack[0] = r.slack;
    } else {
      const auto r = unit_forward<kActivation, T>(a, kActivation == Activation::kClippedRelu ? in.first[item] : T(0));
      store(out, at, r.out, r.row, r.column);
      slack[0] = r.slack[0];
      slack[1] = r.slack[1];
    }
  }
  for (int term = 0; term < 2; ++term) {
    const T total = block_sum(slack[term], scratch);
    if (threadIdx.x == 0) out.slack[(b * gridDim.x + blockIdx.x) * 2 + term] = total;
  }
}

template <typename T>
__device__ Bounds<T> load_grad(const ActivationOutputGrad<T>& grad, int64_t at) {
  return {grad.clean[at], (grad.centre[at] - grad.half_width[at]) / 2, (grad.centre[at] + grad.half_width[at]) / 2};
}

// Stores the gradients of one unit of one sample; returns the radius's share.
template <bool kBox, typename T>
__device__ T store_grad(const ActivationInput<T>& in, const ActivationInputGrad<T>& out, int64_t at, int64_t shared_at,
                        T radius, Bounds<T> grad, T* shared_sum) {
  const auto g = intersect_backward<T>(in.clean[at], radius, in.squared_row_norms[shared_at], kBox,
                                       kBox ? in.centre[at] : T(0), kBox ? in.half_width[at] : T(0), grad);
  out.clean[at] = g.clean;
  if (kBox) {
    out.centre[at] = g.centre;
    out.half_width[at] = g.half_width;
  }
  *shared_sum += g.squared_row_norm;
  if (!in.row_norms_shared) out.squared_row_norms[at] = g.squared_row_norm;
  return g.radius;
}

template <Activation kActivation, bool kBox, typename T>
__global__ void backward_kernel(ActivationInput<T> in, ActivationOutputGrad<T> grad, ActivationInputGrad<T> out) {
  constexpr bool kPaired = is_paired(kActivation), kClipped = kActivation == Activation::kClippedMaxMin;
  __shared__ T scratch[kThreads / 32];
  const int64_t items = in.outer * in.inner, units = kPaired ? 2 * items : items;
  const int64_t item = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const bool alive = item < items;
  const int64_t unit = alive ? unit_of<kPaired>(item, in.inner) : 0;
  T shared_sum[2] = {0, 0}, threshold = 0;
  ThresholdGrad<T> thresholds = {0, 0};
  for (int64_t b = 0; b < in.batch; ++b) {
    T radius_grad = 0;
    if (alive) {
      const int64_t at = b * units + unit, shared_at = in.row_norms_shared ? unit : at;
      const T radius = in.radius[b], slack[2] = {grad.slack[2 * b], grad.slack[2 * b + 1]};
      const Bounds<T> a = load_bounds<kBox>(in, at, shared_at, radius);
      if constexpr (kPaired) {
        const Bounds<T> c = load_bounds<kBox>(in, at + in.inner, shared_at + in.inner, radius);
        Bounds<T> grad_a, grad_c;
        pair_backward<kClipped, T>(a, c, kClipped ? in.first[item] : T(0), kClipped ? in.second[item] : T(0),
                                   load_grad(grad, at), load_grad(grad, at + in.inner), slack[0], grad_a, grad_c,
                                   thresholds);
        radius_grad = store_grad<kBox>(in, out, at, shared_at, radius, grad_a, &shared_sum[0]) +
                      store_grad<kBox>(in, out, at + in.inner, shared_at + in.inner, radius, grad_c, &shared_sum[1]);
      } else {
        const Bounds<T> grad_a = unit_backward<kActivation, T>(
            a, kActivation == Activation::kClippedRelu ? in.first[item] : T(0), load_grad(grad, at), slack, threshold);
        radius_grad = store_grad<kBox>(in, out, at, shared_at, radius, grad_a, &shared_sum[0]);
      }
    }
    const T total = block_sum(radius_grad, scratch);
    if (threadIdx.x == 0) out.radius[blockIdx.x * in.batch + b] = total;
  }
  if (!alive) return;
  if (in.row_norms_shared) {
    out.squared_row_norms[unit] = shared_sum[0];
    if (kPaired) out.squared_row_norms[unit + in.inner] = shared_sum[1];
  }
  if (kActivation == Activation::kClippedRelu) out.first[item] = threshold;
  if (kClipped) {
    out.first[item] = thresholds.first;
    out.second[item] = thresholds.second;
  }
}

}  // namespace

int64_t activation_pattern_chunks(int64_t outer, int64_t inner, bool) {
  return (outer * inner + kThreads - 1) / kThreads;
}

template <typename scalar_t>
void activation_pattern(Activation activation, const ActivationInput<scalar_t>& in,
                        const ActivationOutput<scalar_t>& out, void* stream) {
  with_constants(activation, in.half_width != nullptr, [&](auto kind, auto box) {
    constexpr int64_t kMostSamples = 65535;  // of a grid's second dimension
    const int64_t items = in.outer * in.inner, units = is_paired(kind()) ? 2 * items : items;
    const int64_t chunks = activation_pattern_chunks(in.outer, in.inner, false);
    for (int64_t first = 0; first < in.batch; first += kMostSamples) {
      const int64_t count = in.batch - first < kMostSamples ? in.batch - first : kMostSamples, at = first * units;
      ActivationInput<scalar_t> part = in;
      part.clean += at;
      if (box()) {
        part.centre += at;
        part.half_width += at;
      }
      if (!in.row_norms_shared) part.squared_row_norms += at;
      part.radius += first;
      const ActivationOutput<scalar_t> to = {out.clean + at,    out.centre + at,   out.half_width + at,
                                             out.row_mask + at, out.col_mask + at, out.slack + first * chunks * 2};
      forward_kernel<kind(), box()><<<dim3(chunks, count), kThreads, 0, as_stream(stream)>>>(part, to);
      check_launch("activation_pattern");
    }
  });
}

template <typename scalar_t>
void activation_pattern_backward(Activation activation, const ActivationInput<scalar_t>& in,
                                 const ActivationOutputGrad<scalar_t>& grad_out,
                                 const ActivationInputGrad<scalar_t>& grad_in, void* stream) {
  with_constants(activation, in.half_width != nullptr, [&](auto kind, auto box) {
    const int64_t chunks = activation_pattern_chunks(in.outer, in.inner, true);
    backward_kernel<kind(), box()><<<chunks, kThreads, 0, as_stream(stream)>>>(in, grad_out, grad_in);
    check_launch("activation_pattern_backward");
  });
}

#define LOCALLIP_INSTANTIATE(scalar_t)                                                                              \
  template void activation_pattern(Activation, const ActivationInput<scalar_t>&, const ActivationOutput<scalar_t>&, \
                                   void*);                                                                          \
  template void activation_pattern_backward(Activation, const ActivationInput<scalar_t>&,                           \
                                            const ActivationOutputGrad<scalar_t>&,                                  \
                                            const ActivationInputGrad<scalar_t>&, void*);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cuda
