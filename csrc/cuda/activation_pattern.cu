// Activation patterns: every array is read or written once, by accesses of 16 bytes where the layout allows it, and the
// arithmetic of ../activation_pattern.h is small beside that: 30 bytes a unit forward (clean, centre, half-width and
// row norm in; clean, centre, half-width and two masks out), 44 backward, some 40 and 100 FLOP; 22 and 36 bytes where
// no box is wanted behind. Device memory is the limit.
//
// Forward: a thread takes kUnits neighbouring units (or MaxMin pairs) of one sample; a block kThreads * kUnits of them,
// and leaves their sparsity terms and counts as one partial sum.
// Backward: a block takes the same units for a slice of the batch, so that what is summed over the batch (thresholds,
// shared row norms) stays in registers and is written once a slice; a warp leaves the radius's gradient of every
// sample. Registers hold all; shared memory, one value a warp, serves the forward sums alone.
#include "../activation_pattern.h"

#include "launch.cuh"
#include "pack.cuh"

namespace locallip::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

template <typename T>
constexpr int kMostUnits = sizeof(T) == 4 ? 4 : 1;  // a warp's doubles fill whole sectors one by one

// Offset of the first (or only) unit of item `i`, a unit or a pair; the second is `inner` further on.
template <bool kPaired>
__device__ int64_t unit_of(int64_t i, int64_t inner) {
  return kPaired ? (i / inner) * 2 * inner + i % inner : i;
}

// kUnits neighbouring units of one sample.
template <bool kBox, int kUnits, typename T>
struct Units {
  Pack<T, kUnits> clean, centre, half_width, squared;

  __device__ Units(const ActivationInput<T>& in, int64_t at, int64_t shared_at)
      : clean(load<kUnits>(in.clean + at)),
        centre(kBox ? load<kUnits>(in.centre + at) : clean),
        half_width(kBox ? load<kUnits>(in.half_width + at) : clean),
        squared(load<kUnits>(in.squared_row_norms + shared_at)) {}

  __device__ Bounds<T> bounds(int u, T radius) const {
    return intersect<T>(clean.v[u], radius * row_norm(squared.v[u]), kBox, centre.v[u], half_width.v[u]);
  }
};

template <int kUnits, typename T>
struct Results {
  Pack<T, kUnits> clean, centre, half_width;
  Pack<uint8_t, kUnits> row, column;

  __device__ void set(int u, Bounds<T> value, int row_kept, int column_kept) {
    clean.v[u] = value.clean;
    centre.v[u] = (value.lower + value.upper) / 2;
    half_width.v[u] = (value.upper - value.lower) / 2;
    row.v[u] = static_cast<uint8_t>(row_kept);
    column.v[u] = static_cast<uint8_t>(column_kept);
  }

  __device__ void write(const ActivationOutput<T>& out, int64_t at) const {
    store<kUnits>(out.clean + at, clean);
    if (out.half_width) {
      store<kUnits>(out.centre + at, centre);
      store<kUnits>(out.half_width + at, half_width);
    }
    store<kUnits>(out.row_mask + at, row);
    store<kUnits>(out.col_mask + at, column);
  }
};

template <int kUnits, typename T>
__device__ Pack<T, kUnits> threshold_at(const T* threshold, int64_t item, bool wanted) {
  return wanted ? load<kUnits>(threshold + item) : Pack<T, kUnits>{};
}

template <Activation kActivation, bool kBox, int kUnits, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ ActivationInput<T> in, const __grid_constant__ ActivationOutput<T> out,
                   int64_t chunks) {
  constexpr bool kPaired = is_paired(kActivation), kClipped = kActivation == Activation::kClippedMaxMin;
  auto* scratch = dynamic_shared<T>();  // [4][kWarps]
  const int64_t items = in.outer * in.inner, units = kPaired ? 2 * items : items;
  const int64_t b = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t item = (chunk * kThreads + threadIdx.x) * kUnits;
  T sums[4] = {0, 0, 0, 0};
  if (item < items) {
    const int64_t unit = unit_of<kPaired>(item, in.inner), at = b * units + unit,
                  shared_at = in.row_norms_shared ? unit : at;
    const T radius = in.radius[b];
    const auto first = threshold_at<kUnits>(in.first, item, kClipped || kActivation == Activation::kClippedRelu);
    const Units<kBox, kUnits, T> a(in, at, shared_at);
    if constexpr (kPaired) {
      const Units<kBox, kUnits, T> c(in, at + in.inner, shared_at + in.inner);
      const auto second = threshold_at<kUnits>(in.second, item, kClipped);
      Results<kUnits, T> largest, smallest;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const auto r = pair_forward<kClipped, T>(a.bounds(u, radius), c.bounds(u, radius), first.v[u], second.v[u]);
        largest.set(u, r.largest, r.row_a, r.column_largest);
        smallest.set(u, r.smallest, r.row_b, r.column_smallest);
        sums[0] += r.slack;
        sums[2] += static_cast<T>(r.row_a + r.row_b);
        sums[3] += static_cast<T>(r.column_largest + r.column_smallest);
      }
      largest.write(out, at);
      smallest.write(out, at + in.inner);
    } else {
      Results<kUnits, T> results;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const auto r = unit_forward<kActivation, T>(a.bounds(u, radius), first.v[u]);
        results.set(u, r.out, r.row, r.column);
        sums[0] += r.slack[0];
        sums[1] += r.slack[1];
        sums[2] += static_cast<T>(r.row);
        sums[3] += static_cast<T>(r.column);
      }
      results.write(out, at);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T sum = warp_sum(sums[i]);
    if (threadIdx.x % kWarp == 0) scratch[i * kWarps + threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 4) {
    T total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += scratch[threadIdx.x * kWarps + warp];
    out.sums[static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x] = total;
  }
}

// Gradients of kUnits neighbouring outputs.
template <int kUnits, typename T>
struct Grads {
  Pack<T, kUnits> clean, centre, half_width;

  __device__ Grads(const ActivationOutputGrad<T>& grad, int64_t at)
      : clean(load<kUnits>(grad.clean + at)),
        centre(grad.half_width ? load<kUnits>(grad.centre + at) : Pack<T, kUnits>{}),
        half_width(grad.half_width ? load<kUnits>(grad.half_width + at) : Pack<T, kUnits>{}) {}

  __device__ Bounds<T> bounds(int u) const {
    return {clean.v[u], (centre.v[u] - half_width.v[u]) / 2, (centre.v[u] + half_width.v[u]) / 2};
  }
};

// Stores the gradients of the inputs of kUnits units; adds the row norms' to `shared_sum`, returns the radius's.
template <bool kBox, int kUnits, typename T>
__device__ T store_grads(const ActivationInput<T>& in, const ActivationInputGrad<T>& out, int64_t at,
                         const Units<kBox, kUnits, T>& units, T radius, const Bounds<T> (&grads)[kUnits],
                         Pack<T, kUnits>& shared_sum) {
  Pack<T, kUnits> clean, centre, half_width, squared;
  T radius_grad = 0;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const auto g = intersect_backward<T>(units.clean.v[u], radius, units.squared.v[u], kBox, units.centre.v[u],
                                         units.half_width.v[u], grads[u]);
    clean.v[u] = g.clean;
    centre.v[u] = g.centre;
    half_width.v[u] = g.half_width;
    squared.v[u] = g.squared_row_norm;
    shared_sum.v[u] += g.squared_row_norm;
    radius_grad += g.radius;
  }
  store<kUnits>(out.clean + at, clean);
  if (kBox) {
    store<kUnits>(out.centre + at, centre);
    store<kUnits>(out.half_width + at, half_width);
  }
  if (!in.row_norms_shared) store<kUnits>(out.squared_row_norms + at, squared);
  return radius_grad;
}

template <Activation kActivation, bool kBox, int kUnits, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ ActivationInput<T> in, const __grid_constant__ ActivationOutputGrad<T> grad,
                    const __grid_constant__ ActivationInputGrad<T> out, int64_t chunks, int64_t slices) {
  constexpr bool kPaired = is_paired(kActivation), kClipped = kActivation == Activation::kClippedMaxMin;
  const int64_t items = in.outer * in.inner, units = kPaired ? 2 * items : items;
  const int64_t chunk = blockIdx.x % chunks, slice = blockIdx.x / chunks;
  const int64_t item = (chunk * kThreads + threadIdx.x) * kUnits;
  const bool alive = item < items;
  const int64_t unit = alive ? unit_of<kPaired>(item, in.inner) : 0;
  Pack<T, kUnits> first = {}, second = {};
  if (alive) {
    first = threshold_at<kUnits>(in.first, item, kClipped || kActivation == Activation::kClippedRelu);
    second = threshold_at<kUnits>(in.second, item, kClipped);
  }
  Pack<T, kUnits> norms_a = {}, norms_c = {}, to_first = {}, to_second = {};
  for (int64_t b = in.batch * slice / slices; b < in.batch * (slice + 1) / slices; ++b) {
    T radius_grad = 0;
    if (alive) {
      const int64_t at = b * units + unit, shared_at = in.row_norms_shared ? unit : at;
      const T radius = in.radius[b], slack[2] = {grad.slack[2 * b], grad.slack[2 * b + 1]};
      const Units<kBox, kUnits, T> a(in, at, shared_at);
      const Grads<kUnits, T> grad_first(grad, at);
      Bounds<T> grads_a[kUnits];
      if constexpr (kPaired) {
        const Units<kBox, kUnits, T> c(in, at + in.inner, shared_at + in.inner);
        const Grads<kUnits, T> grad_second(grad, at + in.inner);
        Bounds<T> grads_c[kUnits];
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          ThresholdGrad<T> thresholds = {0, 0};
          pair_backward<kClipped, T>(a.bounds(u, radius), c.bounds(u, radius), first.v[u], second.v[u],
                                     grad_first.bounds(u), grad_second.bounds(u), slack[0], grads_a[u], grads_c[u],
                                     thresholds);
          to_first.v[u] += thresholds.first;
          to_second.v[u] += thresholds.second;
        }
        radius_grad = store_grads<kBox, kUnits>(in, out, at, a, radius, grads_a, norms_a) +
                      store_grads<kBox, kUnits>(in, out, at + in.inner, c, radius, grads_c, norms_c);
      } else {
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
          grads_a[u] = unit_backward<kActivation, T>(a.bounds(u, radius), first.v[u], grad_first.bounds(u), slack,
                                                     to_first.v[u]);
        radius_grad = store_grads<kBox, kUnits>(in, out, at, a, radius, grads_a, norms_a);
      }
    }
    radius_grad = warp_sum(radius_grad);
    if (threadIdx.x % kWarp == 0) out.radius[(chunk * kWarps + threadIdx.x / kWarp) * in.batch + b] = radius_grad;
  }
  if (!alive) return;
  if (in.row_norms_shared) {
    store<kUnits>(out.squared_row_norms + slice * units + unit, norms_a);
    if (kPaired) store<kUnits>(out.squared_row_norms + slice * units + unit + in.inner, norms_c);
  }
  if (kClipped || kActivation == Activation::kClippedRelu) store<kUnits>(out.first + slice * items + item, to_first);
  if (kClipped) store<kUnits>(out.second + slice * items + item, to_second);
}

// Units that a thread takes at once: whole packs where no row ends within one. (Arrays begin on 16 bytes.)
template <typename T>
int units_at_once(int64_t inner) {
  return inner % kMostUnits<T> == 0 ? kMostUnits<T> : 1;
}

template <typename T>
int64_t chunks_of(int64_t outer, int64_t inner) {
  return blocks_for(outer * inner, kThreads * units_at_once<T>(inner));
}

// Calls run(units a thread takes at once) with a constant.
template <typename T, typename Run>
void with_units(int64_t inner, Run run) {
  if (units_at_once<T>(inner) == 1)
    run(std::integral_constant<int, 1>{});
  else
    run(std::integral_constant<int, kMostUnits<T>>{});
}

}  // namespace

template <typename scalar_t>
int64_t activation_pattern_chunks(int64_t outer, int64_t inner, bool backward) {
  return chunks_of<scalar_t>(outer, inner) * (backward ? kWarps : 1);
}

template <typename scalar_t>
int64_t activation_pattern_slices(int64_t batch, int64_t outer, int64_t inner) {
  // enough blocks to keep some on every multiprocessor
  const int64_t wanted = 8 * device_attribute(cudaDevAttrMultiProcessorCount),
                chunks = chunks_of<scalar_t>(outer, inner);
  const int64_t slices = (wanted + chunks - 1) / chunks;
  return slices < batch ? slices : batch;
}

template <typename scalar_t>
void activation_pattern(Activation activation, const ActivationInput<scalar_t>& in,
                        const ActivationOutput<scalar_t>& out, void* stream) {
  const int64_t chunks = chunks_of<scalar_t>(in.outer, in.inner);
  with_constants(activation, in.half_width != nullptr, [&](auto kind, auto box) {
    with_units<scalar_t>(in.inner, [&](auto units) {
      launch("activation_pattern", forward_kernel<kind(), box(), units(), scalar_t>,
             {dim3(blocks_for(in.batch * chunks, 1)), kThreads, 4 * kWarps * sizeof(scalar_t)}, stream, in, out,
             chunks);
    });
  });
}

template <typename scalar_t>
void activation_pattern_backward(Activation activation, const ActivationInput<scalar_t>& in,
                                 const ActivationOutputGrad<scalar_t>& grad_out,
                                 const ActivationInputGrad<scalar_t>& grad_in, void* stream) {
  const int64_t chunks = chunks_of<scalar_t>(in.outer, in.inner),
                slices = activation_pattern_slices<scalar_t>(in.batch, in.outer, in.inner);
  with_constants(activation, in.half_width != nullptr, [&](auto kind, auto box) {
    with_units<scalar_t>(in.inner, [&](auto units) {
      launch("activation_pattern_backward", backward_kernel<kind(), box(), units(), scalar_t>,
             {dim3(blocks_for(chunks * slices, 1)), kThreads}, stream, in, grad_out, grad_in, chunks, slices);
    });
  });
}

#define LOCALLIP_INSTANTIATE(scalar_t)                                                                              \
  template int64_t activation_pattern_chunks<scalar_t>(int64_t, int64_t, bool);                                     \
  template int64_t activation_pattern_slices<scalar_t>(int64_t, int64_t, int64_t);                                  \
  template void activation_pattern(Activation, const ActivationInput<scalar_t>&, const ActivationOutput<scalar_t>&, \
                                   void*);                                                                          \
  template void activation_pattern_backward(Activation, const ActivationInput<scalar_t>&,                           \
                                            const ActivationOutputGrad<scalar_t>&,                                  \
                                            const ActivationInputGrad<scalar_t>&, void*);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cuda
