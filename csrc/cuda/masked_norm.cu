// The streaming path of the masked norm: what lies between two products of the whole batch, which torch's libraries
// make. One block a sample. Its vector is read once, kept in shared memory where it fits (up to 54,000 units in
// float32), and written once; the basis is read once for the coefficients and once, from L2 mostly, for the
// subtraction, by accesses of 16 bytes. Coefficients are sums in double.
#include "../masked_norm.h"

#include <type_traits>

#include "launch.cuh"
#include "pack.cuh"
#include "small_svd.cuh"

namespace locallip::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;

struct alignas(16) Shared {  // the vector follows it
  double scratch[(kWarps + 1) * (kWindow + 1)];
  double coefficients[kWindow];
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    start_kernel(T* basis, const T* start, bool start_per_sample, const uint8_t* mask, int64_t n) {
  auto* scratch = dynamic_shared<double>();
  const int64_t at = blockIdx.x * n;
  const uint8_t* own_mask = mask ? mask + at : nullptr;
  const T* given = start ? start + (start_per_sample ? at : 0) : nullptr;
  double drawn_square = 0, given_square = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    if (own_mask && !own_mask[i]) continue;
    const double drawn = pseudo_random(static_cast<uint32_t>(at + i), 0), own = given ? given[i] : T(0);
    drawn_square += drawn * drawn;
    given_square += own * own;
  }
  drawn_square = block_sum<kThreads>(drawn_square, scratch);
  given_square = block_sum<kThreads>(given_square, scratch);
  const double of_given = given_square > 0 ? 1 / sqrt(given_square) : 0,
               of_drawn = given_square > 0 ? kNoise / sqrt(drawn_square) : 1;
  const auto value = [&](int64_t i) {
    if (own_mask && !own_mask[i]) return 0.0;
    return pseudo_random(static_cast<uint32_t>(at + i), 0) * of_drawn + (given_square > 0 ? given[i] * of_given : 0.0);
  };
  double square = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) square += value(i) * value(i);
  square = block_sum<kThreads>(square, scratch);
  const double factor = square > 0 ? 1 / sqrt(square) : 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) basis[at + i] = static_cast<T>(value(i) * factor);
}

// The vector a block works on, in shared or global memory, and the basis before it.
template <typename T, int kUnits>
struct Extension {
  T* x;
  const T* basis;
  int64_t n, slot_stride;
  int count;
  Shared& shared;

  // x -= its part in the basis; coefficients gain it. Returns |x|^2 before, and stores |x|^2 after.
  __device__ double orthogonalise(bool recorded, double* after) {
    double part[1 + kWindow];  // |x|^2 and the coefficients
#pragma unroll
    for (int j = 0; j <= kWindow; ++j) part[j] = 0;
    for (int64_t i = threadIdx.x * kUnits; i < n; i += kThreads * kUnits) {
      const auto own = load<kUnits>(x + i);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) part[0] += static_cast<double>(own.v[u]) * static_cast<double>(own.v[u]);
#pragma unroll
      for (int j = 0; j < kWindow; ++j) {
        if (j >= count) break;
        const auto other = load<kUnits>(basis + j * slot_stride + i);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) part[1 + j] += static_cast<double>(other.v[u]) * static_cast<double>(own.v[u]);
      }
    }
    block_sums<kThreads>(part, 1 + count, shared.scratch);
    double sum = 0;
    for (int64_t i = threadIdx.x * kUnits; i < n; i += kThreads * kUnits) {
      auto own = load<kUnits>(x + i);
#pragma unroll
      for (int j = 0; j < kWindow; ++j) {
        if (j >= count) break;
        const auto other = load<kUnits>(basis + j * slot_stride + i);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) own.v[u] -= static_cast<T>(part[1 + j]) * other.v[u];
      }
      store<kUnits>(x + i, own);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) sum += static_cast<double>(own.v[u]) * static_cast<double>(own.v[u]);
    }
    *after = block_sum<kThreads>(sum, shared.scratch);
    if (recorded && threadIdx.x == 0) {
#pragma unroll
      for (int j = 0; j < kWindow; ++j)
        if (j < count) shared.coefficients[j] += part[1 + j];
    }
    return part[0];
  }
};

template <typename T, int kUnits>
__global__ void __launch_bounds__(kThreads, 1)
    extend_kernel(T* basis, T* vector, const uint8_t* mask, int count, int64_t n, Breakdown breakdown, bool twice,
                  uint32_t seed, double* projected, bool on_chip) {
  auto* memory = dynamic_shared<unsigned char>();
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const double noise = 16.0 * (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);
  const int64_t slot_stride = gridDim.x * n, at = blockIdx.x * n;
  const uint8_t* own_mask = mask ? mask + at : nullptr;
  T* x = on_chip ? reinterpret_cast<T*>(memory + sizeof(Shared)) : vector + at;
  if (threadIdx.x < kWindow) shared.coefficients[threadIdx.x] = 0;
  // a thread reads and writes the same units in every pass over x: no barrier is needed between passes
  for (int64_t i = threadIdx.x * kUnits; i < n; i += kThreads * kUnits) {
    auto own = load<kUnits>(vector + at + i);
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      if (own_mask && !own_mask[i + u]) own.v[u] = 0;
    store<kUnits>(x + i, own);
  }
  __syncthreads();
  Extension<T, kUnits> extension{x, basis + at, n, slot_stride, count, shared};
  double after, before = 0, length = 0;
  // first the vector itself, perhaps twice; then, where it vanished, a pseudo-random one, twice
  bool drawn = false;
  for (int pass = 0; pass < 4; ++pass) {
    const double square = extension.orthogonalise(!drawn, &after);
    if (pass == 0 || pass == 2) before = square;
    if (pass == 0 && (twice || after < kReorthogonalise * before)) continue;
    if (pass < 2) {
      length = sqrt(after);
      if (!(length <= noise * sqrt(before))) break;
      length = after = 0;
      if (breakdown == Breakdown::kDrop) break;
      for (int64_t i = threadIdx.x * kUnits; i < n; i += kThreads * kUnits)
        for (int u = 0; u < kUnits; ++u)
          x[i + u] = own_mask && !own_mask[i + u] ? T(0) : T(pseudo_random(static_cast<uint32_t>(at + i + u), seed));
      drawn = true;
      pass = 1;  // two passes over the drawn vector follow
    } else if (pass == 3 && after <= noise * noise * before) {
      after = 0;  // nothing left outside the span
    }
  }
  T* out = basis + count * slot_stride + at;
  const double factor = after == 0 ? 0.0 : 1 / sqrt(after);
  for (int64_t i = threadIdx.x * kUnits; i < n; i += kThreads * kUnits) {
    auto own = load<kUnits>(x + i);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) own.v[u] = after == 0 ? T(0) : static_cast<T>(own.v[u] * factor);
    store<kUnits>(out + i, own);
  }
  if (projected && threadIdx.x == 0) {
    double* column = projected + blockIdx.x * kWindow * kWindow + count;
    for (int j = 0; j < count; ++j) column[j * kWindow] = shared.coefficients[j];
    column[count * kWindow] = length;
  }
}

// One warp a sample.
constexpr int kSamples = 4;  // a block

template <typename T>
__global__ void __launch_bounds__(kSamples* kWarp, 1)
    decompose_kernel(double* projected, int count, int kept, int64_t batch, double* right, double* left, T* sigma) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t b = blockIdx.x * static_cast<int64_t>(warps) + warp;
  if (b >= batch) return;
  SmallSvd& small = dynamic_shared<SmallSvd>()[warp];
  double* own = projected + b * kWindow * kWindow;
  for (int i = lane; i < count * count; i += kWarp)
    small.a[i / count][i % count] = own[i / count * kWindow + i % count];
  __syncwarp();
  decompose_in_warp(small, count);
  for (int i = lane; i < kWindow * kWindow; i += kWarp) {
    const int row = i / kWindow, column = i % kWindow;
    own[i] = row == column && row < kept ? small.sigma[small.column[row]] : 0;
  }
  for (int i = lane; i < kept * count; i += kWarp) {
    const int which = i / count, j = i % count, column = small.column[which];
    const double value = small.sigma[column];
    const bool alive = !(value <= 0);
    right[(b * kept + which) * kWindow + j] = alive ? small.v[j][column] : 0;
    left[(b * kept + which) * kWindow + j] = alive ? small.a[j][column] / value : 0;
  }
  if (lane == 0) sigma[b] = static_cast<T>(small.sigma[small.column[0]]);
}

// A thread owns its units, so that `out` may be `basis`.
template <typename T, int kUnits>
__global__ void __launch_bounds__(kThreads)
    rotate_kernel(const T* basis, const double* rotation, int count, int kept, int64_t n, T* out) {
  auto* turn = dynamic_shared<T>();  // [kKept][kWindow]
  for (int i = threadIdx.x; i < kKept * kWindow; i += kThreads)
    turn[i] = i < kept * kWindow && i % kWindow < count
                  ? static_cast<T>(rotation[blockIdx.x * static_cast<int64_t>(kept) * kWindow + i])
                  : T(0);
  __syncthreads();
  const int64_t slot_stride = gridDim.x * n, at = blockIdx.x * n;
  for (int64_t i = threadIdx.x * kUnits; i < n; i += kThreads * kUnits) {
    Pack<T, kUnits> sum[kKept] = {};
#pragma unroll
    for (int j = 0; j < kWindow; ++j) {
      if (j >= count) break;
      const auto value = load<kUnits>(basis + j * slot_stride + at + i);
#pragma unroll
      for (int k = 0; k < kKept; ++k)
        if (k < kept)
#pragma unroll
          for (int u = 0; u < kUnits; ++u) sum[k].v[u] += turn[k * kWindow + j] * value.v[u];
    }
#pragma unroll
    for (int k = 0; k < kKept; ++k)
      if (k < kept) store<kUnits>(out + k * slot_stride + at + i, sum[k]);
  }
}

// Calls run(units a thread takes at once): every array of the batch starts at a multiple of n.
template <typename T, typename Run>
void with_units(int64_t n, Run run) {
  constexpr int kMost = 16 / sizeof(T);
  if (n % kMost == 0)
    run(std::integral_constant<int, kMost>{});
  else
    run(std::integral_constant<int, 1>{});
}

}  // namespace

template <typename scalar_t>
void start_basis(scalar_t* basis, const scalar_t* start, bool start_per_sample, const uint8_t* mask, int64_t batch,
                 int64_t length, void* stream) {
  launch("start_basis", start_kernel<scalar_t>, {dim3(blocks_for(batch, 1)), kThreads, sizeof(Shared)}, stream, basis,
         start, start_per_sample, mask, length);
}

template <typename scalar_t>
void extend_basis(scalar_t* basis, scalar_t* vector, const uint8_t* mask, int count, int64_t batch, int64_t length,
                  Breakdown breakdown, bool twice, uint32_t seed, double* projected, void* stream) {
  const size_t held = sizeof(Shared) + length * sizeof(scalar_t);
  const bool on_chip = held <= static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  with_units<scalar_t>(length, [&](auto units) {
    launch("extend_basis", extend_kernel<scalar_t, units()>,
           {dim3(blocks_for(batch, 1)), kThreads, on_chip ? held : sizeof(Shared)}, stream, basis, vector, mask, count,
           length, breakdown, twice, seed, projected, on_chip);
  });
}

template <typename scalar_t>
void decompose(double* projected, int count, int kept, int64_t batch, double* right, double* left, scalar_t* sigma,
               void* stream) {
  launch("decompose", decompose_kernel<scalar_t>,
         {dim3(blocks_for(batch, kSamples)), kSamples * kWarp, kSamples * sizeof(SmallSvd)}, stream, projected, count,
         kept, batch, right, left, sigma);
}

template <typename scalar_t>
void rotate_basis(const scalar_t* basis, const double* rotation, int count, int kept, int64_t batch, int64_t length,
                  scalar_t* out, void* stream) {
  with_units<scalar_t>(length, [&](auto units) {
    launch("rotate_basis", rotate_kernel<scalar_t, units()>,
           {dim3(blocks_for(batch, 1)), kThreads, kKept * kWindow * sizeof(scalar_t)}, stream, basis, rotation, count,
           kept, length, out);
  });
}

#define LOCALLIP_INSTANTIATE(scalar_t)                                                                               \
  template void start_basis(scalar_t*, const scalar_t*, bool, const uint8_t*, int64_t, int64_t, void*);              \
  template void extend_basis(scalar_t*, scalar_t*, const uint8_t*, int, int64_t, int64_t, Breakdown, bool, uint32_t, \
                             double*, void*);                                                                        \
  template void decompose(double*, int, int, int64_t, double*, double*, scalar_t*, void*);                           \
  template void rotate_basis(const scalar_t*, const double*, int, int, int64_t, int64_t, scalar_t*, void*);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cuda
