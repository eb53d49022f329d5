// Calls the resident kernels of csrc/masked_norm.h on arrays of the caller's, without torch. Each returns null, or what
// went wrong.
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include "masked_norm.h"

namespace {

// Scratch, aligned as a GPU's allocator does it, of NaN.
template <typename T>
std::unique_ptr<T, decltype(&std::free)> scratch(size_t count) {
  const size_t bytes = count * sizeof(T) / 256 * 256 + 256;
  std::unique_ptr<T, decltype(&std::free)> memory(static_cast<T*>(std::aligned_alloc(256, bytes)), &std::free);
  std::memset(memory.get(), 0xFF, bytes);
  return memory;
}

template <typename Run>
const char* guarded(Run run) {
  static std::string what;
  try {
    what = run();
  } catch (const std::exception& error) {
    what = error.what();
  }
  return what.empty() ? nullptr : what.c_str();
}

}  // namespace

// geometry: as the struct's fields follow one another; precision: a locallip::Precision's number.
extern "C" const char* locallip_convolution_norms(const int* geometry, int batch, int iterations,
                                                  const uint8_t* row_mask, const uint8_t* col_mask, const float* start,
                                                  const float* weight, int precision, float* sigma, float* right,
                                                  float* left) {
  return guarded([&]() -> const char* {
    const int* g = geometry;
    const locallip::ConvolutionGeometry of = {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11]};
    const auto with = static_cast<locallip::Precision>(precision);
    if (locallip::cuda::convolution_blocks(of, with) == 0) return "the layer does not fit on chip";
    const auto words = locallip::cuda::convolution_scratch(of, with, batch, iterations);
    const auto packed = scratch<uint32_t>(words.packed), right_slots = scratch<uint32_t>(words.right_slots),
               left_slots = scratch<uint32_t>(words.left_slots);
    int exponent = 0;
    const locallip::ConvolutionProblem problem = {of,    batch, iterations,   row_mask,          col_mask,
                                                  start, true,  packed.get(), right_slots.get(), left_slots.get(),
                                                  sigma, right, left,         &exponent};
    locallip::cuda::masked_norm_convolution(problem, weight, with, nullptr);
    return "";
  });
}

// geometry: rows, columns.
extern "C" const char* locallip_dense_norms(const int* geometry, int batch, int iterations, const uint8_t* row_mask,
                                            const uint8_t* col_mask, const float* start, const float* weight, int,
                                            float* sigma, float* right, float* left) {
  return guarded([&]() -> const char* {
    const int rows = geometry[0], columns = geometry[1];
    if (rows > locallip::kWindow && !locallip::cuda::dense_fits<float>(rows, columns))
      return "the layer does not fit on chip";
    const size_t steps = static_cast<size_t>(iterations + 1) * batch;
    const auto right_slots = scratch<float>(steps * columns), left_slots = scratch<float>(steps * rows);
    const locallip::DenseProblem<float> problem = {weight,           rows,     columns, batch, iterations,
                                                   row_mask,         col_mask, start,   true,  right_slots.get(),
                                                   left_slots.get(), sigma,    right,   left};
    locallip::cuda::masked_norm_dense(problem, nullptr);
    return "";
  });
}
