// From the tridiagonal matrix of a Lanczos run on M = A^T A to an upper bound of M's largest eigenvalue lambda.
//
// Whatever vectors q_0.. and numbers alpha, beta >= 0 a run produced in rounded arithmetic, let the local residuals
// M q_j - beta_{j-1} q_{j-1} - alpha_j q_j - beta_j q_{j+1} be no longer than `error`, and |q_k| <= kUnitLength. With v
// the top eigenvector, y_j = <v, q_j> solves (lambda - T) y = beta_{k-1} y_k e_{k-1} + f, |f_j| <= error. For t above
// the eigenvalues of T, (t - T)^-1 has no negative entry and falls with t, so lambda >= t would give
//
//   |<v, q_0>| <= h(t) = e_0^T (t - T)^-1 w,   w_j = error, and kUnitLength beta_{k-1} more in the last.
//
// Where |<v, q_0>| >= level is known, h(t) < level proves lambda < t. No orthogonality is assumed. Without rounding
// this is the bound by the Lanczos polynomial of Hochstenbach, "Probabilistic upper bounds for the matrix two-norm"
// (2013).
#pragma once

#include <cstdint>

namespace locallip {

// A computed unit vector is no longer than this: its squared length is a sum of fewer than 10^9 rounded terms.
constexpr double kUnitLength = 1 + 1e-6;

namespace cpu {
// alpha, beta [batch][steps], error and level [batch] -> theta [batch], the largest eigenvalue of T but for rounding,
// and upper [batch], a t that h proves, rounding included; infinite where none is found (level <= 0, NaN).
void lanczos_bound(const double* alpha, const double* beta, const double* error, const double* level, int64_t batch,
                   int64_t steps, double* theta, double* upper);
}  // namespace cpu

}  // namespace locallip
