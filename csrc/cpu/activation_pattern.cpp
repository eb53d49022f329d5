// Forward: one thread a sample. Backward: one thread a chunk of units, the samples one after another, so that what is summed
// over the batch (thresholds, shared row norms) stays in the chunk's cache and in one fixed order.
#include "../activation_pattern.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace locallip::cpu {
namespace {

// Units (or pairs) of a backward chunk: a few kilobytes for each array that is held over the batch.
constexpr int64_t kChunk = 1024;

struct Rows {  // ranges of [outer][inner] a chunk covers: whole outer rows, or a part of the only one
  int64_t outer_begin, outer_end, inner_begin, inner_end;
};

Rows rows_of(int64_t chunk, int64_t outer, int64_t inner) {
  if (outer == 1) return {0, 1, chunk * kChunk, std::min(inner, (chunk + 1) * kChunk)};
  const int64_t rows = std::max<int64_t>(1, kChunk / std::max<int64_t>(inner, 1));
  return {chunk * rows, std::min(outer, (chunk + 1) * rows), 0, inner};
}

template <typename T>
LOCALLIP_INLINE T at_or_zero(const T* x, int64_t i) {
  return x ? x[i] : T(0);
}

template <Activation kActivation, bool kBox, typename T>
LOCALLIP_MULTIVERSION void forward_units(const ActivationInput<T>& in, const ActivationOutput<T>& out, int64_t b) {
  const int64_t n = in.inner, at = b * n;
  const T *clean = in.clean + at, *centre = in.centre + at, *half_width = in.half_width + at;
  const T* squared = in.squared_row_norms + (in.row_norms_shared ? 0 : at);
  const T *first = in.first, radius = in.radius[b];
  T *out_clean = out.clean + at, *out_centre = out.centre + at, *out_half = out.half_width + at;
  uint8_t *row = out.row_mask + at, *col = out.col_mask + at;
  double slack0 = 0, slack1 = 0;
#pragma omp simd reduction(+ : slack0, slack1)
  for (int64_t i = 0; i < n; ++i) {
    const Bounds<T> z = intersect<T>(clean[i], radius * row_norm(squared[i]), kBox, kBox ? centre[i] : T(0),
                                     kBox ? half_width[i] : T(0));
    const auto r = unit_forward<kActivation, T>(z, kActivation == Activation::kClippedRelu ? first[i] : T(0));
    out_clean[i] = r.out.clean;
    out_centre[i] = (r.out.lower + r.out.upper) / 2;
    out_half[i] = (r.out.upper - r.out.lower) / 2;
    row[i] = r.row;
    col[i] = r.column;
    slack0 += r.slack[0];
    slack1 += r.slack[1];
  }
  out.slack[2 * b] = static_cast<T>(slack0);
  out.slack[2 * b + 1] = static_cast<T>(slack1);
}

template <bool kClipped, bool kBox, typename T>
LOCALLIP_MULTIVERSION void forward_pairs(const ActivationInput<T>& in, const ActivationOutput<T>& out, int64_t b) {
  const int64_t n = in.inner, radius_at = b;
  double slack = 0;
  for (int64_t o = 0; o < in.outer; ++o) {
    const int64_t at = (b * in.outer + o) * 2 * n, shared_at = in.row_norms_shared ? o * 2 * n : at;
    const T *clean = in.clean + at, *centre = in.centre + at, *half_width = in.half_width + at;
    const T *squared = in.squared_row_norms + shared_at, radius = in.radius[radius_at];
    const T *first = in.first + o * n, *second = in.second + o * n;
    T *out_clean = out.clean + at, *out_centre = out.centre + at, *out_half = out.half_width + at;
    uint8_t *row = out.row_mask + at, *col = out.col_mask + at;
#pragma omp simd reduction(+ : slack)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = i + n;
      const Bounds<T> a = intersect<T>(clean[i], radius * row_norm(squared[i]), kBox, kBox ? centre[i] : T(0),
                                       kBox ? half_width[i] : T(0));
      const Bounds<T> c = intersect<T>(clean[j], radius * row_norm(squared[j]), kBox, kBox ? centre[j] : T(0),
                                       kBox ? half_width[j] : T(0));
      const auto r = pair_forward<kClipped, T>(a, c, kClipped ? first[i] : T(0), kClipped ? second[i] : T(0));
      out_clean[i] = r.largest.clean;
      out_clean[j] = r.smallest.clean;
      out_centre[i] = (r.largest.lower + r.largest.upper) / 2;
      out_centre[j] = (r.smallest.lower + r.smallest.upper) / 2;
      out_half[i] = (r.largest.upper - r.largest.lower) / 2;
      out_half[j] = (r.smallest.upper - r.smallest.lower) / 2;
      row[i] = r.row_a;
      row[j] = r.row_b;
      col[i] = r.column_largest;
      col[j] = r.column_smallest;
      slack += r.slack;
    }
  }
  out.slack[2 * b] = static_cast<T>(slack);
  out.slack[2 * b + 1] = 0;
}

// Gradients of lower' = centre - half and upper' = centre + half from those of centre and half.
template <typename T>
LOCALLIP_INLINE Bounds<T> bounds_grad(const ActivationOutputGrad<T>& grad, int64_t i) {
  return {grad.clean[i], (grad.centre[i] - grad.half_width[i]) / 2, (grad.centre[i] + grad.half_width[i]) / 2};
}

template <Activation kActivation, bool kBox, typename T>
LOCALLIP_MULTIVERSION void backward_units(const ActivationInput<T>& in, const ActivationOutputGrad<T>& grad,
                                          const ActivationInputGrad<T>& out, int64_t b, int64_t begin, int64_t end,
                                          T* radius_grad) {
  const int64_t at = b * in.inner;
  const T *clean = in.clean + at, *centre = in.centre + at, *half_width = in.half_width + at;
  const T* squared = in.squared_row_norms + (in.row_norms_shared ? 0 : at);
  const T *first = in.first, radius = in.radius[b], slack[2] = {grad.slack[2 * b], grad.slack[2 * b + 1]};
  const ActivationOutputGrad<T> own = {grad.clean + at, grad.centre + at, grad.half_width + at, nullptr};
  T *out_clean = out.clean + at, *out_centre = out.centre + at, *out_half = out.half_width + at;
  T* out_squared = out.squared_row_norms + (in.row_norms_shared ? 0 : at);
  T* out_first = out.first;
  const bool add = in.row_norms_shared && b > 0, add_first = b > 0;
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = begin; i < end; ++i) {
    const T middle = kBox ? centre[i] : T(0), half = kBox ? half_width[i] : T(0);
    const Bounds<T> z = intersect<T>(clean[i], radius * row_norm(squared[i]), kBox, middle, half);
    T threshold_grad = 0;
    const Bounds<T> grad_z = unit_backward<kActivation, T>(z, kActivation == Activation::kClippedRelu ? first[i] : T(0),
                                                           bounds_grad(own, i), slack, threshold_grad);
    const auto g = intersect_backward<T>(clean[i], radius, squared[i], kBox, middle, half, grad_z);
    out_clean[i] = g.clean;
    if (kBox) {
      out_centre[i] = g.centre;
      out_half[i] = g.half_width;
    }
    out_squared[i] = add ? out_squared[i] + g.squared_row_norm : g.squared_row_norm;
    if (kActivation == Activation::kClippedRelu) out_first[i] = add_first ? out_first[i] + threshold_grad : threshold_grad;
    total += g.radius;
  }
  *radius_grad += static_cast<T>(total);
}

template <bool kClipped, bool kBox, typename T>
LOCALLIP_MULTIVERSION void backward_pairs(const ActivationInput<T>& in, const ActivationOutputGrad<T>& grad,
                                          const ActivationInputGrad<T>& out, int64_t b, int64_t o, int64_t begin, int64_t end,
                                          T* radius_grad) {
  const int64_t n = in.inner, at = (b * in.outer + o) * 2 * n, shared_at = in.row_norms_shared ? o * 2 * n : at;
  const T *clean = in.clean + at, *centre = in.centre + at, *half_width = in.half_width + at;
  const T *squared = in.squared_row_norms + shared_at, radius = in.radius[b], slack = grad.slack[2 * b];
  const T *first = in.first + o * n, *second = in.second + o * n;
  const ActivationOutputGrad<T> own = {grad.clean + at, grad.centre + at, grad.half_width + at, nullptr};
  T *out_clean = out.clean + at, *out_centre = out.centre + at, *out_half = out.half_width + at;
  T *out_squared = out.squared_row_norms + shared_at, *out_first = out.first + o * n, *out_second = out.second + o * n;
  const bool add = in.row_norms_shared && b > 0, add_threshold = b > 0;
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = begin; i < end; ++i) {
    const int64_t j = i + n;
    const T middle_a = kBox ? centre[i] : T(0), half_a = kBox ? half_width[i] : T(0);
    const T middle_b = kBox ? centre[j] : T(0), half_b = kBox ? half_width[j] : T(0);
    const Bounds<T> a = intersect<T>(clean[i], radius * row_norm(squared[i]), kBox, middle_a, half_a);
    const Bounds<T> c = intersect<T>(clean[j], radius * row_norm(squared[j]), kBox, middle_b, half_b);
    Bounds<T> grad_a, grad_b;
    ThresholdGrad<T> thresholds = {0, 0};
    pair_backward<kClipped, T>(a, c, kClipped ? first[i] : T(0), kClipped ? second[i] : T(0), bounds_grad(own, i),
                               bounds_grad(own, j), slack, grad_a, grad_b, thresholds);
    const auto ga = intersect_backward<T>(clean[i], radius, squared[i], kBox, middle_a, half_a, grad_a);
    const auto gb = intersect_backward<T>(clean[j], radius, squared[j], kBox, middle_b, half_b, grad_b);
    out_clean[i] = ga.clean;
    out_clean[j] = gb.clean;
    if (kBox) {
      out_centre[i] = ga.centre;
      out_centre[j] = gb.centre;
      out_half[i] = ga.half_width;
      out_half[j] = gb.half_width;
    }
    out_squared[i] = add ? out_squared[i] + ga.squared_row_norm : ga.squared_row_norm;
    out_squared[j] = add ? out_squared[j] + gb.squared_row_norm : gb.squared_row_norm;
    if (kClipped) {
      out_first[i] = add_threshold ? out_first[i] + thresholds.first : thresholds.first;
      out_second[i] = add_threshold ? out_second[i] + thresholds.second : thresholds.second;
    }
    total += ga.radius + gb.radius;
  }
  *radius_grad += static_cast<T>(total);
}

template <Activation kActivation, bool kBox, typename T>
void run_forward(const ActivationInput<T>& in, const ActivationOutput<T>& out) {
  at::parallel_for(0, in.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if constexpr (is_paired(kActivation))
        forward_pairs<kActivation == Activation::kClippedMaxMin, kBox>(in, out, b);
      else
        forward_units<kActivation, kBox>(in, out, b);
    }
  });
}

template <Activation kActivation, bool kBox, typename T>
void run_backward(const ActivationInput<T>& in, const ActivationOutputGrad<T>& grad, const ActivationInputGrad<T>& out) {
  at::parallel_for(0, activation_pattern_chunks(in.outer, in.inner, true), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const Rows rows = rows_of(chunk, in.outer, in.inner);
      for (int64_t b = 0; b < in.batch; ++b) {
        T* radius_grad = out.radius + chunk * in.batch + b;
        *radius_grad = 0;
        for (int64_t o = rows.outer_begin; o < rows.outer_end; ++o) {
          if constexpr (is_paired(kActivation))
            backward_pairs<kActivation == Activation::kClippedMaxMin, kBox>(in, grad, out, b, o, rows.inner_begin,
                                                                           rows.inner_end, radius_grad);
          else
            backward_units<kActivation, kBox>(in, grad, out, b, rows.inner_begin, rows.inner_end, radius_grad);
        }
      }
    }
  });
}

}  // namespace

int64_t activation_pattern_chunks(int64_t outer, int64_t inner, bool backward) {
  if (!backward) return 1;
  if (outer == 1) return (inner + kChunk - 1) / kChunk;
  const int64_t rows = std::max<int64_t>(1, kChunk / std::max<int64_t>(inner, 1));
  return (outer + rows - 1) / rows;
}

template <typename scalar_t>
void activation_pattern(Activation activation, const ActivationInput<scalar_t>& in, const ActivationOutput<scalar_t>& out) {
  with_constants(activation, in.half_width != nullptr, [&](auto kind, auto box) { run_forward<kind(), box()>(in, out); });
}

template <typename scalar_t>
void activation_pattern_backward(Activation activation, const ActivationInput<scalar_t>& in,
                                 const ActivationOutputGrad<scalar_t>& grad_out, const ActivationInputGrad<scalar_t>& grad_in) {
  with_constants(activation, in.half_width != nullptr,
                 [&](auto kind, auto box) { run_backward<kind(), box()>(in, grad_out, grad_in); });
}

#define LOCALLIP_INSTANTIATE(scalar_t)                                                                              \
  template void activation_pattern(Activation, const ActivationInput<scalar_t>&, const ActivationOutput<scalar_t>&); \
  template void activation_pattern_backward(Activation, const ActivationInput<scalar_t>&,                            \
                                            const ActivationOutputGrad<scalar_t>&, const ActivationInputGrad<scalar_t>&);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cpu
