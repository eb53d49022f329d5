// Forward: one thread a sample. Backward: one thread a chunk of units, the samples one after another, so that what is
// summed over the batch (thresholds, shared row norms) stays in the chunk's cache and in one fixed order.
#include "../activation_pattern.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "sum.h"

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

// What a loop over units (or pairs) of one sample reads and writes: pointers to its first unit. Loops take copies, so
// that the compiler knows that no store changes the pointers.
template <typename T>
struct InputRow {
  const T *clean, *centre, *half_width, *squared_row_norms, *first, *second;
  T radius;
  int64_t inner;  // from the first unit of a pair to its second

  InputRow(const ActivationInput<T>& in, int64_t b, int64_t o, bool paired)
      : first(in.first + o * in.inner), second(in.second + o * in.inner), radius(in.radius[b]), inner(in.inner) {
    const int64_t width = paired ? 2 * in.inner : in.inner, at = (b * in.outer + o) * width;
    clean = in.clean + at;
    centre = in.centre + at;
    half_width = in.half_width + at;
    squared_row_norms = in.squared_row_norms + (in.row_norms_shared ? o * width : at);
  }
};

template <typename T>
struct OutputRow {
  T *clean, *centre, *half_width;
  T *row_mask,
      *col_mask;  // 0 or 1; narrowed later, as bytes would make the vector loops too wide for short rows of pairs
};

template <typename T>
struct GradRow {
  const T *clean, *centre, *half_width;
  T slack0, slack1;
  T *to_clean, *to_centre, *to_half_width;
  T *to_squared, *to_first, *to_second;  // added to, as samples may share them
};

template <bool kBox, typename T>
LOCALLIP_INLINE Bounds<T> bounds_at(const InputRow<T>& in, int64_t i) {
  return intersect<T>(in.clean[i], in.radius * row_norm(in.squared_row_norms[i]), kBox, kBox ? in.centre[i] : T(0),
                      kBox ? in.half_width[i] : T(0));
}

template <bool kBoxBehind, typename T>
LOCALLIP_INLINE void store(const OutputRow<T>& out, int64_t i, Bounds<T> value, int row, int column) {
  out.clean[i] = value.clean;
  if (kBoxBehind) {
    out.centre[i] = (value.lower + value.upper) / 2;
    out.half_width[i] = (value.upper - value.lower) / 2;
  }
  out.row_mask[i] = row;
  out.col_mask[i] = column;
}

template <Activation kActivation, bool kBox, bool kBoxBehind, typename T>
LOCALLIP_INLINE void forward_at(const InputRow<T>& in, const OutputRow<T>& out, int64_t i, T* slack0, T* slack1) {
  constexpr bool kClipped = kActivation == Activation::kClippedMaxMin;
  const Bounds<T> a = bounds_at<kBox>(in, i);
  if constexpr (is_paired(kActivation)) {
    const int64_t j = i + in.inner;
    const auto r = pair_forward<kClipped, T>(a, bounds_at<kBox>(in, j), kClipped ? in.first[i] : T(0),
                                             kClipped ? in.second[i] : T(0));
    store<kBoxBehind>(out, i, r.largest, r.row_a, r.column_largest);
    store<kBoxBehind>(out, j, r.smallest, r.row_b, r.column_smallest);
    *slack0 = r.slack;
    *slack1 = 0;
  } else {
    const auto r = unit_forward<kActivation, T>(a, kActivation == Activation::kClippedRelu ? in.first[i] : T(0));
    store<kBoxBehind>(out, i, r.out, r.row, r.column);
    *slack0 = r.slack[0];
    *slack1 = r.slack[1];
  }
}

// Gradients of lower' = centre - half and upper' = centre + half from those of centre and half.
template <bool kBoxBehind, typename T>
LOCALLIP_INLINE Bounds<T> grad_at(const GradRow<T>& grad, int64_t i) {
  if (!kBoxBehind) return {grad.clean[i], T(0), T(0)};
  return {grad.clean[i], (grad.centre[i] - grad.half_width[i]) / 2, (grad.centre[i] + grad.half_width[i]) / 2};
}

template <bool kBox, typename T>
LOCALLIP_INLINE T store_grad(const InputRow<T>& in, const GradRow<T>& grad, int64_t i, Bounds<T> value) {
  const auto g = intersect_backward<T>(in.clean[i], in.radius, in.squared_row_norms[i], kBox,
                                       kBox ? in.centre[i] : T(0), kBox ? in.half_width[i] : T(0), value);
  grad.to_clean[i] = g.clean;
  if (kBox) {
    grad.to_centre[i] = g.centre;
    grad.to_half_width[i] = g.half_width;
  }
  grad.to_squared[i] += g.squared_row_norm;
  return g.radius;
}

template <Activation kActivation, bool kBox, bool kBoxBehind, typename T>
LOCALLIP_INLINE void backward_at(const InputRow<T>& in, const GradRow<T>& grad, int64_t i, T* radius_grad) {
  constexpr bool kClipped = kActivation == Activation::kClippedMaxMin;
  const Bounds<T> a = bounds_at<kBox>(in, i);
  ThresholdGrad<T> thresholds = {0, 0};
  if constexpr (is_paired(kActivation)) {
    const int64_t j = i + in.inner;
    Bounds<T> grad_a, grad_b;
    pair_backward<kClipped, T>(a, bounds_at<kBox>(in, j), kClipped ? in.first[i] : T(0), kClipped ? in.second[i] : T(0),
                               grad_at<kBoxBehind>(grad, i), grad_at<kBoxBehind>(grad, j), grad.slack0, grad_a, grad_b,
                               thresholds);
    *radius_grad = store_grad<kBox>(in, grad, i, grad_a) + store_grad<kBox>(in, grad, j, grad_b);
  } else {
    const T slack[2] = {grad.slack0, grad.slack1};
    const Bounds<T> grad_a =
        unit_backward<kActivation, T>(a, kActivation == Activation::kClippedRelu ? in.first[i] : T(0),
                                      grad_at<kBoxBehind>(grad, i), slack, thresholds.first);
    *radius_grad = store_grad<kBox>(in, grad, i, grad_a);
  }
  if (kClipped || kActivation == Activation::kClippedRelu) grad.to_first[i] += thresholds.first;
  if (kClipped) grad.to_second[i] += thresholds.second;
}

template <Activation kActivation, bool kBox, bool kBoxBehind, typename T>
LOCALLIP_MULTIVERSION void forward_row(const InputRow<T>& in_row, const OutputRow<T>& out_row, int64_t n, T* slack) {
  const InputRow<T> in = in_row;
  const OutputRow<T> out = out_row;
  Terms<T> terms[2];
  for (int64_t begin = 0; begin < n; begin += kTerms) {
    const int64_t end = begin + kTerms < n ? begin + kTerms : n;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i)
      forward_at<kActivation, kBox, kBoxBehind>(in, out, i, terms[0] + (i - begin), terms[1] + (i - begin));
    slack[0] += sum(terms[0], end - begin);
    slack[1] += sum(terms[1], end - begin);
  }
}

template <Activation kActivation, bool kBox, bool kBoxBehind, typename T>
LOCALLIP_MULTIVERSION void backward_row(const InputRow<T>& in_row, const GradRow<T>& grad_row, int64_t first,
                                        int64_t last, T* radius_grad) {
  const InputRow<T> in = in_row;
  const GradRow<T> grad = grad_row;
  Terms<T> terms;
  for (int64_t begin = first; begin < last; begin += kTerms) {
    const int64_t end = begin + kTerms < last ? begin + kTerms : last;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) backward_at<kActivation, kBox, kBoxBehind>(in, grad, i, terms + (i - begin));
    *radius_grad += sum(terms, end - begin);
  }
}

// Returns how many are 1.
template <typename T>
LOCALLIP_MULTIVERSION int64_t to_bytes(const T* mask, uint8_t* out, int64_t n) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<uint8_t>(mask[i]);
    count += out[i];
  }
  return count;
}

template <Activation kActivation, bool kBox, bool kBoxBehind, typename T>
void run_forward(const ActivationInput<T>& in, const ActivationOutput<T>& out) {
  const int64_t width = is_paired(kActivation) ? 2 * in.inner : in.inner, units = in.outer * width;
  at::parallel_for(0, in.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> masks(2 * units);
    for (int64_t b = begin; b < end; ++b) {
      T slack[2] = {0, 0};
      for (int64_t o = 0; o < in.outer; ++o) {
        const int64_t in_sample = o * width, at = b * units + in_sample;
        const OutputRow<T> to = {out.clean + at, out.centre + at, out.half_width + at, masks.data() + in_sample,
                                 masks.data() + units + in_sample};
        forward_row<kActivation, kBox, kBoxBehind>(InputRow<T>(in, b, o, is_paired(kActivation)), to, in.inner, slack);
      }
      T* sums = out.sums + 4 * b;
      sums[0] = slack[0];
      sums[1] = slack[1];
      sums[2] = static_cast<T>(to_bytes(masks.data(), out.row_mask + b * units, units));
      sums[3] = static_cast<T>(to_bytes(masks.data() + units, out.col_mask + b * units, units));
    }
  });
}

template <Activation kActivation, bool kBox, bool kBoxBehind, typename T>
void run_backward(const ActivationInput<T>& in, const ActivationOutputGrad<T>& grad,
                  const ActivationInputGrad<T>& out) {
  const int64_t width = is_paired(kActivation) ? 2 * in.inner : in.inner;
  at::parallel_for(0, activation_pattern_chunks<T>(in.outer, in.inner, true), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const Rows rows = rows_of(chunk, in.outer, in.inner);
      for (int64_t b = 0; b < in.batch; ++b) {
        T radius_grad = 0;
        for (int64_t o = rows.outer_begin; o < rows.outer_end; ++o) {
          const int64_t at = (b * in.outer + o) * width;
          const GradRow<T> row = {grad.clean + at,
                                  grad.centre + at,
                                  grad.half_width + at,
                                  grad.slack[2 * b],
                                  grad.slack[2 * b + 1],
                                  out.clean + at,
                                  out.centre + at,
                                  out.half_width + at,
                                  out.squared_row_norms + (in.row_norms_shared ? o * width : at),
                                  out.first + o * in.inner,
                                  out.second + o * in.inner};
          const int64_t count = rows.inner_end - rows.inner_begin;
          if (b == 0 || !in.row_norms_shared)
            for (int64_t k = 0; k < width; k += in.inner)
              std::fill_n(row.to_squared + rows.inner_begin + k, count, T(0));
          if (b == 0 && out.first) std::fill_n(row.to_first + rows.inner_begin, count, T(0));
          if (b == 0 && out.second) std::fill_n(row.to_second + rows.inner_begin, count, T(0));
          backward_row<kActivation, kBox, kBoxBehind>(InputRow<T>(in, b, o, is_paired(kActivation)), row,
                                                      rows.inner_begin, rows.inner_end, &radius_grad);
        }
        out.radius[chunk * in.batch + b] = radius_grad;
      }
    }
  });
}

}  // namespace

template <typename>
int64_t activation_pattern_chunks(int64_t outer, int64_t inner, bool backward) {
  if (!backward) return 1;
  if (outer == 1) return (inner + kChunk - 1) / kChunk;
  const int64_t rows = std::max<int64_t>(1, kChunk / std::max<int64_t>(inner, 1));
  return (outer + rows - 1) / rows;
}

template <typename>
int64_t activation_pattern_slices(int64_t, int64_t, int64_t) {
  return 1;
}

template <typename scalar_t>
void activation_pattern(Activation activation, const ActivationInput<scalar_t>& in,
                        const ActivationOutput<scalar_t>& out) {
  with_constants(activation, in.half_width != nullptr, [&](auto kind, auto box) {
    out.half_width ? run_forward<kind(), box(), true>(in, out) : run_forward<kind(), box(), false>(in, out);
  });
}

template <typename scalar_t>
void activation_pattern_backward(Activation activation, const ActivationInput<scalar_t>& in,
                                 const ActivationOutputGrad<scalar_t>& grad_out,
                                 const ActivationInputGrad<scalar_t>& grad_in) {
  with_constants(activation, in.half_width != nullptr, [&](auto kind, auto box) {
    grad_out.half_width ? run_backward<kind(), box(), true>(in, grad_out, grad_in)
                        : run_backward<kind(), box(), false>(in, grad_out, grad_in);
  });
}

#define LOCALLIP_INSTANTIATE(scalar_t)                                                                               \
  template int64_t activation_pattern_chunks<scalar_t>(int64_t, int64_t, bool);                                      \
  template int64_t activation_pattern_slices<scalar_t>(int64_t, int64_t, int64_t);                                   \
  template void activation_pattern(Activation, const ActivationInput<scalar_t>&, const ActivationOutput<scalar_t>&); \
  template void activation_pattern_backward(Activation, const ActivationInput<scalar_t>&,                            \
                                            const ActivationOutputGrad<scalar_t>&,                                   \
                                            const ActivationInputGrad<scalar_t>&);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cpu
