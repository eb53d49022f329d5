// Forward: one block a (class, sample) pair; directions and room are read again at every step of the climb, from L1 and
// L2. Backward: one block a sample for the features' side, one a class for the weight's, so that every sum has one
// owner and one order; a thread owns its units.
#include "../margin.h"

#include "launch.cuh"

namespace locallip::cuda {
namespace {

template <typename T>
struct Pair {  // what the kernels need of one (sample, class) pair
  const T *own, *other, *features, *lower, *upper;
  int64_t width;

  __device__ Pair(const MarginInput<T>& in, int64_t b, int64_t j)
      : own(in.weight + in.labels[b] * in.width),
        other(in.weight + j * in.width),
        features(in.features + b * in.width),
        lower(in.lower + b * in.width),
        upper(in.upper + b * in.width),
        width(in.width) {}

  __device__ T direction(int64_t i) const { return other[i] - own[i]; }
  __device__ Room<T> room(int64_t i) const { return room_of(features[i], lower[i], upper[i]); }
};

// Sums of the scaled problem: directions in multiples of `unit`, room in multiples of the radius.
template <typename T>
__device__ MarginSums<T> sums_at(const Pair<T>& pair, T unit, T radius, T step, T* scratch) {
  MarginSums<T> sums = {0, 0, 0};
  for (int64_t i = threadIdx.x; i < pair.width; i += kThreads) {
    const T direction = pair.direction(i) / unit;
    const Room<T> room = pair.room(i);
    const auto d = displace<T>(direction, {room.low / radius, room.high / radius}, step);
    sums.inside += d.at_face ? T(0) : direction * direction;
    sums.held += d.at_face ? d.delta * d.delta : T(0);
    sums.pulled += d.at_face ? direction * d.delta : T(0);
  }
  return {block_sum(sums.inside, scratch), block_sum(sums.held, scratch), block_sum(sums.pulled, scratch)};
}

template <typename T>
__global__ void forward_kernel(MarginInput<T> in, T* gain, T* step) {
  __shared__ T scratch[kThreads / 32];
  const int64_t b = blockIdx.x / in.classes, j = blockIdx.x % in.classes, label = in.labels[b];
  const bool box_only = in.radius[b] >= kUnboundedRadius;
  const T radius = box_only ? T(1) : in.radius[b];
  T value = 0, t = 0;
  if (label < 0 || label >= in.classes) {
    value = T(NAN);  // the host does not look at labels on a device
  } else if (j != label && radius != 0) {
    const Pair<T> pair(in, b, j);
    T largest = 0;
    for (int64_t i = threadIdx.x; i < pair.width; i += kThreads) largest = fmax(largest, fabs(pair.direction(i)));
    largest = block_max(largest, scratch);
    const T unit = largest > 0 ? largest : T(1);
    t = T(INFINITY);
    const MarginSums<T> box = sums_at(pair, unit, radius, t, scratch);
    value = box.pulled;
    if (!box_only && !(box.held <= 1)) {  // else the far corner of the box lies in the ball
      T square = 0;
      for (int64_t i = threadIdx.x; i < pair.width; i += kThreads)
        square += (pair.direction(i) / unit) * (pair.direction(i) / unit);
      t = 1 / sqrt(block_sum(square, scratch));
      MarginSums<T> sums = sums_at(pair, unit, radius, t, scratch);
      for (int k = 0; k < kMarginSteps; ++k) {
        const T next = next_step(sums, t);
        if (!(next > t)) break;
        t = next;
        sums = sums_at(pair, unit, radius, t, scratch);
      }
      value = smaller(dual_value(sums, t), box.pulled);
    }
    value *= unit * radius;
    t *= radius / unit;
  }
  if (threadIdx.x == 0) {
    gain[blockIdx.x] = value;
    step[blockIdx.x] = t;
  }
}

template <typename T>
__global__ void features_kernel(MarginInput<T> in, MarginGrad<T> grad) {
  const int64_t b = blockIdx.x, label = in.labels[b];
  T radius_grad = 0;
  for (int64_t i = threadIdx.x; i < in.width; i += kThreads) {
    T moved = 0, low = 0, high = 0;
    for (int64_t j = 0; j < in.classes; ++j) {
      const T g = grad.grad_gain[b * in.classes + j], t = grad.step[b * in.classes + j];
      if (j == label || g == 0 || t == 0) continue;
      const Pair<T> pair(in, b, j);
      const T direction = pair.direction(i);
      const auto d = displace<T>(direction, pair.room(i), t);
      moved += g * d.delta;
      const T pull = d.at_face ? g * (direction - d.delta / t) : T(0);
      (direction > 0 ? high : low) += pull;
      if (i == 0) radius_grad += g * in.radius[b] / t;
    }
    const int64_t at = b * in.width + i;
    if (in.lower[at] > in.features[at]) low = 0;  // outside its box by rounding, the room is 0 and stays so
    if (in.upper[at] < in.features[at]) high = 0;
    grad.moved[at] = moved;
    grad.lower[at] = low;
    grad.upper[at] = high;
    grad.features[at] = -(low + high);
  }
  if (threadIdx.x == 0) grad.radius[b] = radius_grad;
}

template <typename T>
__global__ void weight_kernel(MarginInput<T> in, MarginGrad<T> grad) {
  const int64_t j = blockIdx.x;
  for (int64_t i = threadIdx.x; i < in.width; i += kThreads) {
    T sum = 0;
    for (int64_t b = 0; b < in.batch; ++b) {
      if (in.labels[b] == j) {
        sum -= grad.moved[b * in.width + i];
        continue;
      }
      const T g = grad.grad_gain[b * in.classes + j], t = grad.step[b * in.classes + j];
      if (g == 0 || t == 0) continue;
      const Pair<T> pair(in, b, j);
      sum += g * displace<T>(pair.direction(i), pair.room(i), t).delta;
    }
    grad.weight[j * in.width + i] = sum;
  }
}

}  // namespace

template <typename scalar_t>
void margin(const MarginInput<scalar_t>& in, scalar_t* gain, scalar_t* step, void* stream) {
  forward_kernel<<<in.batch * in.classes, kThreads, 0, as_stream(stream)>>>(in, gain, step);
  check_launch("margin");
}

template <typename scalar_t>
void margin_backward(const MarginInput<scalar_t>& in, const MarginGrad<scalar_t>& grad, void* stream) {
  features_kernel<<<in.batch, kThreads, 0, as_stream(stream)>>>(in, grad);
  check_launch("margin_backward, features");
  weight_kernel<<<in.classes, kThreads, 0, as_stream(stream)>>>(in, grad);
  check_launch("margin_backward, weight");
}

#define LOCALLIP_INSTANTIATE(scalar_t)                                             \
  template void margin(const MarginInput<scalar_t>&, scalar_t*, scalar_t*, void*); \
  template void margin_backward(const MarginInput<scalar_t>&, const MarginGrad<scalar_t>&, void*);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cuda
