// One block a sample. Its threads stride over the sample's units; coefficients are block sums in double, held in shared
// memory. Every pass reads the basis from device memory (it is in L2 for a moderate batch).
#include "../masked_norm.h"

#include <limits>

#include "../small_svd.h"
#include "launch.cuh"

namespace locallip::cuda {
namespace {

template <typename scalar_t>
__device__ double square_sum(const scalar_t* x, int64_t n, double* scratch) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return block_sum(sum, scratch);
}

template <typename scalar_t>
__device__ void randomise(scalar_t* x, const uint8_t* mask, int64_t first, uint32_t seed, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
    x[i] = mask && !mask[i] ? scalar_t(0) : scalar_t(pseudo_random(static_cast<uint32_t>(first + i), seed));
}

template <typename scalar_t>
__global__ void start_kernel(scalar_t* basis, const scalar_t* start, bool start_per_sample, const uint8_t* mask,
                             int64_t n) {
  __shared__ double scratch[kThreads / 32];
  const int64_t at = blockIdx.x * n;
  scalar_t* x = basis + at;
  const uint8_t* own_mask = mask ? mask + at : nullptr;
  randomise(x, own_mask, at, 0, n);
  const double random_square = square_sum(x, n, scratch);
  if (start) {
    const scalar_t* given = start + (start_per_sample ? at : 0);
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads)
      if (!own_mask || own_mask[i]) sum += static_cast<double>(given[i]) * static_cast<double>(given[i]);
    const double square = block_sum(sum, scratch);
    if (square > 0) {
      const double share = kNoise / sqrt(random_square), factor = 1 / sqrt(square);
      for (int64_t i = threadIdx.x; i < n; i += kThreads)
        x[i] = !own_mask || own_mask[i] ? static_cast<scalar_t>(given[i] * factor + x[i] * share) : scalar_t(0);
    }
  }
  const double square = square_sum(x, n, scratch);
  const double factor = square > 0 ? 1 / sqrt(square) : 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) x[i] = static_cast<scalar_t>(x[i] * factor);
}

// x -= its part in the basis; coefficients gain it. Returns |x|^2 before, and stores |x|^2 after.
template <typename scalar_t>
__device__ double orthogonalise(scalar_t* x, const scalar_t* basis, int64_t slot_stride, int count, int64_t n,
                                double* coefficients, double* scratch, double* after) {
  double part[kWindow], before = 0;
  for (int j = 0; j < kWindow; ++j) part[j] = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const double value = x[i];
    before += value * value;
#pragma unroll
    for (int j = 0; j < kWindow; ++j)
      if (j < count) part[j] += static_cast<double>(basis[j * slot_stride + i]) * value;
  }
  before = block_sum(before, scratch);
#pragma unroll
  for (int j = 0; j < kWindow; ++j)
    if (j < count) part[j] = block_sum(part[j], scratch);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    scalar_t value = x[i];
#pragma unroll
    for (int j = 0; j < kWindow; ++j)
      if (j < count) value -= static_cast<scalar_t>(part[j]) * basis[j * slot_stride + i];
    x[i] = value;
    sum += static_cast<double>(value) * static_cast<double>(value);
  }
  *after = block_sum(sum, scratch);
  if (coefficients && threadIdx.x == 0) {
#pragma unroll
    for (int j = 0; j < kWindow; ++j)
      if (j < count) coefficients[j] += part[j];
  }
  return before;
}

template <typename scalar_t>
__global__ void extend_kernel(scalar_t* basis, scalar_t* vector, const uint8_t* mask, int count, int64_t n,
                              Breakdown breakdown, bool twice, uint32_t seed, double* projected) {
  __shared__ double scratch[kThreads / 32];
  __shared__ double coefficients[kWindow];
  const double noise = 16.0 * (sizeof(scalar_t) == 4 ? 0x1p-23 : 0x1p-52);
  const int64_t slot_stride = gridDim.x * n, at = blockIdx.x * n;
  scalar_t* x = vector + at;
  const scalar_t* own = basis + at;
  const uint8_t* own_mask = mask ? mask + at : nullptr;
  if (threadIdx.x < kWindow) coefficients[threadIdx.x] = 0;
  __syncthreads();
  if (own_mask)
    for (int64_t i = threadIdx.x; i < n; i += kThreads)
      if (!own_mask[i]) x[i] = 0;
  double after;
  const double before = orthogonalise(x, own, slot_stride, count, n, coefficients, scratch, &after);
  if (twice || after < kReorthogonalise * before)
    orthogonalise(x, own, slot_stride, count, n, coefficients, scratch, &after);
  double norm = sqrt(after);
  if (norm <= noise * sqrt(before)) {
    norm = 0;
    after = 0;
    if (breakdown == Breakdown::kReplace) {
      randomise(x, own_mask, at, seed, n);
      const double drawn = orthogonalise<scalar_t>(x, own, slot_stride, count, n, nullptr, scratch, &after);
      orthogonalise<scalar_t>(x, own, slot_stride, count, n, nullptr, scratch, &after);
      if (after <= noise * noise * drawn) after = 0;  // nothing left outside the span
    }
  }
  scalar_t* out = basis + count * slot_stride + at;
  const double factor = after == 0 ? 0.0 : 1 / sqrt(after);
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
    out[i] = after == 0 ? scalar_t(0) : static_cast<scalar_t>(x[i] * factor);
  if (projected && threadIdx.x == 0) {
    double* column = projected + blockIdx.x * kWindow * kWindow + count;
    for (int j = 0; j < count; ++j) column[j * kWindow] = coefficients[j];
    column[count * kWindow] = norm;
  }
}

// One thread a sample: the matrix is at most kWindow x kWindow.
template <typename scalar_t>
__global__ void decompose_kernel(double* projected, int count, int kept, int64_t batch, double* right, double* left,
                                 scalar_t* sigma) {
  const int64_t b = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (b < batch)
    decompose_one(projected + b * kWindow * kWindow, count, kept, right + b * kept * kWindow, left + b * kept * kWindow,
                  sigma + b);
}

// A thread owns its units, so that `out` may be `basis`.
template <typename scalar_t>
__global__ void rotate_kernel(const scalar_t* basis, const double* rotation, int count, int kept, int64_t n,
                              scalar_t* out) {
  __shared__ scalar_t turn[kKept][kWindow];
  if (threadIdx.x < kept * kWindow) {
    const int i = threadIdx.x / kWindow, j = threadIdx.x % kWindow;
    turn[i][j] = j < count ? static_cast<scalar_t>(rotation[blockIdx.x * kept * kWindow + threadIdx.x]) : scalar_t(0);
  }
  __syncthreads();
  const int64_t slot_stride = gridDim.x * n, at = blockIdx.x * n;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    scalar_t sum[kKept] = {};
#pragma unroll
    for (int j = 0; j < kWindow; ++j) {
      if (j >= count) break;
      const scalar_t value = basis[j * slot_stride + at + i];
#pragma unroll
      for (int k = 0; k < kKept; ++k)
        if (k < kept) sum[k] += turn[k][j] * value;
    }
#pragma unroll
    for (int k = 0; k < kKept; ++k)
      if (k < kept) out[k * slot_stride + at + i] = sum[k];
  }
}

}  // namespace

template <typename scalar_t>
void start_basis(scalar_t* basis, const scalar_t* start, bool start_per_sample, const uint8_t* mask, int64_t batch,
                 int64_t length, void* stream) {
  start_kernel<<<batch, kThreads, 0, as_stream(stream)>>>(basis, start, start_per_sample, mask, length);
  check_launch("start_basis");
}

template <typename scalar_t>
void extend_basis(scalar_t* basis, scalar_t* vector, const uint8_t* mask, int count, int64_t batch, int64_t length,
                  Breakdown breakdown, bool twice, uint32_t seed, double* projected, void* stream) {
  extend_kernel<<<batch, kThreads, 0, as_stream(stream)>>>(basis, vector, mask, count, length, breakdown, twice, seed,
                                                           projected);
  check_launch("extend_basis");
}

template <typename scalar_t>
void decompose(double* projected, int count, int kept, int64_t batch, double* right, double* left, scalar_t* sigma,
               void* stream) {
  decompose_kernel<<<(batch + 31) / 32, 32, 0, as_stream(stream)>>>(projected, count, kept, batch, right, left, sigma);
  check_launch("decompose");
}

template <typename scalar_t>
void rotate_basis(const scalar_t* basis, const double* rotation, int count, int kept, int64_t batch, int64_t length,
                  scalar_t* out, void* stream) {
  rotate_kernel<<<batch, kThreads, 0, as_stream(stream)>>>(basis, rotation, count, kept, length, out);
  check_launch("rotate_basis");
}

#define LOCALLIP_INSTANTIATE(scalar_t)                                                                               \
  template void start_basis(scalar_t*, const scalar_t*, bool, const uint8_t*, int64_t, int64_t, void*);              \
  template void extend_basis(scalar_t*, scalar_t*, const uint8_t*, int, int64_t, int64_t, Breakdown, bool, uint32_t, \
                             double*, void*);                                                                        \
  template void decompose(double*, int, int, int64_t, double*, double*, scalar_t*, void*);                           \
  template void rotate_basis(const scalar_t*, const double*, int, int, int64_t, int64_t, scalar_t*, void*);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cuda
