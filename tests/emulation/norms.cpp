// Calls the resident kernels of csrc/masked_norm.h on arrays of the caller's, without torch. Each returns null, or what
// went wrong.
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <type_traits>

#include "masked_norm.h"

namespace {

using locallip::ConvolutionProblem;

// What the op takes for a precision: whether it is float32 rather than TF32, or an enum.
template <typename Precision>
bool call(void (*op)(const ConvolutionProblem&, const float*, Precision, void*), const ConvolutionProblem& problem,
          const float* weight, int precision) {
  if constexpr (std::is_same_v<Precision, bool>) {
    if (precision > 1) return false;
    op(problem, weight, precision == 0, nullptr);
  } else {
    op(problem, weight, static_cast<Precision>(precision), nullptr);
  }
  return true;
}

// Scratch, aligned as a GPU's allocator does it, of NaN.
std::unique_ptr<float, decltype(&std::free)> scratch(size_t floats) {
  const size_t bytes = floats * sizeof(float) / 256 * 256 + 256;
  std::unique_ptr<float, decltype(&std::free)> memory(static_cast<float*>(std::aligned_alloc(256, bytes)), &std::free);
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

// geometry: as the struct's fields follow one another; precision: 0 float32, 1 TF32, 2 bfloat16.
extern "C" const char* locallip_convolution_norms(const int* geometry, int batch, int iterations,
                                                  const uint8_t* row_mask, const uint8_t* col_mask, const float* start,
                                                  const float* weight, int precision, float* sigma, float* right,
                                                  float* left) {
  return guarded([&]() -> const char* {
    const int* g = geometry;
    const locallip::ConvolutionGeometry of = {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11]};
    if (!locallip::cuda::convolution_fits(of, batch)) return "the layer does not fit on chip";
    const size_t steps = static_cast<size_t>(iterations) * batch;
    const auto packed = scratch(locallip::cuda::packed_weight_floats(of)),
               right_slots = scratch(steps * g[0] * g[1] * g[2]), left_slots = scratch(steps * g[3] * g[4] * g[5]);
    int exponent = 0;
    const ConvolutionProblem problem = {of,    batch, iterations,   row_mask,          col_mask,
                                        start, true,  packed.get(), right_slots.get(), left_slots.get(),
                                        sigma, right, left,         &exponent};
    return call(locallip::cuda::masked_norm_convolution, problem, weight, precision)
               ? ""
               : "the kernel has no such precision";
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
    const auto right_slots = scratch(steps * columns), left_slots = scratch(steps * rows);
    const locallip::DenseProblem<float> problem = {weight,           rows,     columns, batch, iterations,
                                                   row_mask,         col_mask, start,   true,  right_slots.get(),
                                                   left_slots.get(), sigma,    right,   left};
    locallip::cuda::masked_norm_dense(problem, nullptr);
    return "";
  });
}
