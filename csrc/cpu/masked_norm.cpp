// One thread a sample: a sample's vectors stay in its core's cache between the sweeps of one pass.
#include "../masked_norm.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../portable.h"
#include "../small_svd.h"

namespace locallip::cpu {
namespace {

// Elements swept at once: the block of the vector stays in the first-level cache while every basis vector passes.
constexpr int64_t kBlock = 2048;

// Elements whose products may be summed in float: a lane of a vector adds few enough of them that the sum is right to a
// few units of roundoff.
constexpr int64_t kShort = 256;

template <typename scalar_t>
LOCALLIP_INLINE double dot_in_double(const scalar_t* x, const scalar_t* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return sum;
}

LOCALLIP_INLINE float dot_in_float(const float* x, const float* y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// Squares of floats between these neither overflow nor vanish, and none of their products with a unit vector does.
constexpr float kLeastSquare = 1e-20f, kMostSquare = 1e30f;

// Adds x.x to `square` and x.y to `product`; the Ritz values want the digits of a sum in double.
template <typename scalar_t>
LOCALLIP_MULTIVERSION void add_products(const scalar_t* x, const scalar_t* y, int64_t n, double* square,
                                        double* product) {
  for (int64_t at = 0; at < n; at += kShort) {
    const int64_t m = n - at < kShort ? n - at : kShort;
    if constexpr (std::is_same_v<scalar_t, float>) {
      const float own = dot_in_float(x + at, x + at, m);
      if (own > kLeastSquare && own < kMostSquare) {
        *square += static_cast<double>(own);
        *product += static_cast<double>(dot_in_float(x + at, y + at, m));
        continue;
      }
    }
    *square += dot_in_double(x + at, x + at, m);
    *product += dot_in_double(x + at, y + at, m);
  }
}

template <typename scalar_t>
LOCALLIP_MULTIVERSION double square_of(const scalar_t* x, int64_t n) {
  double sum = 0;
  for (int64_t at = 0; at < n; at += kShort) {
    const int64_t m = n - at < kShort ? n - at : kShort;
    if constexpr (std::is_same_v<scalar_t, float>) {
      const float own = dot_in_float(x + at, x + at, m);
      if (own > kLeastSquare && own < kMostSquare) {
        sum += static_cast<double>(own);
        continue;
      }
    }
    sum += dot_in_double(x + at, x + at, m);
  }
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

// out = mask * x
template <typename scalar_t, typename vector_t>
LOCALLIP_MULTIVERSION void load(scalar_t* out, const vector_t* x, const uint8_t* mask, int64_t n) {
  if (mask) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = mask[i] ? static_cast<scalar_t>(x[i]) : scalar_t(0);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<scalar_t>(x[i]);
  }
}

// Of finite numbers, to the nearest even; torch's own conversion looks at every one for NaN.
LOCALLIP_MULTIVERSION void narrow(c10::BFloat16* out, const float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = c10::bit_cast<uint32_t>(x[i]);
    out[i].x = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
}

// Whether a number above 0 keeps its digits as a scalar_t.
template <typename scalar_t>
LOCALLIP_INLINE bool is_normal(double x) {
  return x >= static_cast<double>(std::numeric_limits<scalar_t>::min()) &&
         x <= static_cast<double>(std::numeric_limits<scalar_t>::max());
}

// out = (x - part * y) * factor, with y null for none; with y, for a factor that is_normal
template <typename scalar_t>
LOCALLIP_MULTIVERSION void scale(scalar_t* out, const scalar_t* x, double factor, int64_t n, scalar_t part = 0,
                                 const scalar_t* y = nullptr) {
  const auto own = static_cast<scalar_t>(factor);
  if (y) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - part * y[i]) * own;
  } else if (is_normal<scalar_t>(factor)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * own;
  } else {  // of a length near either end of the range
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<scalar_t>(x[i] * factor);
  }
}

template <typename scalar_t>
LOCALLIP_MULTIVERSION void randomise(scalar_t* x, const uint8_t* mask, uint32_t first, uint32_t seed, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = pseudo_random(first + static_cast<uint32_t>(i), seed);
  if (mask) apply_mask(x, mask, n);
}

// x -= its part in the basis; coefficients (if not null) gain it. Returns |x|^2, and stores what it is after.
template <typename scalar_t>
double orthogonalise(scalar_t* x, const scalar_t* basis, int64_t slot_stride, int count, int64_t n,
                     double* coefficients, double* after) {
  double before = 0, part[kWindow] = {};
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = std::min(kBlock, n - at);
    double square = count ? 0 : square_of(x + at, m);
    for (int j = 0; j < count; ++j) {
      square = 0;
      add_products(x + at, basis + j * slot_stride + at, m, &square, part + j);
    }
    before += square;
  }
  *after = count ? 0 : before;
  for (int64_t at = 0; count && at < n; at += kBlock) {
    const int64_t m = std::min(kBlock, n - at);
    for (int j = 0; j < count; ++j) subtract(x + at, basis + j * slot_stride + at, static_cast<scalar_t>(part[j]), m);
    *after += square_of(x + at, m);
  }
  if (coefficients)
    for (int j = 0; j < count; ++j) coefficients[j] += part[j];
  return before;
}

// out = unit(mask * x - its part in the unit vector `last`, if there is one), with that part and the length, in two
// sweeps, as the squares of both say what is left. False, with no vector written, where digits would be lost.
template <typename scalar_t, typename vector_t>
bool extend_by_last(const vector_t* x, const uint8_t* mask, const scalar_t* last, int64_t n, scalar_t* out,
                    double* part, double* square, double* norm) {
  scalar_t block[kBlock];
  double before = 0, own = 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = std::min(kBlock, n - at);
    load(block, x + at, mask ? mask + at : nullptr, m);
    if (last)
      add_products(block, last + at, m, &before, &own);
    else
      before += square_of(block, m);
  }
  if (last) *part = own;
  *square = before;
  const double after = before - own * own, factor = 1 / std::sqrt(after);
  if (!(after >= kReorthogonalise * before) || !is_normal<scalar_t>(factor)) return false;
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = std::min(kBlock, n - at);
    load(block, x + at, mask ? mask + at : nullptr, m);
    scale(out + at, block, factor, m, static_cast<scalar_t>(own), last ? last + at : nullptr);
  }
  *norm = std::sqrt(after);
  return true;
}

template <typename scalar_t, typename vector_t>
void extend(scalar_t* basis, const vector_t* vector, const uint8_t* mask, int count, int64_t batch, int64_t length,
            Breakdown breakdown, Against against, uint32_t seed, double* projected, vector_t* copy) {
  const int64_t slot_stride = batch * length;
  const double noise = 16.0 * std::numeric_limits<scalar_t>::epsilon();
  const int first = against == Against::kLast ? std::max(count - 1, 0) : 0;
  const bool twice = against == Against::kAllTwice;
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const vector_t* given = vector + b * length;
      const scalar_t *own = basis + b * length, *last = count ? own + (count - 1) * slot_stride : nullptr;
      const uint8_t* own_mask = mask ? mask + b * length : nullptr;
      scalar_t* x = basis + count * slot_stride + b * length;
      double coefficients[kWindow] = {}, before = 0, norm = 0;
      const bool by_last = !twice && count - first <= 1;
      if (!by_last || !extend_by_last(given, own_mask, last, length, x, coefficients + first, &before, &norm)) {
        load(x, given, own_mask, length);
        double after = 0;
        const auto go = [&] {
          return orthogonalise(x, own + first * slot_stride, slot_stride, count - first, length, coefficients + first,
                               &after);
        };
        if (by_last && last) {  // its part is known
          subtract(x, last, static_cast<scalar_t>(coefficients[first]), length);
          go();
        } else {
          before = go();
          if (twice || after < kReorthogonalise * before) go();
        }
        norm = std::sqrt(after);
        if (std::isfinite(norm) && norm <= noise * std::sqrt(before)) {  // what overflowed has not vanished
          norm = 0;
          after = 0;
          if (breakdown == Breakdown::kReplace && against != Against::kLast) {
            randomise(x, own_mask, static_cast<uint32_t>(b * length), seed, length);
            const double drawn = orthogonalise<scalar_t>(x, own, slot_stride, count, length, nullptr, &after);
            orthogonalise<scalar_t>(x, own, slot_stride, count, length, nullptr, &after);
            if (after <= noise * noise * drawn) after = 0;  // nothing left outside the span
          }
        }
        if (after == 0)
          std::fill_n(x, length, scalar_t(0));
        else
          scale(x, x, 1 / std::sqrt(after), length);
      }
      if constexpr (!std::is_same_v<scalar_t, vector_t>) narrow(copy + b * length, x, length);
      if (projected) {
        double* column = projected + b * kWindow * kWindow + count;
        for (int j = 0; j < count; ++j) column[j * kWindow] = coefficients[j];
        column[count * kWindow] = norm;
      }
    }
  });
}

}  // namespace

bool has_bfloat16() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

template <typename scalar_t>
void start_basis(scalar_t* basis, const scalar_t* start, bool start_per_sample, const uint8_t* mask, int64_t batch,
                 int64_t length) {
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      scalar_t* x = basis + b * length;
      const uint8_t* own_mask = mask ? mask + b * length : nullptr;
      const scalar_t* given = start ? start + (start_per_sample ? b * length : 0) : nullptr;
      const auto drawn = [&](int64_t at, int64_t m) {
        randomise(x + at, own_mask ? own_mask + at : nullptr, static_cast<uint32_t>(b * length + at), 0, m);
      };
      double of_drawn = 0, of_given = 0;
      for (int64_t at = 0; at < length; at += kBlock) {
        const int64_t m = std::min(kBlock, length - at);
        if (given) {
          std::copy_n(given + at, m, x + at);
          if (own_mask) apply_mask(x + at, own_mask + at, m);
          of_given += square_of(x + at, m);
        }
        drawn(at, m);
        of_drawn += square_of(x + at, m);
      }
      double square = of_drawn;
      if (of_given > 0) {
        const auto noise = static_cast<scalar_t>(kNoise * std::sqrt(of_given / of_drawn));
        square = 0;
        for (int64_t at = 0; at < length; at += kBlock) {
          const int64_t m = std::min(kBlock, length - at);
          scale(x + at, x + at, noise, m);
          subtract(x + at, given + at, scalar_t(-1), m);
          if (own_mask) apply_mask(x + at, own_mask + at, m);
          square += square_of(x + at, m);
        }
      }
      scale(x, x, square > 0 ? 1 / std::sqrt(square) : 0.0, length);
    }
  });
}

template <typename scalar_t, typename vector_t>
void extend_basis(scalar_t* basis, const vector_t* vector, const uint8_t* mask, int count, int64_t batch,
                  int64_t length, Breakdown breakdown, Against against, uint32_t seed, double* projected,
                  vector_t* copy) {
  using number_t = std::conditional_t<std::is_same_v<vector_t, uint16_t>, c10::BFloat16, vector_t>;
  extend(basis, reinterpret_cast<const number_t*>(vector), mask, count, batch, length, breakdown, against, seed,
         projected, reinterpret_cast<number_t*>(copy));
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
      if (kept == 1) {
        const double square = square_of(out + b * length, length);
        scale(out + b * length, out + b * length, square > 0 ? 1 / std::sqrt(square) : 0.0, length);
      }
    }
  });
}

#define LOCALLIP_INSTANTIATE_EXTEND(scalar_t, vector_t)                                                             \
  template void extend_basis(scalar_t*, const vector_t*, const uint8_t*, int, int64_t, int64_t, Breakdown, Against, \
                             uint32_t, double*, vector_t*);
LOCALLIP_INSTANTIATE_EXTEND(float, float)
LOCALLIP_INSTANTIATE_EXTEND(float, uint16_t)
LOCALLIP_INSTANTIATE_EXTEND(double, double)

#define LOCALLIP_INSTANTIATE(scalar_t)                                                           \
  template void start_basis(scalar_t*, const scalar_t*, bool, const uint8_t*, int64_t, int64_t); \
  template void decompose(double*, int, int, int64_t, double*, double*, scalar_t*);              \
  template void rotate_basis(const scalar_t*, const double*, int, int, int64_t, int64_t, scalar_t*);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cpu
