// Resident masked norm of a convolution: all iterations of a sample on chip.
//
// A cluster of R blocks (1, 2, 4 or 8) takes one sample, a block of it a band of the rows of q (the input's shape) and
// of p (the output's). A block runs implicit matrix products on tensor cores: target pixels times (tap, channel) times
// target channels, for the convolution and for its adjoint; with a stride s the adjoint is s x s such products, one for
// each residue of the target pixels.
//
//   registers  the accumulators of a warp's tile, 64 pixels x 32 channels (64 a thread): per 8 taps-and-channels, 16
//              loads for pixels and 8 for weights feed 16 tensor instructions, what shared memory can deliver beside
//              them. 16 pixels where the map is too small to give every warp a tile.
//   shared     q and p, in frames with their zero borders and the neighbours' rows that are read; the masks as bits;
//              a ring of three pieces of the weights.
//   global     the weights, rearranged once a call (they are in L2), streamed through the ring by asynchronous
//              copies; q_j and p_j are written as they come, but for the last ones, and read once at the end, for the
//              singular vectors.
//
// A block writes the rows at its band's edge to its neighbours' frames as well, through distributed shared memory; the
// cluster's barrier within each vector's norm makes them visible. The vectors stay unnormalised where they lie: a
// factor is carried beside them.
//
// 32x32x32 maps, 3 x 3: 18.9 MFLOP an application and 256 KiB of vectors; 4 iterations (9 applications) of 256 samples
// are 43 GFLOP. Products in tf32 take one tensor instruction, of operands that were rounded when they were stored; in
// float32 three, of the upper and lower parts of the operands, which leaves errors near 2^-21, and because tensor cores
// round sums toward zero norms some 2e-6 too small. Device memory: 8 vectors of 128 KiB a sample written and read.
#include <limits.h>

#include "../masked_norm.h"
#include "golub_kahan.cuh"
#include "launch.cuh"

namespace locallip::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kPiece = 32;    // taps-and-channels of a piece of the weights
constexpr int kRing = 3;      // pieces on chip: one in use, one complete or nearly, one under way
constexpr int kTogether = 8;  // units, or words of masks, that a thread takes at once, their loads in flight together
constexpr uint32_t kLowerBits = 0x1FFF;  // of a float32, that tf32 has not
constexpr int kMaxStride = 4;
constexpr int kMaxPasses = 1 + kMaxStride * kMaxStride;
constexpr int kMaxCluster = 8;

using Geometry = ConvolutionGeometry;

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
// floats from a pixel to the next.
struct Frame {
  Range rows, cols;
  int pitch;
  __host__ __device__ int floats() const { return rows.size() * cols.size() * pitch; }
  __host__ __device__ int at(int row, int col) const {
    return ((row - rows.begin) * cols.size() + col - cols.begin) * pitch;
  }
};

// Eight neighbouring pixels that are read `stride` apart fall on distinct groups of 4 banks, if any pitch does that.
__host__ __device__ int pitch_for(int channels, int stride) {
  for (int pitch = channels; pitch < channels + 8; ++pitch)
    if (pitch * stride % 8 == 4) return pitch;
  return channels;
}

__host__ __device__ Frame right_frame(const Geometry& g, int rank, int ranks) {
  const Range own = band(g.in_height, rank, ranks), out = band(g.out_height, rank, ranks);
  Range rows = own;
  if (out.size() > 0) rows = hull(own, read_by_forward(out, g.kernel_height, g.stride_height, g.pad_height));
  const Range cols =
      hull({0, g.in_width}, read_by_forward({0, g.out_width}, g.kernel_width, g.stride_width, g.pad_width));
  return {rows, cols, pitch_for(g.in_channels, g.stride_width)};
}

__host__ __device__ Frame left_frame(const Geometry& g, int rank, int ranks) {
  const Range own = band(g.out_height, rank, ranks), in = band(g.in_height, rank, ranks);
  Range rows = own;
  if (in.size() > 0) rows = hull(own, read_by_adjoint(in, g.kernel_height, g.stride_height, g.pad_height));
  const Range cols =
      hull({0, g.out_width}, read_by_adjoint({0, g.in_width}, g.kernel_width, g.stride_width, g.pad_width));
  return {rows, cols, pitch_for(g.out_channels, 1)};
}

// The taps of one axis that reach target index `residue` modulo the stride in the adjoint: first, first + stride, ...
struct Taps {
  int first, count;
};

__host__ __device__ Taps taps_of(int residue, int kernel, int stride, int pad) {
  const int first = (residue + pad) % stride;
  return {first, first < kernel ? (kernel - 1 - first) / stride + 1 : 0};
}

__host__ __device__ int phases_of(const Geometry& g) { return g.stride_height * g.stride_width; }

// One matrix product: the convolution (number 0) or one residue of its adjoint (1 + number).
struct Product {
  bool adjoint;
  Taps rows, cols;  // of the kernel
  int source_channels, target_channels;
  __host__ __device__ int depth() const { return rows.count * cols.count * source_channels; }
  __host__ __device__ int pieces() const { return (depth() + kPiece - 1) / kPiece; }
  __host__ __device__ int padded_channels() const { return (target_channels + 7) / 8 * 8; }
  // in floats: the weights, and for each of the kPiece the offset in the source's frame, in bytes
  __host__ __device__ int piece_size() const { return kPiece * padded_channels() + kPiece; }
};

__host__ __device__ Product product_of(const Geometry& g, int number) {
  if (number == 0) return {false, {0, g.kernel_height}, {0, g.kernel_width}, g.in_channels, g.out_channels};
  const int row = (number - 1) / g.stride_width, col = (number - 1) % g.stride_width;
  return {true, taps_of(row, g.kernel_height, g.stride_height, g.pad_height),
          taps_of(col, g.kernel_width, g.stride_width, g.pad_width), g.out_channels, g.in_channels};
}

// Place of weight (depth, channel) in its piece: what a lane needs of 8 deep x 8 channels is next to each other.
__host__ __device__ int place_in_piece(int depth, int channel, int padded_channels) {
  return (depth / 8 * padded_channels + channel) * 8 + depth % 4 * 2 + depth % 8 / 4;
}

// ---- the weights, rearranged -------------------------------------------------------------------------------------------

// Block i makes piece i of all products' pieces in a row. Weights are scaled by a power of two to at most 2, so that
// applications of A and A^T in a row do not overflow or underflow; block 0 leaves the exponent.
__global__ void pack_kernel(const float* weight, Geometry g, bool float32, float* packed, int* exponent) {
  auto* scratch = dynamic_shared<float>();
  const int count = g.out_channels * g.kernel_height * g.kernel_width * g.in_channels;
  float largest = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) largest = fmaxf(largest, fabsf(weight[i]));
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) largest = fmaxf(largest, scratch[warp]);
  const int power = largest > 0 && largest <= 3.402823466e38f ? ilogbf(largest) : 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *exponent = power;

  int number = 0, piece = blockIdx.x, before = 0;
  Product product = product_of(g, 0);
  while (piece >= product.pieces()) {
    piece -= product.pieces();
    before += product.pieces() * product.piece_size();
    product = product_of(g, ++number);
  }
  float* out = packed + before + piece * product.piece_size();
  const int channels = product.padded_channels();
  for (int i = threadIdx.x; i < kPiece * channels; i += kThreads) {
    const int depth = i / channels, target = i % channels, k = piece * kPiece + depth;
    float value = 0;
    if (k < product.depth() && target < product.target_channels) {
      const int source = k % product.source_channels, tap = k / product.source_channels;
      int row = tap / product.cols.count, col = tap % product.cols.count;
      if (product.adjoint) {
        row = product.rows.first + row * g.stride_height;
        col = product.cols.first + col * g.stride_width;
      }
      const int o = product.adjoint ? source : target, c = product.adjoint ? target : source;
      value = scalbnf(weight[((o * g.kernel_height + row) * g.kernel_width + col) * g.in_channels + c], -power);
    }
    out[place_in_piece(depth, target, channels)] = float32 ? value : as_float(to_tf32(value));
  }
  const Frame source = product.adjoint ? left_frame(g, 0, 1) : right_frame(g, 0, 1);
  auto* offsets = reinterpret_cast<int*>(out + kPiece * channels);
  if (threadIdx.x < kPiece) {
    const int k = piece * kPiece + threadIdx.x;
    const bool inside = k < product.depth();  // beyond, any place will do: the weight there is zero
    const int channel = inside ? k % product.source_channels : 0, tap = inside ? k / product.source_channels : 0;
    const int pixels = tap / product.cols.count * source.cols.size() + tap % product.cols.count;
    const int floats = (product.adjoint ? -pixels : pixels) * source.pitch + channel;
    offsets[threadIdx.x] = floats * static_cast<int>(sizeof(float));
  }
}

// ---- the iteration -----------------------------------------------------------------------------------------------------

// One product as a block carries it out: pixels [0, count) of width `width`, in the target from (target_row,
// target_col) by (row_step, col_step), each read around a source pixel that starts at (source_row, source_col).
struct Pass {
  int width, count, source_row, source_col, source_row_step, source_col_step, target_row, target_col, row_step,
      col_step;
  int pieces, piece_size, channels, padded_channels, first;  // `first`: of the pieces, in floats
  int pixel_tiles, tiles, rounds;
  bool wide;  // 64 pixels a tile, not 16
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
  pass.pieces = product.pieces();
  pass.piece_size = product.piece_size();
  pass.channels = product.target_channels;
  pass.padded_channels = product.padded_channels();
  pass.first = first;
  const int channel_tiles = pass.padded_channels == 8 ? 1 : (pass.padded_channels + 31) / 32;
  pass.wide = (pass.count + 63) / 64 * channel_tiles >= kWarps;
  pass.pixel_tiles = (pass.count + (pass.wide ? 63 : 15)) / (pass.wide ? 64 : 16);
  pass.tiles = pass.pixel_tiles * channel_tiles;
  pass.rounds = (pass.tiles + kWarps - 1) / kWarps;
  return pass;
}

// A vector of one sample on chip: its frame, the band of rows this block owns, and the other blocks' frames. Where it
// lies is told from the begin of the shared memory, because a pointer out of a struct could be to anywhere.
struct Vector {
  int data_at, mask_at;  // in floats, in words
  float* slots;          // in global memory: the sample's vectors one after another, `slot_stride` apart
  int64_t slot_stride;
  Frame frame;
  Range own;
  int width, channels;
  const Range* rows_of_rank;

  __device__ float* data() const { return dynamic_shared<float>() + data_at; }
  // a word for every 32 channels of every pixel of the band
  __device__ uint32_t* mask() const { return dynamic_shared<uint32_t>() + mask_at; }
  __device__ int words() const { return (channels + 31) / 32; }
};

// A unit of a map: its index, channels last, and its coordinates.
struct Unit {
  int index, row, col, channel;
};

struct Shared {
  SmallSvd small;
  double scratch[kWarps];
  double from_rank[2][kMaxCluster];
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
    int floats[2] = {0, 0}, words[2] = {0, 0};
    for (int rank = 0; rank < ranks; ++rank) {
      floats[0] = larger(floats[0], right_frame(g, rank, ranks).floats());
      floats[1] = larger(floats[1], left_frame(g, rank, ranks).floats());
      words[0] = larger(words[0], band(g.in_height, rank, ranks).size() * g.in_width * ((g.in_channels + 31) / 32));
      words[1] = larger(words[1], band(g.out_height, rank, ranks).size() * g.out_width * ((g.out_channels + 31) / 32));
    }
    bytes = 0;
    const auto take = [this](int size) {
      const int begin = bytes;
      bytes += (size + 15) / 16 * 16;
      return begin;
    };
    take(sizeof(Shared));
    for (int i = 0; i < 2; ++i) {
      data[i] = take(floats[i] * 4);
      mask[i] = take(words[i] * 4);
    }
    ring_piece = larger(product_of(g, 0).piece_size(), product_of(g, 1).piece_size());
    ring = take(kRing * ring_piece * 4);
  }
};

template <bool kFloat32>
struct Convolution {
  const ConvolutionProblem& problem;
  Shared& shared;
  float* ring;
  int ring_piece, sample, rank, ranks;
  int parity = 0;
  // the next piece of the weights to ask for, and how many were asked for and used
  int pass = 0, round = 0, piece = 0, asked = 0, used = 0;

  __device__ double cluster_sum(double value) {
    const double own = block_sum<kThreads>(value, shared.scratch);
    if (ranks == 1) return own;
    double* slots = shared.from_rank[parity];  // the other one may still be read
    parity ^= 1;
    if (threadIdx.x < static_cast<unsigned>(ranks)) store_at_rank(&slots[rank], threadIdx.x, own);
    cluster_barrier();
    double total = 0;
    for (int r = 0; r < ranks; ++r) total += slots[r];
    return total;
  }

  // The other blocks whose frames have a row of this one's band, as bits.
  __device__ unsigned readers_of(const Vector& vector, int row) const {
    unsigned readers = 0;
    for (int r = 0; r < ranks; ++r) {
      const Range rows = vector.rows_of_rank[r];
      if (r != rank && row >= rows.begin && row < rows.end) readers |= 1u << r;
    }
    return readers;
  }

  // Writes one value of the band, here and in the readers' frames.
  __device__ void store(const Vector& vector, float* here, unsigned readers, float value) {
    *here = value;
    for (; readers; readers &= readers - 1) {
      const int r = __ffs(static_cast<int>(readers)) - 1;
      const int rows = vector.frame.rows.begin - vector.rows_of_rank[r].begin;
      store_at_rank(here + rows * vector.frame.cols.size() * vector.frame.pitch, r, value);
    }
  }

  // Calls run(units, count) for the band's units, of which a thread takes kTogether at once, so that their loads are in
  // flight together. Divisions are slow: they are done once, and carried on.
  template <typename Run>
  __device__ void for_each_units(const Vector& vector, Run run) {
    const int thread = static_cast<int>(threadIdx.x), pixels = kThreads / vector.channels;
    const int channel_step = kThreads % vector.channels, row_step = pixels / vector.width,
              col_step = pixels % vector.width;
    Unit next = {vector.own.begin * vector.width * vector.channels + thread,
                 vector.own.begin + thread / vector.channels / vector.width, thread / vector.channels % vector.width,
                 thread % vector.channels};
    const int end = vector.own.end * vector.width * vector.channels;
    while (next.index < end) {
      Unit units[kTogether];
      int count = 0;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        units[k] = next;
        count += next.index < end;
        next.index += kThreads;
        next.channel += channel_step;
        next.col += col_step;
        next.row += row_step;
        if (next.channel >= vector.channels) {
          next.channel -= vector.channels;
          ++next.col;
        }
        if (next.col >= vector.width) {
          next.col -= vector.width;
          ++next.row;
        }
      }
      run(units, count);
    }
  }

  __device__ static bool kept(const Vector& vector, const Unit& unit) {
    const int pixel = (unit.row - vector.own.begin) * vector.width + unit.col;
    return vector.mask()[pixel * vector.words() + unit.channel / 32] >> (unit.channel % 32) & 1;
  }

  __device__ static float* place(const Vector& vector, const Unit& unit) {
    return vector.data() + vector.frame.at(unit.row, unit.col) + unit.channel;
  }

  // ---- the stream of weights: the pieces of pass 0, 1, ..., of pass 0 again, and so on, each once a round

  // A block has pixels of the convolution's output, so that the first pass has pieces.
  __device__ void ask_for_piece() {
    const int passes = 1 + phases_of(problem.geometry);
    while (shared.passes[pass].pieces * shared.passes[pass].rounds == 0) pass = pass + 1 < passes ? pass + 1 : 0;
    const Pass& from = shared.passes[pass];
    const float* source = problem.packed + from.first + piece * from.piece_size;
    float* target = ring + asked % kRing * ring_piece;
    for (int i = threadIdx.x * 4; i < from.piece_size; i += kThreads * 4) copy_async(target + i, source + i);
    commit_copies();
    ++asked;
    if (++piece < from.pieces) return;
    piece = 0;
    if (++round < from.rounds) return;
    round = 0;
    pass = pass + 1 < passes ? pass + 1 : 0;
  }

  __device__ const float* next_piece() {
    wait_for_copies<kRing - 2>();
    __syncthreads();  // all threads' copies are there, and nobody reads the piece before it any more
    const float* at = ring + used++ % kRing * ring_piece;
    ask_for_piece();
    return at;
  }

  // ---- products

  // One warp's tile of 16 kPixels pixels x 8 kChannels channels:
  // target = factor * product - old_factor * target, masked; returns the tile's squared length.
  template <int kPixels, int kChannels>
  __device__ double tile(const Pass& now, const Vector& source, const Vector& target, int number, float factor,
                         float old_factor, float* slot) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int pixel0 = number % now.pixel_tiles * (16 * kPixels), channel0 = number / now.pixel_tiles * (8 * kChannels);
    const bool works = number < now.tiles;
    float acc[kPixels][kChannels][4] = {};
    SharedAddress base[kPixels][2];
#pragma unroll
    for (int m = 0; m < kPixels; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = smaller(pixel0 + m * 16 + half * 8 + g, now.count - 1);
        base[m][half] =
            shared_address(source.data() + source.frame.at(now.source_row + pixel / now.width * now.source_row_step,
                                                           now.source_col + pixel % now.width * now.source_col_step));
      }
    for (int i = 0; i < now.pieces; ++i) {
      const float* weights = next_piece();
      if (!works) continue;
      const int* offsets = reinterpret_cast<const int*>(weights + kPiece * now.padded_channels);
#pragma unroll
      for (int k = 0; k < kPiece / 8; ++k) {
        const int near = offsets[k * 8 + t], far = offsets[k * 8 + t + 4];
        uint32_t b_high[kChannels][2], b_low[kChannels][2];
#pragma unroll
        for (int n = 0; n < kChannels; ++n) {
          // channels beyond the last tile of 8 repeat the first: their results are dropped
          const int channel = channel0 + n * 8 < now.padded_channels ? channel0 + n * 8 + g : g;
          const float2 b = reinterpret_cast<const float2*>(weights)[(k * now.padded_channels + channel) * 4 + t];
          split(b.x, b_high[n][0], b_low[n][0]);
          split(b.y, b_high[n][1], b_low[n][1]);
        }
#pragma unroll
        for (int m = 0; m < kPixels; ++m) {
          uint32_t a_high[4], a_low[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) split(load_shared(base[m][j % 2] + (j < 2 ? near : far)), a_high[j], a_low[j]);
#pragma unroll
          for (int n = 0; n < kChannels; ++n) {
            if constexpr (kFloat32) {
              mma_tf32(acc[m][n], a_low, b_high[n]);
              mma_tf32(acc[m][n], a_high, b_low[n]);
            }
            mma_tf32(acc[m][n], a_high, b_high[n]);
          }
        }
      }
    }
    double square = 0;
    if (!works) return square;
#pragma unroll
    for (int m = 0; m < kPixels; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = pixel0 + m * 16 + half * 8 + g;
        if (pixel >= now.count) continue;
        const int row = now.target_row + pixel / now.width * now.row_step,
                  col = now.target_col + pixel % now.width * now.col_step;
        const int unit = (row * target.width + col) * target.channels;
        const unsigned readers = readers_of(target, row);
        float* here = target.data() + target.frame.at(row, col);
        const uint32_t keep =
            target.mask()[((row - target.own.begin) * target.width + col) * target.words() + channel0 / 32];
#pragma unroll
        for (int n = 0; n < kChannels; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int channel = channel0 + n * 8 + 2 * t + e;
            if (channel >= target.channels) continue;
            float value = 0;
            if (keep >> (channel % 32) & 1) {
              value = acc[m][n][half * 2 + e] * factor;
              if (old_factor != 0) value -= old_factor * here[channel];
              value = rounded(value);
            }
            square += static_cast<double>(value) * static_cast<double>(value);  // float32's would underflow
            store(target, here + channel, readers, value);
            if (slot) slot[unit + channel] = value;
          }
      }
    return square;
  }

  // x as a sum of tf32 numbers, as tensor cores read them, which leave out the lower bits: the upper bits of x, and the
  // rest to the nearest. In tf32 x is one already. Infinities and NaN stay in the first.
  __device__ static void split(float x, uint32_t& high, uint32_t& low) {
    high = as_bits(x);
    if constexpr (kFloat32) {
      high &= ~kLowerBits;
      low = as_bits(x - as_float(high)) + (kLowerBits + 1) / 2;
    }
  }

  // What a vector's element is rounded to where it is stored.
  __device__ static float rounded(float x) { return kFloat32 ? x : as_float(to_tf32(x)); }

  // ---- what golub_kahan asks for

  __device__ double start() {
    const Vector right = shared.vectors[0];
    const ConvolutionGeometry& g = problem.geometry;
    const int64_t first = static_cast<int64_t>(sample) * g.in_height * g.in_width * g.in_channels;
    const float* start = problem.start ? problem.start + (problem.start_per_sample ? first : 0) : nullptr;
    const auto random = [&](const Unit& unit) { return pseudo_random(static_cast<uint32_t>(first + unit.index), 0); };
    double drawn = 0, given = 0;
    for_each_units(right, [&](const Unit(&units)[kTogether], int count) {
      float from[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) from[k] = start && k < count ? start[units[k].index] : 0;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k >= count || !kept(right, units[k])) continue;
        const double r = random(units[k]), s = from[k];
        drawn += r * r;
        given += s * s;
      }
    });
    drawn = cluster_sum(drawn);
    given = cluster_sum(given);
    const double of_given = given > 0 ? 1 / sqrt(given) : 0, of_drawn = given > 0 ? kNoise / sqrt(drawn) : 1;
    float* slot = problem.iterations > 0 ? right.slots : nullptr;
    double square = 0;
    for_each_units(right, [&](const Unit(&units)[kTogether], int count) {
      float from[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) from[k] = given > 0 && k < count ? start[units[k].index] : 0;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k >= count) break;
        float value = 0;
        if (kept(right, units[k]))
          value = rounded(static_cast<float>(random(units[k]) * of_drawn) + static_cast<float>(from[k] * of_given));
        square += static_cast<double>(value) * static_cast<double>(value);
        store(right, place(right, units[k]), readers_of(right, units[k].row), value);
        if (slot) slot[units[k].index] = value;
      }
    });
    const double length = sqrt(cluster_sum(square));
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
    float* slot = created < problem.iterations ? target.slots + created * target.slot_stride : nullptr;
    const int end = adjoint ? 1 + phases_of(problem.geometry) : 1;
    double square = 0;
    for (int i = adjoint; i < end; ++i) {
      const Pass now = shared.passes[i];
      for (int r = 0; r < now.rounds; ++r) {
        const int warp_tile = r * kWarps + static_cast<int>(threadIdx.x) / kWarp;
        if (now.padded_channels == 8)
          square += now.wide ? tile<4, 1>(now, source, target, warp_tile, factor, old_factor, slot)
                             : tile<1, 1>(now, source, target, warp_tile, factor, old_factor, slot);
        else
          square += now.wide ? tile<4, 4>(now, source, target, warp_tile, factor, old_factor, slot)
                             : tile<1, 4>(now, source, target, warp_tile, factor, old_factor, slot);
      }
    }
    const double length = sqrt(cluster_sum(square));
    if (threadIdx.x == 0) shared.factor[1 - adjoint][created] = length > 0 ? 1 / length : 0;
    __syncthreads();
    return length;
  }

  __device__ void finish(const SmallSvd& small, int count) {
    const double sigma = count ? small.sigma[small.column[0]] : 0;
    if (rank == 0 && threadIdx.x == 0) problem.sigma[sample] = scalbnf(static_cast<float>(sigma), *problem.exponent);
    if (threadIdx.x < 2 * kWindow) {
      const int side = static_cast<int>(threadIdx.x) / kWindow, j = static_cast<int>(threadIdx.x) % kWindow;
      double share = 0;
      if (j < count && !(sigma == 0))
        share = shared.factor[side][j] * (side ? small.a[j][small.column[0]] / sigma : small.v[j][small.column[0]]);
      shared.share[side][j] = static_cast<float>(share);
    }
    __syncthreads();
    for (int side = 0; side < 2; ++side) {
      const Vector vector = shared.vectors[side];
      const float* share = shared.share[side];
      const int64_t size = vector.slot_stride / problem.batch;
      const int used = sigma == 0 ? 0 : count, stored = smaller(used, problem.iterations);
      float* out = (side ? problem.left : problem.right) + sample * size;
      double square = 0;
      for_each_units(vector, [&](const Unit(&units)[kTogether], int some) {
        float values[kTogether] = {};
        for (int j = 0; j < stored; ++j) {
          const float* slot = vector.slots + j * vector.slot_stride;
#pragma unroll
          for (int k = 0; k < kTogether; ++k)
            if (k < some) values[k] += share[j] * slot[units[k].index];
        }
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (k >= some) break;
          float* here = place(vector, units[k]);
          if (used > stored) values[k] += share[stored] * *here;  // the last vector stayed on chip
          *here = values[k];
          square += static_cast<double>(values[k]) * static_cast<double>(values[k]);
        }
      });
      square = cluster_sum(square);
      const float factor = square == 0 ? 0 : static_cast<float>(1 / sqrt(square));
      for_each_units(vector, [&](const Unit(&units)[kTogether], int some) {
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
          if (k < some) out[units[k].index] = *place(vector, units[k]) * factor;
      });
    }
  }
};

// The mask of a band as bits: a warp a word, and kTogether words at once.
__device__ void load_mask(const Vector& vector, const uint8_t* mask) {
  const int lane = threadIdx.x % kWarp, words = vector.own.size() * vector.width * vector.words();
  for (int first = threadIdx.x / kWarp; first < words; first += kTogether * kWarps) {
    bool keep[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int word = first + k * kWarps, pixel = vector.own.begin * vector.width + word / vector.words(),
                channel = word % vector.words() * 32 + lane;
      keep[k] = word < words && channel < vector.channels &&
                (!mask || mask[static_cast<int64_t>(pixel) * vector.channels + channel]);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int word = first + k * kWarps;
      const uint32_t bits = __ballot_sync(kAllLanes, keep[k]);
      if (lane == 0 && word < words) vector.mask()[word] = bits;
    }
  }
}

template <bool kFloat32>
__global__ void __launch_bounds__(kThreads, 1) convolution_kernel(const __grid_constant__ ConvolutionProblem problem,
                                                                  const __grid_constant__ Layout layout, int ranks) {
  auto* memory = dynamic_shared<unsigned char>();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const ConvolutionGeometry& g = problem.geometry;
  const int rank = ranks == 1 ? 0 : static_cast<int>(cluster_rank()), sample = static_cast<int>(blockIdx.x) / ranks;
  const int64_t right_units = static_cast<int64_t>(g.in_height) * g.in_width * g.in_channels,
                left_units = static_cast<int64_t>(g.out_height) * g.out_width * g.out_channels;
  if (threadIdx.x < 2) {
    const int side = static_cast<int>(threadIdx.x);
    Vector& vector = shared.vectors[side];
    vector.data_at = layout.data[side] / 4;
    vector.mask_at = layout.mask[side] / 4;
    vector.slots = (side ? problem.left_slots : problem.right_slots) + sample * (side ? left_units : right_units);
    vector.slot_stride = problem.batch * (side ? left_units : right_units);
    vector.frame = side ? left_frame(g, rank, ranks) : right_frame(g, rank, ranks);
    vector.own = band(side ? g.out_height : g.in_height, rank, ranks);
    vector.width = side ? g.out_width : g.in_width;
    vector.channels = side ? g.out_channels : g.in_channels;
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
  for (int side = 0; side < 2; ++side) {
    const uint8_t* mask = side ? problem.row_mask : problem.col_mask;
    load_mask(shared.vectors[side], mask ? mask + sample * (side ? left_units : right_units) : nullptr);
    // borders stay zero throughout
    float* data = shared.vectors[side].data();
    for (int i = threadIdx.x; i < shared.vectors[side].frame.floats(); i += kThreads) data[i] = 0;
  }
  if (ranks > 1)
    cluster_barrier();  // the other blocks have begun, and zeroed what will be written to
  else
    __syncthreads();

  Convolution<kFloat32> op{problem, shared, reinterpret_cast<float*>(memory + layout.ring), layout.ring_piece, sample,
                           rank,    ranks};
  for (int i = 0; i < kRing - 1; ++i) op.ask_for_piece();
  golub_kahan(op, problem.iterations, kFloat32 ? 16 * 0x1p-23 : 0x1p-10, shared.small);
  wait_for_copies<0>();
}

// Blocks a sample: the fewest whose shared memory holds it, more where the batch would leave multiprocessors idle; 0
// where not even the largest cluster does.
unsigned cluster_for(const Geometry& g, int64_t batch) {
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const bool clusters = has_clusters(convolution_kernel<true>);
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  unsigned chosen = 0;
  const int rows = smaller(g.in_height, g.out_height);  // every block has some
  for (int ranks = 1; ranks <= (clusters ? smaller(kMaxCluster, rows) : 1); ranks *= 2)
    if (Layout(g, ranks).bytes <= limit && (chosen == 0 || (batch * ranks <= multiprocessors && 2 * ranks <= rows)))
      chosen = static_cast<unsigned>(ranks);
  return chosen;
}

int pieces_of(const Geometry& g) {
  int pieces = 0;
  for (int i = 0; i <= phases_of(g); ++i) pieces += product_of(g, i).pieces();
  return pieces;
}

}  // namespace

bool convolution_fits(const ConvolutionGeometry& g, int64_t batch) {
  // far beyond any cluster, and below what the products of sizes here can hold
  constexpr int64_t kTooMany = 1 << 24;
  const int64_t padded = (int64_t{g.in_height} + 2 * g.pad_height) * (int64_t{g.in_width} + 2 * g.pad_width),
                taps = int64_t{g.kernel_height} * g.kernel_width;
  if (padded * g.in_channels > kTooMany || padded * g.out_channels > kTooMany ||
      taps * g.in_channels * g.out_channels > kTooMany)
    return false;
  return g.stride_height <= kMaxStride && g.stride_width <= kMaxStride && cluster_for(g, batch) > 0;
}

int64_t packed_weight_floats(const ConvolutionGeometry& g) {
  int64_t floats = 0;
  for (int i = 0; i <= phases_of(g); ++i)
    floats += static_cast<int64_t>(product_of(g, i).pieces()) * product_of(g, i).piece_size();
  return floats;
}

void masked_norm_convolution(const ConvolutionProblem& problem, const float* weight, bool float32, void* stream) {
  const Geometry& g = problem.geometry;
  launch("masked_norm, packing", pack_kernel, {dim3(pieces_of(g)), kThreads, kWarps * sizeof(float)}, stream, weight, g,
         float32, problem.packed, problem.exponent);
  const unsigned ranks = cluster_for(g, problem.batch);
  const Layout layout(g, static_cast<int>(ranks));
  launch("masked_norm, convolution", float32 ? convolution_kernel<true> : convolution_kernel<false>,
         {dim3(static_cast<unsigned>(problem.batch) * ranks), kThreads, static_cast<size_t>(layout.bytes), ranks},
         stream, problem, layout, static_cast<int>(ranks));
}

}  // namespace locallip::cuda
