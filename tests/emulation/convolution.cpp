// Calls the kernel of convolutions of csrc/masked_norm.h on arrays of the caller's, without torch.
#include "masked_norm.h"

#include <cstddef>
#include <type_traits>
#include <vector>

namespace {

// What the op takes for a precision: whether it is float32 rather than TF32, or an enum.
template <typename Precision>
void call(void (*op)(const locallip::ConvolutionProblem&, const float*, Precision, void*),
          const locallip::ConvolutionProblem& problem, const float* weight, int precision) {
  if constexpr (std::is_same_v<Precision, bool>)
    op(problem, weight, precision == 0, nullptr);
  else
    op(problem, weight, static_cast<Precision>(precision), nullptr);
}

}  // namespace

// geometry: as the struct's fields follow one another; precision: 0 float32, 1 TF32, 2 bfloat16. Returns 0 where the
// layer does not fit.
extern "C" int locallip_convolution_norms(const int* geometry, int batch, int iterations, const uint8_t* row_mask,
                                          const uint8_t* col_mask, const float* start, const float* weight,
                                          int precision, float* sigma, float* right, float* left) {
  const int* g = geometry;
  const locallip::ConvolutionGeometry of = {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11]};
  if (!locallip::cuda::convolution_fits(of, batch)) return 0;
  const size_t steps = static_cast<size_t>(iterations) * batch;
  std::vector<float> packed(locallip::cuda::packed_weight_floats(of) + 4), right_slots(steps * g[0] * g[1] * g[2] + 1),
      left_slots(steps * g[3] * g[4] * g[5] + 1);
  int exponent = 0;
  const locallip::ConvolutionProblem problem = {of,
                                                batch,
                                                iterations,
                                                row_mask,
                                                col_mask,
                                                start,
                                                true,
                                                packed.data(),
                                                right_slots.data(),
                                                left_slots.data(),
                                                sigma,
                                                right,
                                                left,
                                                &exponent};
  call(locallip::cuda::masked_norm_convolution, problem, weight, precision);
  return 1;
}
