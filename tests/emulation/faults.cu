// A block's masked sum with a fault of the caller's choice, to see that the emulation or a sanitizer notices it.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.cuh"

namespace locallip::cuda {
namespace {

constexpr int kThreads = 96;

enum Fault {
  kNone,
  kMissingBarrier,
  kMissingWarpBarrier,
  kSharedOverrun,
  kGlobalOverrun,
  kMissingWait,
  kUnwritten,
  kBarrierNotReached,
  kLaneNotReached,
  kMissingClusterBarrier,
  kMisaligned,
  kMissingFirstBarrier
};

// out[block] = the sum of the 96 values that `mask` keeps, over both blocks of a cluster.
__global__ void sum_kernel(const float* values, const unsigned char* mask, float* out, Fault fault) {
  auto* shared = dynamic_shared<float>();  // [kThreads] values, [kThreads / 4] per four, [2] per block, in double
  float* sums = shared + kThreads;
  auto* of_blocks = reinterpret_cast<double*>(sums + kThreads / 4);
  const int i = static_cast<int>(threadIdx.x);
  if (fault != kMissingFirstBarrier) cluster_barrier();
  const float* from = values + static_cast<int>(blockIdx.x) * kThreads;
  if (i % 4 == 0) {
    copy_async(shared + i + (fault == kMisaligned && i == 0), from + i);
    commit_copies();
    if (fault != kMissingWait) wait_for_copies<0>();
  }
  if (fault != kMissingWarpBarrier) __syncwarp();
  const float own = shared[i];
  float sum = mask[static_cast<int>(blockIdx.x) * kThreads + i] ? own : 0;
  if (fault == kMissingWait) wait_for_copies<0>();
  if (fault == kLaneNotReached && i == 5) return;
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  if (i % 4 == 0 && !(fault == kUnwritten && i == 8)) sums[i / 4] = sum;
  if (fault == kSharedOverrun && i == 0) of_blocks[2] = 1;
  if (fault == kBarrierNotReached && i < 32) {
    while (__any_sync(kAllLanes, true)) cluster_barrier();
  }
  if (fault != kMissingBarrier) __syncthreads();
  if (i == 0) {
    double total = 0;
    for (int k = 0; k < kThreads / 4; ++k) total += sums[k];
    for (unsigned rank = 0; rank < 2; ++rank) store_at_rank(of_blocks + cluster_rank(), rank, total);
  }
  if (fault != kMissingClusterBarrier) cluster_barrier();
  if (i == 0) out[static_cast<int>(blockIdx.x) + (fault == kGlobalOverrun ? 2 : 0)] =
      static_cast<float>(of_blocks[0] + of_blocks[1]);
}

}  // namespace
}  // namespace locallip::cuda

int main(int, char** arguments) {
  using namespace locallip::cuda;
  const auto fault = static_cast<Fault>(std::atoi(arguments[1]));
  int wrong = 0;
  for (emulation::order = 0; emulation::order < 8; ++emulation::order) {
    std::vector<float> values(2 * kThreads), out(2, -1);
    std::vector<unsigned char> mask(2 * kThreads);
    float expected = 0;
    for (int i = 0; i < 2 * kThreads; ++i) {
      values[i] = static_cast<float>(i + 1);
      mask[i] = i % 3 == 0;
      expected += mask[i] ? values[i] : 0;
    }
    launch("sum", sum_kernel, {dim3(2), kThreads, (kThreads + kThreads / 4 + 4) * sizeof(float), 2}, nullptr,
           values.data(), mask.data(), out.data(), fault);
    wrong += out[0] != expected || out[1] != expected;
  }
  if (wrong) std::printf("wrong in %d of 8 orders\n", wrong);
  return wrong ? 1 : 0;
}
