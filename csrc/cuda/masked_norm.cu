// The streaming path of the masked norm: what lies between two products of the whole batch, which torch's libraries
// make. Sums are in double, accesses of up to 16 bytes, several of them under way.
//
// Bytes from and to memory by which one unit of a basis of c vectors grows, for products in float32 and in bfloat16:
//
//   the product's vector, read once                    4      2
//   its mask                                           1      1
//   the last vector of the basis, read once            4      4
//   the new vector, and its copy in bfloat16           4    4 + 2
//   together                                          13     13
//   against all of the basis, once or twice: 9 + 8 c or 9 + 16 c
//
// That is with the product's vector on chip between its two uses, as it is up to 457,000 units in a cluster of an H100
// and 40,000 in a block of an A100 (beyond, up to 22 and 20); the last of the basis, where there is no room for both,
// comes from L2 the second time. The product itself reads a vector and writes one, 8 or 4 bytes a unit: masks as bits
// would take 7/8 of a byte off 21 or 17, 4 or 5 %, and are left bytes.
//
// A dense weight of 4096 x 512 is read once for a batch, and a unit of the 4096 takes 1024 operations of its product,
// 79 for each byte here. Without tensor cores the product is the bound (a GPU makes about 15 in the time of a byte); in
// TF32 (100) they are even, and in bfloat16 (200) the bytes are it. A 3x3 convolution of 64 channels takes 1152.
#include "../masked_norm.h"

#include <type_traits>

#include "launch.cuh"
#include "pack.cuh"
#include "small_svd.cuh"

namespace locallip::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;

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

// ---- one more vector ---------------------------------------------------------------------------------------------------

constexpr int kExtending = 256;  // threads: two blocks of many registers share a multiprocessor
constexpr unsigned kMostRanks = 8;

// A vector that has less than this share of its squared length left by the last of its basis has vanished: beyond, sums
// in double have five digits of what is left, and float32 products none.
constexpr double kVanished = 1e-10;

struct alignas(16) Shared {  // the vectors on chip follow it
  double scratch[(kExtending / kWarp + 1) * (kWindow + 1)];
  double from_rank[2][kMostRanks][kWindow + 1];
  double coefficients[kWindow];  // thread 0's
};

// How the blocks of a cluster share a sample: so many, of so many units each, of which `held` vectors are on chip: the
// one that becomes the new one, and the last of the basis.
struct Share {
  unsigned ranks;
  int64_t units;
  int held;
  size_t bytes;
};

// A block's units of one sample. A thread reads and writes the same ones in every sweep: no barriers between them.
template <typename T, typename V, int kUnits>
struct Extension {
  T* basis;  // slot 0
  const V* vector;
  const uint8_t* mask;
  V* copy;
  T *x, *last_on_chip;  // x: on chip, or where the new vector goes
  int64_t units, slot_stride;
  int count, held;
  unsigned rank, ranks;
  Shared& shared;
  int parity = 0;

  using Units = Pack<T, kUnits>;
  // Bytes of the mask in one: as a pack, each would be taken out of it, and so waited for, as soon as it is loaded.
  using Kept = std::conditional_t<kUnits == 4, uint32_t, std::conditional_t<kUnits == 2, uint16_t, uint8_t>>;
  static_assert(sizeof(Kept) == kUnits);
  struct Read {
    Pack<V, kUnits> given;
    Kept kept;
    Units last;
  };

  // use(i, load(i)) for the thread's units, with several loads under way; those past the end are of the last units.
  template <typename Load, typename Use>
  __device__ void sweep(Load load, Use use) {
    constexpr int kAhead = 4;
    constexpr int64_t kStep = kExtending * kUnits;
    for (int64_t i = threadIdx.x * kUnits; i < units; i += kAhead * kStep) {
      decltype(load(i)) read[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t ahead = i + a * kStep;
        read[a] = load(ahead < units ? ahead : units - kUnits);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (i + a * kStep < units) use(i + a * kStep, read[a]);
    }
  }

  __device__ Read read(int64_t i, const T* last) const {
    Read out;
    out.given = load<kUnits>(vector + i);
    out.kept = mask ? *reinterpret_cast<const Kept*>(mask + i) : static_cast<Kept>(~Kept{0});
    if (last) out.last = load<kUnits>(last + i);
    return out;
  }

  __device__ Units masked(const Read& read) const {
    Units out;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if constexpr (std::is_same_v<T, V>)
        out.v[u] = read.given.v[u];
      else
        out.v[u] = as_float(static_cast<uint32_t>(read.given.v[u]) << 16);
      if (!(read.kept >> 8 * u & 0xFF)) out.v[u] = 0;
    }
    return out;
  }

  __device__ void write(int64_t i, const Units& unit) const {
    store<kUnits>(basis + count * slot_stride + i, unit);
    if constexpr (!std::is_same_v<T, V>) {
      Pack<V, kUnits> narrow;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) narrow.v[u] = static_cast<uint16_t>(to_bfloat16(unit.v[u], 0));
      store<kUnits>(copy + i, narrow);
    }
  }

  // The first `number` of the values, over the cluster.
  template <int kMost>
  __device__ void sum(double (&values)[kMost], int number) {
    block_sums<kExtending>(values, number, shared.scratch);
    if (ranks == 1) return;
    auto& slots = shared.from_rank[parity];  // the others may still be read
    parity ^= 1;
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (i < number && threadIdx.x < ranks) store_at_rank(&slots[rank][i], threadIdx.x, values[i]);
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= number) break;
      values[i] = 0;
      for (unsigned r = 0; r < ranks; ++r) values[i] += slots[r][i];
    }
  }

  // The new vector by the last one of the basis alone; returns its length. The last one's own square is summed too: it
  // is not 1 to all digits, and what is left may be a small part. What is no number stays none.
  __device__ double by_last() {
    const T* last = count ? basis + (count - 1) * slot_stride : nullptr;
    double sums[3] = {0, 0, 0};
    sweep([&](int64_t i) { return read(i, last); },
          [&](int64_t i, const Read& read) {
            const Units own = masked(read);
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
              const double a = own.v[u], b = last ? read.last.v[u] : T(0);
              sums[0] += a * a;
              sums[1] += a * b;
              sums[2] += b * b;
            }
            if (held > 0) store<kUnits>(x + i, own);
            if (held > 1 && last) store<kUnits>(last_on_chip + i, read.last);
          });
    sum(sums, 3);
    const double part = sums[2] == 0 ? 0 : sums[1] / sums[2], left = sums[0] - part * sums[1];
    const bool vanished = left <= kVanished * sums[0] && isfinite(sums[0]);
    const double length = vanished ? 0 : sqrt(left), factor = 1 / length;
    if (count && threadIdx.x == 0) shared.coefficients[count - 1] = part;
    struct Both {
      Units own, last;
    };
    const T* last_again = held > 1 && last ? last_on_chip : last;
    sweep(
        [&](int64_t i) {
          Both both;
          both.own = held > 0 ? load<kUnits>(x + i) : masked(read(i, nullptr));
          if (last) both.last = load<kUnits>(last_again + i);
          return both;
        },
        [&](int64_t i, Both& both) {
#pragma unroll
          for (int u = 0; u < kUnits; ++u) {
            double unit = both.own.v[u];
            if (last) unit -= part * both.last.v[u];
            both.own.v[u] = vanished ? T(0) : static_cast<T>(unit * factor);
          }
          write(i, both.own);
        });
    return length;
  }

  // x -= its part in the basis; coefficients gain it. Returns |x|^2 before, and stores |x|^2 after.
  __device__ double orthogonalise(bool recorded, double* after) {
    double part[1 + kWindow];  // |x|^2 and the coefficients
#pragma unroll
    for (int j = 0; j <= kWindow; ++j) part[j] = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x * kUnits; i < units; i += kExtending * kUnits) {
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
    sum(part, 1 + count);
    double square[1] = {0};
#pragma unroll 1
    for (int64_t i = threadIdx.x * kUnits; i < units; i += kExtending * kUnits) {
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
      for (int u = 0; u < kUnits; ++u) square[0] += static_cast<double>(own.v[u]) * static_cast<double>(own.v[u]);
    }
    sum(square, 1);
    *after = square[0];
    if (recorded && threadIdx.x == 0) {
#pragma unroll
      for (int j = 0; j < kWindow; ++j)
        if (j < count) shared.coefficients[j] += part[1 + j];
    }
    return part[0];
  }

  // The new vector by all of the basis; returns its length. `at`: the number of its first unit in the batch.
  __device__ double by_all(int64_t at, Breakdown breakdown, bool twice, uint32_t seed) {
    const double noise = 16.0 * (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);
    sweep([&](int64_t i) { return read(i, nullptr); },
          [&](int64_t i, const Read& read) { store<kUnits>(x + i, masked(read)); });
    double after, before = 0, length = 0;
    // first the vector itself, perhaps twice; then, where it vanished, a pseudo-random one, twice
    bool drawn = false;
    for (int pass = 0; pass < 4; ++pass) {
      const double square = orthogonalise(!drawn, &after);
      if (pass == 0 || pass == 2) before = square;
      if (pass == 0 && (twice || after < kReorthogonalise * before)) continue;
      if (pass < 2) {
        length = sqrt(after);
        if (!(isfinite(length) && length <= noise * sqrt(before))) break;  // what overflowed has not vanished
        length = after = 0;
        if (breakdown == Breakdown::kDrop) break;
        for (int64_t i = threadIdx.x * kUnits; i < units; i += kExtending * kUnits)
          for (int u = 0; u < kUnits; ++u)
            x[i + u] = mask && !mask[i + u] ? T(0) : T(pseudo_random(static_cast<uint32_t>(at + i + u), seed));
        drawn = true;
        pass = 1;  // two passes over the drawn vector follow
      } else if (pass == 3 && after <= noise * noise * before) {
        after = 0;  // nothing left outside the span
      }
    }
    const double factor = after == 0 ? 0.0 : 1 / sqrt(after);
    for (int64_t i = threadIdx.x * kUnits; i < units; i += kExtending * kUnits) {
      auto own = load<kUnits>(x + i);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) own.v[u] = after == 0 ? T(0) : static_cast<T>(own.v[u] * factor);
      write(i, own);
    }
    return length;
  }
};

template <typename T, typename V, int kUnits>
__global__ void __launch_bounds__(kExtending, 2)
    extend_kernel(T* basis, const V* vector, const uint8_t* mask, int count, int64_t n, Breakdown breakdown,
                  Against against, uint32_t seed, double* projected, V* copy, Share share) {
  auto* memory = dynamic_shared<unsigned char>();
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const unsigned rank = share.ranks == 1 ? 0 : cluster_rank();
  const int64_t sample = blockIdx.x / share.ranks, begin = rank * share.units, at = sample * n + begin,
                slot_stride = gridDim.x / share.ranks * n, left = n - begin;
  T* on_chip = reinterpret_cast<T*>(memory + sizeof(Shared));
  Extension<T, V, kUnits> extension{basis + at,
                                    vector + at,
                                    mask ? mask + at : nullptr,
                                    copy ? copy + at : nullptr,
                                    share.held > 0 ? on_chip : basis + count * slot_stride + at,
                                    on_chip + share.units,
                                    left < share.units ? left : share.units,
                                    slot_stride,
                                    count,
                                    share.held,
                                    rank,
                                    share.ranks,
                                    shared};
  if (threadIdx.x == 0)
    for (double& coefficient : shared.coefficients) coefficient = 0;
  if (share.ranks > 1) cluster_barrier();  // the other blocks have begun
  const double length = against == Against::kLast
                            ? extension.by_last()
                            : extension.by_all(at, breakdown, against == Against::kAllTwice, seed);
  if (projected && rank == 0 && threadIdx.x == 0) {
    double* column = projected + sample * kWindow * kWindow + count;
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

// A thread owns its units, so that `out` may be `basis`. One vector alone is made a unit one, which it is but for what
// basis vectors have of each other: in bfloat16 some thousandths.
template <typename T, int kUnits>
__global__ void __launch_bounds__(kThreads)
    rotate_kernel(const T* basis, const double* rotation, int count, int kept, int64_t n, T* out) {
  auto* scratch = dynamic_shared<double>();
  T* turn = reinterpret_cast<T*>(scratch + kWarps);  // [kKept][kWindow]
  for (int i = threadIdx.x; i < kKept * kWindow; i += kThreads)
    turn[i] = i < kept * kWindow && i % kWindow < count
                  ? static_cast<T>(rotation[blockIdx.x * static_cast<int64_t>(kept) * kWindow + i])
                  : T(0);
  __syncthreads();
  const int64_t slot_stride = gridDim.x * n, at = blockIdx.x * n;
  double square = 0;  // of the first
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
#pragma unroll
    for (int u = 0; u < kUnits; ++u) square += static_cast<double>(sum[0].v[u]) * static_cast<double>(sum[0].v[u]);
  }
  if (kept > 1) return;
  square = block_sum<kThreads>(square, scratch);
  const double factor = square > 0 ? 1 / sqrt(square) : 0;
  for (int64_t i = threadIdx.x * kUnits; i < n; i += kThreads * kUnits) {
    auto own = load<kUnits>(out + at + i);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) own.v[u] = static_cast<T>(own.v[u] * factor);
    store<kUnits>(out + at + i, own);
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

// The first that fits. In half of its shared memory, two blocks share a multiprocessor: one loads while the other sums.
Share share_of(int64_t length, int units, size_t size, unsigned most_ranks) {
  constexpr size_t kOfBlock = 1024;  // that it costs beside its own
  const auto most = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  for (const int held : {2, 1})
    for (const size_t limit : {(most + kOfBlock) / 2 - kOfBlock, most})
      for (unsigned ranks = 1; ranks <= most_ranks; ranks *= 2) {
        const int64_t own = blocks_for(length, int64_t{ranks} * units) * int64_t{units};
        const size_t bytes = sizeof(Shared) + held * own * size;
        if (bytes <= limit) return {ranks, own, held, bytes};
      }
  return {1, length, 0, sizeof(Shared)};
}

}  // namespace

bool has_bfloat16() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }

template <typename scalar_t>
void start_basis(scalar_t* basis, const scalar_t* start, bool start_per_sample, const uint8_t* mask, int64_t batch,
                 int64_t length, void* stream) {
  launch("start_basis", start_kernel<scalar_t>, {dim3(blocks_for(batch, 1)), kThreads, kWarps * sizeof(double)}, stream,
         basis, start, start_per_sample, mask, length);
}

template <typename scalar_t, typename vector_t>
void extend_basis(scalar_t* basis, const vector_t* vector, const uint8_t* mask, int count, int64_t batch,
                  int64_t length, Breakdown breakdown, Against against, uint32_t seed, double* projected,
                  vector_t* copy, void* stream) {
  // the one sweep that goes by the last vector has not float64's digits of what is left
  if (std::is_same_v<scalar_t, double> && against == Against::kLast) against = Against::kAll;
  with_units<scalar_t>(length, [&](auto units) {
    const auto kernel = extend_kernel<scalar_t, vector_t, units()>;
    const Share share = share_of(length, units(), sizeof(scalar_t), has_clusters(kernel) ? kMostRanks : 1);
    launch("extend_basis", kernel, {dim3(blocks_for(batch, 1) * share.ranks), kExtending, share.bytes, share.ranks},
           stream, basis, vector, mask, count, length, breakdown, against, seed, projected, copy, share);
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
           {dim3(blocks_for(batch, 1)), kThreads, kWarps * sizeof(double) + kKept * kWindow * sizeof(scalar_t)}, stream,
           basis, rotation, count, kept, length, out);
  });
}

#define LOCALLIP_INSTANTIATE_EXTEND(scalar_t, vector_t)                                                             \
  template void extend_basis(scalar_t*, const vector_t*, const uint8_t*, int, int64_t, int64_t, Breakdown, Against, \
                             uint32_t, double*, vector_t*, void*);
LOCALLIP_INSTANTIATE_EXTEND(float, float)
LOCALLIP_INSTANTIATE_EXTEND(float, uint16_t)
LOCALLIP_INSTANTIATE_EXTEND(double, double)

#define LOCALLIP_INSTANTIATE(scalar_t)                                                                  \
  template void start_basis(scalar_t*, const scalar_t*, bool, const uint8_t*, int64_t, int64_t, void*); \
  template void decompose(double*, int, int, int64_t, double*, double*, scalar_t*, void*);              \
  template void rotate_basis(const scalar_t*, const double*, int, int, int64_t, int64_t, scalar_t*, void*);
LOCALLIP_INSTANTIATE(float)
LOCALLIP_INSTANTIATE(double)

}  // namespace locallip::cuda
