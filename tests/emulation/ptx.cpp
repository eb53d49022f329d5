// Executes PTX as ptx.py reads it, a warp at a time, and counts what it executes. Lanes of a warp that diverge go on
// apart and meet again at the first instruction that both reach: those at the lowest place in the program go first.
//
// Beside the counts it keeps a clock: a warp's instructions wait for their operands; behind a barrier all warps go on
// together, after the slowest of them or after what they took of a unit that they share. bench/counts.py says which
// latencies and rates, and what that is a model of.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {
namespace {

constexpr int kMostOperands = 16, kKinds = 32, kPhases = 16, kUnits = 4, kCores = 4, kBanks = 32;
constexpr int kInstructionsPerLine = 8;  // of the instruction cache, 128 bytes

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("PTX: " + what); }

// What is charged, set by locallip_ptx_model. Cycles, but for the cache.
struct Model {
  double latency[kKinds];          // from the issue of an instruction to that of one that reads its result
  double occupancy[kKinds];        // of the kind's unit in its core, for a whole warp
  int unit[kKinds];                // -1: none but the slots of issue
  double line_miss, cached_lines;  // to fetch 128 bytes of code; how many of them a multiprocessor keeps
  double branch, barrier, cluster_barrier, sector;
};

// What was counted of a kernel's launches, [phase][kind]; its clocks add up in `cycles`, by phase and by what was
// waited for: results of a kind, or another cause.
enum Cause { kIssue = kKinds, kBranch, kCode, kWaves, kSectors, kBarrier, kUnit0, kCauses = kUnit0 + kUnits };
struct Counts {
  double executed[kPhases][kKinds], wavefronts[kPhases][kKinds], sectors[kPhases][kKinds], bytes[kPhases][kKinds];
  double cycles[kPhases][kCauses];
  double total;                                             // of the clusters one after another
  double launches, blocks, cluster, threads, shared_bytes;  // of the last launch, but for their number
};

// kind: of a memory access, in shared memory; kind_global: elsewhere.
struct Fact {
  int kind, kind_global, phase, block;  // block: of the code, without branches
  double weight;                        // machine instructions
};

struct Machine;
struct Instruction;
using Handler = void (*)(Machine&, const Instruction&, uint32_t active);

struct Instruction {
  Handler run;
  std::string opcode;
  int guard, negated, results, count, operands[kMostOperands];
  int64_t offset;
  int target;
  Fact fact;
  int line;        // of the code
  int spaces = 0;  // of an access: 1 shared, 2 global, 3 either
  bool stores = false, commits = false;
  int awaits_but = -1;  // of groups of copies, those that need not be there
};

struct Program {
  int registers, parameter_bytes, special[6];
  std::vector<std::pair<int, uint64_t>> constants;
  std::vector<Instruction> code;
};

struct Value {
  uint64_t lanes[kWarp];
};

struct Block;

// When a register's value is there, and which node of which stretch it is from.
struct Result {
  double ready;
  int64_t stretch;
  int node, kind;
};

// An instruction in a stretch of code without branches: when it issues, after which other one, waiting for what.
struct Node {
  double time;
  int before, phase, cause;
};

struct Stretch {
  int64_t number = 1;
  std::vector<Node> nodes;
  double issue[kPhases] = {}, code = 0;
  double unit_free[kUnits] = {};
  int accessed[2], stored[2];
  int64_t unit_used_in[kUnits] = {}, accessed_in[2] = {};
};

struct Warp {
  Block* block;
  int index;
  std::unique_ptr<Value, decltype(&std::free)> registers{nullptr, &std::free};
  std::vector<Result> results;
  Stretch stretch;
  std::vector<double> copied;  // when each group of asynchronous copies is there
  int at[kWarp];
  uint32_t alive = 0;
  bool waits = false, waits_for_cluster = false;
  double clock = 0, cycles[kPhases][kCauses] = {};  // at the begin of the stretch; since the block last met
  int line = -1, phase = 0, code_block = -1;        // where it is
};

struct Block {
  unsigned index, rank;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
  size_t shared_bytes;
  std::vector<Warp> warps;
  double clock = 0;                                              // when it last met
  double core[kCores][kUnits + 1] = {}, waves = 0, sectors = 0;  // since then; the last of a core: issue
  // lines of code that are at hand
  std::unordered_set<int> cached;
  std::vector<int> lines;
  uint64_t random = 1;
};

struct Access {
  uint64_t address[kWarp];
  int bytes = 0;  // a lane
  bool shared;
};

struct Machine {
  const Program* program;
  const unsigned char* parameters;
  std::vector<Block>* blocks;
  Warp* warp;
  uint32_t branched;  // lanes that go to the target
  Access access;

  template <typename T>
  T get(const Instruction& in, int operand, int lane) const {
    T value;
    std::memcpy(&value, &warp->registers.get()[in.operands[operand]].lanes[lane], sizeof(T));
    return value;
  }
  template <typename T>
  void set(const Instruction& in, int operand, int lane, T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    warp->registers.get()[in.operands[operand]].lanes[lane] = bits;
  }
};

template <typename Run>
void each(uint32_t active, Run run) {
  for (; active; active &= active - 1) run(std::countr_zero(active));
}

std::map<std::string, Handler>& handlers() {
  static std::map<std::string, Handler> all;
  return all;
}

void define(const std::string& names, Handler run) {
  std::istringstream in(names);
  for (std::string name; in >> name;) handlers()[name] = run;
}

// result = F{}(operands...), each of type T.
template <typename R, typename T, typename F, size_t... i>
void pure(Machine& m, const Instruction& in, uint32_t active, std::index_sequence<i...>) {
  each(active, [&](int lane) { m.set<R>(in, 0, lane, static_cast<R>(F{}(m.get<T>(in, 1 + i, lane)...))); });
}

template <typename R, typename T, int kCount, typename F>
void define(const std::string& names, F) {
  define(names, [](Machine& m, const Instruction& in, uint32_t active) {
    pure<R, T, F>(m, in, active, std::make_index_sequence<kCount>());
  });
}

using u16 = uint16_t;
using i16 = int16_t;
using u32 = uint32_t;
using i32 = int32_t;
using u64 = uint64_t;
using i64 = int64_t;

template <typename T>
T shifted_left(T x, u32 by) {
  return by < sizeof(T) * 8 ? static_cast<T>(x << by) : 0;
}

// ---- arithmetic --------------------------------------------------------------------------------------------------------

template <typename T>
void define_integers(const std::string& s, const std::string& u, const std::string& b) {
  using S = std::make_signed_t<T>;
  const auto names = [&](const char* op) { return std::string(op) + s + " " + op + u + " " + op + b; };
  define<T, T, 2>(names("add."), [](T a, T b) { return a + b; });
  define<T, T, 2>(names("sub."), [](T a, T b) { return a - b; });
  define<T, T, 2>(names("mul.lo."), [](T a, T b) { return a * b; });
  define<T, T, 3>(names("mad.lo."), [](T a, T b, T c) { return a * b + c; });
  define<T, T, 1>(names("neg."), [](T a) { return -a; });
  define<T, T, 1>(names("not."), [](T a) { return ~a; });
  define<T, T, 2>(names("and."), [](T a, T b) { return a & b; });
  define<T, T, 2>(names("or."), [](T a, T b) { return a | b; });
  define<T, T, 2>(names("xor."), [](T a, T b) { return a ^ b; });
  define<T, T, 2>(names("shl."), [](T a, T b) { return shifted_left(a, static_cast<u32>(b)); });
  define<T, T, 2>(("shr." + u + " shr." + b),
                  [](T a, T b) { return static_cast<u32>(b) < sizeof(T) * 8 ? a >> static_cast<u32>(b) : 0; });
  define<S, S, 2>(("shr." + s), [](S a, S b) { return a >> std::min<u32>(static_cast<u32>(b), sizeof(T) * 8 - 1); });
  define<S, S, 2>(("div." + s), [](S a, S b) { return b ? a / b : -1; });
  define<T, T, 2>(("div." + u), [](T a, T b) { return b ? a / b : -1; });
  define<S, S, 2>(("rem." + s), [](S a, S b) { return b ? a % b : a; });
  define<T, T, 2>(("rem." + u), [](T a, T b) { return b ? a % b : a; });
  define<S, S, 2>(("min." + s), [](S a, S b) { return std::min(a, b); });
  define<T, T, 2>(("min." + u), [](T a, T b) { return std::min(a, b); });
  define<S, S, 2>(("max." + s), [](S a, S b) { return std::max(a, b); });
  define<T, T, 2>(("max." + u), [](T a, T b) { return std::max(a, b); });
  define<S, S, 1>(("abs." + s), [](S a) { return a < 0 ? -a : a; });
}

template <typename T>
void define_floats(const std::string& t) {
  define<T, T, 2>(("add." + t + " add.rn." + t), [](T a, T b) { return a + b; });
  define<T, T, 2>(("sub." + t + " sub.rn." + t), [](T a, T b) { return a - b; });
  define<T, T, 2>(("mul." + t + " mul.rn." + t), [](T a, T b) { return a * b; });
  define<T, T, 2>(("div.rn." + t), [](T a, T b) { return a / b; });
  define<T, T, 3>(("fma.rn." + t), [](T a, T b, T c) { return std::fma(a, b, c); });
  define<T, T, 2>(("max." + t), [](T a, T b) { return std::fmax(a, b); });
  define<T, T, 2>(("min." + t), [](T a, T b) { return std::fmin(a, b); });
  define<T, T, 1>("neg." + t, [](T a) { return -a; });
  define<T, T, 1>("abs." + t, [](T a) { return std::fabs(a); });
  define<T, T, 1>("sqrt.rn." + t, [](T a) { return std::sqrt(a); });
  define<T, T, 1>("rcp.rn." + t, [](T a) { return 1 / a; });
}

template <typename T>
void define_comparisons(const std::string& t) {
  const auto is = [&](auto of, const std::string& op) { define<bool, T, 2>("setp." + op + "." + t, of); };
  is([](T a, T b) { return a == b; }, "eq");
  is([](T a, T b) { return a < b || a > b || (std::is_integral_v<T> && a != b); }, "ne");
  is([](T a, T b) { return a < b; }, "lt");
  is([](T a, T b) { return a <= b; }, "le");
  is([](T a, T b) { return a > b; }, "gt");
  is([](T a, T b) { return a >= b; }, "ge");
  is([](T a, T b) { return !(a == b); }, "neu");  // true of NaN, as the next
  is([](T a, T b) { return !(a >= b); }, "ltu");
  is([](T a, T b) { return !(a > b); }, "leu");
  is([](T a, T b) { return !(a <= b); }, "gtu");
  is([](T a, T b) { return !(a < b); }, "geu");
  is([](T a, T b) { return a == a && b == b; }, "num");
  is([](T a, T b) { return a != a || b != b; }, "nan");
}

template <typename T>
void select(Machine& m, const Instruction& in, uint32_t active) {
  each(active, [&](int lane) { m.set<T>(in, 0, lane, m.get<T>(in, m.get<bool>(in, 3, lane) ? 1 : 2, lane)); });
}

// One register, or two halves of it side by side: together or apart.
template <typename T, typename Half>
void move(Machine& m, const Instruction& in, uint32_t active) {
  each(active, [&](int lane) {
    if (in.results == 2) {
      const T whole = m.get<T>(in, 2, lane);
      m.set<Half>(in, 0, lane, static_cast<Half>(whole));
      m.set<Half>(in, 1, lane, static_cast<Half>(whole >> sizeof(Half) * 8));
    } else if (in.count == 3) {
      m.set<T>(in, 0, lane, m.get<Half>(in, 1, lane) | static_cast<T>(m.get<Half>(in, 2, lane)) << sizeof(Half) * 8);
    } else {
      m.set<T>(in, 0, lane, m.get<T>(in, 1, lane));
    }
  });
}

// To the nearest, ties to even.
u16 to_bfloat16(float x) {
  const u32 bits = bits_of(x);
  return static_cast<u16>(x != x ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

void define_arithmetic() {
  define_integers<u16>("s16", "u16", "b16");
  define_integers<u32>("s32", "u32", "b32");
  define_integers<u64>("s64", "u64", "b64");
  define_floats<float>("f32");
  define_floats<double>("f64");
  define_comparisons<i16>("s16");
  define_comparisons<u16>("u16");
  define_comparisons<i32>("s32");
  define_comparisons<u32>("u32");
  define_comparisons<u32>("b32");
  define_comparisons<i64>("s64");
  define_comparisons<u64>("u64");
  define_comparisons<u64>("b64");
  define_comparisons<float>("f32");
  define_comparisons<double>("f64");
  define<bool, bool, 2>("and.pred", [](bool a, bool b) { return a && b; });
  define<bool, bool, 2>("or.pred", [](bool a, bool b) { return a || b; });
  define<bool, bool, 2>("xor.pred", [](bool a, bool b) { return a != b; });
  define<bool, bool, 1>("not.pred", [](bool a) { return !a; });
  define("selp.u16 selp.s16 selp.b16", select<u16>);
  define("selp.u32 selp.s32 selp.b32 selp.f32", select<u32>);
  define("selp.u64 selp.s64 selp.b64 selp.f64", select<u64>);
  define<i64, i32, 2>("mul.wide.s32", [](i64 a, i64 b) { return a * b; });
  define<u64, u32, 2>("mul.wide.u32", [](u64 a, u64 b) { return a * b; });
  define<i32, i32, 2>("mul.hi.s32", [](i64 a, i64 b) { return (a * b) >> 32; });
  define<u32, u32, 2>("mul.hi.u32", [](u64 a, u64 b) { return (a * b) >> 32; });
  define<u32, u32, 1>("popc.b32", [](u32 a) { return std::popcount(a); });
  define<u32, u32, 1>("clz.b32", [](u32 a) { return std::countl_zero(a); });
  define<u32, u32, 1>("bfind.shiftamt.u32", [](u32 a) { return a ? std::countl_zero(a) : ~0u; });
  define<u32, u32, 1>("brev.b32", [](u32 a) {
    u32 reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i);
    return reversed;
  });
  define("mov.b32", move<u32, u16>);
  define("mov.b64", move<u64, u32>);
  define<u64, u64, 1>("mov.u16 mov.b16 mov.u32 mov.f32 mov.u64 mov.f64 mov.pred cvta.to.global.u64",
                      [](u64 a) { return a; });
  define<u64, u32, 1>("cvt.u64.u32", [](u32 a) { return a; });
  define<i64, i32, 1>("cvt.s64.s32", [](i32 a) { return a; });
  define<u32, u64, 1>("cvt.u32.u64", [](u64 a) { return a; });
  define<u16, u32, 1>("cvt.u16.u32", [](u32 a) { return a; });
  define<u32, u16, 1>("cvt.u32.u16", [](u16 a) { return a; });
  define<double, float, 1>("cvt.f64.f32", [](float a) { return a; });
  define<float, double, 1>("cvt.rn.f32.f64", [](double a) { return a; });
  define<float, i32, 1>("cvt.rn.f32.s32", [](i32 a) { return a; });
  define<float, u32, 1>("cvt.rn.f32.u32", [](u32 a) { return a; });
  define<double, i32, 1>("cvt.rn.f64.s32", [](i32 a) { return a; });
  define<double, u32, 1>("cvt.rn.f64.u32", [](u32 a) { return a; });
  define<u16, float, 1>("cvt.rn.bf16.f32", [](float a) { return to_bfloat16(a); });
  define<u32, float, 2>("cvt.rn.bf16x2.f32", [](float upper, float lower) {
    return static_cast<u32>(to_bfloat16(upper)) << 16 | to_bfloat16(lower);
  });
  define<float, u16, 1>("cvt.f32.bf16", [](u16 a) { return float_of(static_cast<u32>(a) << 16); });
  define<u32, u32, 4>("bfi.b32", [](u32 a, u32 b, u32 at, u32 bits) {
    const u32 mask = shifted_left((bits < 32 ? 1u << bits : 0u) - 1, at);
    return (shifted_left(a, at) & mask) | (b & ~mask);
  });
  define<u32, u32, 3>("prmt.b32", [](u32 a, u32 b, u32 selector) {
    const u64 bytes = a | static_cast<u64>(b) << 32;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
      const u32 which = selector >> 4 * i & 15, byte = bytes >> (which & 7) * 8 & 255;
      result |= (which & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
  });
  define<u32, u32, 3>("shf.l.wrap.b32", [](u32 low, u32 high, u32 by) {
    return static_cast<u32>(((static_cast<u64>(high) << 32 | low) << (by & 31)) >> 32);
  });
  define<u32, u32, 3>("shf.r.wrap.b32", [](u32 low, u32 high, u32 by) {
    return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> (by & 31));
  });
  define<u32, float, 1>("cvt.rna.tf32.f32", [](float a) { return to_tf32(a); });
}

// ---- memory ------------------------------------------------------------------------------------------------------------

// Addresses of shared memory are offsets where the instruction names the space, pointers of this process where it does
// not; in a cluster the rank, plus one, is in the upper byte.
constexpr int kRankShift = 24;

unsigned char* in_shared(Block& own, std::vector<Block>& blocks, uint64_t address, size_t bytes, bool cluster) {
  const unsigned rank = static_cast<u32>(address) >> kRankShift;
  if (rank > (cluster ? blocks.size() : 0)) fail("no address of shared memory");
  Block& block = rank ? blocks[rank - 1] : own;
  const uint64_t offset = address & ((1u << kRankShift) - 1);
  if (offset + bytes > block.shared_bytes) fail("an access past the end of shared memory");
  return block.shared.get() + offset;
}

bool is_shared(const Block& block, uint64_t pointer) {
  return pointer - reinterpret_cast<uint64_t>(block.shared.get()) < block.shared_bytes;
}

enum Space { kGeneric, kShared, kCluster, kGlobal, kParameter };

// T: of memory; R: what a narrower one is extended to.
template <typename T, typename R, Space space, int kVector, bool kStores>
void access(Machine& m, const Instruction& in, uint32_t active) {
  constexpr size_t kBytes = sizeof(T) * kVector;
  Block& block = *m.warp->block;
  if (space != kParameter) m.access = {{}, static_cast<int>(kBytes), space == kShared || space == kCluster};
  each(active, [&](int lane) {
    const uint64_t address = m.get<u64>(in, in.results, lane) + static_cast<uint64_t>(in.offset);
    const uint64_t narrow = static_cast<u32>(address);
    m.access.address[lane] = address;
    if (address % kBytes) fail("an unaligned access: " + in.opcode);
    unsigned char* at;
    if constexpr (space == kShared || space == kCluster) {
      m.access.address[lane] = narrow;
      at = in_shared(block, *m.blocks, narrow, kBytes, space == kCluster);
    } else if constexpr (space == kParameter) {
      if (address + kBytes > static_cast<uint64_t>(m.program->parameter_bytes)) fail("an access past the parameters");
      at = const_cast<unsigned char*>(m.parameters) + address;
    } else {
      if (space == kGeneric && is_shared(block, address)) m.access.shared = true;
      at = reinterpret_cast<unsigned char*>(address);
    }
    for (int i = 0; i < kVector; ++i) {
      T value;
      if constexpr (kStores) {
        value = m.get<T>(in, 1 + i, lane);
        std::memcpy(at + i * sizeof(T), &value, sizeof(T));
      } else {
        std::memcpy(&value, at + i * sizeof(T), sizeof(T));
        m.set<R>(in, i, lane, static_cast<R>(value));
      }
    }
  });
}

template <typename T, typename R, Space space, int kVector>
void define_access(const std::string& name, const std::string& type) {
  const std::string dots = name + (kVector == 4 ? ".v4." : kVector == 2 ? ".v2." : ".") + type;
  define(("ld" + dots), access<T, R, space, kVector, false>);
  if (space != kParameter) define(("st" + dots), access<T, R, space, kVector, true>);
}

template <Space space>
void define_space(const std::string& name) {
  const auto with = [&]<typename T, typename R>(T, R, std::initializer_list<const char*> types) {
    for (const char* type : types) {
      define_access<T, R, space, 1>(name, type);
      define_access<T, R, space, 2>(name, type);
      if constexpr (sizeof(T) < 8) define_access<T, R, space, 4>(name, type);
    }
  };
  with(uint8_t(), u64(), {"u8", "b8"});
  with(int8_t(), i64(), {"s8"});
  with(u16(), u64(), {"u16", "b16"});
  with(i16(), i64(), {"s16"});
  with(u32(), u64(), {"u32", "b32", "f32"});
  with(i32(), i64(), {"s32"});
  with(u64(), u64(), {"u64", "b64", "f64", "s64"});
}

// kCount matrices of 8 rows of 4 words.
template <int kCount>
void define_matrices() {
  define("ldmatrix.sync.aligned.m8n8.x" + std::to_string(kCount) + ".shared.b16",
         [](Machine& m, const Instruction& in, uint32_t active) {
           if (active != 0xFFFFFFFFu) fail("a load of matrices that not all lanes reach");
           m.access = {{}, 16, true};
           const unsigned char* rows[8 * kCount];
           for (int lane = 0; lane < kWarp; ++lane) {  // the address of a lane beyond the rows is not read
             const int row = lane < 8 * kCount ? lane : 0;
             const auto address = static_cast<u32>(m.get<u64>(in, in.results, row) + static_cast<uint64_t>(in.offset));
             if (address % 16) fail("an unaligned access: " + in.opcode);
             m.access.address[lane] = address;
             rows[row] = in_shared(*m.warp->block, *m.blocks, address, 16, false);
           }
           each(active, [&](int lane) {
             for (int i = 0; i < kCount; ++i) {
               u32 word;
               std::memcpy(&word, rows[8 * i + lane / 4] + lane % 4 * sizeof(word), sizeof(word));
               m.set<u32>(in, i, lane, word);
             }
           });
         });
}

void define_memory() {
  define_space<kGeneric>("");
  define_space<kShared>(".shared");
  define_space<kCluster>(".shared::cluster");
  define_space<kGlobal>(".global");
  define_space<kParameter>(".param");
  define("cvta.shared.u64", [](Machine& m, const Instruction& in, uint32_t active) {
    const auto base = reinterpret_cast<uint64_t>(m.warp->block->shared.get());
    each(active, [&](int lane) { m.set<u64>(in, 0, lane, base + m.get<u64>(in, 1, lane)); });
  });
  define("cvta.to.shared.u64", [](Machine& m, const Instruction& in, uint32_t active) {
    const auto base = reinterpret_cast<uint64_t>(m.warp->block->shared.get());
    each(active, [&](int lane) { m.set<u64>(in, 0, lane, m.get<u64>(in, 1, lane) - base); });
  });
  define("mapa.shared::cluster.u32", [](Machine& m, const Instruction& in, uint32_t active) {
    each(active, [&](int lane) {
      if (m.get<u32>(in, 2, lane) >= m.blocks->size()) fail("no such rank in the cluster");
      m.set<u32>(in, 0, lane, m.get<u32>(in, 1, lane) | (m.get<u32>(in, 2, lane) + 1) << kRankShift);
    });
  });
  define_matrices<2>();
  define_matrices<4>();
  // At once: the emulation of the kernels as C++ copies as late as it may, and finds a wait that is missing.
  define("cp.async.cg.shared.global", [](Machine& m, const Instruction& in, uint32_t active) {
    m.access = {{}, 16, false};
    each(active, [&](int lane) {
      m.access.address[lane] = m.get<u64>(in, 1, lane);
      const auto to = m.get<u32>(in, 0, lane);
      if (to % 16 || m.access.address[lane] % 16) fail("an asynchronous copy between unaligned addresses");
      std::memcpy(in_shared(*m.warp->block, *m.blocks, to, 16, false),
                  reinterpret_cast<const void*>(m.access.address[lane]), 16);
    });
  });
}

// ---- warps -------------------------------------------------------------------------------------------------------------

// c += a b of 16 x 8 results, kDepth deep, operand(lane, i, k) the k-th number in register i of a lane; sums round
// toward zero, as the unit's do.
template <int kDepth, typename Operand>
void multiply(Machine& m, const Instruction& in, uint32_t active, Operand operand) {
  if (active != 0xFFFFFFFFu) fail("a tensor instruction that not all lanes reach");
  constexpr int kPer = kDepth / 8;  // numbers a register
  double a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < kPer; ++k) {
        const int g = lane / 4, depth = half * 4 * kPer + lane % 4 * kPer + k;
        a[g][depth] = operand(lane, 4 + 2 * half, k);
        a[g + 8][depth] = operand(lane, 5 + 2 * half, k);
        b[depth][g] = operand(lane, 8 + half, k);
      }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const float c = m.get<float>(in, 10 + i, lane);
      double sum = c;
      for (int k = 0; k < kDepth; ++k) sum += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
      auto rounded = static_cast<float>(sum);
      if (std::fabs(static_cast<double>(rounded)) > std::fabs(sum)) rounded = std::nextafter(rounded, 0.0f);
      m.set<float>(in, i, lane, rounded);
    }
}

uint32_t votes(Machine& m, const Instruction& in, uint32_t active) {
  uint32_t found = 0;
  each(active, [&](int lane) { found |= static_cast<uint32_t>(m.get<bool>(in, 1, lane)) << lane; });
  return found;
}

void nothing(Machine&, const Instruction&, uint32_t) {}

void define_warps() {
  define("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", [](Machine& m, const Instruction& in, uint32_t active) {
    multiply<8>(m, in, active, [&](int lane, int i, int) { return float_of(m.get<u32>(in, i, lane) & ~0x1FFFu); });
  });
  define("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", [](Machine& m, const Instruction& in, uint32_t active) {
    multiply<16>(m, in, active,
                 [&](int lane, int i, int k) { return float_of(m.get<u32>(in, i, lane) >> 16 * k << 16); });
  });
  define("shfl.sync.bfly.b32", [](Machine& m, const Instruction& in, uint32_t active) {
    const auto at = in.results;
    if (active != m.get<u32>(in, at + 3, std::countr_zero(active))) fail("a shuffle that not all its lanes reach");
    uint32_t values[kWarp];
    each(active, [&](int lane) { values[lane] = m.get<u32>(in, at, lane); });
    each(active, [&](int lane) {
      m.set<u32>(in, 0, lane, values[lane ^ m.get<u32>(in, at + 1, lane)]);
      if (in.results == 2) m.set<bool>(in, 1, lane, true);
    });
  });
  define("vote.sync.ballot.b32", [](Machine& m, const Instruction& in, uint32_t active) {
    if (active != m.get<u32>(in, 2, std::countr_zero(active))) fail("a vote that not all its lanes reach");
    const uint32_t found = votes(m, in, active);
    each(active, [&](int lane) { m.set<u32>(in, 0, lane, found); });
  });
  define("vote.sync.any.pred", [](Machine& m, const Instruction& in, uint32_t active) {
    if (active != m.get<u32>(in, 2, std::countr_zero(active))) fail("a vote that not all its lanes reach");
    const bool found = votes(m, in, active) != 0;
    each(active, [&](int lane) { m.set<bool>(in, 0, lane, found); });
  });
  define("bar.warp.sync", [](Machine& m, const Instruction& in, uint32_t active) {
    if (active != m.get<u32>(in, 0, std::countr_zero(active))) fail("a warp's barrier that not all its lanes reach");
  });
  define("bra bra.uni", [](Machine& m, const Instruction&, uint32_t active) { m.branched = active; });
  define("ret", [](Machine& m, const Instruction&, uint32_t active) { m.warp->alive &= ~active; });
  const auto wait = [](Machine& m, const Instruction&, uint32_t active) {
    if (active != m.warp->alive) fail("a barrier that not all lanes reach");
    m.warp->waits = true;
  };
  define("bar.sync barrier.sync", wait);
  define("barrier.cluster.wait.acquire.aligned", [](Machine& m, const Instruction&, uint32_t active) {
    if (active != m.warp->alive) fail("a barrier that not all lanes reach");
    m.warp->waits = m.warp->waits_for_cluster = true;
  });
  define("barrier.cluster.arrive.release.aligned cp.async.commit_group cp.async.wait_group", nothing);
}

// ---- counts and the clock ----------------------------------------------------------------------------------------------

Model model = {};
Counts* counts = nullptr;  // of the kernel that runs

// Wavefronts of one access: the lanes are served in groups whose bytes together fill the banks once.
int wavefronts_of(const Access& access, uint32_t active) {
  const int groups = std::max(1, access.bytes / 4), lanes = kWarp / groups;
  int total = 0;
  for (int group = 0; group < groups; ++group) {
    std::vector<uint64_t> words;
    each(active & (lanes == 32 ? ~0u : ((1u << lanes) - 1) << group * lanes), [&](int lane) {
      for (int byte = 0; byte < access.bytes; byte += 4) words.push_back((access.address[lane] + byte) / 4);
    });
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int most = 0, in_bank[kBanks] = {};
    for (const uint64_t word : words) most = std::max(most, ++in_bank[word % kBanks]);
    total += most;
  }
  return total;
}

int sectors_of(const Access& access, uint32_t active) {
  std::vector<uint64_t> sectors;
  each(active, [&](int lane) { sectors.push_back(access.address[lane] / 32); });
  std::sort(sectors.begin(), sectors.end());
  return static_cast<int>(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
}

// Cycles until the code of an instruction is there. What it displaces is as good as random: a loop that is a little
// longer than the cache still finds most of its lines.
double fetched_after(Block& block, Warp& warp, int line) {
  if (line == warp.line) return 0;
  warp.line = line;
  if (!block.cached.insert(line).second) return 0;
  if (static_cast<double>(block.lines.size()) < model.cached_lines) {
    block.lines.push_back(line);
  } else {
    block.random = block.random * 6364136223846793005u + 1442695040888963407u;
    int& displaced = block.lines[(block.random >> 33) % block.lines.size()];
    block.cached.erase(displaced);
    displaced = line;
  }
  return model.line_miss;
}

// Ends a stretch of code without branches: it takes as long as its instructions need to issue, or as the longest chain
// of those that wait for one another, and what fetching it took.
void close(Warp& warp, bool branches) {
  Stretch& s = warp.stretch;
  double issue = 0;
  for (const double slots : s.issue) issue += slots;
  double flow = 0;
  for (const Node& node : s.nodes) flow = std::max(flow, node.time - warp.clock);
  if (flow <= issue) {
    for (int phase = 0; phase < kPhases; ++phase) warp.cycles[phase][kIssue] += s.issue[phase];
  } else {
    int i = 0;
    while (s.nodes[i].time - warp.clock < flow) ++i;
    for (; i >= 0; i = s.nodes[i].before) {
      const Node& node = s.nodes[i];
      warp.cycles[node.phase][node.cause] += node.time - (node.before >= 0 ? s.nodes[node.before].time : warp.clock);
    }
  }
  warp.cycles[warp.phase][kCode] += s.code;
  warp.cycles[warp.phase][kBranch] += branches ? model.branch : 0;
  warp.clock += std::max(flow, issue) + s.code + (branches ? model.branch : 0);
  s.nodes.clear();
  std::memset(s.issue, 0, sizeof(s.issue));
  s.code = 0;
  ++s.number;
}

// Enters an instruction into the stretch. Those of a stretch issue in the order in which their operands are there, as
// the compiler arranges them; loads and stores that may meet, as far as it can tell, stay in order.
void charge(Machine& m, const Instruction& in, uint32_t active, bool branches) {
  Warp& warp = *m.warp;
  Block& block = *warp.block;
  const Fact& fact = in.fact;
  const bool memory = m.access.bytes > 0;
  const int kind = memory && !m.access.shared ? fact.kind_global : fact.kind;
  double extra = 0;
  counts->executed[fact.phase][kind] += 1;
  if (memory) {
    counts->bytes[fact.phase][kind] += std::popcount(active) * m.access.bytes;
    if (m.access.shared) {
      const int waves = wavefronts_of(m.access, active);
      counts->wavefronts[fact.phase][kind] += waves;
      block.waves += waves;
      extra = waves - 1;
    } else {
      const int sectors = sectors_of(m.access, active);
      counts->sectors[fact.phase][kind] += sectors;
      block.sectors += sectors;
    }
  }
  Stretch& s = warp.stretch;
  if (fact.block != warp.code_block) close(warp, false);
  warp.code_block = fact.block;
  warp.phase = fact.phase;
  s.code += fetched_after(block, warp, in.line);
  Node node = {warp.clock, -1, fact.phase, kIssue};
  const auto after = [&](double time, int before, int cause) {
    if (time > node.time) node.time = time, node.before = before, node.cause = cause;
  };
  const auto after_result = [&](int number) {
    const Result& r = warp.results[number];
    after(r.ready, r.stretch == s.number ? r.node : -1, r.kind);
  };
  for (int i = in.results; i < in.count; ++i) after_result(in.operands[i]);
  if (in.guard >= 0) after_result(in.guard);
  if (in.commits) warp.copied.push_back(warp.clock + model.latency[kind]);
  if (in.awaits_but >= 0 && warp.copied.size() > static_cast<size_t>(in.awaits_but))
    after(warp.copied[warp.copied.size() - 1 - in.awaits_but], -1, kind);
  const int own = static_cast<int>(s.nodes.size());
  const auto result_in = [&](double time, int kind) {
    for (int i = 0; i < in.results; ++i) warp.results[in.operands[i]] = {time, s.number, own, kind};
  };
  if (fact.weight == 0) {  // becomes part of what uses it, and waits for nothing itself
    if (node.time > warp.clock) {
      for (int i = 0; i < in.results; ++i)
        warp.results[in.operands[i]] = {node.time, s.number, node.before, node.cause};
      return;
    }
    result_in(node.time, kind);
    for (int i = 0; i < in.results; ++i) warp.results[in.operands[i]].node = -1;
    return;
  }
  for (int space = 0; space < 2; ++space) {
    if (!(in.spaces >> space & 1)) continue;
    const int before = in.stores ? s.accessed[space] : s.stored[space];
    if (s.accessed_in[space] == s.number && before >= 0) after(s.nodes[before].time, before, kIssue);
  }
  const int unit = model.unit[kind];
  if (unit >= 0) {
    // the unit's earlier work comes first, but does not wait for operands that are late
    if (s.unit_used_in[unit] != s.number) s.unit_free[unit] = std::max(warp.clock, s.unit_free[unit]);
    s.unit_used_in[unit] = s.number;
    after(s.unit_free[unit], -1, kUnit0 + unit);
    const double busy = model.occupancy[kind] * fact.weight;
    s.unit_free[unit] += busy;
    block.core[warp.index % kCores][unit] += busy;
  }
  for (int space = 0; space < 2; ++space)
    if (in.spaces >> space & 1) {
      if (s.accessed_in[space] != s.number) s.stored[space] = -1;
      s.accessed_in[space] = s.number;
      s.accessed[space] = own;
      if (in.stores) s.stored[space] = own;
    }
  s.nodes.push_back(node);
  result_in(node.time + model.latency[kind] + extra, kind);
  s.issue[fact.phase] += fact.weight;
  block.core[warp.index % kCores][kUnits] += fact.weight;
  if (branches) close(warp, true);
}

// All warps of the block have met: they go on at one time. What the slowest waited for is what the time is charged to,
// and what a shared unit took beyond that to the unit, in the slowest warp's phases. Of a cluster, rank 0 is charged.
void meet(Block& block, double barrier) {
  Warp* slowest = &block.warps[0];
  for (Warp& warp : block.warps)
    if (warp.clock > slowest->clock) slowest = &warp;
  const double own = slowest->clock - block.clock;
  double least = own;
  int cause = -1;
  const auto at_least = [&](double cycles, int of) {
    if (cycles > least) least = cycles, cause = of;
  };
  for (auto& core : block.core)
    for (int unit = 0; unit <= kUnits; ++unit) at_least(core[unit], unit == kUnits ? kIssue : kUnit0 + unit);
  at_least(block.waves, kWaves);
  at_least(block.sectors * model.sector, kSectors);
  if (block.rank == 0 && own > 0) {
    for (int phase = 0; phase < kPhases; ++phase)
      for (int i = 0; i < kCauses; ++i) {
        const double cycles = slowest->cycles[phase][i];
        counts->cycles[phase][i] += cycles;
        if (cause >= 0) counts->cycles[phase][cause] += (least - own) * cycles / own;
      }
    counts->cycles[slowest->phase][kBarrier] += barrier;
  }
  block.clock += least + barrier;
  std::memset(block.core, 0, sizeof(block.core));
  block.waves = block.sectors = 0;
  for (Warp& warp : block.warps) {
    std::memset(warp.cycles, 0, sizeof(warp.cycles));
    warp.clock = block.clock;
  }
}

// ---- running -----------------------------------------------------------------------------------------------------------

// Until the warp waits at a barrier or has left.
void run(Machine& m, Warp& warp) {
  m.warp = &warp;
  while (warp.alive && !warp.waits) {
    int pc = INT32_MAX, next = INT32_MAX;
    each(warp.alive, [&](int lane) { pc = std::min(pc, warp.at[lane]); });
    uint32_t together = 0;
    each(warp.alive, [&](int lane) {
      if (warp.at[lane] == pc)
        together |= 1u << lane;
      else
        next = std::min(next, warp.at[lane]);
    });
    for (bool straight = true; straight && pc < next;) {
      const Instruction& in = m.program->code[pc];
      uint32_t active = together;
      if (in.guard >= 0)
        each(together, [&](int lane) {
          const bool holds = warp.registers.get()[in.guard].lanes[lane] & 1;
          if (holds == static_cast<bool>(in.negated)) active &= ~(1u << lane);
        });
      m.branched = 0;
      m.access.bytes = 0;
      if (active) in.run(m, in, active);
      charge(m, in, active, m.branched != 0);
      ++pc;
      straight = !m.branched && warp.alive && !warp.waits && (warp.alive & together) == together;
    }
    if (warp.waits || !warp.alive) close(warp, false);
    each(together, [&](int lane) { warp.at[lane] = m.branched >> lane & 1 ? m.program->code[pc - 1].target : pc; });
  }
}

std::map<std::string, Program>& programs() {
  static std::map<std::string, Program> all;
  return all;
}

std::map<std::string, Counts>& all_counts() {
  static std::map<std::string, Counts> all;
  return all;
}

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> all;
  return all;
}

// Whether the block's warps wait at the cluster's barrier; else all have left.
bool run_to_cluster_barrier(Machine& m, Block& block) {
  for (;;) {
    bool waiting = false, for_block = false, for_cluster = false;
    for (Warp& warp : block.warps) {
      run(m, warp);
      waiting = waiting || warp.waits;
      for_cluster = for_cluster || warp.waits_for_cluster;
      for_block = for_block || (warp.waits && !warp.waits_for_cluster);
    }
    if (for_block && for_cluster) fail("warps of a block meet at different barriers");
    meet(block, for_block ? model.barrier : 0);
    if (!for_block) return waiting;
    for (Warp& warp : block.warps) warp.waits = false;
  }
}

void run_cluster(const Program& program, const Launch& launch, unsigned first) {
  std::vector<Block> blocks(launch.cluster);
  const unsigned threads = launch.block.count();
  Machine m{&program, launch.parameters.data(), &blocks, nullptr, 0, {}};
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    Block& block = blocks[rank];
    block.index = first + rank;
    block.rank = rank;
    block.shared_bytes = launch.shared_bytes;
    block.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(128, (launch.shared_bytes + 255) / 128 * 128)));
    std::memset(block.shared.get(), 0xFF, launch.shared_bytes);
    block.warps.resize((threads + kWarp - 1) / kWarp);
    for (size_t w = 0; w < block.warps.size(); ++w) {
      Warp& warp = block.warps[w];
      warp.block = &block;
      warp.index = static_cast<int>(w);
      warp.registers.reset(static_cast<Value*>(std::calloc(program.registers, sizeof(Value))));
      warp.results.resize(program.registers);
      std::fill_n(warp.at, kWarp, 0);
      const auto fill = [&](int number, uint64_t value, uint64_t step) {
        if (number < 0) return;
        for (int lane = 0; lane < kWarp; ++lane) warp.registers.get()[number].lanes[lane] = value + step * lane;
      };
      for (const auto& [number, value] : program.constants) fill(number, value, 0);
      fill(program.special[0], w * kWarp, 1);
      fill(program.special[1], block.index, 0);
      fill(program.special[2], threads, 0);
      fill(program.special[3], launch.grid.count(), 0);
      fill(program.special[4], rank, 0);
      fill(program.special[5], 0, 1);
      for (unsigned lane = 0; lane < kWarp; ++lane)
        if (w * kWarp + lane < threads) warp.alive |= 1u << lane;
    }
  }
  for (bool running = true; running;) {
    running = false;
    for (Block& block : blocks) running = run_to_cluster_barrier(m, block) || running;
    double end = 0;
    for (const Block& block : blocks) end = std::max(end, block.clock);
    if (running) end += model.cluster_barrier;
    counts->cycles[blocks[0].warps[0].phase][kBarrier] += end - blocks[0].clock;
    for (Block& block : blocks) {
      block.clock = end;
      for (Warp& warp : block.warps) {
        warp.clock = end;
        warp.waits = warp.waits_for_cluster = false;
      }
    }
  }
  counts->total += blocks[0].clock;
}

void run_translated(const void* kernel, const Launch& launch) {
  const auto found = kernels().find(kernel);
  if (found == kernels().end()) fail("no PTX of a kernel that was launched");
  const Program& program = programs()[found->second];
  counts = &all_counts()[found->second];
  if (launch.parameters.size() > static_cast<size_t>(program.parameter_bytes)) fail("more parameters than the PTX has");
  counts->launches += 1;
  counts->blocks = launch.grid.count();
  counts->cluster = launch.cluster;
  counts->threads = launch.block.count();
  counts->shared_bytes = static_cast<double>(launch.shared_bytes);
  for (unsigned first = 0; first < launch.grid.count(); first += launch.cluster) run_cluster(program, launch, first);
}

}  // namespace
}  // namespace emulation

namespace {

void take_program(const char* text) {
  using namespace emulation;
  if (handlers().empty()) {
    define_arithmetic();
    define_memory();
    define_warps();
  }
  launched = run_translated;
  std::istringstream in(text);
  std::string name;
  size_t constants, instructions;
  Program program;
  in >> name >> program.registers >> program.parameter_bytes >> constants >> instructions;
  program.constants.resize(constants);
  for (auto& [number, value] : program.constants) in >> number >> value;
  for (int& number : program.special) in >> number;
  program.code.resize(instructions);
  double place = 0;
  for (Instruction& i : program.code) {
    in >> i.opcode >> i.guard >> i.negated >> i.results >> i.count;
    if (i.count > kMostOperands) fail("too many operands of " + i.opcode);
    for (int k = 0; k < i.count; ++k) in >> i.operands[k];
    in >> i.offset >> i.target >> i.fact.kind >> i.fact.kind_global >> i.fact.phase >> i.fact.block >> i.fact.weight;
    const auto found = handlers().find(i.opcode);
    if (found == handlers().end()) fail("no instruction " + i.opcode + " is known here");
    i.run = found->second;
    const auto in_name = [&](const char* part) { return i.opcode.find(part) != std::string::npos; };
    i.stores = i.opcode.starts_with("st");
    if ((i.stores || i.opcode.starts_with("ld")) && !in_name(".param"))
      i.spaces = in_name(".shared") ? 1 : in_name(".global") ? 2 : 3;
    i.commits = i.opcode == "cp.async.commit_group";
    if (i.opcode == "cp.async.wait_group")
      for (const auto& [number, value] : program.constants)
        if (number == i.operands[0]) i.awaits_but = static_cast<int>(value);
    i.line = static_cast<int>(place / kInstructionsPerLine);
    place += i.fact.weight;
  }
  if (!in) fail("a program that ends early");
  programs()[name] = std::move(program);
}

}  // namespace

// The text of ptx.py's `load`; returns null, or what is wrong with it.
extern "C" const char* locallip_ptx_program(const char* text) {
  static std::string what;
  try {
    take_program(text);
    return nullptr;
  } catch (const std::exception& error) {
    what = error.what();
    return what.c_str();
  }
}

// A program by itself, in place of a launch of the host code's.
extern "C" const char* locallip_ptx_launch(const char* name, unsigned blocks, unsigned threads, size_t shared_bytes,
                                           const unsigned char* parameters, size_t bytes) {
  static std::string what;
  try {
    emulation::kernels()[name] = name;
    emulation::run_translated(name, {blocks, threads, 1, shared_bytes, {parameters, parameters + bytes}});
    return nullptr;
  } catch (const std::exception& error) {
    what = error.what();
    return what.c_str();
  }
}

extern "C" void locallip_ptx_kernel(const void* kernel, const char* name) { emulation::kernels()[kernel] = name; }
extern "C" void locallip_ptx_model(const emulation::Model* model) { emulation::model = *model; }
extern "C" emulation::Counts* locallip_ptx_counts(const char* name) { return &emulation::all_counts()[name]; }
