// The passes of the masked-norm solver between two applications of the operator, for a batch of samples; on a GPU also
// kernels that keep a sample on chip and run the whole iteration.
//
// The solver is Golub-Kahan-Lanczos with full orthogonalisation: orthonormal right vectors q_0.. and left vectors p_0..
// of one sample with A q_j = sum_{i <= j} projected[i][j] p_i, so the singular values of the small upper triangular
// matrix `projected` are Ritz values of the masked operator A, none above its norm.
//
// A basis is an array [slot][sample][length]. A `mask` is null (all True) or [sample][length], one byte a unit.
#pragma once

#include <cstdint>

#include "portable.h"

namespace locallip {

// Most right vectors held before a restart, and the Ritz vectors kept by one. Small networks' norms need 1 to 5 steps,
// so a restart is the exception; 6 of 16 keep the second and third singular vectors in play, which is what a saddle
// needs.
constexpr int kWindow = 16;
constexpr int kKept = 6;

// Share of the pseudo-random vector in a start that the caller gave.
constexpr double kNoise = 0.1;

// Numbers in [-1, 1], none of them 0 (a mask may leave one unit alone), from an index and a seed, the same on every
// device.
LOCALLIP_INLINE float pseudo_random(uint32_t index, uint32_t seed) {
  uint32_t h = index * 0x9E3779B9u + seed * 0x85EBCA6Bu;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  h ^= h >> 16;
  return static_cast<float>(static_cast<int32_t>(h | 1)) * 0x1p-31f;
}

// What becomes of a vector that lies in the span of its basis but for rounding: a left one is dropped (the operator has
// no further rank there), a right one is replaced by a pseudo-random direction, so that an invariant subspace without
// the top singular vector is left again.
enum class Breakdown { kDrop, kReplace };

// The vectors of its basis that a new one is orthogonalised against. The last is enough in exact arithmetic; by
// rounding the others have a part in a vector once a singular value has converged, which can give a singular vector
// twice and the value still once, as long as all vectors of both bases go this way. One that vanishes then ends the
// space, whatever its breakdown: zero, as all that follow. Many steps, as restarts make them, want all vectors, twice.
enum class Against { kLast, kAll, kAllTwice };

// Which it is, for the longer of the two vectors and without a restart: short ones cost little.
constexpr Against against_for(int64_t length) { return length > 2048 ? Against::kLast : Against::kAll; }

// A vector whose squared length falls below this share in its orthogonalisation lost digits there, and is
// orthogonalised once more. What is left of the loss grows by at most a factor 1.4 a step: harmless before a restart,
// fatal over many.
constexpr double kReorthogonalise = 0.5;

#define LOCALLIP_DECLARE_MASKED_NORM(STREAM)                                                                           \
  /* basis[0] = unit(mask * (start / |start| + kNoise * random / |random|)); start [length] or [sample][length] or     \
   * null */                                                                                                           \
  template <typename scalar_t>                                                                                         \
  void start_basis(scalar_t* basis, const scalar_t* start, bool start_per_sample, const uint8_t* mask, int64_t batch,  \
                   int64_t length STREAM);                                                                             \
  /* basis[count] = unit(mask * vector - its part in basis[0..count)), and that in vector_t in `copy`, if it is  */    \
  /* another type: uint16_t, the bits of bfloat16. projected, if not null, gets its coefficients as column `count` */  \
  /* of [sample][kWindow][kWindow]. */                                                                                 \
  template <typename scalar_t, typename vector_t>                                                                      \
  void extend_basis(scalar_t* basis, const vector_t* vector, const uint8_t* mask, int count, int64_t batch,            \
                    int64_t length, Breakdown breakdown, Against against, uint32_t seed, double* projected,            \
                    vector_t* copy STREAM);                                                                            \
  /* Singular value decomposition of the leading count x count block of `projected`: rotations [sample][kept][kWindow] \
   */                                                                                                                  \
  /* hold the leading right and left vectors, sigma [sample] the largest value; all zero where that is zero. */        \
  /* The block becomes the diagonal of the leading `kept` values. */                                                   \
  template <typename scalar_t>                                                                                         \
  void decompose(double* projected, int count, int kept, int64_t batch, double* right, double* left,                   \
                 scalar_t* sigma STREAM);                                                                              \
  /* out[i] = sum_j rotation[i][j] basis[j], i < kept, j < count; `out` may be `basis`. Of one vector, a unit one. */  \
  template <typename scalar_t>                                                                                         \
  void rotate_basis(const scalar_t* basis, const double* rotation, int count, int kept, int64_t batch, int64_t length, \
                    scalar_t* out STREAM);

namespace cpu {
LOCALLIP_DECLARE_MASKED_NORM()

// Whether the processor has instructions for products in bfloat16.
bool has_bfloat16();
}  // namespace cpu

// ---- on a GPU ----------------------------------------------------------------------------------------------------------

// A convolution without groups or dilation; maps are channels-last.
struct ConvolutionGeometry {
  int in_channels, in_height, in_width, out_channels, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width, pad_height, pad_width;
};

// Of a convolution's products on chip, and of the vectors between them; sums are float32 in all.
enum class Precision { kFloat32, kTf32, kBfloat16 };

// The masked norms of a batch, one sample after another in every array; masks and start may be null. packed,
// right_slots, left_slots and exponent are scratch.
struct ConvolutionProblem {
  ConvolutionGeometry geometry;
  int64_t batch;
  int iterations;
  const uint8_t *row_mask, *col_mask;
  const float* start;
  bool start_per_sample;
  uint32_t *packed, *right_slots, *left_slots;
  float *sigma, *right, *left;
  int* exponent;
};

// How many words of 32 bits its scratch takes.
struct ConvolutionScratch {
  int64_t packed, right_slots, left_slots;
};

// The same for a weight [rows][columns]; right_slots, left_slots [iterations + 1][sample][columns or rows].
template <typename scalar_t>
struct DenseProblem {
  const scalar_t* weight;
  int rows, columns;
  int64_t batch;
  int iterations;
  const uint8_t *row_mask, *col_mask;
  const scalar_t* start;
  bool start_per_sample;
  scalar_t *right_slots, *left_slots, *sigma, *right, *left;
};

namespace cuda {
#define LOCALLIP_COMMA_STREAM , void* stream
LOCALLIP_DECLARE_MASKED_NORM(LOCALLIP_COMMA_STREAM)

bool has_bfloat16();

// How many blocks a sample takes at least where one kernel can run all iterations on chip (at most kWindow - 1), else
// 0; and that kernel.
int convolution_blocks(const ConvolutionGeometry& geometry, Precision precision);
ConvolutionScratch convolution_scratch(const ConvolutionGeometry& geometry, Precision precision, int64_t batch,
                                       int iterations);
// weight [out][kernel_height][kernel_width][in]
void masked_norm_convolution(const ConvolutionProblem& problem, const float* weight, Precision precision, void* stream);

template <typename scalar_t>
bool dense_fits(int64_t rows, int64_t columns);
template <typename scalar_t>
void masked_norm_dense(const DenseProblem<scalar_t>& problem, void* stream);
}  // namespace cuda

}  // namespace locallip
