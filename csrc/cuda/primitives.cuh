// One wrapper for each thing CUDA C++ has no words for, so that a kernel's text stays C++: dynamic shared memory,
// thread block clusters, asynchronous copies, tensor cores. Where the sources are compiled for the host, each is
// emulated.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace locallip::cuda {

#ifdef __CUDACC__

template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// Clusters need compute capability 9.0; before it a block is a cluster of its own.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster; what they wrote before, to any block's shared memory, is seen after.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores to the place in block `rank`'s shared memory that `here` is in one's own.
__device__ inline void store_at_rank(float* here, unsigned rank, float value) {
  const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(here));
  asm volatile(
      "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "st.shared::cluster.f32 [there], %2;\n\t}" ::"r"(own),
      "r"(rank), "f"(value)
      : "memory");
}

__device__ inline void store_at_rank(double* here, unsigned rank, double value) {
  const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(here));
  asm volatile(
      "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "st.shared::cluster.f64 [there], %2;\n\t}" ::"r"(own),
      "r"(rank), "d"(value)
      : "memory");
}

#else

__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline void cluster_barrier() { __syncthreads(); }

template <typename T>
__device__ void store_at_rank(T* here, unsigned, T value) {
  *here = value;
}

#endif

// A place in shared memory as a number of 32 bits, and a load from there: one sum is all that an address takes, which
// a compiler that sees through it would make two of.
using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(const void* place) {
  SharedAddress address;
  asm("{\n\t.reg .u64 there;\n\tcvta.to.shared.u64 there, %1;\n\tcvt.u32.u64 %0, there;\n\t}"
      : "=r"(address)
      : "l"(place));
  return address;
}

__device__ inline float load_shared(SharedAddress address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}

// Copies 16 bytes from global to shared memory; there once its group has been waited for, by this thread alone.
__device__ inline void copy_async(void* to, const void* from) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups but the last kButLast.
template <int kButLast>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kButLast) : "memory");
}

// Rounded to the 10 bits after the point that tensor cores take, nearest, ties away from zero.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

// c += a b for a 16 x 8 matrix a, 8 x 8 b, 16 x 8 c spread over a warp. Lane 4 g + t holds a at (g, t), (g + 8, t),
// (g, t + 4), (g + 8, t + 4); b at (t, g), (t + 4, g); c at (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
// Volatile: it has to stay where all lanes of the warp meet.
__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t as_bits(float x) { return __float_as_uint(x); }

#else

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared());
}

using emulation::cluster_barrier;
using emulation::cluster_rank;
using emulation::commit_copies;
using emulation::mma_tf32;
using emulation::to_tf32;

inline float as_float(uint32_t bits) { return emulation::float_of(bits); }
inline uint32_t as_bits(float x) { return emulation::bits_of(x); }

template <typename T>
void store_at_rank(T* here, unsigned rank, T value) {
  *static_cast<T*>(emulation::at_rank(here, rank)) = value;
}

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* place) { return reinterpret_cast<SharedAddress>(place); }
inline float load_shared(SharedAddress address) { return *reinterpret_cast<const float*>(address); }

inline void copy_async(void* to, const void* from) { emulation::copy_async(to, from, 16); }

template <int kButLast>
void wait_for_copies() {
  emulation::wait_for_copies(kButLast);
}

#endif

}  // namespace locallip::cuda
