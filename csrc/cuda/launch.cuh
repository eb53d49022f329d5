// Launch errors, grid sizes and block-wide sums, shared by the kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace locallip::cuda {

constexpr int kThreads = 256;

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Sum over a block of kThreads threads, the same in every thread. `scratch` holds kThreads / 32 values; the sum's order
// is fixed, so that equal inputs give equal bits.
template <typename T>
__device__ T block_sum(T value, T* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  __syncthreads();  // the scratch of an earlier sum has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += scratch[warp];
  return total;
}

// Largest of a block's values, as block_sum.
template <typename T>
__device__ T block_max(T value, T* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) value = fmax(value, __shfl_xor_sync(0xffffffffu, value, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T largest = scratch[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) largest = fmax(largest, scratch[warp]);
  return largest;
}

}  // namespace locallip::cuda
