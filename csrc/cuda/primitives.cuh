// One wrapper for each thing CUDA C++ has no words for, so that a kernel's text stays C++: dynamic shared memory,
// thread block clusters, asynchronous copies, tensor cores. Where the sources are compiled for the host, each is
// emulated.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

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
template <typename T>
__device__ void store_at_rank(T* here, unsigned rank, T value) {
  static_assert(sizeof(T) == 8);
  uint64_t bits;
  memcpy(&bits, &value, sizeof(T));
  const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(here));
  asm volatile(
      "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "st.shared::cluster.u64 [there], %2;\n\t}" ::"r"(own),
      "r"(rank), "l"(bits)
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

__device__ inline uint32_t load_shared(SharedAddress address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

// Matrices of 8 rows of 4 words each, 2 or 4 of them, spread over a warp as the tensor instructions below want them:
// lane 8 i + j says where row j of matrix i begins, a multiple of 16 bytes, and lane 4 g + t gets word t of row g of
// each.
__device__ inline void load_matrices(uint32_t (&words)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row));
}

__device__ inline void load_matrices(uint32_t (&words)[2], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(row));
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

// Two numbers in bfloat16, to the nearest, ties to even; `low` in the lower half of the word.
__device__ inline uint32_t to_bfloat16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// d = a b + c for a 16 x 8 matrix a, 8 x 8 b, 16 x 8 c spread over a warp. Lane 4 g + t holds a at (g, t), (g + 8, t),
// (g, t + 4), (g + 8, t + 4); b at (t, g), (t + 4, g); c at (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
// Of a and b in bfloat16 an entry is two neighbours of twice the depth. Volatile: it has to stay where all lanes of the
// warp meet.
__device__ inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
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
using emulation::mma_bfloat16;
using emulation::mma_tf32;
using emulation::to_bfloat16;
using emulation::to_tf32;

inline float as_float(uint32_t bits) { return emulation::float_of(bits); }
inline uint32_t as_bits(float x) { return emulation::bits_of(x); }

template <typename T>
void store_at_rank(T* here, unsigned rank, T value) {
  static_assert(sizeof(T) == 8);
  *static_cast<T*>(emulation::at_rank(here, rank)) = value;
}

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* place) { return reinterpret_cast<SharedAddress>(place); }
inline uint32_t load_shared(SharedAddress address) { return *reinterpret_cast<const uint32_t*>(address); }

template <int kCount>
void load_matrices(uint32_t (&words)[kCount], SharedAddress row) {
  emulation::load_matrices(words, kCount, row);
}

inline void copy_async(void* to, const void* from) { emulation::copy_async(to, from, 16); }

template <int kButLast>
void wait_for_copies() {
  emulation::wait_for_copies(kButLast);
}

#endif

}  // namespace locallip::cuda
