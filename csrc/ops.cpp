// The ops' schemas, their dispatch and the pybind11 module: the only file that knows torch's registration.
#include "ops.h"

#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <string>
#include <vector>

namespace locallip {

TORCH_LIBRARY(locallip_cuda, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::string conv = "int[] stride, int[] padding, int[] dilation, int groups";
  const std::string bounds =
      "Tensor values, Tensor? half_width, Tensor squared_row_norms, Tensor radius, str activation, "
      "Tensor? first, Tensor? second, bool box_behind";
  const std::string last = "Tensor features, Tensor lower, Tensor upper, Tensor radius, Tensor weight, Tensor labels";
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  define("affine(Tensor x, Tensor weight, Tensor? bias, " + conv + ", bool bfloat16) -> Tensor");
  define("affine_backward(Tensor grad, Tensor x, Tensor weight, " + conv +
         ", bool bfloat16, bool of_input, bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)");
  define("masked_norm(Tensor weight, Tensor? row_mask, Tensor? col_mask, Tensor? start, SymInt[] input_shape, " + conv +
         ", int iterations, bool bfloat16) -> (Tensor sigma, Tensor right, Tensor left)");
  define("masked_norm_backward(Tensor grad, Tensor weight, Tensor right, Tensor left, " + conv + ") -> Tensor");
  const std::string convs = "int[] stride, int[] padding, int[] dilation, int[] groups";
  define(
      "chain_norm(Tensor[] weights, Tensor[] masks, Tensor? row_mask, Tensor? col_mask, Tensor? start, "
      "SymInt[] input_shape, " +
      convs + ", int iterations, bool bfloat16) -> (Tensor sigma, Tensor right, Tensor left)");
  define("chain_norm_backward(Tensor grad, Tensor[] weights, Tensor[] masks, Tensor right, Tensor left, " + convs +
         ") -> Tensor[]");
  define("activation_pattern(" + bounds +
         ") -> (Tensor values, Tensor half_width, Tensor row_mask, Tensor col_mask, Tensor slack, Tensor varying)");
  define("activation_pattern_backward(Tensor grad_values, Tensor grad_half_width, Tensor grad_slack, " + bounds +
         ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  define("margin(" + last + ") -> (Tensor gain, Tensor step)");
  define("lanczos_bound(Tensor alpha, Tensor beta, Tensor error, Tensor level) -> (Tensor theta, Tensor upper)");
  define("margin_backward(Tensor grad_gain, Tensor step, " + last + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#define LOCALLIP_REGISTER(KEY)                                           \
  TORCH_LIBRARY_IMPL(locallip_cuda, KEY, m) {                            \
    m.impl("affine", &affine);                                           \
    m.impl("affine_backward", &affine_backward);                         \
    m.impl("masked_norm", &masked_norm);                                 \
    m.impl("masked_norm_backward", &masked_norm_backward);               \
    m.impl("chain_norm", &chain_norm);                                   \
    m.impl("chain_norm_backward", &chain_norm_backward);                 \
    m.impl("activation_pattern", &activation_pattern);                   \
    m.impl("activation_pattern_backward", &activation_pattern_backward); \
    m.impl("margin", &margin);                                           \
    m.impl("margin_backward", &margin_backward);                         \
  }
LOCALLIP_REGISTER(CPU)
TORCH_LIBRARY_IMPL(locallip_cuda, CPU, m) { m.impl("lanczos_bound", &lanczos_bound); }
#ifdef LOCALLIP_CUDA
LOCALLIP_REGISTER(CUDA)
#else
namespace {
// torch's own error would not say that the cause is this build
void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(),
              ": got a tensor on a GPU, but this locallip_cuda was built for the CPU alone: "
              "locallip_cuda.build_info()[\"reason\"] says why");
}
}  // namespace

TORCH_LIBRARY_IMPL(locallip_cuda, CUDA, m) {
  for (const char* op : {"affine", "masked_norm", "chain_norm", "activation_pattern", "margin"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
}
#endif

}  // namespace locallip

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Registers the ops torch.ops.locallip_cuda.*; call them through locallip_cuda.ops.";
}
