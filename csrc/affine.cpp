// Affine layers: products by torch's libraries.
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <utility>

#include "operator.h"
#include "ops.h"

namespace locallip {
namespace {

Tensor narrowed(const Tensor& t, bool bfloat16) { return bfloat16 ? t.to(at::kBFloat16) : t; }

// The samples from the first to the last whose gradient is not zero. Where the ball bounds every unit of a layer, the
// box's half of the batch has none, and its convolutions need not run. Known on the CPU alone: a GPU would have to be
// waited for.
std::pair<int64_t, int64_t> samples_with_gradient(const Tensor& grad) {
  int64_t first = 0, last = grad.size(0);
  if (!grad.is_cpu() || grad.numel() == 0) return {first, last};
  const int64_t length = grad.numel() / last;
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "samples_with_gradient", [&] {
    const auto* g = grad.const_data_ptr<scalar_t>();
    const auto zero = [&](int64_t b) {
      return std::all_of(g + b * length, g + (b + 1) * length, [](scalar_t v) { return v == 0; });
    };
    while (first < last && zero(first)) ++first;
    while (last > first && zero(last - 1)) --last;
  });
  return {first, last};
}

}  // namespace

Tensor affine(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
              IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool bfloat16) {
  const c10::OptionalDeviceGuard on_device(at::device_of(weight));
  const Tf32OnRequest precision;
  check_geometry(stride, padding, dilation);
  const Operator op{narrowed(weight, bfloat16), stride.vec(), padding.vec(), dilation.vec(), groups};
  const OptionalTensor shift = bias ? OptionalTensor(narrowed(*bias, bfloat16)) : std::nullopt;
  return op.apply(narrowed(laid_out(x), bfloat16), shift).to(weight.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> affine_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& weight,
                                                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                   int64_t groups, bool bfloat16, bool of_input, bool of_weight,
                                                   bool of_bias) {
  const c10::OptionalDeviceGuard on_device(at::device_of(weight));
  const Tf32OnRequest precision;
  const auto options = weight.options().requires_grad(false);
  const Tensor grad = laid_out(grad_in), x = laid_out(x_in);
  const auto [first, last] = samples_with_gradient(grad);
  Tensor to_x = of_input ? empty(x.sizes(), options) : at::empty({0}, options);
  Tensor to_weight = of_weight ? at::empty_like(weight) : at::empty({0}, options);
  Tensor to_bias = at::empty({0}, options);
  if (of_bias) to_bias = weight.dim() == 2 ? grad.sum(0) : grad.sum(IntArrayRef{0, 2, 3});
  if (first == last) return {of_input ? to_x.zero_() : to_x, of_weight ? to_weight.zero_() : to_weight, to_bias};
  const Operator op{narrowed(weight, bfloat16), stride.vec(), padding.vec(), dilation.vec(), groups};
  const auto part = [&](const Tensor& t) { return narrowed(t.narrow(0, first, last - first), bfloat16); };
  const auto [input, kernel] = op.gradients(part(grad), part(x), of_input, of_weight);
  if (of_input && last - first == x.size(0) && !bfloat16) {
    to_x = input;
  } else if (of_input) {
    to_x.narrow(0, 0, first).zero_();
    to_x.narrow(0, first, last - first).copy_(input);
    to_x.narrow(0, last, x.size(0) - last).zero_();
  }
  if (of_weight) to_weight = kernel.to(weight.scalar_type()).contiguous(weight.suggest_memory_format());
  return {to_x, to_weight, to_bias};
}

}  // namespace locallip
