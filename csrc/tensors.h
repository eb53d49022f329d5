// Tensors as the kernels want them, and which device's kernels run: what the ops of this folder share.
#pragma once

#include <ATen/DeviceGuard.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#if defined(LOCALLIP_EMULATED_CUDA)  // the tests' build: the CUDA kernels, compiled for the host, in place of the CPU's
#define LOCALLIP_CURRENT_STREAM nullptr
#define LOCALLIP_RUN(tensor, function, ...) cuda::function(__VA_ARGS__, LOCALLIP_CURRENT_STREAM)
#define LOCALLIP_HOST_RUN(tensor, function, ...) cuda::function(__VA_ARGS__)
#elif defined(LOCALLIP_CUDA)
#include <c10/cuda/CUDAStream.h>
#define LOCALLIP_CURRENT_STREAM c10::cuda::getCurrentCUDAStream().stream()
#define LOCALLIP_RUN(tensor, function, ...) \
  ((tensor).is_cuda() ? cuda::function(__VA_ARGS__, LOCALLIP_CURRENT_STREAM) : cpu::function(__VA_ARGS__))
#define LOCALLIP_HOST_RUN(tensor, function, ...) \
  ((tensor).is_cuda() ? cuda::function(__VA_ARGS__) : cpu::function(__VA_ARGS__))
#else
#define LOCALLIP_RUN(tensor, function, ...) cpu::function(__VA_ARGS__)
#define LOCALLIP_HOST_RUN(tensor, function, ...) cpu::function(__VA_ARGS__)
#endif

namespace locallip {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Dense, channels last, and at an address that accesses of 16 bytes take: a view may begin anywhere.
inline Tensor laid_out(const Tensor& t) {
  const auto format = t.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor dense = t.contiguous(format);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone(format);
}

inline OptionalTensor laid_out(const OptionalTensor& t) { return t ? OptionalTensor(laid_out(*t)) : std::nullopt; }

inline Tensor empty(IntArrayRef sizes, at::TensorOptions options) {
  return at::empty(
      sizes, options.memory_format(sizes.size() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous));
}

inline const uint8_t* bytes(const OptionalTensor& mask) {
  return mask ? reinterpret_cast<const uint8_t*>(mask->const_data_ptr<bool>()) : nullptr;
}

inline uint8_t* bytes(Tensor& mask) { return reinterpret_cast<uint8_t*>(mask.mutable_data_ptr<bool>()); }

template <typename T>
const T* pointer(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

inline std::vector<int64_t> with_batch(int64_t batch, IntArrayRef sizes) {
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out[0] = batch;
  return out;
}

}  // namespace locallip
