// Activation pattern of one layer in one pass: pre-activation box and ball in; row and column masks, post-activation
// clean value and box, and sparsity terms out. The arithmetic of one unit (or one MaxMin pair) is here, shared by both
// devices.
//
// Arrays are [sample][units], units in one dense order. A MaxMin pair is (o, 0, i), (o, 1, i) of units =
// [outer][2][inner], and its thresholds are [outer][inner]. Other activations have outer = 1 and no factor 2: units =
// [inner].
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "portable.h"

namespace locallip {

enum class Activation { kIdentity, kRelu, kClippedRelu, kMaxMin, kClippedMaxMin };

LOCALLIP_INLINE constexpr bool is_paired(Activation a) {
  return a == Activation::kMaxMin || a == Activation::kClippedMaxMin;
}

// clean [batch][units]; centre, half_width [batch][units] or both null where only the ball bounds the unit;
// squared_row_norms [batch][units] or, with row_norms_shared, [units]; radius [batch];
// first, second: threshold (clipped ReLU), upper and lower (clipped MaxMin), or null.
template <typename scalar_t>
struct ActivationInput {
  const scalar_t *clean, *centre, *half_width, *squared_row_norms, *radius, *first, *second;
  bool row_norms_shared;
  int64_t batch, outer, inner;
};

// All [batch][units] but sums, [batch][chunks][4]: over a chunk's units, the two sparsity terms, and how many are True
// in the row mask and in the column mask. centre and half_width are null where nobody takes the box; so are their
// gradients.
template <typename scalar_t>
struct ActivationOutput {
  scalar_t *clean, *centre, *half_width;
  uint8_t *row_mask, *col_mask;
  scalar_t* sums;
};

// Gradients of the outputs; grad_slack is [batch][2], the same for every unit of a sample.
template <typename scalar_t>
struct ActivationOutputGrad {
  const scalar_t *clean, *centre, *half_width, *slack;
};

// Gradients of the inputs, shaped as they are (null where the input is), but that radius is [chunks][batch], and what
// the samples share (first, second, squared_row_norms with row_norms_shared) is [slices] of it, sums over a slice's
// samples.
template <typename scalar_t>
struct ActivationInputGrad {
  scalar_t *clean, *centre, *half_width, *squared_row_norms, *radius, *first, *second;
};

#define LOCALLIP_DECLARE_ACTIVATION_PATTERN(STREAM)                                                          \
  /* how many partial sums a pass over units [outer][inner] leaves in sums (forward) or radius (backward) */ \
  template <typename scalar_t>                                                                               \
  int64_t activation_pattern_chunks(int64_t outer, int64_t inner, bool backward);                            \
  /* into how many slices the backward pass cuts the batch */                                                \
  template <typename scalar_t>                                                                               \
  int64_t activation_pattern_slices(int64_t batch, int64_t outer, int64_t inner);                            \
  template <typename scalar_t>                                                                               \
  void activation_pattern(Activation activation, const ActivationInput<scalar_t>& in,                        \
                          const ActivationOutput<scalar_t>& out STREAM);                                     \
  template <typename scalar_t>                                                                               \
  void activation_pattern_backward(Activation activation, const ActivationInput<scalar_t>& in,               \
                                   const ActivationOutputGrad<scalar_t>& grad_out,                           \
                                   const ActivationInputGrad<scalar_t>& grad_in STREAM);

namespace cpu {
LOCALLIP_DECLARE_ACTIVATION_PATTERN()
}
namespace cuda {
#define LOCALLIP_STREAM , void* stream
LOCALLIP_DECLARE_ACTIVATION_PATTERN(LOCALLIP_STREAM)
}  // namespace cuda

// Calls run(activation, box) with the activation and the presence of a box as constants: integral_constant objects.
template <typename Run>
void with_constants(Activation activation, bool box, Run run) {
  const auto with_box = [&](auto kind) { box ? run(kind, std::true_type{}) : run(kind, std::false_type{}); };
  switch (activation) {
    case Activation::kIdentity:
      return with_box(std::integral_constant<Activation, Activation::kIdentity>{});
    case Activation::kRelu:
      return with_box(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kClippedRelu:
      return with_box(std::integral_constant<Activation, Activation::kClippedRelu>{});
    case Activation::kMaxMin:
      return with_box(std::integral_constant<Activation, Activation::kMaxMin>{});
    case Activation::kClippedMaxMin:
      return with_box(std::integral_constant<Activation, Activation::kClippedMaxMin>{});
  }
}

// ---- one unit ----------------------------------------------------------------------------------------------------------

// The clean value of a unit and the bounds of its value; as a gradient, the gradients of the three.
template <typename T>
struct Bounds {
  T clean, lower, upper;
};

// No branch anywhere below, so that compilers make vector code of the loops over units: sums of selects, not
// conditional sums, and no square root or division behind a comparison.

template <typename T>
LOCALLIP_INLINE T positive(T x) {
  return (x + std::fabs(x)) / 2;  // exact; NaN stays NaN
}

template <typename T>
LOCALLIP_INLINE T where(bool condition, T x) {
  return condition ? x : T(0);
}

template <typename T>
LOCALLIP_INLINE T clip_above(T x, T upper) {
  return x >= upper ? upper : x < upper ? x : x + upper;  // NaN in either stays NaN
}

template <typename T>
LOCALLIP_INLINE T clip_below(T x, T lower) {
  return x <= lower ? lower : x > lower ? x : x + lower;
}

template <typename T>
LOCALLIP_INLINE T row_norm(T squared) {
  return std::sqrt(std::fabs(squared));  // a fast convolution's rounding can leave a small negative
}

// Box intersected with ball, before the activation.
template <typename T>
LOCALLIP_INLINE Bounds<T> intersect(T clean, T reach, bool box, T centre, T half_width) {
  T lower = clean - reach, upper = clean + reach;
  if (box) {
    const T box_lower = centre - half_width, box_upper = centre + half_width;
    lower = box_lower > lower ? box_lower : lower;
    upper = box_upper < upper ? box_upper : upper;
  }
  return {clean, lower, upper};
}

template <typename T>
struct UnitGrad {
  T clean, centre, half_width, squared_row_norm, radius;
};

// Gradient of `intersect` and of reach = radius * row_norm(squared).
template <typename T>
LOCALLIP_INLINE UnitGrad<T> intersect_backward(T clean, T radius, T squared, bool box, T centre, T half_width,
                                               Bounds<T> grad) {
  const T norm = row_norm(squared), reach = radius * norm;
  UnitGrad<T> out{grad.clean, 0, 0, 0, 0};
  const bool lower_box = box && centre - half_width > clean - reach,
             upper_box = box && centre + half_width < clean + reach;
  const T box_low = where(lower_box, grad.lower), box_high = where(upper_box, grad.upper);
  const T ball_low = grad.lower - box_low, ball_high = grad.upper - box_high;
  out.centre = box_low + box_high;
  out.half_width = box_high - box_low;
  out.clean += ball_low + ball_high;
  const T reach_grad = ball_high - ball_low;
  out.radius = reach_grad * norm;
  // reach_grad * radius / (2 norm), and 0 where the row is empty
  out.squared_row_norm = reach_grad * radius * norm / (2 * std::fabs(squared) + std::numeric_limits<T>::min());
  return out;
}

template <typename T>
struct UnitResult {
  Bounds<T> out;
  int row, column;  // 0 or 1; not bool, which GCC makes branches of
  T slack[2];
};

template <Activation kActivation, typename T>
LOCALLIP_INLINE T unit_value(T z, T threshold) {
  if (kActivation == Activation::kIdentity) return z;
  const T rectified = positive(z);
  if (kActivation == Activation::kRelu) return rectified;
  return clip_above(rectified, threshold);
}

template <Activation kActivation, typename T>
LOCALLIP_INLINE UnitResult<T> unit_forward(Bounds<T> z, T threshold) {
  UnitResult<T> r;
  r.out = {unit_value<kActivation>(z.clean, threshold), unit_value<kActivation>(z.lower, threshold),
           unit_value<kActivation>(z.upper, threshold)};
  const bool rectifies = kActivation != Activation::kIdentity, clips = kActivation == Activation::kClippedRelu;
  // written so that NaN bounds keep the unit: a NaN must reach the result, not hide behind a mask
  r.row = !(rectifies && z.upper <= 0) && !(clips && z.lower >= threshold);
  r.column = r.row;
  r.slack[0] = where(rectifies, positive(z.upper));
  r.slack[1] = where(clips, positive(threshold - z.lower));
  return r;
}

template <typename T>
struct ThresholdGrad {
  T first, second;
};

template <Activation kActivation, typename T>
LOCALLIP_INLINE T unit_value_backward(T z, T threshold, T grad, T& threshold_grad) {
  if (kActivation == Activation::kIdentity) return grad;
  const bool clipped = kActivation == Activation::kClippedRelu && z >= threshold;
  threshold_grad += where(clipped, grad);
  return where(!clipped & (z > 0), grad);
}

template <Activation kActivation, typename T>
LOCALLIP_INLINE Bounds<T> unit_backward(Bounds<T> z, T threshold, Bounds<T> grad, const T (&slack)[2],
                                        T& threshold_grad) {
  Bounds<T> out = {unit_value_backward<kActivation>(z.clean, threshold, grad.clean, threshold_grad),
                   unit_value_backward<kActivation>(z.lower, threshold, grad.lower, threshold_grad),
                   unit_value_backward<kActivation>(z.upper, threshold, grad.upper, threshold_grad)};
  out.upper += where(kActivation != Activation::kIdentity && z.upper > 0, slack[0]);
  const T pushed = where(kActivation == Activation::kClippedRelu && threshold > z.lower, slack[1]);
  out.lower -= pushed;
  threshold_grad += pushed;
  return out;
}

// ---- one MaxMin pair: a, b in; max, min out ----------------------------------------------------------------------------

template <typename T>
struct PairResult {
  Bounds<T> largest, smallest;
  int row_a, row_b, column_largest, column_smallest;
  T slack;
};

template <bool kClipped, typename T>
LOCALLIP_INLINE void pair_value(T a, T b, T upper, T lower, T& largest, T& smallest) {
  largest = a >= b ? a : b;
  smallest = a >= b ? b : a;
  if (kClipped) {
    largest = clip_above(largest, upper);
    smallest = clip_below(smallest, lower);
  }
}

template <bool kClipped, typename T>
LOCALLIP_INLINE PairResult<T> pair_forward(Bounds<T> a, Bounds<T> b, T upper, T lower) {
  PairResult<T> r;
  T top, bottom;  // least value of the max and greatest value of the min, before they are clipped
  pair_value<kClipped>(a.clean, b.clean, upper, lower, r.largest.clean, r.smallest.clean);
  pair_value<false>(a.lower, b.lower, upper, lower, top, r.smallest.lower);
  pair_value<false>(a.upper, b.upper, upper, lower, r.largest.upper, bottom);
  r.largest.lower = top;
  r.smallest.upper = bottom;
  r.row_a = r.row_b = r.column_largest = r.column_smallest = 1;
  r.slack = 0;
  if (kClipped) {
    const int large = !(top >= upper), small = !(bottom <= lower);
    const int a_first = a.lower >= b.upper, b_first = (1 - a_first) & (b.lower >= a.upper),
              open = 1 - a_first - b_first;
    r.largest.lower = clip_above(top, upper);
    r.largest.upper = clip_above(r.largest.upper, upper);
    r.smallest.lower = clip_below(r.smallest.lower, lower);
    r.smallest.upper = clip_below(bottom, lower);
    r.column_largest = large;
    r.column_smallest = small;
    r.row_a = (a_first & large) | (b_first & small) | (open & (large | small));
    r.row_b = (a_first & small) | (b_first & large) | (open & (large | small));
    r.slack = positive(upper - top) + positive(bottom - lower);
  }
  return r;
}

template <bool kClipped, typename T>
LOCALLIP_INLINE void pair_value_backward(T a, T b, T upper, T lower, T grad_largest, T grad_smallest, T& grad_a,
                                         T& grad_b, ThresholdGrad<T>& thresholds) {
  const bool a_first = a >= b;
  const T clipped_largest = where(kClipped && (a_first ? a : b) >= upper, grad_largest);
  const T clipped_smallest = where(kClipped && (a_first ? b : a) <= lower, grad_smallest);
  thresholds.first += clipped_largest;
  thresholds.second += clipped_smallest;
  grad_largest -= clipped_largest;
  grad_smallest -= clipped_smallest;
  grad_a = a_first ? grad_largest : grad_smallest;
  grad_b = a_first ? grad_smallest : grad_largest;
}

template <bool kClipped, typename T>
LOCALLIP_INLINE void pair_backward(Bounds<T> a, Bounds<T> b, T upper, T lower, Bounds<T> grad_largest,
                                   Bounds<T> grad_smallest, T slack, Bounds<T>& grad_a, Bounds<T>& grad_b,
                                   ThresholdGrad<T>& thresholds) {
  pair_value_backward<kClipped>(a.clean, b.clean, upper, lower, grad_largest.clean, grad_smallest.clean, grad_a.clean,
                                grad_b.clean, thresholds);
  pair_value_backward<kClipped>(a.lower, b.lower, upper, lower, grad_largest.lower, grad_smallest.lower, grad_a.lower,
                                grad_b.lower, thresholds);
  pair_value_backward<kClipped>(a.upper, b.upper, upper, lower, grad_largest.upper, grad_smallest.upper, grad_a.upper,
                                grad_b.upper, thresholds);
  if (!kClipped) return;
  const bool top_is_a = a.lower >= b.lower, bottom_is_a = !(a.upper >= b.upper);
  const T below = where(upper > (top_is_a ? a.lower : b.lower), slack);
  const T above = where((bottom_is_a ? a.upper : b.upper) > lower, slack);
  thresholds.first += below;
  thresholds.second -= above;
  grad_a.lower -= where(top_is_a, below);
  grad_b.lower -= where(!top_is_a, below);
  grad_a.upper += where(bottom_is_a, above);
  grad_b.upper += where(!bottom_is_a, above);
}

}  // namespace locallip
