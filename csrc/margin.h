// The most that logit j can gain on logit y when the features move inside a ball and a box:
//
//   gain = max { d . delta : |delta| <= r, low <= delta <= high },  d = w_j - w_y,  low <= 0 <= high.
//
// Its dual g(lambda) = sum_i [d_i delta_i - lambda delta_i^2 / 2] + lambda r^2 / 2, delta_i = clip(d_i / lambda, low_i,
// high_i), bounds the gain from above for every lambda > 0; g at the lambda reached is what is returned, so that
// stopping early costs tightness and never soundness. With t = 1 / lambda, |delta(t)|^2 = t^2 A + C, A the sum of d_i^2
// over the units inside the box and C the squared length of those at its faces. t <- sqrt((r^2 - C) / A) climbs from r
// / |d| to the solution monotonically and in finitely many steps, since units only move from the inside to the faces.
// The climb works on d / max |d| and, with the room, on units of r: squares of small numbers would underflow and the
// bound with them.
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"

namespace locallip {

// features, lower, upper [batch][width]; radius [batch]; weight [classes][width]; labels [batch].
template <typename scalar_t>
struct MarginInput {
  const scalar_t *features, *lower, *upper, *radius, *weight;
  const int64_t* labels;
  int64_t batch, classes, width;
};

// grad_gain [batch][classes] and step, the t that `margin` stored; gradients shaped as the inputs, but that the
// weight's is [slices] of it, sums over a slice of the batch. `moved` is scratch [batch][width].
template <typename scalar_t>
struct MarginGrad {
  const scalar_t *grad_gain, *step;
  scalar_t *features, *lower, *upper, *radius, *weight, *moved;
};

// Beyond this radius the box alone bounds the gain: the room in units of the radius would underflow.
constexpr double kUnboundedRadius = 1e15;

// Steps of the climb: it ends by itself after a few (one for every group of units that reaches the box at once).
constexpr int kMarginSteps = 64;

#define LOCALLIP_DECLARE_MARGIN(STREAM)                                                                 \
  /* into how many slices the backward pass cuts the batch */                                           \
  int64_t margin_slices(int64_t batch, int64_t classes, int64_t width);                                 \
  /* gain and step [batch][classes]; step is t, infinite where the box alone bounds, 0 where r is 0. */ \
  template <typename scalar_t>                                                                          \
  void margin(const MarginInput<scalar_t>& in, scalar_t* gain, scalar_t* step STREAM);                  \
  template <typename scalar_t>                                                                          \
  void margin_backward(const MarginInput<scalar_t>& in, const MarginGrad<scalar_t>& grad STREAM);

namespace cpu {
LOCALLIP_DECLARE_MARGIN()
}
namespace cuda {
#define LOCALLIP_MARGIN_STREAM , void* stream
LOCALLIP_DECLARE_MARGIN(LOCALLIP_MARGIN_STREAM)
}  // namespace cuda

// The room of one unit; a clean value outside its box by a rounding error counts as on its face.
template <typename T>
struct Room {
  T low, high;
};

template <typename T>
LOCALLIP_INLINE Room<T> room_of(T feature, T lower, T upper) {
  const T low = lower - feature, high = upper - feature;
  return {low >= 0 ? T(0) : low, high <= 0 ? T(0) : high};  // NaN stays NaN
}

// The displacement of one unit at step t (infinite: at the face it is drawn to), and whether a face holds it there.
template <typename T>
struct Displacement {
  T delta;
  int at_face;  // 0 or 1
};

template <typename T>
LOCALLIP_INLINE Displacement<T> displace(T direction, Room<T> room, T step) {
  const T face = direction > 0 ? room.high : room.low;
  const T free = direction == 0 ? T(0) : direction * step;        // 0 times infinity is 0 here
  const int held = !(direction > 0 ? free < face : free > face);  // a NaN face holds, and shows
  return {direction == 0 ? T(0) : (held ? face : free), held && direction != 0};
}

// Sums over the units of one (sample, class) pair at a step: enough for the climb and for the dual value.
template <typename T>
struct MarginSums {
  T inside;  // sum of d^2 over the units inside the box
  T held;    // sum of delta^2 over the units at a face
  T pulled;  // sum of d delta over the units at a face
};

// The next t of the scaled problem (r = 1), or the present one where the climb is over.
template <typename T>
LOCALLIP_INLINE T next_step(MarginSums<T> sums, T step) {
  const T left = 1 - sums.held;
  if (!(sums.inside > 0) || !(left > 0)) return step;
  const T next = std::sqrt(left / sums.inside);
  return next > step * (1 + T(sizeof(T) == 4 ? 1e-6 : 1e-14)) ? next : step;
}

template <typename T>
LOCALLIP_INLINE T smaller(T x, T y) {
  return y < x ? y : x;  // NaN in x stays
}

// g at lambda = 1 / t of the scaled problem: inside units give t d^2 / 2 each, held ones d delta - delta^2 / (2 t).
template <typename T>
LOCALLIP_INLINE T dual_value(MarginSums<T> sums, T step) {
  return sums.pulled + step * sums.inside / 2 + (1 - sums.held) / (2 * step);
}

}  // namespace locallip
