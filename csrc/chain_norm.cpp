// Norms of chains: weights in a row with masks between them, as one operator, by the streaming path.
#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "ops.h"
#include "streaming.h"

namespace locallip {
namespace {

// Samples that a dense weight, which is read again for every group of them, is at least worth.
constexpr int64_t kDenseGroup = 32;

// masks[k] lies between stages k and k + 1, in the shape in which the latter takes its input; of a batch of one, too.
struct Chain {
  std::vector<Operator> stages;
  std::vector<Tensor> masks;
  std::vector<std::vector<int64_t>> inputs;  // of every stage, and the output of the last one

  Chain(at::TensorList weights, at::TensorList masks_in, IntArrayRef input, IntArrayRef stride, IntArrayRef padding,
        IntArrayRef dilation, IntArrayRef groups) {
    const size_t count = weights.size();
    TORCH_CHECK(count > 1, "weights: got ", count, ", want two or more");
    TORCH_CHECK(masks_in.size() + 1 == count, "masks: got ", masks_in.size(), ", want ", count - 1);
    for (const IntArrayRef numbers : {stride, padding, dilation})
      TORCH_CHECK(numbers.size() == 2 * count, "stride, padding, dilation: got ", numbers,
                  ", want two numbers a weight");
    TORCH_CHECK(groups.size() == count, "groups: got ", groups, ", want a number a weight");
    std::vector<int64_t> sizes = input.vec();
    for (size_t k = 0; k < count; ++k) {
      const Tensor& weight = weights[k];
      TORCH_CHECK(weight.dim() == 2 || weight.dim() == 4, "weights: got ", weight.dim(), " dimensions, want 2 or 4");
      TORCH_CHECK(weight.device() == weights[0].device() && weight.scalar_type() == weights[0].scalar_type(),
                  "weights: got ", weight.scalar_type(), " on ", weight.device(), " beside ", weights[0].scalar_type(),
                  " on ", weights[0].device(), ", want one dtype and device");
      const auto pair = [&](IntArrayRef numbers) { return numbers.slice(2 * k, 2).vec(); };
      stages.push_back({laid_out(weight.detach()), pair(stride), pair(padding), pair(dilation), groups[k]});
      TORCH_CHECK(
          static_cast<int64_t>(sizes.size()) == weight.dim() && (weight.dim() == 4 || sizes[1] == weight.size(1)),
          "weights: got shape ", weight.sizes(), " for an input of shape ", sizes);
      inputs.push_back(sizes);
      sizes = stages[k].output_sizes(sizes);
      if (k + 1 == count) break;
      const Tensor& mask = masks_in[k];
      const int64_t units = c10::multiply_integers(IntArrayRef(sizes).slice(1));
      TORCH_CHECK(
          (mask.size(0) == input[0] || mask.size(0) == 1) && c10::multiply_integers(mask.sizes().slice(1)) == units,
          "masks: got shape ", mask.sizes(), ", want ", units, " units of ", input[0], " samples");
      TORCH_CHECK(mask.scalar_type() == at::kBool && mask.device() == weight.device(), "masks: got ",
                  mask.scalar_type(), " on ", mask.device(), ", want bool on ", weight.device());
      masks.push_back(laid_out(mask));
      sizes = with_batch(input[0], mask.sizes());
    }
    inputs.push_back(sizes);
  }

  const Tensor& weight() const { return stages[0].weight; }

  // Stage k's output as stage k + 1 takes it; `x` is written over where that is possible.
  Tensor between(const Tensor& x, size_t k, int64_t first) const {
    const Tensor moved = laid_out(x.reshape(with_batch(x.size(0), masks[k].sizes())));
    return moved.mul_(masks[k].size(0) == 1 ? masks[k] : masks[k].narrow(0, first, x.size(0)));
  }

  // What stage k + 1's transpose gives, as stage k's takes it.
  Tensor back_between(const Tensor& y, size_t k, int64_t first) const {
    const Tensor masked = y.mul_(masks[k].size(0) == 1 ? masks[k] : masks[k].narrow(0, first, y.size(0)));
    return laid_out(masked.reshape(with_batch(y.size(0), stages[k].output_sizes(inputs[k]))));
  }

  Tensor adjoint_of(size_t k, const Tensor& y) const {
    Tensor out = at::empty({0}, y.options());
    stages[k].adjoint_into(out, y, empty(with_batch(y.size(0), inputs[k]), y.options()));
    return out;
  }

  void apply_into(Tensor& out, const Tensor& x, int64_t first) const {
    Tensor value = stages[0].apply(x);
    for (size_t k = 1; k < stages.size(); ++k) value = stages[k].apply(between(value, k - 1, first));
    out = value;
  }

  void adjoint_into(Tensor& out, const Tensor& y, const Tensor&, int64_t first) const {
    Tensor value = adjoint_of(stages.size() - 1, y);
    for (size_t k = stages.size() - 1; k-- > 0;) value = adjoint_of(k, back_between(value, k, first));
    out = value;
  }

  Chain in_bfloat16() const {
    Chain narrowed = *this;
    for (Operator& op : narrowed.stages) op = op.in_bfloat16();
    return narrowed;
  }

  int64_t samples_at_once(int64_t length) const {
    int64_t least = std::numeric_limits<int64_t>::max();
    bool dense = false;
    for (const Operator& op : stages) {
      least = std::min(least, op.samples_at_once(length));
      dense = dense || op.weight.dim() == 2;
    }
    return dense ? std::max(least, kDenseGroup) : least;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> chain_norm(at::TensorList weights, at::TensorList masks,
                                              const OptionalTensor& row_mask, const OptionalTensor& col_mask,
                                              const OptionalTensor& start, IntArrayRef input_shape, IntArrayRef stride,
                                              IntArrayRef padding, IntArrayRef dilation, IntArrayRef groups,
                                              int64_t iterations, bool bfloat16) {
  TORCH_CHECK(!weights.empty(), "weights: got none, want two or more");
  const c10::OptionalDeviceGuard on_device(at::device_of(weights[0]));
  const Tf32OnRequest precision;
  const Chain chain(weights, masks, input_shape, stride, padding, dilation, groups);
  NormProblem in(chain.weight(), row_mask, col_mask, start, input_shape, chain.inputs.back(), iterations);
  if (in.batch == 0) return {in.sigma, in.right, in.left};
  stream_norm(in, chain, bfloat16);
  // a NaN or infinite weight in a masked row or column would otherwise stay unseen
  for (const Operator& op : chain.stages) in.sigma.add_(op.weight.mul(0).sum());
  return {in.sigma, in.right, in.left};
}

// d sigma = left^T (what is behind) dW_k (what is before) right for every weight, with the singular vectors held
// constant.
std::vector<Tensor> chain_norm_backward(const Tensor& grad, at::TensorList weights, at::TensorList masks,
                                        const Tensor& right, const Tensor& left, IntArrayRef stride,
                                        IntArrayRef padding, IntArrayRef dilation, IntArrayRef groups) {
  const c10::OptionalDeviceGuard on_device(at::device_of(grad));
  const Tf32OnRequest precision;
  const Chain chain(weights, masks, right.sizes(), stride, padding, dilation, groups);
  const size_t count = weights.size();
  std::vector<Tensor> found(count);
  if (right.size(0) == 0) {
    for (size_t k = 0; k < count; ++k) found[k] = at::zeros_like(weights[k]);
    return found;
  }
  std::vector<Tensor> before = {laid_out(right)};
  for (size_t k = 0; k + 1 < count; ++k) before.push_back(chain.between(chain.stages[k].apply(before[k]), k, 0));
  std::vector<int64_t> shape(left.dim(), 1);
  shape[0] = -1;
  Tensor behind = laid_out(left * grad.view(shape));
  for (size_t k = count; k-- > 0;) {
    found[k] = std::get<1>(chain.stages[k].gradients(behind, before[k], false, true));
    if (k > 0) behind = chain.back_between(chain.adjoint_of(k, behind), k - 1, 0);
  }
  return found;
}

}  // namespace locallip
