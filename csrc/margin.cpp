// Margins of the last layer and their gradients.
#include "margin.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include "ops.h"

namespace locallip {
namespace {

struct Margin {
  Tensor features, lower, upper, radius, weight, labels;

  Margin(const Tensor& features_in, const Tensor& lower_in, const Tensor& upper_in, const Tensor& radius_in,
         const Tensor& weight_in, const Tensor& labels_in)
      : features(features_in.contiguous()),
        lower(lower_in.contiguous()),
        upper(upper_in.contiguous()),
        radius(radius_in.contiguous()),
        weight(weight_in.contiguous()),
        labels(labels_in.contiguous()) {
    TORCH_CHECK(features.dim() == 2 && lower.sizes() == features.sizes() && upper.sizes() == features.sizes(),
                "features, lower, upper: got shapes ", features.sizes(), ", ", lower.sizes(), ", ", upper.sizes(),
                ", want one (B, h)");
    TORCH_CHECK(weight.dim() == 2 && weight.size(1) == features.size(1), "weight: got shape ", weight.sizes(),
                ", want (K, ", features.size(1), ")");
    TORCH_CHECK(radius.sizes() == IntArrayRef({features.size(0)}), "radius: got shape ", radius.sizes(), ", want (B,)");
    TORCH_CHECK(labels.sizes() == radius.sizes() && labels.scalar_type() == at::kLong, "labels: got ",
                labels.scalar_type(), " ", labels.sizes(), ", want int64 (B,)");
    for (const Tensor& t : {lower, upper, radius, weight})
      TORCH_CHECK(t.scalar_type() == features.scalar_type() && t.device() == features.device(),
                  "margin: got a tensor of ", t.scalar_type(), " on ", t.device(), ", want ", features.scalar_type(),
                  " on ", features.device());
    TORCH_CHECK(labels.device() == features.device(), "labels: got device ", labels.device(), ", want ",
                features.device());
  }

  template <typename T>
  MarginInput<T> input() const {
    return {features.const_data_ptr<T>(),
            lower.const_data_ptr<T>(),
            upper.const_data_ptr<T>(),
            radius.const_data_ptr<T>(),
            weight.const_data_ptr<T>(),
            labels.const_data_ptr<int64_t>(),
            features.size(0),
            weight.size(0),
            features.size(1)};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> margin(const Tensor& features, const Tensor& lower, const Tensor& upper,
                                  const Tensor& radius, const Tensor& weight, const Tensor& labels) {
  const c10::OptionalDeviceGuard on_device(at::device_of(features));
  const Margin in(features, lower, upper, radius, weight, labels);
  Tensor gain = at::empty({features.size(0), weight.size(0)}, features.options().requires_grad(false));
  Tensor step = at::empty_like(gain);
  if (gain.numel() == 0) return {gain, step};
  AT_DISPATCH_FLOATING_TYPES(features.scalar_type(), "margin", [&] {
    LOCALLIP_RUN(features, margin, in.input<scalar_t>(), gain.mutable_data_ptr<scalar_t>(),
                 step.mutable_data_ptr<scalar_t>());
  });
  return {gain, step};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> margin_backward(const Tensor& grad_gain, const Tensor& step,
                                                                   const Tensor& features, const Tensor& lower,
                                                                   const Tensor& upper, const Tensor& radius,
                                                                   const Tensor& weight, const Tensor& labels) {
  const c10::OptionalDeviceGuard on_device(at::device_of(features));
  const Margin in(features, lower, upper, radius, weight, labels);
  Tensor to_features = at::empty_like(in.features), to_lower = at::empty_like(in.lower),
         to_upper = at::empty_like(in.upper);
  Tensor to_radius = at::empty_like(in.radius), moved = at::empty_like(in.features);
  if (grad_gain.numel() == 0)
    return {to_features.zero_(), to_lower.zero_(), to_upper.zero_(), to_radius.zero_(), at::zeros_like(in.weight)};
  const int64_t slices =
      LOCALLIP_HOST_RUN(features, margin_slices, features.size(0), in.weight.size(0), in.weight.size(1));
  Tensor to_weight = at::empty({slices, in.weight.size(0), in.weight.size(1)}, in.weight.options());
  const Tensor grad = grad_gain.contiguous(), at_step = step.contiguous();
  AT_DISPATCH_FLOATING_TYPES(features.scalar_type(), "margin_backward", [&] {
    const MarginGrad<scalar_t> to = {grad.const_data_ptr<scalar_t>(),          at_step.const_data_ptr<scalar_t>(),
                                     to_features.mutable_data_ptr<scalar_t>(), to_lower.mutable_data_ptr<scalar_t>(),
                                     to_upper.mutable_data_ptr<scalar_t>(),    to_radius.mutable_data_ptr<scalar_t>(),
                                     to_weight.mutable_data_ptr<scalar_t>(),   moved.mutable_data_ptr<scalar_t>()};
    LOCALLIP_RUN(features, margin_backward, in.input<scalar_t>(), to);
  });
  return {to_features, to_lower, to_upper, to_radius, slices == 1 ? to_weight[0] : to_weight.sum(0)};
}

}  // namespace locallip
