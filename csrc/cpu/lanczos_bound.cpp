// A few thousand operations a sample, always on the host: one thread a sample.
#include "../lanczos_bound.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <vector>

namespace locallip::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRoundoff = 0x1p-53;

// h at t (1 + 4u), or above it; infinite where t - T is not found positive definite.
//
// A computed pivot is the exact one of a matrix whose diagonal is at most t (1 + u) - alpha_j and whose squared
// off-diagonal entries are within 3u of those used. These are widened by 8u, so that matrix is entrywise below
// t (1 + 4u) - T. Both are M-matrices, and the smaller one has the larger inverse. What is summed after that is
// positive, so its relative error is below 8u a step.
double overlap(const double* alpha, const double* beta, double error, int64_t steps, double t, double* pivot,
               double* sum) {
  for (int64_t j = 0; j < steps; ++j) {
    pivot[j] = t - alpha[j];
    sum[j] = error + (j == steps - 1 ? kUnitLength * beta[j] : 0.0);
    if (j > 0) {
      const double off = beta[j - 1] * (1 + 8 * kRoundoff), factor = off / pivot[j - 1];
      pivot[j] -= factor * off;
      sum[j] += factor * sum[j - 1];
    }
    if (!(pivot[j] > 0)) return kInfinity;
  }
  double z = sum[steps - 1] / pivot[steps - 1];
  for (int64_t j = steps - 2; j >= 0; --j) z = (sum[j] + beta[j] * (1 + 8 * kRoundoff) * z) / pivot[j];
  return z * (1 + 1e-9);
}

bool above_spectrum(const double* alpha, const double* beta, int64_t steps, double t) {
  double pivot = t - alpha[0];
  for (int64_t j = 1; j < steps && pivot > 0; ++j) pivot = t - alpha[j] - beta[j - 1] * beta[j - 1] / pivot;
  return pivot > 0;
}

// The border between false and true of a monotone predicate on [low, high], true at high.
template <typename Predicate>
double bisect(double low, double high, double tolerance, const Predicate& holds) {
  for (int i = 0; i < 200 && high - low > tolerance * high; ++i) {
    const double middle = low + (high - low) / 2;
    (holds(middle) ? high : low) = middle;
  }
  return high;
}

}  // namespace

void lanczos_bound(const double* alpha, const double* beta, const double* error, const double* level, int64_t batch,
                   int64_t steps, double* theta, double* upper) {
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> pivot(steps), sum(steps);
    for (int64_t b = begin; b < end; ++b) {
      const double *own_alpha = alpha + b * steps, *own_beta = beta + b * steps;
      double low = 0, high = 0;  // around the largest eigenvalue of T: the largest diagonal entry, and Gershgorin's
      for (int64_t j = 0; j < steps; ++j) {
        const double off = (j > 0 ? own_beta[j - 1] : 0.0) + (j < steps - 1 ? own_beta[j] : 0.0);
        low = std::fmax(low, own_alpha[j]);
        high = std::fmax(high, own_alpha[j] + off);
      }
      theta[b] = high > 0 ? bisect(low, high * (1 + 8 * kRoundoff), 1e-13,
                                   [&](double t) { return above_spectrum(own_alpha, own_beta, steps, t); })
                          : 0.0;
      const auto proved = [&](double t) {
        return overlap(own_alpha, own_beta, error[b], steps, t, pivot.data(), sum.data()) < level[b];
      };
      double t = std::fmax(std::fmax(high, error[b]), std::numeric_limits<double>::min());
      while (t < kInfinity && !proved(t)) t *= 16;
      upper[b] = t < kInfinity ? bisect(low, t, 1e-7, proved) * (1 + 8 * kRoundoff) : kInfinity;
    }
  });
}

}  // namespace locallip::cpu
