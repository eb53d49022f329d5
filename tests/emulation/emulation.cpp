// Runs what cuda_runtime.h declares: blocks, their threads as fibers, and where these wait for one another. Compiled
// without sanitizers, which would slow down every switch; the kernels and their accesses carry them.
#include <algorithm>
#include <boost/context/fiber.hpp>
#include <boost/context/pooled_fixedsize_stack.hpp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <queue>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {

int order = 0;
size_t shared_limit = 232448;
int ptx_version = 90;
int multiprocessors = 2;  // fewer than samples
void (*launched)(const void*, const Launch&) = nullptr;

namespace {

constexpr size_t kStack = 128 * 1024;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

struct Random {
  uint64_t state;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
};

struct Thread;

struct Barrier {
  unsigned arrived = 0;
  std::vector<Thread*> waiting;
};

// Two sets of slots, because a lane may begin the next exchange before the others have read this one.
struct Warp {
  Slot slots[2][kWarp];
  int parity = 0;
  uint32_t arrived = 0, mask = 0, alive = 0;
  const char* operation = nullptr;
  std::vector<Thread*> waiting;
};

struct Cluster;

struct Block {
  Cluster* cluster;
  uint3 index;
  unsigned rank, alive;
  bool begun = false;
  std::unique_ptr<void, decltype(&std::free)> shared{nullptr, &std::free};
  size_t shared_bytes;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Cluster {
  dim3 grid, block;
  std::vector<Block> blocks;
  unsigned alive;
  Barrier barrier;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  Block* block;
  uint3 index;
  unsigned linear;
  uint64_t warp_priority;
  std::vector<std::vector<Copy>> copies{1};  // groups of asynchronous copies, the last one open
  boost::context::fiber fiber, back;

  Warp& warp() { return block->warps[linear / kWarp]; }
  int lane() const { return static_cast<int>(linear % kWarp); }
};

struct Scheduler {
  Random random;
  std::priority_queue<std::pair<uint64_t, Thread*>> ready;

  void add(Thread* t) {
    const uint64_t number = t->block->rank * 1024 + t->linear;
    const uint64_t priority = order == 0   ? 65535 - number
                              : order == 1 ? number
                              : order % 2  ? t->warp_priority << 16 | (random.next() & 65535)
                                           : random.next();
    ready.emplace(priority, t);
  }
};

thread_local Thread* current = nullptr;
thread_local Scheduler* scheduler = nullptr;

void pause() {
  Thread* self = current;
  self->back = std::move(self->back).resume();
}

void release(std::vector<Thread*>& waiting) {
  for (Thread* t : waiting) scheduler->add(t);
  waiting.clear();
}

void wait_at(Barrier& barrier, unsigned alive) {
  barrier.waiting.push_back(current);
  if (++barrier.arrived == alive) {
    barrier.arrived = 0;
    release(barrier.waiting);
  }
  pause();
}

// A thread that has left the kernel is no longer waited for.
void leave(Barrier& barrier, unsigned alive) {
  if (alive && barrier.arrived == alive) {
    barrier.arrived = 0;
    release(barrier.waiting);
  }
}

void retire(Thread* t) {
  Block& block = *t->block;
  Warp& warp = t->warp();
  warp.alive &= ~(1u << t->lane());
  if (warp.arrived && (warp.mask & ~warp.alive)) fail("a lane leaves the kernel while its warp waits for it");
  if (t->copies.size() > 1 || !t->copies.back().empty()) fail("a thread leaves with asynchronous copies under way");
  leave(block.barrier, --block.alive);
  leave(block.cluster->barrier, --block.cluster->alive);
}

void run_cluster(dim3 grid, dim3 block, unsigned size, unsigned first, size_t shared_bytes, uint64_t seed,
                 const std::function<void()>& body) {
  static boost::context::pooled_fixedsize_stack stacks(kStack);
  const unsigned threads = block.count(), warps = (threads + kWarp - 1) / kWarp;
  Cluster cluster{grid, block, std::vector<Block>(size), size * threads, {}};
  std::vector<Thread> all(size * threads);
  Scheduler own{Random{seed}, {}};
  scheduler = &own;
  for (unsigned r = 0; r < size; ++r) {
    Block& b = cluster.blocks[r];
    const unsigned i = first + r;
    b.cluster = &cluster;
    b.index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    b.rank = r;
    b.alive = threads;
    void* memory = nullptr;  // of the exact size, so that its end is guarded
    if (posix_memalign(&memory, 128, shared_bytes ? shared_bytes : 1)) fail("out of memory");
    std::memset(memory, 0xFF, shared_bytes);
    b.shared.reset(memory);
    b.shared_bytes = shared_bytes;
    b.warps.resize(warps);
    uint64_t priority = 0;
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = all[r * threads + t];
      if (t % kWarp == 0) priority = own.random.next() >> 16;
      thread.warp_priority = priority;
      thread.block = &b;
      thread.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
      thread.linear = t;
      b.warps[t / kWarp].alive |= 1u << (t % kWarp);
      thread.fiber = boost::context::fiber(std::allocator_arg, stacks, [&thread, &body](boost::context::fiber&& back) {
        thread.back = std::move(back);
        thread.block->begun = true;
        body();
        return std::move(thread.back);
      });
      own.add(&thread);
    }
  }
  for (size_t left = all.size(); left > 0;) {
    if (own.ready.empty()) fail("a barrier or warp operation that not every thread reaches");
    Thread* t = current = own.ready.top().second;
    own.ready.pop();
    t->fiber = std::move(t->fiber).resume();
    if (!t->fiber) {
      retire(t);
      --left;
    }
  }
  current = nullptr;
}

}  // namespace

unsigned largest_cluster = 0;  // launched since it was asked for

void run_grid(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, const std::function<void()>& body) {
  largest_cluster = std::max(largest_cluster, cluster);
  if (block.count() == 0 || block.count() > 1024) fail("a block of no or more than 1024 threads");
  if (grid.count() == 0) fail("a grid without blocks");
  if (shared_bytes > shared_limit) fail("more shared memory than a block can have");
  if (cluster == 0 || cluster > 8 || grid.x % cluster) fail("a grid that is no multiple of its cluster");
  if (grid.y > 65535 || grid.z > 65535) fail("a grid beyond 65535 in y or z");
  Random random{0x9E3779B97F4A7C15u * static_cast<uint64_t>(order + 1)};
  std::vector<unsigned> clusters(grid.count() / cluster);
  std::iota(clusters.begin(), clusters.end(), 0u);
  if (order == 1) std::reverse(clusters.begin(), clusters.end());
  if (order > 1)
    for (size_t i = clusters.size(); i > 1; --i) std::swap(clusters[i - 1], clusters[random.next() % i]);
  for (const unsigned c : clusters)
    run_cluster(grid, block, cluster, c * cluster, shared_bytes, random.next() | 1, body);
}

const uint3& thread_index() { return current->index; }
const uint3& block_index() { return current->block->index; }
const dim3& block_size() { return current->block->cluster->block; }
const dim3& grid_size() { return current->block->cluster->grid; }
int lane() { return current->lane(); }

void block_barrier() { wait_at(current->block->barrier, current->block->alive); }
void cluster_barrier() { wait_at(current->block->cluster->barrier, current->block->cluster->alive); }
unsigned cluster_rank() { return current->block->rank; }
void* dynamic_shared() { return current->block->shared.get(); }

void* at_rank(void* here, unsigned rank) {
  Block& own = *current->block;
  const auto offset = static_cast<char*>(here) - static_cast<char*>(own.shared.get());
  if (offset < 0 || static_cast<size_t>(offset) >= own.shared_bytes) fail("no address of shared memory");
  if (rank >= own.cluster->blocks.size()) fail("no such rank in the cluster");
  if (!own.cluster->blocks[rank].begun) fail("the shared memory of a block that has not begun");
  return static_cast<char*>(own.cluster->blocks[rank].shared.get()) + offset;
}

const Slot* exchange(uint32_t mask, const void* value, size_t bytes, const char* operation) {
  Warp& warp = current->warp();
  const int lane = current->lane(), parity = warp.parity;
  if (bytes > sizeof(Slot)) fail("an exchange of more than 32 bytes");
  if (!(mask >> lane & 1)) fail("a lane calls a warp operation without being in its mask");
  if (mask & ~warp.alive) fail("a warp operation waits for a lane that has left the kernel");
  if (warp.arrived && (warp.mask != mask || std::strcmp(warp.operation, operation) != 0))
    fail("the lanes of a warp meet in different operations");
  warp.mask = mask;
  warp.operation = operation;
  std::memcpy(warp.slots[parity][lane].bytes, value, bytes);
  warp.arrived |= 1u << lane;
  warp.waiting.push_back(current);
  if (warp.arrived == mask) {
    warp.arrived = 0;
    warp.parity ^= 1;
    release(warp.waiting);
  }
  pause();
  return warp.slots[parity];
}

void misaligned(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s: ", what);
  fail("an address that is not aligned");
}

void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) misaligned("cp.async");
  current->copies.back().push_back({to, from, bytes});
}

void commit_copies() { current->copies.emplace_back(); }

void wait_for_copies(size_t but_last) {
  // called, not inlined: so it is the sanitizer's own, and sees a copy out of bounds
  void* (*volatile copy_checked)(void*, const void*, size_t) = std::memcpy;
  auto& groups = current->copies;
  while (groups.size() > but_last + 1) {
    for (const Copy& copy : groups.front()) copy_checked(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

namespace {

// operand(word, k): number k of those that a word of an operand holds
template <typename Operand>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], int numbers,
         Operand operand) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Slot* slots = exchange(0xFFFFFFFFu, own, sizeof(own), "mma");
  const auto word = [&](int lane, int i) {
    uint32_t bits;
    std::memcpy(&bits, slots[lane].bytes + 4 * i, 4);
    return bits;
  };
  const int g = current->lane() / 4, t = current->lane() % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 8; ++k) {
      const uint32_t left = word(g * 4 + k % 4, i / 2 + k / 4 * 2),
                     right = word((2 * t + i % 2) * 4 + k % 4, 4 + k / 4);
      for (int n = 0; n < numbers; ++n) sum += static_cast<double>(operand(left, n)) * operand(right, n);
    }
    d[i] = static_cast<float>(sum);
    if (std::fabs(static_cast<double>(d[i])) > std::fabs(sum)) d[i] = std::nextafter(d[i], 0.0f);  // toward zero
  }
}

}  // namespace

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  // the unit ignores the low 13 bits of what it is given
  mma(d, a, b, c, 1, [](uint32_t word, int) { return float_of(word & ~0x1FFFu); });
}

void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  mma(d, a, b, c, 2, [](uint32_t word, int n) { return float_of(n ? word & 0xFFFF0000u : word << 16); });
}

}  // namespace emulation

extern "C" void locallip_emulation_order(int order) { emulation::order = order; }
extern "C" void locallip_emulation_shared_limit(size_t bytes) { emulation::shared_limit = bytes; }
extern "C" unsigned locallip_emulation_largest_cluster() { return std::exchange(emulation::largest_cluster, 0u); }
extern "C" void locallip_emulation_ptx_version(int version) { emulation::ptx_version = version; }
extern "C" void locallip_emulation_multiprocessors(int count) { emulation::multiprocessors = count; }
