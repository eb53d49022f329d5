// Singular value decomposition of one matrix of at most kWindow x kWindow by one warp, in shared memory: one-sided
// Jacobi rotations (Hestenes) as in ../small_svd.h, all disjoint pairs of columns at once. Four lanes a pair, each with
// every fourth row; a sweep takes n - 1 rounds (n even), of which each rotates n / 2 pairs.
#pragma once

#include "../masked_norm.h"
#include "launch.cuh"

namespace locallip::cuda {

struct SmallSvd {
  double a[kWindow][kWindow + 1];  // in: the matrix; out: left singular vectors times singular values
  double v[kWindow][kWindow + 1];  // out: right singular vectors
  double sigma[kWindow];           // of each column, in no order
  int column[kWindow];             // the columns by sigma, largest first; a NaN comes before all
};

// Called by a whole warp; `a` written before by its lanes or behind a barrier.
__device__ inline void decompose_in_warp(SmallSvd& s, int n) {
  constexpr int kLanes = 4, kSweeps = 30;
  const int lane = threadIdx.x % kWarp, pair = lane / kLanes, part = lane % kLanes;
  const int even = n + n % 2;
  for (int i = lane; i < n * n; i += kWarp) s.v[i / n][i % n] = i / n == i % n;
  __syncwarp();
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool rotated = false;
    for (int round = 0; round + 1 < even; ++round) {
      // a round-robin tournament: the last column stays, the others move on by one place a round
      const int turn = even - 1;
      int p = pair == 0 ? even - 1 : (round + pair) % turn, q = pair == 0 ? round : (round + turn - pair) % turn;
      if (p > q) {
        const int other = p;
        p = q;
        q = other;
      }
      const bool plays = pair < even / 2 && q < n;
      double pp = 0, qq = 0, pq = 0;
      if (plays)
        for (int i = part; i < n; i += kLanes) {
          pp += s.a[i][p] * s.a[i][p];
          qq += s.a[i][q] * s.a[i][q];
          pq += s.a[i][p] * s.a[i][q];
        }
      for (int offset = 1; offset < kLanes; offset *= 2) {
        pp += __shfl_xor_sync(kAllLanes, pp, offset);
        qq += __shfl_xor_sync(kAllLanes, qq, offset);
        pq += __shfl_xor_sync(kAllLanes, pq, offset);
      }
      if (plays && fabs(pq) > 1e-15 * sqrt(pp) * sqrt(qq)) {
        rotated = true;
        const double zeta = (qq - pp) / (2 * pq);
        const double t = (zeta >= 0 ? 1.0 : -1.0) / (fabs(zeta) + sqrt(1 + zeta * zeta));
        const double c = 1 / sqrt(1 + t * t), d = c * t;
        for (int i = part; i < n; i += kLanes) {
          const double ap = s.a[i][p], aq = s.a[i][q], vp = s.v[i][p], vq = s.v[i][q];
          s.a[i][p] = c * ap - d * aq;
          s.a[i][q] = d * ap + c * aq;
          s.v[i][p] = c * vp - d * vq;
          s.v[i][q] = d * vp + c * vq;
        }
      }
      __syncwarp();
    }
    if (!__any_sync(kAllLanes, rotated)) break;
  }
  if (lane < n) {
    double square = 0;
    for (int i = 0; i < n; ++i) square += s.a[i][lane] * s.a[i][lane];
    s.sigma[lane] = sqrt(square);
  }
  __syncwarp();
  if (lane < n) {
    const double own = s.sigma[lane];
    int before = 0;
    for (int j = 0; j < n; ++j) {
      const bool larger = own == own && !(s.sigma[j] <= own),
                 same = s.sigma[j] == own || (own != own && s.sigma[j] != s.sigma[j]);
      before += larger || (same && j < lane);
    }
    s.column[before] = lane;
  }
  __syncwarp();
}

}  // namespace locallip::cuda
