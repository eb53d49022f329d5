// The passes of the masked-norm solver between two applications of the operator, for a batch of samples.
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

// A vector whose squared length falls below this share in its orthogonalisation lost digits there, and is
// orthogonalised once more. What is left of the loss grows by at most a factor 1.4 a step: harmless before a restart,
// fatal over many, so that a restarted solver always goes twice.
constexpr double kReorthogonalise = 0.5;

#define LOCALLIP_DECLARE_MASKED_NORM(STREAM)                                                                           \
  /* basis[0] = unit(mask * (start / |start| + kNoise * random / |random|)); start [length] or [sample][length] or     \
   * null */                                                                                                           \
  template <typename scalar_t>                                                                                         \
  void start_basis(scalar_t* basis, const scalar_t* start, bool start_per_sample, const uint8_t* mask, int64_t batch,  \
                   int64_t length STREAM);                                                                             \
  /* basis[count] = unit(mask * vector - its part in basis[0..count)); `vector` is overwritten.                    */  \
  /* Orthogonalised `twice`, or once where that leaves the vector long enough.                                     */  \
  /* projected, if not null, gets its coefficients as column `count` of [sample][kWindow][kWindow].                */  \
  template <typename scalar_t>                                                                                         \
  void extend_basis(scalar_t* basis, scalar_t* vector, const uint8_t* mask, int count, int64_t batch, int64_t length,  \
                    Breakdown breakdown, bool twice, uint32_t seed, double* projected STREAM);                         \
  /* Singular value decomposition of the leading count x count block of `projected`: rotations [sample][kept][kWindow] \
   */                                                                                                                  \
  /* hold the leading right and left vectors, sigma [sample] the largest value; all zero where that is zero. */        \
  /* The block becomes the diagonal of the leading `kept` values. */                                                   \
  template <typename scalar_t>                                                                                         \
  void decompose(double* projected, int count, int kept, int64_t batch, double* right, double* left,                   \
                 scalar_t* sigma STREAM);                                                                              \
  /* out[i] = sum_j rotation[i][j] basis[j], i < kept, j < count; `out` may be `basis`. */                             \
  template <typename scalar_t>                                                                                         \
  void rotate_basis(const scalar_t* basis, const double* rotation, int count, int kept, int64_t batch, int64_t length, \
                    scalar_t* out STREAM);

namespace cpu {
LOCALLIP_DECLARE_MASKED_NORM()
}

#define LOCALLIP_COMMA_STREAM , void* stream
namespace cuda {
LOCALLIP_DECLARE_MASKED_NORM(LOCALLIP_COMMA_STREAM)
}

}  // namespace locallip
