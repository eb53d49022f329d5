// What the CPU and the CUDA sources share of the language: one spelling for functions both compile, and multiversioned
// loops.
#pragma once

#ifdef __CUDACC__
#define LOCALLIP_INLINE __host__ __device__ __forceinline__
#else
#define LOCALLIP_INLINE inline __attribute__((always_inline))
#endif

// A loop marked so is compiled for several x86-64 levels, and the loader takes the best the processor has: the package
// stays portable without giving up AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_ADDRESS__)
#define LOCALLIP_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LOCALLIP_MULTIVERSION
#endif
