// The iteration of the resident kernels: Golub-Kahan-Lanczos without restart, on vectors that a block or cluster holds
// on chip. Two of them suffice, q and p, each overwritten by its successor:
//
//   alpha_j p_j = A q_j - beta_{j-1} p_{j-1},   beta_j q_{j+1} = A^T p_j - alpha_j q_j,
//
// so that A is the upper bidiagonal matrix of the alphas and betas on the Krylov space. No vector is orthogonalised
// against those before its predecessor: over at most kWindow steps rounding can make a converged value appear twice,
// and cannot raise it. (Past kWindow the streaming path restarts, and orthogonalises fully.)
#pragma once

#include "top_triplet.cuh"

namespace locallip::cuda {

// `Operator` holds A, q and p of one sample and is called by all threads that share them, with the same results in all:
//   double start()                  q = the unit start vector; returns 0 where no column survives
//   double apply(int number, double coefficient)
//                                   number 2 j:     p = unit(A q - coefficient p), p_j of q_j (and p_{j-1} from j = 1)
//                                   number 2 j + 1: q = unit(A^T p - coefficient q), q_{j+1} of p_j and q_j
//                                   returns the length before it was made one
//   void finish(int count)          the singular value and vectors, from `count` of each kind
// `noise` is the relative length below which a vector is rounding: the Krylov space is exhausted, the value exact.
template <typename Operator>
__device__ void golub_kahan(Operator& op, int iterations, double noise, TopTriplet& small) {
  for (int i = threadIdx.x; i < kWindow * kWindow; i += blockDim.x) small.matrix[i / kWindow][i % kWindow] = 0;
  int count = 0;
  if (!(op.start() == 0)) {
    double coefficient = 0;
    for (int number = 0;; ++number) {
      const int step = number / 2;
      const double length = op.apply(number, coefficient);
      const bool spent = isfinite(length) && length <= noise * coefficient;  // what overflowed is not
      if (number % 2 == 0) {
        if (threadIdx.x == 0) {
          small.matrix[step][step] = spent ? 0 : length;
          if (step > 0) small.matrix[step - 1][step] = coefficient;
        }
        count = step + 1;
        if (step == iterations) break;
      }
      if (spent) break;
      coefficient = length;
    }
  }
  __syncthreads();
  if (threadIdx.x < kWarp) find_in_warp(small, count);
  __syncthreads();
  op.finish(count);
}

}  // namespace locallip::cuda
