// The largest singular value of one matrix B of at most kWindow x kWindow, with its singular vectors, by one warp in
// shared memory: B^T B, scaled to trace 1, is squared until only its dominant part is left. Rotations would find the
// other values too, at some ten times the time, for which the rest of a block waits.
#pragma once

#include "../masked_norm.h"
#include "launch.cuh"

namespace locallip::cuda {

// A value that is 2^-kSquarings smaller, relatively, is told from the largest; of closer ones any mixture serves.
constexpr int kSquarings = 40;

struct TopTriplet {
  double matrix[kWindow][kWindow + 1];  // in
  double power[2][kWindow][kWindow + 1];
  double sigma;  // out: 0 of zero, NaN of what holds a NaN
  double right[kWindow], left[kWindow];
};

// Called by a whole warp; `matrix` written before by its lanes or behind a barrier.
__device__ inline void find_in_warp(TopTriplet& s, int n) {
  constexpr int kRows = kWarp / kWindow;  // at once, a lane an entry
  const int lane = threadIdx.x % kWarp, column = lane % kWindow;
  double largest = 0, trace = 0;
  if (column < n)
    for (int row = lane / kWindow; row < n; row += kRows) largest += fabs(s.matrix[row][column]);
  largest = warp_sum(largest);
  if (!(largest > 0)) {
    if (lane < n) s.right[lane] = s.left[lane] = largest;
    if (lane == 0) s.sigma = largest;
    __syncwarp();
    return;
  }
  // or squares of entries might not be there, nor the inverse of a tiny one
  const double boost = largest < 1 ? 0x1p600 : 1, scale = 1 / (largest * boost);
  const auto entry_at = [&](int row, int of) { return s.matrix[row][of] * boost * scale; };
  if (column < n)
    for (int row = lane / kWindow; row < n; row += kRows) {
      double sum = 0;
      for (int i = 0; i < n; ++i) sum += entry_at(i, row) * entry_at(i, column);
      s.power[0][row][column] = sum;
      trace += row == column ? sum : 0;
    }
  trace = warp_sum(trace);
  int now = 0;
  for (int k = 0; k < kSquarings; ++k) {
    const double factor = 1 / trace;
    __syncwarp();
    double squares = 0;  // of the scaled matrix: the trace of its square
    if (column < n)
      for (int row = lane / kWindow; row < n; row += kRows) {
        const double entry = s.power[now][row][column] * factor;
        double sum = 0;
        for (int i = 0; i < n; ++i) sum += s.power[now][row][i] * s.power[now][i][column];
        s.power[now ^ 1][row][column] = sum * factor * factor;
        squares += entry * entry;
      }
    now ^= 1;
    trace = warp_sum(squares);
    if (!(trace < 1 - 1e-8)) break;  // one value is left, in the square to 1e-16, or none is a number
  }
  __syncwarp();
  int dominant = 0;
  double length = 0, image = 0;
  for (int i = 1; i < n; ++i)
    if (s.power[now][i][i] > s.power[now][dominant][dominant]) dominant = i;
  for (int i = 0; i < n; ++i) length += s.power[now][i][dominant] * s.power[now][i][dominant];
  length = 1 / sqrt(length);
  if (lane < n) {
    s.right[lane] = s.power[now][lane][dominant] * length;
    for (int i = 0; i < n; ++i) image += entry_at(lane, i) * (s.power[now][i][dominant] * length);
  }
  const double sigma = sqrt(warp_sum(image * image));
  if (lane < n) s.left[lane] = image / sigma;
  if (lane == 0) s.sigma = sigma * largest;
  __syncwarp();
}

}  // namespace locallip::cuda
