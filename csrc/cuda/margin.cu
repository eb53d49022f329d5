// Margins. Forward: one warp a (sample, class) pair. A lane holds its units' directions and the faces they are drawn to
// in registers (8 pairs of them at width 256, 32 at 1024), loaded once; every step of the climb is then some ten
// operations a unit and three sums over the warp. Wider layers read them from L1 again in every step. K = 10 and width
// 512 at a batch of 256: 2560 warps, 3 MB read from L2; two loads and about 100 FLOP a unit and pair.
//
// Backward: for the features' side a thread a (sample, unit), over the classes; for the weight's a thread a (class,
// unit), over a slice of the batch, so that every sum has one owner and one order, and there are blocks enough.
#include "../margin.h"

#include "launch.cuh"

namespace locallip::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

template <typename T>
struct Pair {  // what the kernels need of one (sample, class) pair
  const T *own, *other, *features, *lower, *upper;

  __device__ Pair(const MarginInput<T>& in, int64_t b, int64_t label, int64_t j)
      : own(in.weight + label * in.width),
        other(in.weight + j * in.width),
        features(in.features + b * in.width),
        lower(in.lower + b * in.width),
        upper(in.upper + b * in.width) {}

  __device__ T direction(int64_t i) const { return other[i] - own[i]; }
  __device__ Room<T> room(int64_t i) const { return room_of(features[i], lower[i], upper[i]); }
  __device__ T face(int64_t i) const { return direction(i) > 0 ? room(i).high : room(i).low; }
};

// The units of one lane: `kHeld` of them in registers, or, where that is 0, any number in memory.
template <int kHeld, typename T>
struct Lane {
  const Pair<T>& pair;
  int64_t width;
  T directions[kHeld > 0 ? kHeld : 1], faces[kHeld > 0 ? kHeld : 1];
  T unit = 1, radius = 1;  // directions in multiples of `unit`, room in multiples of the radius

  __device__ Lane(const Pair<T>& from, int64_t n) : pair(from), width(n) {
    const int64_t lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t i = lane + k * kWarp;
      directions[k] = i < width ? pair.direction(i) : T(0);  // a direction of 0 moves nothing
      faces[k] = i < width ? pair.face(i) : T(0);
    }
  }

  template <typename Run>
  __device__ void for_each(Run run) const {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) run(directions[k] / unit, faces[k] / radius);
    } else {
      for (int64_t i = threadIdx.x % kWarp; i < width; i += kWarp) run(pair.direction(i) / unit, pair.face(i) / radius);
    }
  }

  __device__ void scale(T by_unit, T by_radius) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        directions[k] /= by_unit;
        faces[k] /= by_radius;
      }
    } else {
      unit = by_unit;
      radius = by_radius;
    }
  }

  __device__ MarginSums<T> sums_at(T step) const {
    MarginSums<T> sums = {0, 0, 0};
    for_each([&](T direction, T face) {
      const auto d = displace<T>(direction, {face, face}, step);
      sums.inside += d.at_face ? T(0) : direction * direction;
      sums.held += d.at_face ? d.delta * d.delta : T(0);
      sums.pulled += d.at_face ? direction * d.delta : T(0);
    });
    return {warp_sum(sums.inside), warp_sum(sums.held), warp_sum(sums.pulled)};
  }
};

template <int kHeld, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ MarginInput<T> in, T* gain, T* step) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
  if (at >= in.batch * in.classes) return;
  const int64_t b = at / in.classes, j = at % in.classes, label = in.labels[b];
  const bool box_only = in.radius[b] >= kUnboundedRadius;
  const T radius = box_only ? T(1) : in.radius[b];
  T value = 0, t = 0;
  if (label < 0 || label >= in.classes) {
    value = T(NAN);  // the host does not look at labels on a device
  } else if (j != label && radius != 0) {
    const Pair<T> pair(in, b, label, j);
    Lane<kHeld, T> lane(pair, in.width);
    T largest = 0, square = 0;
    lane.for_each([&](T direction, T) { largest = fmax(largest, fabs(direction)); });
    largest = warp_max(largest);
    const T unit = largest > 0 ? largest : T(1);
    lane.scale(unit, radius);
    t = T(INFINITY);
    const MarginSums<T> box = lane.sums_at(t);
    value = box.pulled;
    if (!box_only && !(box.held <= 1)) {  // else the far corner of the box lies in the ball
      lane.for_each([&](T direction, T) { square += direction * direction; });
      t = 1 / sqrt(warp_sum(square));
      MarginSums<T> sums = lane.sums_at(t);
      for (int k = 0; k < kMarginSteps; ++k) {
        const T next = next_step(sums, t);
        if (!(next > t)) break;
        t = next;
        sums = lane.sums_at(t);
      }
      value = smaller(dual_value(sums, t), box.pulled);
    }
    value *= unit * radius;
    t *= radius / unit;
  }
  if (threadIdx.x % kWarp == 0) {
    gain[at] = value;
    step[at] = t;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    features_kernel(const __grid_constant__ MarginInput<T> in, const __grid_constant__ MarginGrad<T> grad,
                    int64_t chunks) {
  const int64_t b = blockIdx.x / chunks, i = blockIdx.x % chunks * kThreads + threadIdx.x, label = in.labels[b];
  if (i >= in.width) return;
  const bool known = label >= 0 && label < in.classes;  // the host does not look at labels on a device
  T radius_grad = 0, moved = known ? T(0) : T(NAN), low = moved, high = moved;
  for (int64_t j = 0; known && j < in.classes; ++j) {
    const T g = grad.grad_gain[b * in.classes + j], t = grad.step[b * in.classes + j];
    if (j == label || g == 0 || t == 0) continue;
    const Pair<T> pair(in, b, label, j);
    const T direction = pair.direction(i);
    const auto d = displace<T>(direction, pair.room(i), t);
    moved += g * d.delta;
    const T pull = d.at_face ? g * (direction - d.delta / t) : T(0);
    (direction > 0 ? high : low) += pull;
    radius_grad += g * in.radius[b] / t;
  }
  const int64_t at = b * in.width + i;
  if (in.lower[at] > in.features[at]) low = 0;  // outside its box by rounding, the room is 0 and stays so
  if (in.upper[at] < in.features[at]) high = 0;
  grad.moved[at] = moved;
  grad.lower[at] = low;
  grad.upper[at] = high;
  grad.features[at] = -(low + high);
  if (i == 0) grad.radius[b] = radius_grad;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(const __grid_constant__ MarginInput<T> in, const __grid_constant__ MarginGrad<T> grad, int64_t chunks,
                  int64_t slices) {
  const int64_t i = blockIdx.x % chunks * kThreads + threadIdx.x, j = blockIdx.x / chunks % in.classes,
                slice = blockIdx.x / chunks / in.classes;
  if (i >= in.width) return;
  T sum = 0;
  for (int64_t b = in.batch * slice / slices; b < in.batch * (slice + 1) / slices; ++b) {
    const int64_t label = in.labels[b];
    if (label == j || label < 0 || label >= in.classes) {
      sum -= grad.moved[b * in.width + i];
      continue;
    }
    const T g = grad.grad_gain[b * in.classes + j], t = grad.step[b * in.classes + j];
    if (g == 0 || t == 0) continue;
    const Pair<T> pair(in, b, label, j);
    sum += g * displace<T>(pair.direction(i), pair.room(i), t).delta;
  }
  grad.weight[(slice * in.classes + j) * in.width + i] = sum;
}

}  // namespace

int64_t margin_slices(int64_t batch, int64_t classes, int64_t width) {
  // enough blocks to keep some on every multiprocessor
  const int64_t wanted = 4 * device_attribute(cudaDevAttrMultiProcessorCount),
                blocks = classes * blocks_for(width, kThreads), slices = (wanted + blocks - 1) / blocks;
  return slices < batch ? slices : batch;
}

template <typename scalar_t>
void margin(const MarginInput<scalar_t>& in, scalar_t* gain, scalar_t* step, void* stream) {
  constexpr int kMost = sizeof(scalar_t) == 4 ? 32 : 16;  // units a lane: 32 doubles and their faces do not fit
  const auto kernel = in.width <= 8 * kWarp       ? forward_kernel<8, scalar_t>
                      : in.width <= 16 * kWarp    ? forward_kernel<16, scalar_t>
                      : in.width <= kMost * kWarp ? forward_kernel<kMost, scalar_t>
                                                  : forward_kernel<0, scalar_t>;
  launch("margin", kernel, {dim3(blocks_for(in.batch * in.classes, kWarps)), kThreads}, stream, in, gain, step);
}

template <typename scalar_t>
void margin_backward(const MarginInput<scalar_t>& in, const MarginGrad<scalar_t>& grad, void* stream) {
  const int64_t chunks = blocks_for(in.width, kThreads), slices = margin_slices(in.batch, in.classes, in.width);
  launch("margin_backward, features", features_kernel<scalar_t>, {dim3(blocks_for(in.batch * chunks, 1)), kThreads},
         stream, in, grad, chunks);
  launch("margin_backward, weight", weight_kernel<scalar_t>,
         {dim3(blocks_for(chunks * in.classes * slices, 1)), kThreads}, stream, in, grad, chunks, slices);
}

#define LOCALLIP_INSTANTIATE(scalar_t)                                             \
  template void margin(const MarginInput<scalar_t>&, scalar_t*, scalar_t*, void*); \
  template void margin_backward(const MarginInput<scalar_t>&, const MarginGrad<scalar_t>&, void*);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cuda
