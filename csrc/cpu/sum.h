// Sums next to vector loops. Terms are stored by the loop over units and added up by a second one: a sum in the first,
// or a struct declared in its body, keeps compilers from making vector code of it. Bodies are calls of inlined
// functions for the same reason.
#pragma once

#include <cstdint>

#include "../portable.h"

namespace locallip::cpu {

constexpr int64_t kTerms = 256;

template <typename T>
using Terms = T[kTerms];

template <typename T>
LOCALLIP_INLINE T sum(const Terms<T>& terms, int64_t n) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += terms[i];
  return total;
}

}  // namespace locallip::cpu
