// Neighbouring units that one thread loads and stores together: up to 16 bytes, the widest access there is.
#pragma once

#include <cstdint>

namespace locallip::cuda {

template <typename T, int kUnits>
struct alignas(sizeof(T) * kUnits) Pack {
  T v[kUnits];
};

template <int kUnits, typename T>
__device__ Pack<T, kUnits> load(const T* at) {
  return *reinterpret_cast<const Pack<T, kUnits>*>(at);
}

template <int kUnits, typename T>
__device__ void store(T* at, const Pack<T, kUnits>& value) {
  *reinterpret_cast<Pack<T, kUnits>*>(at) = value;
}

}  // namespace locallip::cuda
