// Activation patterns and their gradients.
#include "activation_pattern.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <string>

#include "ops.h"

namespace locallip {
namespace {

Activation activation_named(const std::string& name) {
  if (name == "identity") return Activation::kIdentity;
  if (name == "relu") return Activation::kRelu;
  if (name == "clipped_relu") return Activation::kClippedRelu;
  if (name == "maxmin") return Activation::kMaxMin;
  if (name == "clipped_maxmin") return Activation::kClippedMaxMin;
  TORCH_CHECK(false, "activation: got ", name, ", want identity, relu, clipped_relu, maxmin or clipped_maxmin");
}

// The inputs of the op, laid out and checked, and the shapes that follow.
struct Pattern {
  Activation activation;
  bool paired, box;
  Tensor values, row_norms, radius;
  OptionalTensor half_width, first, second;
  int64_t batch, outer, inner;
  std::vector<int64_t> sizes;  // of one array over the batch

  Pattern(const Tensor& values_in, const OptionalTensor& half_width_in, const Tensor& row_norms_in,
          const Tensor& radius_in, const std::string& name, const OptionalTensor& first_in,
          const OptionalTensor& second_in)
      : activation(activation_named(name)),
        paired(is_paired(activation)),
        box(half_width_in.has_value()),
        values(laid_out(values_in)),
        row_norms(laid_out(row_norms_in)),
        radius(radius_in.contiguous()),
        half_width(laid_out(half_width_in)),
        batch(radius_in.size(0)) {
    sizes = with_batch(batch, values.sizes());
    TORCH_CHECK(values.dim() >= 2 && values.dim() != 3 && values.dim() <= 4, "values: got shape ", values.sizes(),
                ", want (B, units) or (B, C, H, W)");
    TORCH_CHECK(values.size(0) == (box ? 2 * batch : batch), "values: got ", values.size(0), " rows, want ",
                box ? 2 * batch : batch);
    TORCH_CHECK(!box || half_width->sizes() == IntArrayRef(sizes), "half_width: got shape ",
                box ? half_width->sizes() : sizes, ", want ", sizes);
    TORCH_CHECK(row_norms.sizes() == IntArrayRef(sizes) || row_norms.sizes() == IntArrayRef(with_batch(1, sizes)),
                "squared_row_norms: got shape ", row_norms.sizes(), ", want ", sizes, " or one row of it");
    const int64_t units = batch ? values.numel() / values.size(0) : 0;
    std::vector<int64_t> threshold_sizes = with_batch(1, sizes);
    outer = 1;
    inner = units;
    if (paired) {
      TORCH_CHECK(sizes[1] % 2 == 0, "values: got ", sizes[1], " channels, want an even number for MaxMin");
      threshold_sizes[1] /= 2;
      outer = sizes.size() == 4 ? sizes[2] * sizes[3] : 1;
      inner = sizes[1] / 2;
    }
    const auto take = [&](const char* threshold, const OptionalTensor& t, bool wanted) -> OptionalTensor {
      TORCH_CHECK(t.has_value() == wanted, threshold, ": ", wanted ? "wanted" : "not wanted", " for activation ", name);
      if (!wanted) return std::nullopt;
      TORCH_CHECK(t->sizes() == IntArrayRef(threshold_sizes), threshold, ": got shape ", t->sizes(), ", want ",
                  threshold_sizes);
      return laid_out(*t);
    };
    first = take("first", first_in, activation == Activation::kClippedRelu || activation == Activation::kClippedMaxMin);
    second = take("second", second_in, activation == Activation::kClippedMaxMin);
    for (const auto& t : {OptionalTensor(row_norms), OptionalTensor(radius), half_width, first, second})
      TORCH_CHECK(!t || (t->scalar_type() == values.scalar_type() && t->device() == values.device()),
                  "activation_pattern: got a tensor of ", t->scalar_type(), " on ", t->device(), ", want ",
                  values.scalar_type(), " on ", values.device());
  }

  bool row_norms_shared() const { return row_norms.size(0) != batch || batch == 1; }

  template <typename T>
  ActivationInput<T> input() const {
    const T* clean = values.const_data_ptr<T>();
    return {clean,
            box ? clean + values.numel() / 2 : nullptr,
            pointer<T>(half_width),
            row_norms.const_data_ptr<T>(),
            radius.const_data_ptr<T>(),
            pointer<T>(first),
            pointer<T>(second),
            row_norms_shared(),
            batch,
            outer,
            inner};
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activation_pattern(
    const Tensor& values, const OptionalTensor& half_width, const Tensor& squared_row_norms, const Tensor& radius,
    const std::string& activation, const OptionalTensor& first, const OptionalTensor& second, bool box_behind) {
  const c10::OptionalDeviceGuard on_device(at::device_of(values));
  const Pattern in(values, half_width, squared_row_norms, radius, activation, first, second);
  const auto options = values.options().requires_grad(false);
  Tensor out = empty(with_batch(box_behind ? 2 * in.batch : in.batch, in.sizes), options),
         out_half = empty(box_behind ? IntArrayRef(in.sizes) : IntArrayRef{0}, options);
  Tensor row = empty(in.sizes, options.dtype(at::kBool)), col = empty(in.sizes, options.dtype(at::kBool)), sums;
  const int64_t units = row.numel() / std::max<int64_t>(in.batch, 1);
  if (row.numel() == 0) {
    const Tensor none = at::zeros({in.batch, 2}, options);
    return {out, out_half, row, col, none, none.to(at::kLong)};
  }
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "activation_pattern", [&] {
    const int64_t chunks = LOCALLIP_HOST_RUN(values, activation_pattern_chunks<scalar_t>, in.outer, in.inner, false);
    sums = at::empty({in.batch, chunks, 4}, options);
    auto* clean = out.mutable_data_ptr<scalar_t>();
    const ActivationOutput<scalar_t> to = {clean,
                                           box_behind ? clean + out_half.numel() : nullptr,
                                           box_behind ? out_half.mutable_data_ptr<scalar_t>() : nullptr,
                                           bytes(row),
                                           bytes(col),
                                           sums.mutable_data_ptr<scalar_t>()};
    LOCALLIP_RUN(values, activation_pattern, in.activation, in.input<scalar_t>(), to);
  });
  const Tensor totals = sums.size(1) == 1 ? sums.select(1, 0) : sums.sum(1);
  return {out,
          out_half,
          row,
          col,
          totals.narrow(1, 0, 2) / (in.paired ? units / 2 : units),
          totals.narrow(1, 2, 2).to(at::kLong)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activation_pattern_backward(
    const Tensor& grad_values, const Tensor& grad_half_width, const Tensor& grad_slack, const Tensor& values,
    const OptionalTensor& half_width, const Tensor& squared_row_norms, const Tensor& radius,
    const std::string& activation, const OptionalTensor& first, const OptionalTensor& second, bool box_behind) {
  const c10::OptionalDeviceGuard on_device(at::device_of(values));
  const Pattern in(values, half_width, squared_row_norms, radius, activation, first, second);
  const auto options = values.options().requires_grad(false);
  const auto like = [&](const OptionalTensor& t) { return t ? at::empty_like(*t) : at::empty({0}, options); };
  Tensor out_values = at::empty_like(in.values), out_half = like(in.half_width);
  if (in.values.numel() == 0)
    return {out_values,
            out_half,
            at::zeros_like(in.row_norms),
            at::zeros_like(radius),
            like(in.first).zero_(),
            like(in.second).zero_()};
  const Tensor g_values = laid_out(grad_values), g_half = laid_out(grad_half_width);
  const int64_t units = in.paired ? 2 * in.outer * in.inner : in.inner;
  const Tensor g_slack = (grad_slack / (in.paired ? units / 2 : units)).contiguous();
  const bool shared = in.row_norms_shared();
  Tensor out_norms, out_radius, out_first, out_second;
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "activation_pattern_backward", [&] {
    const int64_t chunks = LOCALLIP_HOST_RUN(values, activation_pattern_chunks<scalar_t>, in.outer, in.inner, true);
    const int64_t slices = LOCALLIP_HOST_RUN(values, activation_pattern_slices<scalar_t>, in.batch, in.outer, in.inner);
    // what the samples share comes as sums over slices of the batch
    const auto sliced = [&](const OptionalTensor& t) {
      return t ? empty(with_batch(slices, t->sizes()), options) : at::empty({0}, options);
    };
    out_norms = shared ? sliced(in.row_norms) : at::empty_like(in.row_norms);
    out_radius = at::empty({chunks, in.batch}, options);
    out_first = sliced(in.first);
    out_second = sliced(in.second);
    const auto* g = g_values.const_data_ptr<scalar_t>();
    const ActivationOutputGrad<scalar_t> from = {g, box_behind ? g + g_half.numel() : nullptr,
                                                 box_behind ? g_half.const_data_ptr<scalar_t>() : nullptr,
                                                 g_slack.const_data_ptr<scalar_t>()};
    auto* clean = out_values.mutable_data_ptr<scalar_t>();
    const ActivationInputGrad<scalar_t> to = {clean,
                                              in.box ? clean + in.values.numel() / 2 : nullptr,
                                              in.box ? out_half.mutable_data_ptr<scalar_t>() : nullptr,
                                              out_norms.mutable_data_ptr<scalar_t>(),
                                              out_radius.mutable_data_ptr<scalar_t>(),
                                              in.first ? out_first.mutable_data_ptr<scalar_t>() : nullptr,
                                              in.second ? out_second.mutable_data_ptr<scalar_t>() : nullptr};
    LOCALLIP_RUN(values, activation_pattern_backward, in.activation, in.input<scalar_t>(), from, to);
  });
  const auto total = [](const Tensor& t) { return t.size(0) <= 1 ? t : laid_out(t.sum(0, /*keepdim=*/true)); };
  return {out_values,        out_half,         shared ? total(out_norms) : out_norms,
          out_radius.sum(0), total(out_first), total(out_second)};
}

}  // namespace locallip
