// One thread a sample: a sample's few basis vectors stay in its core's cache between the sweeps of one pass.
#include "../masked_norm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../portable.h"
#include "../small_svd.h"

namespace locallip::cpu {
namespace {

// Elements swept at once: the block of the vector stays in the first-level cache while every basis vector passes.
constexpr int64_t kBlock = 2048;

// Sums are kept in double: float squares overflow beyond 1e19, and the Ritz values want the digits.
template <typename scalar_t>
LOCALLIP_MULTIVERSION double dot(const scalar_t* x, const scalar_t* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return sum;
}

template <typename scalar_t>
LOCALLIP_MULTIVERSION void subtract(scalar_t* x, const scalar_t* y, scalar_t factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] -= factor * y[i];
}

template <typename scalar_t>
LOCALLIP_MULTIVERSION void apply_mask(scalar_t* x, const uint8_t* mask, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = mask[i] ? x[i] : scalar_t(0);
}

template <typename scalar_t>
LOCALLIP_MULTIVERSION void scale(scalar_t* out, const scalar_t* x, double factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<scalar_t>(x[i] * factor);
}

template <typename scalar_t>
LOCALLIP_MULTIVERSION void randomise(scalar_t* x, const uint8_t* mask, uint32_t first, uint32_t seed, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = pseudo_random(first + static_cast<uint32_t>(i), seed);
  if (mask) apply_mask(x, mask, n);
}

template <typename scalar_t>
LOCALLIP_MULTIVERSION double masked_square(const scalar_t* x, const uint8_t* mask, int64_t n) {
  if (!mask) return dot(x, x, n);
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += mask[i] ? static_cast<double>(x[i]) * static_cast<double>(x[i]) : 0.0;
  return sum;
}

// x -= its part in the basis; coefficients (if not null) gain it. Returns |x|^2 before, and stores |x|^2 after.
template <typename scalar_t>
double orthogonalise(scalar_t* x, const scalar_t* basis, int64_t slot_stride, int count, int64_t n,
                     double* coefficients, double* after) {
  double before = 0, part[kWindow] = {};
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = std::min(kBlock, n - at);
    before += dot(x + at, x + at, m);
    for (int j = 0; j < count; ++j) part[j] += dot(basis + j * slot_stride + at, x + at, m);
  }
  *after = count ? 0 : before;
  for (int64_t at = 0; count && at < n; at += kBlock) {
    const int64_t m = std::min(kBlock, n - at);
    for (int j = 0; j < count; ++j) subtract(x + at, basis + j * slot_stride + at, static_cast<scalar_t>(part[j]), m);
    *after += dot(x + at, x + at, m);
  }
  if (coefficients)
    for (int j = 0; j < count; ++j) coefficients[j] += part[j];
  return before;
}

}  // namespace

template <typename scalar_t>
void start_basis(scalar_t* basis, const scalar_t* start, bool start_per_sample, const uint8_t* mask, int64_t batch,
                 int64_t length) {
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      scalar_t* x = basis + b * length;
      const uint8_t* own_mask = mask ? mask + b * length : nullptr;
      randomise(x, own_mask, static_cast<uint32_t>(b * length), 0, length);
      if (start) {
        const scalar_t* given = start + (start_per_sample ? b * length : 0);
        const double square = masked_square(given, own_mask, length);
        if (square > 0) {
          scale(x, x, kNoise * std::sqrt(square / dot(x, x, length)), length);
          subtract(x, given, scalar_t(-1), length);
          if (own_mask) apply_mask(x, own_mask, length);
        }
      }
      const double norm = dot(x, x, length);
      scale(x, x, norm > 0 ? 1 / std::sqrt(norm) : 0.0, length);
    }
  });
}

template <typename scalar_t>
void extend_basis(scalar_t* basis, scalar_t* vector, const uint8_t* mask, int count, int64_t batch, int64_t length,
                  Breakdown breakdown, bool twice, uint32_t seed, double* projected) {
  const int64_t slot_stride = batch * length;
  const double noise = 16.0 * std::numeric_limits<scalar_t>::epsilon();
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      scalar_t* x = vector + b * length;
      const scalar_t* own = basis + b * length;
      const uint8_t* own_mask = mask ? mask + b * length : nullptr;
      double coefficients[kWindow] = {}, after = 0;
      if (own_mask) apply_mask(x, own_mask, length);
      const double before = orthogonalise(x, own, slot_stride, count, length, coefficients, &after);
      if (twice || after < kReorthogonalise * before)
        orthogonalise(x, own, slot_stride, count, length, coefficients, &after);
      double norm = std::sqrt(after);
      if (norm <= noise * std::sqrt(before)) {
        norm = 0;
        after = 0;
        if (breakdown == Breakdown::kReplace) {
          randomise(x, own_mask, static_cast<uint32_t>(b * length), seed, length);
          const double drawn = orthogonalise(x, own, slot_stride, count, length, nullptr, &after);
          orthogonalise(x, own, slot_stride, count, length, nullptr, &after);
          if (after <= noise * noise * drawn) after = 0;  // nothing left outside the span
        }
      }
      scalar_t* out = basis + count * slot_stride + b * length;
      if (after == 0)
        std::fill_n(out, length, scalar_t(0));
      else
        scale(out, x, 1 / std::sqrt(after), length);
      if (projected) {
        double* column = projected + b * kWindow * kWindow + count;
        for (int j = 0; j < count; ++j) column[j * kWindow] = coefficients[j];
        column[count * kWindow] = norm;
      }
    }
  });
}

template <typename scalar_t>
void decompose(double* projected, int count, int kept, int64_t batch, double* right, double* left, scalar_t* sigma) {
  at::parallel_for(0, batch, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      decompose_one(projected + b * kWindow * kWindow, count, kept, right + b * kept * kWindow,
                    left + b * kept * kWindow, sigma + b);
  });
}

template <typename scalar_t>
void rotate_basis(const scalar_t* basis, const double* rotation, int count, int kept, int64_t batch, int64_t length,
                  scalar_t* out) {
  const int64_t slot_stride = batch * length;
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    scalar_t block[kKept][kBlock];
    for (int64_t b = begin; b < end; ++b) {
      const double* own = rotation + b * kept * kWindow;
      for (int64_t at = 0; at < length; at += kBlock) {
        const int64_t m = std::min(kBlock, length - at);
        for (int i = 0; i < kept; ++i) {
          std::fill_n(block[i], m, scalar_t(0));
          for (int j = 0; j < count; ++j)
            subtract(block[i], basis + j * slot_stride + b * length + at, static_cast<scalar_t>(-own[i * kWindow + j]),
                     m);
        }
        for (int i = 0; i < kept; ++i) std::copy_n(block[i], m, out + i * slot_stride + b * length + at);
      }
    }
  });
}

#define LOCALLIP_INSTANTIATE(scalar_t)                                                                               \
  template void start_basis(scalar_t*, const scalar_t*, bool, const uint8_t*, int64_t, int64_t);                     \
  template void extend_basis(scalar_t*, scalar_t*, const uint8_t*, int, int64_t, int64_t, Breakdown, bool, uint32_t, \
                             double*);                                                                               \
  template void decompose(double*, int, int, int64_t, double*, double*, scalar_t*);                                  \
  template void rotate_basis(const scalar_t*, const double*, int, int, int64_t, int64_t, scalar_t*);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cpu
