// Resident masked norm of a convolution: all iterations of a sample on chip.
//
// A cluster of R blocks (1, 2, 4 or 8) takes one sample after another, a block of it a band of the rows of q (the
// input's shape) and of p (the output's). A block runs implicit matrix products on tensor cores: target pixels times
// (tap, channel) times target channels, for the convolution and for its adjoint; with a stride s the adjoint is s x s
// such products, one for each residue of the target pixels.
//
//   registers  the accumulators of a warp's tile, 64 pixels x 32 channels (64 a thread; in float32 32 pixels): per 8
//              words of depth, 4 loads of matrices of pixels and 2 of weights, 512 bytes each, feed 16 tensor
//              instructions, what shared memory can deliver beside them. 16 pixels where the map is too small to give
//              every warp a tile.
//   shared     q and p, in frames with their zero borders and the neighbours' rows that are read; the masks as bits;
//              a ring of three pieces of the weights.
//   global     the weights, rearranged once a call (they are in L2), streamed through the ring by asynchronous
//              copies; q_j and p_j are written as they come, but for the last ones, and read once at the end, for the
//              singular vectors. A cluster writes every sample's to the same place, which so stays in L2.
//
// What lies on chip are words of 32 bits: a number, or two neighbouring channels in bfloat16. A tensor instruction
// takes 8 words of depth of either, from the same lanes, so that only the conversions and the instruction itself
// differ.
//
// A block sends the rows at its band's edge to its neighbours' frames, through distributed shared memory; the cluster's
// barrier within each vector's norm makes them visible. The vectors stay unnormalised where they lie: a factor is
// carried beside them.
//
// 32x32x32 maps, 3 x 3: 18.9 MFLOP an application and 256 KiB of vectors; 4 iterations (9 applications) of 256 samples
// are 43 GFLOP. Products in bfloat16 and TF32 take one tensor instruction (of twice the depth in bfloat16), of operands
// that were rounded when they were stored; in float32 three, of the upper and lower parts of the operands, which leaves
// errors near 2^-21. Tensor cores round sums toward zero: in float32 they sum 8 deep alone, and the rest is added to
// the nearest, which leaves norms right to 1e-6. Device memory: the masks, the start and the singular vectors.
#include "../masked_norm.h"

#include <algorithm>
#include <type_traits>

#include "golub_kahan.cuh"
#include "launch.cuh"
#include "pack.cuh"

namespace locallip::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kPiece = 32;    // words of depth, taps-and-channels, of a piece of the weights
constexpr int kRing = 3;      // pieces on chip: one in use, one complete or nearly, one under way
constexpr int kTogether = 4;  // pairs of channels, or words of masks, that a thread takes at once, their loads in
                              // flight together
constexpr int kSlots = 2;     // stored vectors whose loads are in flight together
constexpr uint32_t kLowerBits = 0x1FFF;  // of a float32, that tf32 has not
constexpr int kMaxStride = 4;
constexpr int kMaxPasses = 1 + kMaxStride * kMaxStride;
constexpr int kMaxCluster = 8;

// A sum of squares in float32 within these lost nothing to underflow or overflow.
constexpr double kLeastSquare = 1e-20, kMostSquare = 1e30;

// Pixels of a warp's tile, over 16; in float32 a third of the operands' loads feeds as many tensor instructions, and
// their parts take the registers.
__host__ __device__ constexpr int wide_tile(Precision precision) { return precision == Precision::kFloat32 ? 2 : 4; }

// `in` and `out`: how many words of depth a pixel of the input and of the output is.
struct Geometry : ConvolutionGeometry {
  int in, out, wide_pixels;
  bool narrow;
  __host__ __device__ Geometry(const ConvolutionGeometry& g, Precision precision)
      : ConvolutionGeometry(g), wide_pixels(16 * wide_tile(precision)), narrow(precision == Precision::kBfloat16) {
    in = narrow ? (in_channels + 1) / 2 : in_channels;
    out = narrow ? (out_channels + 1) / 2 : out_channels;
  }
};

// Two neighbouring channels as they lie on chip and in the slots, for threads that see no more of them.
template <Precision kPrecision>
struct Pair {
  uint2 words;
  __device__ static Pair rounded(float x, float y) {
    if constexpr (kPrecision == Precision::kTf32) return {{to_tf32(x), to_tf32(y)}};
    return {{as_bits(x), as_bits(y)}};
  }
  __device__ float2 values() const { return {as_float(words.x), as_float(words.y)}; }
};

template <>
struct Pair<Precision::kBfloat16> {
  uint32_t word;
  __device__ static Pair rounded(float x, float y) { return {to_bfloat16(x, y)}; }
  __device__ float2 values() const { return {as_float(word << 16), as_float(word & 0xFFFF0000u)}; }
};

__host__ __device__ int pairs_of(int channels) { return (channels + 1) / 2; }

struct Range {
  int begin, end;
  __host__ __device__ int size() const { return end - begin; }
};

__host__ __device__ int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
__host__ __device__ int ceil_div(int a, int b) { return -floor_div(-a, b); }
__host__ __device__ int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ int larger(int a, int b) { return a > b ? a : b; }

__host__ __device__ Range hull(Range a, Range b) {
  if (a.size() <= 0) return b;
  if (b.size() <= 0) return a;
  return {smaller(a.begin, b.begin), larger(a.end, b.end)};
}

// Rows of a map that block `rank` of `ranks` owns.
__host__ __device__ Range band(int height, int rank, int ranks) {
  return {height * rank / ranks, height * (rank + 1) / ranks};
}

// What of one axis of q outputs [out.begin, out.end) read; what of p inputs read in the adjoint.
__host__ __device__ Range read_by_forward(Range out, int kernel, int stride, int pad) {
  return {out.begin * stride - pad, (out.end - 1) * stride - pad + kernel};
}

__host__ __device__ Range read_by_adjoint(Range in, int kernel, int stride, int pad) {
  return {ceil_div(in.begin + pad - kernel + 1, stride), floor_div(in.end - 1 + pad, stride) + 1};
}

// Where q or p lies in a block's shared memory: rows x cols pixels from (rows.begin, cols.begin) of the map, `pitch`
// words from a pixel to the next.
struct Frame {
  Range rows, cols;
  int pitch;
  __host__ __device__ int words() const { return rows.size() * cols.size() * pitch; }
  __host__ __device__ int at(int row, int col) const {
    return ((row - rows.begin) * cols.size() + col - cols.begin) * pitch;
  }
};

// Where a tensor instruction's words lie next to each other, pixels begin at multiples of 4 words and neighbours fall
// on distinct groups of 4 banks. Else eight neighbours that are read `stride` apart do, if any pitch does that which
// leaves pairs of channels where one access takes them.
__host__ __device__ int pitch_for(int words, int stride) {
  if (words % 8 == 0) return words + 4;
  for (int pitch = words; pitch < words + 8; ++pitch)
    if (pitch % 2 == 0 && pitch * stride % 8 == 4) return pitch;
  return (words + 1) / 2 * 2;
}

// Units of a map.
__host__ __device__ int64_t units_of(const ConvolutionGeometry& g, bool left) {
  return left ? int64_t{g.out_height} * g.out_width * g.out_channels
              : int64_t{g.in_height} * g.in_width * g.in_channels;
}

// Words of a stored vector: pixels of pairs.
__host__ __device__ int slot_words(const Geometry& g, bool left) {
  return left ? g.out_height * g.out_width * pairs_of(g.out_channels) * (g.narrow ? 1 : 2)
              : g.in_height * g.in_width * pairs_of(g.in_channels) * (g.narrow ? 1 : 2);
}

__host__ __device__ Frame right_frame(const Geometry& g, int rank, int ranks) {
  const Range own = band(g.in_height, rank, ranks), out = band(g.out_height, rank, ranks);
  Range rows = own;
  if (out.size() > 0) rows = hull(own, read_by_forward(out, g.kernel_height, g.stride_height, g.pad_height));
  const Range cols =
      hull({0, g.in_width}, read_by_forward({0, g.out_width}, g.kernel_width, g.stride_width, g.pad_width));
  return {rows, cols, pitch_for(g.in, g.stride_width)};
}

__host__ __device__ Frame left_frame(const Geometry& g, int rank, int ranks) {
  const Range own = band(g.out_height, rank, ranks), in = band(g.in_height, rank, ranks);
  Range rows = own;
  if (in.size() > 0) rows = hull(own, read_by_adjoint(in, g.kernel_height, g.stride_height, g.pad_height));
  const Range cols =
      hull({0, g.out_width}, read_by_adjoint({0, g.in_width}, g.kernel_width, g.stride_width, g.pad_width));
  return {rows, cols, pitch_for(g.out, 1)};
}

// The taps of one axis that reach target index `residue` modulo the stride in the adjoint: first, first + stride, ...
struct Taps {
  int first, count;
};

__host__ __device__ Taps taps_of(int residue, int kernel, int stride, int pad) {
  const int first = (residue + pad) % stride;
  return {first, first < kernel ? (kernel - 1 - first) / stride + 1 : 0};
}

__host__ __device__ int phases_of(const ConvolutionGeometry& g) { return g.stride_height * g.stride_width; }

// One matrix product: the convolution (number 0) or one residue of its adjoint (1 + number).
struct Product {
  bool adjoint;
  Taps rows, cols;  // of the kernel
  int source_words, target_channels;
  __host__ __device__ int depth() const { return rows.count * cols.count * source_words; }
  __host__ __device__ int pieces() const { return (depth() + kPiece - 1) / kPiece; }
  // as many as whole tiles of a warp take
  __host__ __device__ int padded_channels() const {
    return target_channels <= 8 ? 8 : (target_channels + 31) / 32 * 32;
  }
  // whether 8 words of depth, as a tensor instruction takes them, lie next to each other in the source's frame
  __host__ __device__ bool aligned() const { return source_words % 8 == 0; }
  // in words: the weights, and for each of the kPiece the offset in the source's frame, in bytes
  __host__ __device__ int piece_size() const { return kPiece * padded_channels() + kPiece; }
};

__host__ __device__ Product product_of(const Geometry& g, int number) {
  if (number == 0) return {false, {0, g.kernel_height}, {0, g.kernel_width}, g.in, g.out_channels};
  const int row = (number - 1) / g.stride_width, col = (number - 1) % g.stride_width;
  return {true, taps_of(row, g.kernel_height, g.stride_height, g.pad_height),
          taps_of(col, g.kernel_width, g.stride_width, g.pad_width), g.out, g.in_channels};
}

// Place of weight (depth, channel) in its piece: 8 channels of 4 deep are what one load of a warp begins with.
__host__ __device__ int place_in_piece(int depth, int channel) {
  return (channel / 8 * (kPiece / 8) + depth / 8) * 64 + depth % 8 / 4 * 32 + channel % 8 * 4 + depth % 4;
}

// ---- the weights, rearranged -------------------------------------------------------------------------------------------

// The largest of a block's own numbers.
__device__ float block_max(float value, float* scratch) {
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) value = fmaxf(value, scratch[warp]);
  return value;
}

// Block i makes piece i of all products' pieces in a row. Weights are scaled by a power of two to at most 2, so that
// applications of A and A^T in a row do not overflow or underflow; block 0 leaves the exponent.
template <Precision kPrecision>
__global__ void pack_kernel(const float* weight, ConvolutionGeometry geometry, uint32_t* packed, int* exponent) {
  const Geometry g(geometry, kPrecision);
  const int count = g.out_channels * g.kernel_height * g.kernel_width * g.in_channels;
  float largest = 0;
  for (int first = threadIdx.x; first < count; first += kThreads * kTogether) {
    float some[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) some[k] = first + k * kThreads < count ? weight[first + k * kThreads] : 0;
#pragma unroll
    for (int k = 0; k < kTogether; ++k) largest = fmaxf(largest, fabsf(some[k]));
  }
  largest = block_max(largest, dynamic_shared<float>());
  const int power = largest > 0 && largest <= 3.402823466e38f ? ilogbf(largest) : 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *exponent = power;

  int number = 0, piece = blockIdx.x, before = 0;
  Product product = product_of(g, 0);
  while (piece >= product.pieces()) {
    piece -= product.pieces();
    before += product.pieces() * product.piece_size();
    product = product_of(g, ++number);
  }
  uint32_t* out = packed + before + piece * product.piece_size();
  const int channels = product.padded_channels(), sources = product.adjoint ? g.out_channels : g.in_channels;
  const auto value_at = [&](int tap, int source, int target) {
    if (source >= sources) return 0.0f;
    int row = tap / product.cols.count, col = tap % product.cols.count;
    if (product.adjoint) {
      row = product.rows.first + row * g.stride_height;
      col = product.cols.first + col * g.stride_width;
    }
    const int o = product.adjoint ? source : target, c = product.adjoint ? target : source;
    return scalbnf(weight[((o * g.kernel_height + row) * g.kernel_width + col) * g.in_channels + c], -power);
  };
  for (int i = threadIdx.x; i < kPiece * channels; i += kThreads) {
    const int depth = i / channels, target = i % channels, k = piece * kPiece + depth;
    uint32_t word = 0;
    if (k < product.depth() && target < product.target_channels) {
      const int source = k % product.source_words, tap = k / product.source_words;
      if constexpr (kPrecision == Precision::kBfloat16)
        word = to_bfloat16(value_at(tap, 2 * source, target), value_at(tap, 2 * source + 1, target));
      else if constexpr (kPrecision == Precision::kTf32)
        word = to_tf32(value_at(tap, source, target));
      else
        word = as_bits(value_at(tap, source, target));
    }
    out[place_in_piece(depth, target)] = word;
  }
  const Frame source = product.adjoint ? left_frame(g, 0, 1) : right_frame(g, 0, 1);
  auto* offsets = reinterpret_cast<int*>(out + kPiece * channels);
  if (threadIdx.x < kPiece) {
    const int k = piece * kPiece + threadIdx.x;
    const bool inside = k < product.depth();  // beyond, any place will do: the weight there is zero
    const int word = inside ? k % product.source_words : 0, tap = inside ? k / product.source_words : 0;
    const int pixels = tap / product.cols.count * source.cols.size() + tap % product.cols.count;
    const int words = (product.adjoint ? -pixels : pixels) * source.pitch + word;
    offsets[threadIdx.x] = words * static_cast<int>(sizeof(uint32_t));
  }
}

// ---- the iteration -----------------------------------------------------------------------------------------------------

// One product as a block carries it out: pixels [0, count) of width `width`, in the target from (target_row,
// target_col) by (row_step, col_step), each read around a source pixel that starts at (source_row, source_col).
struct Pass {
  int width, count, source_row, source_col, source_row_step, source_col_step, target_row, target_col, row_step,
      col_step;
  int pieces, piece_size, padded_channels, first;  // `first`: of the pieces, in words
  int pixel_tiles, tiles, rounds;
  int eight_rows, eight_cols;  // from a pixel to the eighth after it
  bool wide, aligned;          // many pixels a tile, not 16; Product::aligned
};

__device__ Pass pass_of(const Geometry& g, int number, int first, int rank, int ranks) {
  const Product product = product_of(g, number);
  Pass pass;
  int height;
  if (!product.adjoint) {
    const Range own = band(g.out_height, rank, ranks);
    height = own.size();
    pass.width = g.out_width;
    pass.target_row = own.begin;
    pass.target_col = 0;
    pass.row_step = pass.col_step = 1;
    pass.source_row = own.begin * g.stride_height - g.pad_height;
    pass.source_col = -g.pad_width;
    pass.source_row_step = g.stride_height;
    pass.source_col_step = g.stride_width;
  } else {
    const Range own = band(g.in_height, rank, ranks);
    const int row = (number - 1) / g.stride_width, col = (number - 1) % g.stride_width;
    const int top = own.begin + (row - own.begin % g.stride_height + g.stride_height) % g.stride_height;
    height = top < own.end ? (own.end - 1 - top) / g.stride_height + 1 : 0;
    pass.width = col < g.in_width ? (g.in_width - 1 - col) / g.stride_width + 1 : 0;
    pass.target_row = top;
    pass.target_col = col;
    pass.row_step = g.stride_height;
    pass.col_step = g.stride_width;
    pass.source_row = (top + g.pad_height - product.rows.first) / g.stride_height;
    pass.source_col = (col + g.pad_width - product.cols.first) / g.stride_width;
    pass.source_row_step = pass.source_col_step = 1;
  }
  pass.count = height * pass.width;
  pass.eight_rows = pass.width ? 8 / pass.width : 0;
  pass.eight_cols = pass.width ? 8 % pass.width : 0;
  pass.pieces = product.pieces();
  pass.piece_size = product.piece_size();
  pass.aligned = product.aligned();
  pass.padded_channels = product.padded_channels();
  pass.first = first;
  const int channel_tiles = pass.padded_channels == 8 ? 1 : pass.padded_channels / 32;
  pass.wide = (pass.count + g.wide_pixels - 1) / g.wide_pixels * channel_tiles >= kWarps;
  const int pixels = pass.wide ? g.wide_pixels : 16;
  pass.pixel_tiles = (pass.count + pixels - 1) / pixels;
  pass.tiles = pass.pixel_tiles * channel_tiles;
  pass.rounds = (pass.tiles + kWarps - 1) / kWarps;
  return pass;
}

// A vector of one sample on chip: its frame, the band of rows this block owns, and the other blocks' frames. Where it
// lies is told from the begin of the shared memory, because a pointer out of a struct could be to anywhere.
struct Vector {
  int data_at, mask_at;  // in words
  uint32_t* slots;       // in global memory: the cluster's vectors one after another, pixels of pairs
  int slot_words;
  Frame frame;
  Range own;
  int width, channels;
  const Range* rows_of_rank;

  __device__ uint32_t* data() const { return dynamic_shared<uint32_t>() + data_at; }
  // a word for every 32 channels of every pixel of the band
  __device__ uint32_t* mask_at_pixel(int row, int col) const {
    return dynamic_shared<uint32_t>() + mask_at + ((row - own.begin) * width + col) * mask_words();
  }
  __device__ int mask_words() const { return (channels + 31) / 32; }
};

// Two channels of a pixel of a map, and the index of the first, channels last.
struct Place {
  int row, col, pair, index;
};

struct Shared {
  TopTriplet small;
  double scratch[kWarps];
  double from_rank[2][2][kMaxCluster];
  double factor[2][kWindow];  // of q_j and p_j: the unit vector over the stored one
  float share[2][kWindow];    // of each stored vector in the singular vectors
  Vector vectors[2];          // q and p
  Range rows_of_rank[2][kMaxCluster];
  Pass passes[kMaxPasses];
};

// How a block's shared memory is divided, in bytes; the same in every block of the cluster.
struct Layout {
  int data[2], mask[2], ring, ring_piece, bytes;

  Layout(const Geometry& g, int ranks) {
    int words[2] = {0, 0}, mask_words[2] = {0, 0};
    for (int rank = 0; rank < ranks; ++rank) {
      words[0] = larger(words[0], right_frame(g, rank, ranks).words());
      words[1] = larger(words[1], left_frame(g, rank, ranks).words());
      mask_words[0] =
          larger(mask_words[0], band(g.in_height, rank, ranks).size() * g.in_width * ((g.in_channels + 31) / 32));
      mask_words[1] =
          larger(mask_words[1], band(g.out_height, rank, ranks).size() * g.out_width * ((g.out_channels + 31) / 32));
    }
    bytes = 0;
    const auto take = [this](int size) {
      const int begin = bytes;
      bytes += (size + 15) / 16 * 16;
      return begin;
    };
    take(sizeof(Shared));
    for (int i = 0; i < 2; ++i) {
      data[i] = take(words[i] * 4);
      mask[i] = take(mask_words[i] * 4);
    }
    ring_piece = larger(product_of(g, 0).piece_size(), product_of(g, 1).piece_size());
    ring = take(kRing * ring_piece * 4);
  }
};

template <Precision kPrecision>
struct Convolution {
  using Two = Pair<kPrecision>;
  // relative length below which a vector is rounding
  static constexpr double kRounding = kPrecision == Precision::kFloat32 ? 16 * 0x1p-23
                                      : kPrecision == Precision::kTf32  ? 0x1p-10
                                                                        : 0x1p-6;

  const ConvolutionProblem& problem;
  Shared& shared;
  uint32_t* ring;
  int ring_piece, rank, ranks;
  int64_t sample = 0;
  int parity = 0;
  // where the next piece of the weights begins, how many of its pass are left, and the round of that pass
  uint32_t piece = 0;
  int pieces = 0, piece_size = 0, pass = 0, round = 0;
  int asked = 0, used = 0;  // places in the ring, in words

  // The sums over all threads of the cluster; makes what they wrote of `changed` visible to all.
  template <int kSums>
  __device__ void cluster_sums(double (&values)[kSums], const Vector* changed = nullptr) {
#pragma unroll
    for (double& value : values) value = block_sum<kThreads>(value, shared.scratch);
    if (ranks == 1) return;
    if (changed) send_edges(*changed);
    double* slots = shared.from_rank[parity][0];  // the other ones may still be read
    parity ^= 1;
    if (threadIdx.x < static_cast<unsigned>(ranks))
#pragma unroll
      for (int i = 0; i < kSums; ++i) store_at_rank(&slots[i * kMaxCluster + rank], threadIdx.x, values[i]);
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      values[i] = 0;
#pragma unroll 1
      for (int r = 0; r < ranks; ++r) values[i] += slots[i * kMaxCluster + r];
    }
  }

  __device__ double cluster_sum(double value, const Vector* changed = nullptr) {
    double values[1] = {value};
    cluster_sums(values, changed);
    return values[0];
  }

  // Copies the rows of the band to the frames of the other blocks that have them.
  __device__ void send_edges(const Vector& vector) const {
    const int row_words = vector.frame.cols.size() * vector.frame.pitch;
#pragma unroll 1
    for (int r = 0; r < ranks; ++r) {
      const Range rows = vector.rows_of_rank[r];
      const int begin = larger(rows.begin, vector.own.begin), end = smaller(rows.end, vector.own.end);
      if (r == rank || begin >= end) continue;
      uint32_t* from = vector.data() + (begin - vector.frame.rows.begin) * row_words;
      const int there = (vector.frame.rows.begin - rows.begin) * row_words;
#pragma unroll 1
      for (int i = 2 * static_cast<int>(threadIdx.x); i < (end - begin) * row_words; i += 2 * kThreads)
        store_at_rank(reinterpret_cast<uint64_t*>(from + there + i), r, *reinterpret_cast<uint64_t*>(from + i));
    }
  }

  // Calls run(places, count) for the band's pairs of channels, of which a thread takes kTogether at once, so that their
  // loads are in flight together. Divisions are slow: they are done once, and carried on.
  template <typename Run>
  __device__ void for_each_pairs(const Vector& vector, Run run) {
    const int thread = static_cast<int>(threadIdx.x), pairs = pairs_of(vector.channels), pixels = kThreads / pairs;
    const int pair_step = kThreads % pairs, row_step = pixels / vector.width, col_step = pixels % vector.width;
    Place next = {vector.own.begin + thread / pairs / vector.width, thread / pairs % vector.width, thread % pairs, 0};
    while (next.row < vector.own.end) {
      Place places[kTogether];
      int count = 0;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        next.index = (next.row * vector.width + next.col) * vector.channels + 2 * next.pair;
        places[k] = next;
        count += next.row < vector.own.end;
        next.pair += pair_step;
        next.col += col_step;
        next.row += row_step;
        if (next.pair >= pairs) {
          next.pair -= pairs;
          ++next.col;
        }
        if (next.col >= vector.width) {
          next.col -= vector.width;
          ++next.row;
        }
      }
      run(places, count);
    }
  }

  // Which of the two channels the mask keeps, as bits.
  __device__ static uint32_t kept(const Vector& vector, const Place& at) {
    return vector.mask_at_pixel(at.row, at.col)[at.pair / 16] >> (at.pair % 16 * 2) & 3;
  }

  __device__ static Two& on_chip(const Vector& vector, const Place& at) {
    return reinterpret_cast<Two*>(vector.data() + vector.frame.at(at.row, at.col))[at.pair];
  }

  __device__ static int slot_index(const Vector& vector, int row, int col, int pair) {
    return (row * vector.width + col) * pairs_of(vector.channels) + pair;
  }

  // Two channels of a tensor in global memory: at once where all pairs of a map allow it.
  struct Channels {
    int channels;
    bool at_once;
    __device__ Channels(const float* map, int channels)
        : channels(channels), at_once(channels % 2 == 0 && reinterpret_cast<uintptr_t>(map) % sizeof(float2) == 0) {}
    __device__ bool alone(const Place& at) const { return 2 * at.pair + 1 == channels; }
    __device__ float2 load(const float* map, const Place& at) const {
      if (at_once) return *reinterpret_cast<const float2*>(map + at.index);
      return {map[at.index], alone(at) ? 0 : map[at.index + 1]};
    }
    __device__ void store(float* map, const Place& at, float2 values) const {
      if (at_once) {
        *reinterpret_cast<float2*>(map + at.index) = values;
        return;
      }
      map[at.index] = values.x;
      if (!alone(at)) map[at.index + 1] = values.y;
    }
  };

  // Of a sample whose masks are there; no copies may be under way.
  __device__ void begin(int64_t number) {
    sample = number;
    asked = used = 0;
    enter_pass(0, 0);  // which has pieces: a block has pixels of the convolution's output
    for (int i = 0; i < kRing - 1; ++i) ask_for_piece();
  }

  // ---- the stream of weights: the pieces of pass 0, 1, ..., of pass 0 again, and so on, each once a round

  __device__ void enter_pass(int number, int in_round) {
    pass = number;
    round = in_round;
    const Pass& from = shared.passes[pass];
    piece = from.first;
    piece_size = from.piece_size;
    pieces = from.pieces;
  }

  __device__ int next_place(int place) const { return place == (kRing - 1) * ring_piece ? 0 : place + ring_piece; }

  __device__ void ask_for_piece() {
    const auto* packed = reinterpret_cast<const unsigned char*>(problem.packed);
#pragma unroll 1
    for (uint32_t i = threadIdx.x * 4; i < static_cast<uint32_t>(piece_size); i += kThreads * 4)
      copy_async(ring + asked + i, packed + (piece + i) * 4u);
    commit_copies();
    asked = next_place(asked);
    piece += piece_size;
    if (--pieces > 0) return;
    if (round + 1 < shared.passes[pass].rounds) return enter_pass(pass, round + 1);
    const int passes = 1 + phases_of(problem.geometry);
    int next = pass;
    do next = next + 1 < passes ? next + 1 : 0;
    while (shared.passes[next].pieces * shared.passes[next].rounds == 0);
    enter_pass(next, 0);
  }

  __device__ const uint32_t* next_piece() {
    wait_for_copies<kRing - 2>();
    __syncthreads();  // all threads' copies are there, and nobody reads the piece before it any more
    const uint32_t* at = ring + used;
    used = next_place(used);
    ask_for_piece();
    return at;
  }

  // ---- products

  // Pixels of a product, eight apart. Divisions are slow: one is enough.
  struct Pixel {
    int row, col;
    __device__ Pixel(const Pass& pass, int number) : row(number / pass.width), col(number % pass.width) {}
    __device__ void advance(const Pass& pass) {
      row += pass.eight_rows;
      col += pass.eight_cols;
      if (col < pass.width) return;
      col -= pass.width;
      ++row;
    }
  };

  // In float32, x as a sum of tf32 numbers, as tensor cores read them, which leave out the lower bits: the upper bits
  // of x, and the rest to the nearest. Infinities and NaN stay in the first.
  __device__ static void split(uint32_t x, uint32_t& high, uint32_t& low) {
    if constexpr (kPrecision == Precision::kFloat32) {
      high = x & ~kLowerBits;
      low = as_bits(as_float(x) - as_float(high)) + (kLowerBits + 1) / 2;
    } else {
      high = x;
    }
  }

  __device__ static void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&a_low)[4],
                                  const uint32_t (&b)[2], const uint32_t (&b_low)[2]) {
    if constexpr (kPrecision == Precision::kFloat32) {
      const float zero[4] = {};
      float some[4];
      mma_tf32(some, a_low, b, zero);
      mma_tf32(some, a, b_low, some);
      mma_tf32(some, a, b, some);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += some[i];
    } else if constexpr (kPrecision == Precision::kTf32) {
      mma_tf32(sum, a, b, sum);
    } else {
      mma_bfloat16(sum, a, b, sum);
    }
  }

  // One warp's tile of 16 kPixels pixels x 8 kChannels channels:
  // target = factor * product - old_factor * target, masked; returns the tile's squared length.
  template <int kPixels, int kChannels, bool kAligned>
  __device__ float tile(const Pass& now, const Vector& source, const Vector& target, int number, float factor,
                        float old_factor, uint32_t* slot) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int pixel0 = number % now.pixel_tiles * (16 * kPixels), channel0 = number / now.pixel_tiles * (8 * kChannels);
    const bool works = number < now.tiles;
    float acc[kPixels][kChannels][4] = {};
    // of the pixel whose words this lane loads: for the whole warp, 8 pixels x 4 words at a time, or its own
    constexpr int kApart = kAligned ? 16 : 8;
    SharedAddress base[16 * kPixels / kApart];
    {
      int at = pixel0 + (kAligned ? lane % 16 : g);
      Pixel pixel(now, smaller(at, now.count - 1));
#pragma unroll
      for (SharedAddress& place : base) {
        place = shared_address(source.data() +
                               source.frame.at(now.source_row + pixel.row * now.source_row_step,
                                               now.source_col + pixel.col * now.source_col_step) +
                               (kAligned ? lane / 16 * 4 : 0));
        at += kApart;
        for (int i = 0; i < kApart / 8; ++i)
          if (at < now.count) pixel.advance(now);  // beyond, any place will do
      }
    }
    constexpr int kLoads = kChannels == 1 ? 1 : 2;  // tiles of 8 channels a load takes
    const int own_weights = channel0 / 8 * place_in_piece(0, 8) + lane / 16 % kLoads * place_in_piece(0, 8) +
                            lane / 8 % 2 * place_in_piece(4, 0) + lane % 8 * place_in_piece(0, 1);
    constexpr int kDeep = kPrecision == Precision::kFloat32 ? 2 : kPiece / 8;  // unrolled: the parts take the registers
    for (int i = 0; i < now.pieces; ++i) {
      const uint32_t* weights = next_piece();
      if (!works) continue;
      const auto* offsets = reinterpret_cast<const int*>(weights + kPiece * now.padded_channels);
      const SharedAddress from = shared_address(weights + own_weights);
#pragma unroll kDeep
      for (int k = 0; k < kPiece / 8; ++k) {
        uint32_t b[kChannels][2], b_low[kChannels][2];
#pragma unroll
        for (int n = 0; n < kChannels; n += kLoads) {
          uint32_t words[2 * kLoads];
          load_matrices(words, from + place_in_piece(k * 8, n * 8) * sizeof(uint32_t));
#pragma unroll
          for (int j = 0; j < 2 * kLoads; ++j) split(words[j], b[n + j / 2][j % 2], b_low[n + j / 2][j % 2]);
        }
        const int near = offsets[k * 8 + (kAligned ? 0 : t)], far = kAligned ? near : offsets[k * 8 + t + 4];
#pragma unroll
        for (int m = 0; m < kPixels; ++m) {
          uint32_t a[4], a_low[4];
          if constexpr (kAligned)
            load_matrices(a, base[m] + near);
          else
#pragma unroll
            for (int j = 0; j < 4; ++j) a[j] = load_shared(base[2 * m + j % 2] + (j < 2 ? near : far));
#pragma unroll
          for (int j = 0; j < 4; ++j) split(a[j], a[j], a_low[j]);
#pragma unroll
          for (int n = 0; n < kChannels; ++n) multiply(acc[m][n], a, a_low, b[n], b_low[n]);
        }
      }
    }
    float square = 0;
    if (!works) return square;
    const int pairs = pairs_of(target.channels), pair0 = channel0 / 2 + t;
    Pixel pixel(now, smaller(pixel0 + g, now.count - 1));
    // a loop, that moves the accumulators on: code that runs once takes longer to come than to run
#pragma unroll 1
    for (int m = 0; m < kPixels; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (pixel0 + g + 16 * m + 8 * half >= now.count) break;
        const int row = now.target_row + pixel.row * now.row_step, col = now.target_col + pixel.col * now.col_step;
        pixel.advance(now);
        auto* here = reinterpret_cast<Two*>(target.data() + target.frame.at(row, col)) + pair0;
        auto* kept_here = reinterpret_cast<Two*>(slot) + slot_index(target, row, col, pair0);
        const uint32_t keep = target.mask_at_pixel(row, col)[channel0 / 32] >> (2 * t);
        float2 old[kChannels];  // not read at first, when it may be another sample's
#pragma unroll
        for (int n = 0; n < kChannels; ++n)
          old[n] = old_factor != 0 && pair0 + n * 4 < pairs ? here[n * 4].values() : float2{0, 0};
#pragma unroll
        for (int n = 0; n < kChannels; ++n) {
          const float x = acc[0][n][2 * half] * factor - old_factor * old[n].x,
                      y = acc[0][n][2 * half + 1] * factor - old_factor * old[n].y;
          // channels beyond the last have no bits
          const Two two = Two::rounded(keep >> (n * 8) & 1 ? x : 0, keep >> (n * 8 + 1) & 1 ? y : 0);
          const float2 values = two.values();
          square += values.x * values.x;
          square += values.y * values.y;
          if (pair0 + n * 4 >= pairs) continue;
          here[n * 4] = two;
          if (slot) kept_here[n * 4] = two;
        }
      }
#pragma unroll
      for (int i = 0; i + 1 < kPixels; ++i)
#pragma unroll
        for (int n = 0; n < kChannels; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[i][n][j] = acc[i + 1][n][j];
    }
    return square;
  }

  template <bool kAligned>
  __device__ float any_tile(const Pass& now, const Vector& source, const Vector& target, int number, float factor,
                            float old_factor, uint32_t* slot) {
    constexpr int kWide = wide_tile(kPrecision);
    if (now.padded_channels == 8)
      return now.wide ? tile<kWide, 1, kAligned>(now, source, target, number, factor, old_factor, slot)
                      : tile<1, 1, kAligned>(now, source, target, number, factor, old_factor, slot);
    return now.wide ? tile<kWide, 4, kAligned>(now, source, target, number, factor, old_factor, slot)
                    : tile<1, 4, kAligned>(now, source, target, number, factor, old_factor, slot);
  }

  // The squared length of the band, where float32 lost it.
  __device__ double square_in_double(const Vector& vector) {
    double square = 0;
    for_each_pairs(vector, [&](const Place(&places)[kTogether], int count) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k >= count) break;
        const float2 values = on_chip(vector, places[k]).values();
        square += static_cast<double>(values.x) * static_cast<double>(values.x);
        square += static_cast<double>(values.y) * static_cast<double>(values.y);
      }
    });
    return square;
  }

  // Stores the band times 2^-power, here and in its slot.
  __device__ void enlarge(const Vector& vector, uint32_t* slot, int power) {
    for_each_pairs(vector, [&](const Place(&places)[kTogether], int count) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k >= count) break;
        Two& here = on_chip(vector, places[k]);
        const float2 values = here.values();
        here = Two::rounded(scalbnf(values.x, -power), scalbnf(values.y, -power));
        if (slot) reinterpret_cast<Two*>(slot)[slot_index(vector, places[k].row, places[k].col, places[k].pair)] = here;
      }
    });
  }

  // ---- what golub_kahan asks for

  __device__ double start() {
    const Vector right = shared.vectors[0];
    const int64_t first = sample * units_of(problem.geometry, false);
    const float* start = problem.start ? problem.start + (problem.start_per_sample ? first : 0) : nullptr;
    const Channels channels(start, right.channels);
    const auto random = [&](const Place& at) {
      const auto number = static_cast<uint32_t>(first + at.index);
      return float2{pseudo_random(number, 0), pseudo_random(number + 1, 0)};
    };
    double lengths[2] = {0, 0}, &drawn = lengths[0], &given = lengths[1];
    if (start) {
      for_each_pairs(right, [&](const Place(&places)[kTogether], int count) {
        float2 from[kTogether];
#pragma unroll
        for (int k = 0; k < kTogether; ++k) from[k] = k < count ? channels.load(start, places[k]) : float2{0, 0};
        float some = 0;
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (k >= count) break;
          const uint32_t keep = kept(right, places[k]);
          const float2 r = random(places[k]);
          const double x = keep & 1 ? from[k].x : 0, y = keep & 2 ? from[k].y : 0;
          some += keep & 1 ? r.x * r.x : 0;
          some += keep & 2 ? r.y * r.y : 0;
          given += x * x + y * y;
        }
        drawn += static_cast<double>(some);
      });
      cluster_sums(lengths);
    }
    const double of_given = given > 0 ? 1 / sqrt(given) : 0;
    const float of_drawn = given > 0 ? static_cast<float>(kNoise / sqrt(drawn)) : 1;
    auto* slot = reinterpret_cast<Two*>(problem.iterations > 0 ? right.slots : nullptr);
    double square = 0;
    for_each_pairs(right, [&](const Place(&places)[kTogether], int count) {
      float2 from[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        from[k] = given > 0 && k < count ? channels.load(start, places[k]) : float2{0, 0};
      float some = 0;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k >= count) break;
        const uint32_t keep = kept(right, places[k]);
        const float2 r = random(places[k]);
        const float x = r.x * of_drawn + static_cast<float>(from[k].x * of_given),
                    y = r.y * of_drawn + static_cast<float>(from[k].y * of_given);
        const Two two = Two::rounded(keep & 1 ? x : 0, keep & 2 ? y : 0);
        const float2 values = two.values();
        some += values.x * values.x;
        some += values.y * values.y;
        on_chip(right, places[k]) = two;
        if (slot) slot[slot_index(right, places[k].row, places[k].col, places[k].pair)] = two;
      }
      square += static_cast<double>(some);
    });
    const double length = sqrt(cluster_sum(square, &right));
    if (threadIdx.x == 0) shared.factor[0][0] = 1 / length;
    __syncthreads();
    return length;
  }

  __device__ double apply(int number, double coefficient) {
    const int step = number / 2, adjoint = number % 2, created = step + adjoint;
    const Vector source = shared.vectors[adjoint], target = shared.vectors[1 - adjoint];
    const float factor = static_cast<float>(shared.factor[adjoint][step]),
                old_factor = number > 0 ? static_cast<float>(coefficient * shared.factor[1 - adjoint][created - 1]) : 0;
    // the last vector of each kind is never overwritten, and stays on chip
    uint32_t* slot = created < problem.iterations ? target.slots + created * target.slot_words : nullptr;
    const int end = adjoint ? 1 + phases_of(problem.geometry) : 1;
    double square = 0;
    for (int i = adjoint; i < end; ++i) {
      const Pass now = shared.passes[i];
      for (int r = 0; r < now.rounds; ++r) {
        const int warp_tile = r * kWarps + static_cast<int>(threadIdx.x) / kWarp;
        const float some = now.aligned ? any_tile<true>(now, source, target, warp_tile, factor, old_factor, slot)
                                       : any_tile<false>(now, source, target, warp_tile, factor, old_factor, slot);
        square += static_cast<double>(some);
      }
    }
    square = cluster_sum(square, &target);
    int power = 0;  // of two, by which the vector is stored smaller than it is
    if (!(square > kLeastSquare && square < kMostSquare)) {
      square = cluster_sum(square_in_double(target));
      if (square > 0 && square < kLeastSquare) {  // or the next vector, of its square's size, would not be there
        power = ilogbf(static_cast<float>(sqrt(square)));
        enlarge(target, slot, power);
        cluster_sum(0, &target);  // for the neighbours' sake
      }
    }
    const double length = sqrt(square);
    if (threadIdx.x == 0)
      shared.factor[1 - adjoint][created] = length > 0 ? static_cast<double>(scalbnf(1, power)) / length : 0;
    __syncthreads();
    return length;
  }

  __device__ void finish(int count) {
    const TopTriplet& small = shared.small;
    const double sigma = count ? small.sigma : 0;
    if (rank == 0 && threadIdx.x == 0) problem.sigma[sample] = scalbnf(static_cast<float>(sigma), *problem.exponent);
    if (threadIdx.x < 2 * kWindow) {
      const int side = static_cast<int>(threadIdx.x) / kWindow, j = static_cast<int>(threadIdx.x) % kWindow;
      double share = 0;
      if (j < count && !(sigma == 0)) share = shared.factor[side][j] * (side ? small.left[j] : small.right[j]);
      shared.share[side][j] = static_cast<float>(share);
    }
    __syncthreads();
    double squares[2] = {0, 0};
    for (int side = 0; side < 2; ++side) {
      const Vector vector = shared.vectors[side];
      const float* share = shared.share[side];
      const int used = sigma == 0 ? 0 : count, stored = smaller(used, problem.iterations);
      float* out = result(side);
      const Channels channels(out, vector.channels);
      double square = 0;
      for_each_pairs(vector, [&](const Place(&places)[kTogether], int some) {
        float2 values[kTogether] = {};
        for (int j = 0; j < stored; j += kSlots) {
          Two from[kSlots][kTogether] = {};
#pragma unroll
          for (int i = 0; i < kSlots; ++i)
#pragma unroll
            for (int k = 0; k < kTogether; ++k)
              if (j + i < stored && k < some)
                from[i][k] = reinterpret_cast<const Two*>(
                    vector.slots +
                    (j + i) * vector.slot_words)[slot_index(vector, places[k].row, places[k].col, places[k].pair)];
#pragma unroll
          for (int i = 0; i < kSlots; ++i) {
            const float of_slot = j + i < stored ? share[j + i] : 0;
#pragma unroll
            for (int k = 0; k < kTogether; ++k) {
              values[k].x += of_slot * from[i][k].values().x;
              values[k].y += of_slot * from[i][k].values().y;
            }
          }
        }
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (k >= some) break;
          if (used > stored) {  // the last vector stayed on chip
            const float2 last = on_chip(vector, places[k]).values();
            values[k].x += share[stored] * last.x;
            values[k].y += share[stored] * last.y;
          }
          square += static_cast<double>(values[k].x * values[k].x + values[k].y * values[k].y);
          channels.store(out, places[k], values[k]);
        }
      });
      (side ? squares[1] : squares[0]) = square;
    }
    cluster_sums(squares);
    for (int side = 0; side < 2; ++side) {
      const Vector& vector = shared.vectors[side];
      const int row = vector.width * vector.channels;
      const double square = side ? squares[1] : squares[0];
      scale(result(side) + vector.own.begin * row, vector.own.size() * row,
            square == 0 ? 0 : static_cast<float>(1 / sqrt(square)));
    }
  }

  // Where the singular vector of the sample goes.
  __device__ float* result(int side) const {
    return (side ? problem.left : problem.right) + sample * units_of(problem.geometry, side);
  }

  // Numbers in global memory that this block wrote, behind a barrier.
  __device__ static void scale(float* numbers, int count, float factor) {
    constexpr int kFour = 4;
    const int packs = reinterpret_cast<uintptr_t>(numbers) % sizeof(Pack<float, kFour>) == 0 ? count / kFour : 0;
    for (int first = threadIdx.x; first < packs; first += kTogether * kThreads) {
      Pack<float, kFour> some[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (first + k * kThreads < packs) some[k] = load<kFour>(numbers + (first + k * kThreads) * kFour);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k * kThreads >= packs) break;
        for (float& number : some[k].v) number *= factor;
        store<kFour>(numbers + (first + k * kThreads) * kFour, some[k]);
      }
    }
    for (int i = packs * kFour + threadIdx.x; i < count; i += kThreads) numbers[i] *= factor;
  }
};

// The mask of a band as bits.
__device__ void load_mask(const Vector& vector, const uint8_t* mask) {
  const int words = vector.own.size() * vector.width * vector.mask_words();
  uint32_t* bits = vector.mask_at_pixel(vector.own.begin, 0);
  if (!mask) {
    for (int i = threadIdx.x; i < words; i += kThreads) {
      const int left = vector.channels - i % vector.mask_words() * 32;
      bits[i] = left < 32 ? (1u << left) - 1 : ~0u;
    }
    return;
  }
  mask += static_cast<int64_t>(vector.own.begin) * vector.width * vector.channels;
  if (vector.channels % 32 == 0 && reinterpret_cast<uintptr_t>(mask) % sizeof(uint4) == 0) {  // 16 channels a load
    auto* halves = reinterpret_cast<uint16_t*>(bits);
    const auto four = [](uint32_t bytes) {
      const uint32_t high = ((bytes & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | bytes;  // a byte's highest bit: whether it is not 0
      return (high >> 7 & 0x01010101u) * 0x01020408u >> 24 & 15;
    };
    for (int first = threadIdx.x; first < 2 * words; first += kTogether * kThreads) {
      uint4 from[kTogether] = {};
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (first + k * kThreads < 2 * words) from[k] = reinterpret_cast<const uint4*>(mask)[first + k * kThreads];
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (first + k * kThreads < 2 * words)
          halves[first + k * kThreads] = static_cast<uint16_t>(four(from[k].x) | four(from[k].y) << 4 |
                                                               four(from[k].z) << 8 | four(from[k].w) << 12);
    }
    return;
  }
  const int lane = threadIdx.x % kWarp;  // a warp a word
  for (int first = threadIdx.x / kWarp; first < words; first += kTogether * kWarps) {
    bool keep[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int word = first + k * kWarps, pixel = word / vector.mask_words(),
                channel = word % vector.mask_words() * 32 + lane;
      keep[k] = word < words && channel < vector.channels && mask[pixel * vector.channels + channel];
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int word = first + k * kWarps;
      const uint32_t ballot = __ballot_sync(kAllLanes, keep[k]);
      if (lane == 0 && word < words) bits[word] = ballot;
    }
  }
}

template <Precision kPrecision>
__global__ void __launch_bounds__(kThreads, 1) convolution_kernel(const __grid_constant__ ConvolutionProblem problem,
                                                                  const __grid_constant__ Layout layout, int ranks) {
  using Operator = Convolution<kPrecision>;
  auto* memory = dynamic_shared<unsigned char>();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Geometry g(problem.geometry, kPrecision);
  const int rank = ranks == 1 ? 0 : static_cast<int>(cluster_rank()), cluster = static_cast<int>(blockIdx.x) / ranks,
            clusters = static_cast<int>(gridDim.x) / ranks;
  if (threadIdx.x < 2) {
    const int side = static_cast<int>(threadIdx.x);
    Vector& vector = shared.vectors[side];
    vector.data_at = layout.data[side] / 4;
    vector.mask_at = layout.mask[side] / 4;
    vector.frame = side ? left_frame(g, rank, ranks) : right_frame(g, rank, ranks);
    vector.own = band(side ? g.out_height : g.in_height, rank, ranks);
    vector.width = side ? g.out_width : g.in_width;
    vector.channels = side ? g.out_channels : g.in_channels;
    vector.slot_words = slot_words(g, side);
    vector.slots = (side ? problem.left_slots : problem.right_slots) +
                   static_cast<int64_t>(cluster) * problem.iterations * vector.slot_words;
    vector.rows_of_rank = shared.rows_of_rank[side];
    for (int r = 0; r < ranks; ++r)
      shared.rows_of_rank[side][r] = side ? left_frame(g, r, ranks).rows : right_frame(g, r, ranks).rows;
  }
  if (threadIdx.x == kWarp) {
    int first = 0;
    for (int i = 0; i <= phases_of(g); ++i) {
      shared.passes[i] = pass_of(g, i, first, rank, ranks);
      first += shared.passes[i].pieces * shared.passes[i].piece_size;
    }
  }
  __syncthreads();
  for (int side = 0; side < 2; ++side) {  // borders stay zero throughout
    uint32_t* data = shared.vectors[side].data();
    for (int i = threadIdx.x; i < shared.vectors[side].frame.words(); i += kThreads) data[i] = 0;
  }
  if (ranks > 1) cluster_barrier();  // the other blocks have begun, and zeroed what will be written to

  Operator op{problem, shared, reinterpret_cast<uint32_t*>(memory + layout.ring), layout.ring_piece, rank, ranks};
  for (int64_t sample = cluster; sample < problem.batch; sample += clusters) {
    for (int side = 0; side < 2; ++side) {
      const uint8_t* mask = side ? problem.row_mask : problem.col_mask;
      load_mask(shared.vectors[side], mask ? mask + sample * units_of(g, side) : nullptr);
    }
    __syncthreads();
    op.begin(sample);
    golub_kahan(op, problem.iterations, Operator::kRounding, shared.small);
    wait_for_copies<0>();
    __syncthreads();  // nobody's copies are under way into the ring
  }
}

template <typename Run>
void with_precision(Precision precision, Run run) {
  switch (precision) {
    case Precision::kFloat32:
      return run(std::integral_constant<Precision, Precision::kFloat32>{});
    case Precision::kTf32:
      return run(std::integral_constant<Precision, Precision::kTf32>{});
    case Precision::kBfloat16:
      return run(std::integral_constant<Precision, Precision::kBfloat16>{});
  }
}

// The fewest blocks whose shared memory holds a sample; 0 where not even the largest cluster does.
int fewest_blocks(const Geometry& g) {
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int most = has_clusters(convolution_kernel<Precision::kFloat32>) ? kMaxCluster : 1;
  const int rows = smaller(g.in_height, g.out_height);  // every block has some
  for (int ranks = 1; ranks <= smaller(most, rows); ranks *= 2)
    if (Layout(g, ranks).bytes <= limit) return ranks;
  return 0;
}

// More of them where the batch would leave multiprocessors idle.
unsigned cluster_for(const Geometry& g, int64_t batch) {
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int rows = smaller(g.in_height, g.out_height);
  int ranks = fewest_blocks(g);
  if (has_clusters(convolution_kernel<Precision::kFloat32>))
    while (ranks > 0 && 2 * ranks <= kMaxCluster && batch * 2 * ranks <= multiprocessors && 4 * ranks <= rows)
      ranks *= 2;
  return static_cast<unsigned>(ranks);
}

// As many as run at once, a block a multiprocessor.
unsigned clusters_for(int64_t batch, unsigned ranks) {
  const auto at_once = static_cast<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount)) / ranks;
  return static_cast<unsigned>(std::min(batch, std::max<int64_t>(at_once, 1)));
}

int pieces_of(const Geometry& g) {
  int pieces = 0;
  for (int i = 0; i <= phases_of(g); ++i) pieces += product_of(g, i).pieces();
  return pieces;
}

}  // namespace

int convolution_blocks(const ConvolutionGeometry& geometry, Precision precision) {
  const Geometry g(geometry, precision);
  // far beyond any cluster, and below what the products of sizes here can hold
  constexpr int64_t kTooMany = 1 << 24;
  const int64_t padded = (int64_t{g.in_height} + 2 * g.pad_height) * (int64_t{g.in_width} + 2 * g.pad_width),
                taps = int64_t{g.kernel_height} * g.kernel_width;
  if (padded * g.in_channels > kTooMany || padded * g.out_channels > kTooMany ||
      taps * g.in_channels * g.out_channels > kTooMany)
    return 0;
  return g.stride_height <= kMaxStride && g.stride_width <= kMaxStride ? fewest_blocks(g) : 0;
}

ConvolutionScratch convolution_scratch(const ConvolutionGeometry& geometry, Precision precision, int64_t batch,
                                       int iterations) {
  const Geometry g(geometry, precision);
  const int64_t slots = static_cast<int64_t>(clusters_for(batch, cluster_for(g, batch))) * iterations;
  int64_t packed = 0;
  for (int i = 0; i <= phases_of(g); ++i)
    packed += static_cast<int64_t>(product_of(g, i).pieces()) * product_of(g, i).piece_size();
  return {packed, slots * slot_words(g, false), slots * slot_words(g, true)};
}

void masked_norm_convolution(const ConvolutionProblem& problem, const float* weight, Precision precision,
                             void* stream) {
  const Geometry g(problem.geometry, precision);
  const unsigned ranks = cluster_for(g, problem.batch), clusters = clusters_for(problem.batch, ranks);
  const Layout layout(g, static_cast<int>(ranks));
  with_precision(precision, [&](auto kind) {
    launch("masked_norm, packing", pack_kernel<kind()>, {dim3(pieces_of(g)), kThreads, kWarps * sizeof(float)}, stream,
           weight, problem.geometry, problem.packed, problem.exponent);
    launch("masked_norm, convolution", convolution_kernel<kind()>,
           {dim3(clusters * ranks), kThreads, static_cast<size_t>(layout.bytes), ranks}, stream, problem, layout,
           static_cast<int>(ranks));
  });
}

}  // namespace locallip::cuda
