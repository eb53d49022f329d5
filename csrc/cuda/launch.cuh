// Launches and their errors, sums over warps and blocks: what every kernel here uses.
//
// All shared memory is dynamic: a kernel's one struct, or arrays carved from `dynamic_shared`.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "primitives.cuh"

namespace locallip::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

inline void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or torch's next check would report it once more
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Shape {
  dim3 grid;
  unsigned threads;
  size_t shared = 0;     // bytes a block
  unsigned cluster = 1;  // blocks
};

// Every launch goes through here.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Shape& shape, void* stream,
            const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shape.shared > kWithoutAsking)
    check(name,
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared)));
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1;
  check(name, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check("device", cudaGetDevice(&device));
  check("device", cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Whether the code of `kernel` that this device runs has instructions for clusters: compiled for compute
// capability 9.0, and not the PTX of an earlier one.
template <typename... Parameters>
bool has_clusters(void (*kernel)(Parameters...)) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return false;
  cudaFuncAttributes attributes = {};
  check("masked_norm", cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return attributes.ptxVersion >= 90;
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// Sums have one order, so that equal inputs give equal bits; every lane or thread gets the same value.

template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <typename T>
__device__ T warp_max(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmax(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// Over a block of kThreads threads; `scratch` holds a value a warp.
template <int kThreads, typename T>
__device__ T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  __syncthreads();  // an earlier sum's scratch has been read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += scratch[warp];
  return total;
}

// The first `count` of kMost values each; `scratch` holds kMost values a warp, and kMost more.
template <int kThreads, int kMost, typename T>
__device__ void block_sums(T (&values)[kMost], int count, T* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  T* totals = scratch + kWarps * kMost;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (i >= count) break;
    values[i] = warp_sum(values[i]);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp * kMost + i] = values[i];
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) {
    T total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp * kMost + threadIdx.x];
    totals[threadIdx.x] = total;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMost; ++i)
    if (i < count) values[i] = totals[i];
}

}  // namespace locallip::cuda
