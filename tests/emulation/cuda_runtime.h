// Stands in for CUDA's header of this name, so that a host compiler takes the .cu sources as C++: clusters run one
// after another, the threads of a cluster as fibers that run in an order of our choosing and switch only where CUDA's
// threads may wait for one another. A kernel that lacks a barrier then reads what was not written yet in one order or
// another; shared memory starts as NaN and has the size the launch asked for, so that sanitizers see what leaves it.
//
// Only what the kernels use is here; emulation.cpp runs it. What a GPU would answer with a hang or with nonsense ends
// the process with a message.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

constexpr int kWarp = 32;

// Which of the threads that can go on goes on. 0: the first; 1: the last; even: any, at random; odd: those of a
// randomly chosen warp as far as they get, then those of the next. The number is the seed.
extern int order;

// Bytes of shared memory a block may have: an H100's. Tests lower it to see what happens to layers that do not fit.
extern size_t shared_limit;
extern int ptx_version;

// Multiprocessors of the device.
extern int multiprocessors;

// A launch, with its parameters as a GPU gets them: side by side, each aligned by its type.
struct Launch {
  dim3 grid, block;
  unsigned cluster;
  size_t shared_bytes;
  std::vector<unsigned char> parameters;

  template <typename T>
  void add(const T& value) {
    parameters.resize((parameters.size() + alignof(T) - 1) / alignof(T) * alignof(T) + sizeof(T));
    std::memcpy(parameters.data() + parameters.size() - sizeof(T), &value, sizeof(T));
  }
};

// Runs a launch in place of the kernel as C++, where it is set.
extern void (*launched)(const void* kernel, const Launch& launch);

void run_grid(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, const std::function<void()>& body);

// ---- of the thread that runs

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
int lane();

void block_barrier();
void cluster_barrier();
unsigned cluster_rank();
void* dynamic_shared();
// The address in the shared memory of block `rank` that `here` has in one's own.
void* at_rank(void* here, unsigned rank);

// What a lane hands to the others of its warp.
struct Slot {
  alignas(16) unsigned char bytes[32];
};

// Every lane of `mask` brings its bytes; returns the slots of all once they are there.
const Slot* exchange(uint32_t mask, const void* value, size_t bytes, const char* operation);

template <typename T>
T fetched(const Slot& slot) {
  T value;
  std::memcpy(&value, slot.bytes, sizeof(T));
  return value;
}

[[noreturn]] void misaligned(const char* what);

// Copies that happen as late as they may: when their group is waited for.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(size_t but_last);

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Of `count` matrices of 8 rows of 16 bytes, whose addresses the lanes bring, the words that are this lane's.
inline void load_matrices(uint32_t* words, int count, uintptr_t row) {
  const Slot* rows = exchange(0xFFFFFFFFu, &row, sizeof(row), "ldmatrix");
  for (int i = 0; i < count; ++i) {
    const auto from = fetched<uintptr_t>(rows[8 * i + lane() / 4]);
    if (from % 16) misaligned("ldmatrix");
    words[i] = reinterpret_cast<const uint32_t*>(from)[lane() % 4];
  }
}

// Nearest, ties away from zero, as cvt.rna.tf32.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  return (bits & 0x7F800000u) == 0x7F800000u ? bits : (bits + 0x1000u) & ~0x1FFFu;
}

// cvt.rn.bf16x2: nearest, ties to even; NaN has one form.
inline uint32_t to_bfloat16(float low, float high) {
  const auto upper_half = [](float x) {
    const uint32_t bits = bits_of(x);
    return x != x ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
  };
  return upper_half(low) | upper_half(high) << 16;
}

// mma.m16n8k8 with tf32 operands, mma.m16n8k16 with bfloat16 ones.
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);
void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);

// Objects, because macros would replace the members of CUDA's structs that have the same names.
template <auto of>
struct Index {
  struct {
    operator unsigned() const { return of().x; }
  } x;
  struct {
    operator unsigned() const { return of().y; }
  } y;
  struct {
    operator unsigned() const { return of().z; }
  } z;
};

}  // namespace emulation

// ---- the language ------------------------------------------------------------------------------------------------------

inline constexpr emulation::Index<emulation::thread_index> threadIdx;
inline constexpr emulation::Index<emulation::block_index> blockIdx;
inline constexpr emulation::Index<emulation::block_size> blockDim;
inline constexpr emulation::Index<emulation::grid_size> gridDim;

inline void __syncthreads() { emulation::block_barrier(); }

inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) {
  const char nothing = 0;
  emulation::exchange(mask, &nothing, 1, "__syncwarp");
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits) {
  return emulation::fetched<T>(
      emulation::exchange(mask, &value, sizeof(T), "__shfl_xor_sync")[(emulation::lane() ^ bits) & 31]);
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote) {
  const auto* slots = emulation::exchange(mask, &vote, 1, "__ballot_sync");
  uint32_t votes = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane)
    if (mask >> lane & 1) votes |= static_cast<uint32_t>(emulation::fetched<bool>(slots[lane])) << lane;
  return votes;
}

inline bool __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// ---- the runtime -------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess };

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(emulation::shared_limit)
           : attribute == cudaDevAttrComputeCapabilityMajor     ? 9
                                                                : emulation::multiprocessors;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = emulation::ptx_version;
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> held(std::forward<Arguments>(arguments)...);
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  if (emulation::launched) {
    emulation::Launch launch{config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes, {}};
    std::apply([&](const auto&... each) { (launch.add(each), ...); }, held);
    emulation::launched(reinterpret_cast<const void*>(kernel), launch);
    return cudaSuccess;
  }
  emulation::run_grid(config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes,
                      [&] { std::apply(kernel, held); });
  return cudaSuccess;
}
