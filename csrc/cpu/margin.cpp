// Forward: one thread a sample, its room and clean values stay in cache for all classes. Backward: once over the
// samples for the features' side, once over the classes for the weight's, so that every sum has one owner and one
// order.
#include "../margin.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "sum.h"

namespace locallip::cpu {
namespace {

template <typename T>
LOCALLIP_INLINE void sum_terms_at(const T* direction, const T* low, const T* high, T step, int64_t i, T* inside,
                                  T* held, T* pulled) {
  const auto d = displace<T>(direction[i], {low[i], high[i]}, step);
  *inside = d.at_face ? T(0) : direction[i] * direction[i];
  *held = d.at_face ? d.delta * d.delta : T(0);
  *pulled = d.at_face ? d.delta * direction[i] : T(0);
}

template <typename T>
LOCALLIP_MULTIVERSION MarginSums<T> sums_at(const T* direction, const T* low, const T* high, T step, int64_t width) {
  Terms<T> inside, held, pulled;
  MarginSums<T> sums = {0, 0, 0};
  for (int64_t begin = 0; begin < width; begin += kTerms) {
    const int64_t end = begin + kTerms < width ? begin + kTerms : width;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i)
      sum_terms_at(direction, low, high, step, i, inside + (i - begin), held + (i - begin), pulled + (i - begin));
    sums.inside += sum(inside, end - begin);
    sums.held += sum(held, end - begin);
    sums.pulled += sum(pulled, end - begin);
  }
  return sums;
}

// Room of every unit in multiples of `unit`.
template <typename T>
void room(const MarginInput<T>& in, int64_t b, T unit, T* low, T* high) {
  for (int64_t i = 0; i < in.width; ++i) {
    const int64_t at = b * in.width + i;
    const Room<T> r = room_of(in.features[at], in.lower[at], in.upper[at]);
    low[i] = r.low / unit;
    high[i] = r.high / unit;
  }
}

// direction = (other - own) / its largest magnitude, which is returned.
template <typename T>
LOCALLIP_MULTIVERSION T direction_of(const T* own, const T* other, T* direction, int64_t width) {
  T largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < width; ++i) {
    direction[i] = other[i] - own[i];
    largest = std::max(largest, std::fabs(direction[i]));
  }
  const T unit = largest > 0 ? largest : T(1);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) direction[i] /= unit;
  return unit;
}

// The scaled problem: largest |direction| 1, radius 1.
template <typename T>
void solve(const T* direction, const T* low, const T* high, bool box_only, int64_t width, T* gain, T* step) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const MarginSums<T> box = sums_at(direction, low, high, kInfinity, width);
  *gain = box.pulled;
  *step = kInfinity;
  if (box_only || box.held <= 1) return;  // the far corner of the box lies in the ball
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < width; ++i) square += direction[i] * direction[i];
  T t = 1 / std::sqrt(square);
  MarginSums<T> sums = sums_at(direction, low, high, t, width);
  for (int k = 0; k < kMarginSteps; ++k) {
    const T next = next_step(sums, t);
    if (!(next > t)) break;
    t = next;
    sums = sums_at(direction, low, high, t, width);
  }
  *step = t;
  *gain = smaller(dual_value(sums, t), box.pulled);
}

template <typename T>
LOCALLIP_INLINE void displacement_at(const T* own, const T* other, const T* low, const T* high, T step, T* delta,
                                     int64_t i) {
  delta[i] = displace<T>(other[i] - own[i], {low[i], high[i]}, step).delta;
}

template <typename T>
LOCALLIP_MULTIVERSION void displacement(const T* own, const T* other, const T* low, const T* high, T step, T* delta,
                                        int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) displacement_at(own, other, low, high, step, delta, i);
}

// A unit at a face moves with it: d gain / d face = d - lambda delta.
template <typename T>
LOCALLIP_INLINE void add_room_grad_at(const T* own, const T* other, const T* low, const T* high, T step, T multiplier,
                                      T grad, T* grad_low, T* grad_high, int64_t i) {
  const T direction = other[i] - own[i];
  const auto d = displace<T>(direction, {low[i], high[i]}, step);
  const T pull = d.at_face ? grad * (direction - multiplier * d.delta) : T(0);
  grad_high[i] += direction > 0 ? pull : T(0);
  grad_low[i] += direction > 0 ? T(0) : pull;
}

template <typename T>
LOCALLIP_MULTIVERSION void add_room_grad(const T* own, const T* other, const T* low, const T* high, T step, T grad,
                                         T* grad_low, T* grad_high, int64_t width) {
  const T multiplier = 1 / step;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    add_room_grad_at(own, other, low, high, step, multiplier, grad, grad_low, grad_high, i);
}

template <typename T>
LOCALLIP_MULTIVERSION void add_scaled(T* out, const T* x, T factor, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) out[i] += factor * x[i];
}

}  // namespace

int64_t margin_slices(int64_t, int64_t, int64_t) { return 1; }

template <typename scalar_t>
void margin(const MarginInput<scalar_t>& in, scalar_t* gain, scalar_t* step) {
  at::parallel_for(0, in.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<scalar_t> low(in.width), high(in.width), direction(in.width);
    for (int64_t b = begin; b < end; ++b) {
      const bool box_only = in.radius[b] >= kUnboundedRadius;
      const scalar_t radius = box_only ? scalar_t(1) : in.radius[b];
      room(in, b, radius, low.data(), high.data());
      for (int64_t j = 0; j < in.classes; ++j) {
        const int64_t at = b * in.classes + j;
        gain[at] = step[at] = 0;
        if (j == in.labels[b] || radius == 0) continue;
        const scalar_t unit =
            direction_of(in.weight + in.labels[b] * in.width, in.weight + j * in.width, direction.data(), in.width);
        solve(direction.data(), low.data(), high.data(), box_only, in.width, gain + at, step + at);
        gain[at] *= unit * radius;
        step[at] *= radius / unit;
      }
    }
  });
}

template <typename scalar_t>
void margin_backward(const MarginInput<scalar_t>& in, const MarginGrad<scalar_t>& grad) {
  const int64_t width = in.width;
  at::parallel_for(0, in.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<scalar_t> low(width), high(width), delta(width);
    for (int64_t b = begin; b < end; ++b) {
      room(in, b, scalar_t(1), low.data(), high.data());
      scalar_t *grad_low = grad.lower + b * width, *grad_high = grad.upper + b * width, *moved = grad.moved + b * width;
      std::fill_n(grad_low, width, scalar_t(0));
      std::fill_n(grad_high, width, scalar_t(0));
      std::fill_n(moved, width, scalar_t(0));
      grad.radius[b] = 0;
      const scalar_t* own = in.weight + in.labels[b] * width;
      for (int64_t j = 0; j < in.classes; ++j) {
        const scalar_t g = grad.grad_gain[b * in.classes + j], t = grad.step[b * in.classes + j];
        if (j == in.labels[b] || g == 0 || t == 0) continue;
        const scalar_t* other = in.weight + j * width;
        displacement(own, other, low.data(), high.data(), t, delta.data(), width);
        add_scaled(moved, delta.data(), g, width);
        add_room_grad(own, other, low.data(), high.data(), t, g, grad_low, grad_high, width);
        grad.radius[b] += g * in.radius[b] / t;
      }
      for (int64_t i = 0; i < width; ++i) {
        const int64_t at = b * width + i;
        if (in.lower[at] > in.features[at]) grad_low[i] = 0;  // outside its box by rounding, the room is 0 and stays so
        if (in.upper[at] < in.features[at]) grad_high[i] = 0;
        grad.features[at] = -(grad_low[i] + grad_high[i]);
      }
    }
  });
  at::parallel_for(0, in.classes, 1, [&](int64_t begin, int64_t end) {
    std::vector<scalar_t> low(width), high(width), delta(width);
    for (int64_t j = begin; j < end; ++j) {
      scalar_t* out = grad.weight + j * width;
      std::fill_n(out, width, scalar_t(0));
      for (int64_t b = 0; b < in.batch; ++b) {
        if (j == in.labels[b]) {
          add_scaled(out, grad.moved + b * width, scalar_t(-1), width);
          continue;
        }
        const scalar_t g = grad.grad_gain[b * in.classes + j], t = grad.step[b * in.classes + j];
        if (g == 0 || t == 0) continue;
        room(in, b, scalar_t(1), low.data(), high.data());
        displacement(in.weight + in.labels[b] * width, in.weight + j * width, low.data(), high.data(), t, delta.data(),
                     width);
        add_scaled(out, delta.data(), g, width);
      }
    }
  });
}

#define LOCALLIP_INSTANTIATE(scalar_t)                                      \
  template void margin(const MarginInput<scalar_t>&, scalar_t*, scalar_t*); \
  template void margin_backward(const MarginInput<scalar_t>&, const MarginGrad<scalar_t>&);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cpu
