// Singular value decomposition of one small square matrix by one-sided Jacobi rotations (Hestenes), for a single
// thread.
#pragma once

#include <cmath>

#include "masked_norm.h"
#include "portable.h"

namespace locallip {

// a (row stride `stride`, leading n x n block) becomes U * diag(sigma) with v orthogonal, so that the input was a *
// v^T. Columns are sorted by sigma, largest first; a NaN anywhere makes sigma[0] NaN.
template <int kMax>
LOCALLIP_INLINE void small_svd(double (&a)[kMax][kMax], double (&v)[kMax][kMax], double (&sigma)[kMax], int n) {
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) v[i][j] = i == j;
  for (int sweep = 0; sweep < 30; ++sweep) {
    bool rotated = false;
    for (int p = 0; p + 1 < n; ++p) {
      for (int q = p + 1; q < n; ++q) {
        double pp = 0, qq = 0, pq = 0;
        for (int i = 0; i < n; ++i) {
          pp += a[i][p] * a[i][p];
          qq += a[i][q] * a[i][q];
          pq += a[i][p] * a[i][q];
        }
        if (!(fabs(pq) > 1e-15 * sqrt(pp) * sqrt(qq))) continue;
        rotated = true;
        const double zeta = (qq - pp) / (2 * pq);
        const double t = (zeta >= 0 ? 1.0 : -1.0) / (fabs(zeta) + sqrt(1 + zeta * zeta));
        const double c = 1 / sqrt(1 + t * t), s = c * t;
        for (int i = 0; i < n; ++i) {
          const double ap = a[i][p], vp = v[i][p];
          a[i][p] = c * ap - s * a[i][q];
          a[i][q] = s * ap + c * a[i][q];
          v[i][p] = c * vp - s * v[i][q];
          v[i][q] = s * vp + c * v[i][q];
        }
      }
    }
    if (!rotated) break;
  }
  for (int j = 0; j < n; ++j) {
    double norm = 0;
    for (int i = 0; i < n; ++i) norm += a[i][j] * a[i][j];
    sigma[j] = sqrt(norm);
  }
  for (int j = 0; j < n; ++j) {
    int best = j;
    for (int k = j + 1; k < n; ++k)
      if (!(sigma[k] <= sigma[best])) best = k;
    const double value = sigma[best];
    sigma[best] = sigma[j];
    sigma[j] = value;
    for (int i = 0; i < n; ++i) {
      const double ai = a[i][best], vi = v[i][best];
      a[i][best] = a[i][j];
      a[i][j] = ai;
      v[i][best] = v[i][j];
      v[i][j] = vi;
    }
  }
}

// One sample of `decompose` in masked_norm.h.
template <typename scalar_t>
LOCALLIP_INLINE void decompose_one(double* projected, int count, int kept, double* right, double* left,
                                   scalar_t* sigma) {
  double a[kWindow][kWindow], v[kWindow][kWindow], values[kWindow];
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < count; ++j) a[i][j] = projected[i * kWindow + j];
  small_svd(a, v, values, count);
  for (int i = 0; i < kept; ++i) {
    const bool alive = !(values[i] <= 0);
    for (int j = 0; j < count; ++j) {
      right[i * kWindow + j] = alive ? v[j][i] : 0;
      left[i * kWindow + j] = alive ? a[j][i] / values[i] : 0;
    }
  }
  for (int i = 0; i < kWindow * kWindow; ++i) projected[i] = 0;
  for (int i = 0; i < kept; ++i) projected[i * kWindow + i] = values[i];
  *sigma = static_cast<scalar_t>(values[0]);
}

}  // namespace locallip
