// Resident masked norm of a dense weight: a block takes one sample, gathers the surviving rows and columns into shared
// memory, and runs every iteration there. With at most kWindow rows (a last layer's classes) there is nothing to
// iterate: the Gram matrix of the masked rows has the squared singular values.
//
//   registers  one sum a thread
//   shared     the survivors' indices, q and p over the survivors alone, the gathered matrix. Half of what a
//              multiprocessor has, so that two samples share one and fill each other's waits.
//   global     the weight, in L2: a sample whose survivors do not fit (beyond density 0.3 at 512 x 512) reads its rows
//              there in every application, still skipping the others; the vectors q_j and p_j, written as they come.
//
// 512 x 512, density 0.1: 51 x 51 survivors, 10 KiB, 5 kFLOP an application. Gathering reads 51 rows of 512 in sectors
// of 32 bytes, at most 84 KiB of L2 a sample; a batched product with masks does 524 kFLOP a sample and application.
#include "../masked_norm.h"
#include "golub_kahan.cuh"
#include "launch.cuh"

namespace locallip::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kInFlight = 8;  // loads of a thread, which nothing else hides where the weight is read in L2

template <typename T>
struct Shared {
  TopTriplet small;
  double scratch[kWarps];
  int survivors[2];  // columns, rows
  T partial[kThreads];
};

// Indices that a mask keeps, in order; the whole warp calls it and gets their number.
__device__ int collect(const uint8_t* mask, int n, int* indices) {
  const int lane = threadIdx.x % kWarp;
  int count = 0;
  for (int first = 0; first < n; first += kInFlight * kWarp) {
    bool keep[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int i = first + k * kWarp + lane;
      keep[k] = i < n;
      if (mask && i < n) keep[k] = mask[i];
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const unsigned kept = __ballot_sync(kAllLanes, keep[k]);
      if (keep[k]) indices[count + __popc(kept & ((1u << lane) - 1))] = first + k * kWarp + lane;
      count += __popc(kept);
    }
  }
  return count;
}

// A over the survivors: gathered, or in place.
template <typename T>
struct Gathered {
  const T* matrix;
  int pitch;
  __device__ T operator()(int i, int j) const { return matrix[i * pitch + j]; }
};

template <typename T>
struct InPlace {
  const T* weight;
  const int *rows, *columns;
  int width;  // an index fits into 32 bits (dense_fits)
  __device__ T operator()(int i, int j) const { return weight[rows[i] * width + columns[j]]; }
};

template <typename T, typename Matrix>
struct Dense {
  const DenseProblem<T>& problem;
  Shared<T>& shared;
  Matrix matrix;
  T *q, *p;
  const int *rows, *columns;
  int height, width;  // survivors
  int64_t sample;

  __device__ T* slot(bool left, int step) const {
    return (left ? problem.left_slots : problem.right_slots) +
           (step * problem.batch + sample) * (left ? problem.rows : problem.columns);
  }

  // x = unit(x), kept as vector `step`; its length before.
  __device__ double normalise(bool left, int step) {
    T* x = left ? p : q;
    const int n = left ? height : width;
    double square = 0;
    for (int i = threadIdx.x; i < n; i += kThreads) square += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    const double length = sqrt(block_sum<kThreads>(square, shared.scratch)), factor = length == 0 ? 0 : 1 / length;
    T* kept = slot(left, step);
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const T value = static_cast<T>(x[i] * factor);
      x[i] = value;
      kept[i] = value;
    }
    __syncthreads();
    return length;
  }

  __device__ double start() {
    const T* start =
        problem.start ? problem.start + (problem.start_per_sample ? sample * problem.columns : 0) : nullptr;
    const auto random = [&](int j) {
      return static_cast<double>(pseudo_random(static_cast<uint32_t>(sample * problem.columns + columns[j]), 0));
    };
    double drawn = 0, given = 0;
    for (int j = threadIdx.x; j < width; j += kThreads) {
      drawn += random(j) * random(j);
      if (start) given += static_cast<double>(start[columns[j]]) * static_cast<double>(start[columns[j]]);
    }
    drawn = block_sum<kThreads>(drawn, shared.scratch);
    given = block_sum<kThreads>(given, shared.scratch);
    const double of_given = given > 0 ? 1 / sqrt(given) : 0, of_drawn = given > 0 ? kNoise / sqrt(drawn) : 1;
    for (int j = threadIdx.x; j < width; j += kThreads)
      q[j] = static_cast<T>(random(j) * of_drawn + (given > 0 ? start[columns[j]] * of_given : 0));
    return normalise(false, 0);
  }

  __device__ double apply(int number, double coefficient) {
    const int step = number / 2;
    const T subtract = static_cast<T>(coefficient);
    if (number % 2 == 0) {  // a warp a row
      const int lane = threadIdx.x % kWarp;
      for (int i = threadIdx.x / kWarp; i < height; i += kWarps) {
        T sum = 0;
        for (int first = lane; first < width; first += kInFlight * kWarp) {
          T entries[kInFlight];
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) {
            const int j = first + k * kWarp;
            entries[k] = j < width ? matrix(i, j) : T(0);
          }
#pragma unroll
          for (int k = 0; k < kInFlight; ++k)
            if (first + k * kWarp < width) sum += entries[k] * q[first + k * kWarp];
        }
        sum = warp_sum(sum);
        if (lane == 0) p[i] = step > 0 ? sum - subtract * p[i] : sum;
      }
      __syncthreads();
      return normalise(true, step);
    }
    // a thread a column, or several, each with its share of the rows, where there are threads to spare
    const int shares = width >= kThreads ? 1 : kThreads / width;
    for (int first = 0; first < width; first += kThreads) {
      const int share = shares == 1 ? 0 : static_cast<int>(threadIdx.x) / width,
                j = shares == 1 ? first + static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x) % width;
      T sum = 0;
      if (share < shares && j < width)
        for (int first = share; first < height; first += kInFlight * shares) {
          T entries[kInFlight];
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) {
            const int i = first + k * shares;
            entries[k] = i < height ? matrix(i, j) : T(0);
          }
#pragma unroll
          for (int k = 0; k < kInFlight; ++k)
            if (first + k * shares < height) sum += entries[k] * p[first + k * shares];
        }
      if (shares == 1) {
        if (j < width) q[j] = sum - subtract * q[j];
        continue;
      }
      shared.partial[threadIdx.x] = sum;
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < width) {
        for (int k = 1; k < shares; ++k) sum += shared.partial[k * width + j];
        q[j] = sum - subtract * q[j];
      }
    }
    __syncthreads();
    return normalise(false, step + 1);
  }

  __device__ void finish(int count) {
    const TopTriplet& small = shared.small;
    const double sigma = count ? small.sigma : 0;
    if (threadIdx.x == 0) problem.sigma[sample] = static_cast<T>(sigma);
    for (int left = 0; left < 2; ++left) {
      const int n = left ? height : width, all = left ? problem.rows : problem.columns;
      T* x = left ? p : q;
      double square = 0;
      for (int i = threadIdx.x; i < n; i += kThreads) {
        T value = 0;
        if (!(sigma == 0))
          for (int j = 0; j < count; ++j)
            value += static_cast<T>(left ? small.left[j] : small.right[j]) * slot(left, j)[i];
        x[i] = value;
        square += static_cast<double>(value) * static_cast<double>(value);
      }
      square = block_sum<kThreads>(square, shared.scratch);
      const double factor = square == 0 ? 0 : 1 / sqrt(square);
      T* out = (left ? problem.left : problem.right) + sample * all;
      for (int i = threadIdx.x; i < all; i += kThreads) out[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < n; i += kThreads) out[left ? rows[i] : columns[i]] = static_cast<T>(x[i] * factor);
    }
  }
};

// Bytes before the gathered matrix.
template <typename T>
size_t vectors_bytes(int64_t rows, int64_t columns) {
  return (sizeof(Shared<T>) + (rows + columns) * (sizeof(T) + sizeof(int)) + 15) / 16 * 16;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    dense_kernel(const __grid_constant__ DenseProblem<T> problem, int matrix_at, int capacity) {
  auto* memory = dynamic_shared<unsigned char>();
  auto& shared = *reinterpret_cast<Shared<T>*>(memory);
  T* q = reinterpret_cast<T*>(memory + sizeof(Shared<T>));
  T* p = q + problem.columns;
  int* columns = reinterpret_cast<int*>(p + problem.rows);
  int* rows = columns + problem.columns;
  T* matrix = reinterpret_cast<T*>(memory + matrix_at);
  const int64_t sample = blockIdx.x;
  const unsigned warp = threadIdx.x / kWarp;
  if (warp < 2) {
    const uint8_t* mask = warp ? problem.row_mask : problem.col_mask;
    const int n = warp ? problem.rows : problem.columns;
    const int count = collect(mask ? mask + sample * n : nullptr, n, warp ? rows : columns);
    if (threadIdx.x % kWarp == 0) shared.survivors[warp] = count;
  }
  __syncthreads();
  const int width = shared.survivors[0], height = shared.survivors[1];
  const int pitch = width | 1;  // odd, so that a column's entries lie in different banks
  const double noise = 16 * (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);
  const InPlace<T> in_place{problem.weight, rows, columns, problem.columns};
  if (static_cast<int64_t>(height) * pitch > capacity) {
    Dense<T, InPlace<T>> op{problem, shared, in_place, q, p, rows, columns, height, width, sample};
    golub_kahan(op, problem.iterations, noise, shared.small);
    return;
  }
  for (int first = static_cast<int>(warp); first < height; first += kInFlight * kWarps)
    for (int j = threadIdx.x % kWarp; j < width; j += kWarp) {
      T entries[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k)
        entries[k] = first + k * kWarps < height ? in_place(first + k * kWarps, j) : T(0);
#pragma unroll
      for (int k = 0; k < kInFlight; ++k)
        if (first + k * kWarps < height) matrix[(first + k * kWarps) * pitch + j] = entries[k];
    }
  __syncthreads();
  Dense<T, Gathered<T>> op{problem, shared, {matrix, pitch}, q, p, rows, columns, height, width, sample};
  golub_kahan(op, problem.iterations, noise, shared.small);
}

// ---- at most kWindow rows ----------------------------------------------------------------------------------------------

// A block a sample, a warp an entry of the Gram matrix, in double. 10 x 512: 55 entries of 512 products.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) gram_kernel(const __grid_constant__ DenseProblem<T> problem) {
  auto& shared = *dynamic_shared<Shared<T>>();
  const int64_t sample = blockIdx.x;
  const uint8_t* row_mask = problem.row_mask ? problem.row_mask + sample * problem.rows : nullptr;
  const uint8_t* col_mask = problem.col_mask ? problem.col_mask + sample * problem.columns : nullptr;
  const int m = problem.rows, lane = threadIdx.x % kWarp;
  for (int entry = threadIdx.x / kWarp; entry < m * m; entry += kWarps) {
    const int i = entry / m, k = entry % m;
    if (k > i) continue;
    double sum = 0;
    const T* of_rows[2] = {problem.weight + static_cast<int64_t>(i) * problem.columns,
                           problem.weight + static_cast<int64_t>(k) * problem.columns};
    if (!row_mask || (row_mask[i] && row_mask[k]))
      for (int first = lane; first < problem.columns; first += kInFlight * kWarp) {
        T a[kInFlight] = {}, b[kInFlight] = {};
        bool keep[kInFlight];
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
          const int j = first + n * kWarp;
          keep[n] = j < problem.columns;
          if (!keep[n]) continue;
          a[n] = of_rows[0][j];
          b[n] = of_rows[1][j];
          if (col_mask) keep[n] = col_mask[j];
        }
#pragma unroll
        for (int n = 0; n < kInFlight; ++n)
          if (keep[n]) sum += static_cast<double>(a[n]) * static_cast<double>(b[n]);
      }
    sum = warp_sum(sum);
    if (lane == 0) shared.small.matrix[i][k] = shared.small.matrix[k][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) find_in_warp(shared.small, m);
  __syncthreads();
  // the eigenvector to the largest eigenvalue is the left singular vector; its image under A^T has the norm as length
  const double eigenvalue = shared.small.sigma;
  double square = 0;
  T* right = problem.right + sample * problem.columns;
  for (int j = threadIdx.x; j < problem.columns; j += kThreads) {
    double sum = 0;
    if ((!col_mask || col_mask[j]) && !(eigenvalue == 0))
      for (int i = 0; i < m; ++i)
        if (!row_mask || row_mask[i])
          sum += shared.small.right[i] *
                 static_cast<double>(problem.weight[static_cast<int64_t>(i) * problem.columns + j]);
    right[j] = static_cast<T>(sum);
    square += sum * sum;
  }
  const double sigma = sqrt(block_sum<kThreads>(square, shared.scratch)), factor = sigma == 0 ? 0 : 1 / sigma;
  for (int j = threadIdx.x; j < problem.columns; j += kThreads) right[j] = static_cast<T>(right[j] * factor);
  if (threadIdx.x < static_cast<unsigned>(m))
    problem.left[sample * m + threadIdx.x] = sigma == 0 ? T(0) : static_cast<T>(shared.small.right[threadIdx.x]);
  if (threadIdx.x == 0) problem.sigma[sample] = static_cast<T>(eigenvalue == eigenvalue ? sigma : eigenvalue);
}

// Two blocks to a multiprocessor, each of which keeps 1 KiB for itself.
size_t half_of_shared() {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) / 2 - 1024;
}

}  // namespace

// Weights up to this size are gathered or read in place; a larger one is worth a batched matrix product.
constexpr int64_t kMostWeights = int64_t{1} << 19;

template <typename scalar_t>
bool dense_fits(int64_t rows, int64_t columns) {
  return rows * columns <= kMostWeights && vectors_bytes<scalar_t>(rows, columns) <= half_of_shared();
}

template <typename scalar_t>
void masked_norm_dense(const DenseProblem<scalar_t>& problem, void* stream) {
  const dim3 grid(static_cast<unsigned>(problem.batch));
  if (problem.rows <= kWindow) {
    launch("masked_norm, Gram matrix", gram_kernel<scalar_t>, {grid, kThreads, sizeof(Shared<scalar_t>)}, stream,
           problem);
    return;
  }
  const size_t before = vectors_bytes<scalar_t>(problem.rows, problem.columns), all = half_of_shared();
  launch("masked_norm, dense", dense_kernel<scalar_t>, {grid, kThreads, all}, stream, problem, static_cast<int>(before),
         static_cast<int>((all - before) / sizeof(scalar_t)));
}

#define LOCALLIP_INSTANTIATE(scalar_t)                  \
  template bool dense_fits<scalar_t>(int64_t, int64_t); \
  template void masked_norm_dense(const DenseProblem<scalar_t>&, void*);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cuda
