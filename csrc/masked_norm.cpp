// Norms of masked operators, and which of them a GPU computes on chip.
#include "masked_norm.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "operator.h"
#include "ops.h"
#include "streaming.h"

namespace locallip {
namespace {

// A weight by itself, whose products are the same for every sample.
struct OneOperator {
  Operator op;

  const Tensor& weight() const { return op.weight; }
  void apply_into(Tensor& out, const Tensor& x, int64_t) const { op.apply_into(out, x); }
  void adjoint_into(Tensor& out, const Tensor& y, const Tensor& like, int64_t) const { op.adjoint_into(out, y, like); }
  int64_t samples_at_once(int64_t length) const { return op.samples_at_once(length); }
  OneOperator in_bfloat16() const { return {op.in_bfloat16()}; }
};

#if defined(LOCALLIP_CUDA) || defined(LOCALLIP_EMULATED_CUDA)
// Whether the kernel of a convolution is faster than the library's products of whole batches. Its phases beside the
// iteration want some iterations to pay; where the library has tensor cores' rate, large clusters do not keep up; and a
// block of few pixels waits for the weights. (By cycles counted for the kernel, bench/counts.py, whose model is within
// a tenth of times measured on an H200, and by the measured times of the library; not by times of this kernel.)
bool on_chip_is_faster(const ConvolutionGeometry& g, Precision precision, int blocks, int64_t iterations) {
  const bool tensor_cores = precision != Precision::kFloat32;
  return iterations >= (tensor_cores ? 2 : 1) && blocks <= (tensor_cores ? 2 : 8) &&
         g.out_height * g.out_width >= 24 * blocks;
}

// The one place that chooses how a GPU computes norms: on chip in one kernel where the layer fits, needs no restart and
// gains by it, else by the streaming path (false). LOCALLIP_STREAMING=1 or 0 decides it, for measuring one
// against the other.
bool resident_masked_norm(NormProblem& in, const Operator& op, bool bfloat16) {
  const Tensor& weight = op.weight;
#ifndef LOCALLIP_EMULATED_CUDA
  if (!weight.is_cuda()) return false;
#endif
  const char* asked = std::getenv("LOCALLIP_STREAMING");
  const std::string streaming = asked ? asked : "";
  if (streaming == "1") return false;
  if (in.iterations + 1 > kWindow) return false;
  const auto iterations = static_cast<int>(in.iterations);
  const auto slots = [&](int64_t count, int64_t units) { return at::empty({count, in.batch, units}, in.options()); };
  if (weight.dim() == 2) {
    bool fits = false;
    AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "masked_norm", [&] {
      fits = in.rows <= kWindow || cuda::dense_fits<scalar_t>(in.rows, in.columns);
      if (!fits) return;
      const Tensor right = slots(iterations + 1, in.columns), left = slots(iterations + 1, in.rows);
      const DenseProblem<scalar_t> problem = {weight.const_data_ptr<scalar_t>(),
                                              static_cast<int>(in.rows),
                                              static_cast<int>(in.columns),
                                              in.batch,
                                              iterations,
                                              bytes(in.row_mask),
                                              bytes(in.col_mask),
                                              pointer<scalar_t>(in.start),
                                              in.own_start(),
                                              right.mutable_data_ptr<scalar_t>(),
                                              left.mutable_data_ptr<scalar_t>(),
                                              in.sigma.mutable_data_ptr<scalar_t>(),
                                              in.right.mutable_data_ptr<scalar_t>(),
                                              in.left.mutable_data_ptr<scalar_t>()};
      cuda::masked_norm_dense(problem, LOCALLIP_CURRENT_STREAM);
    });
    return fits;
  }
  const bool plain = op.groups == 1 && op.dilation == std::vector<int64_t>{1, 1};
  if (weight.scalar_type() != at::kFloat || !plain) return false;
  const auto size = [](const auto& sizes, int i) { return static_cast<int>(sizes[i]); };
  const ConvolutionGeometry geometry = {size(in.input_shape, 1),  size(in.input_shape, 2),  size(in.input_shape, 3),
                                        size(in.output_shape, 1), size(in.output_shape, 2), size(in.output_shape, 3),
                                        size(weight.sizes(), 2),  size(weight.sizes(), 3),  size(op.stride, 0),
                                        size(op.stride, 1),       size(op.padding, 0),      size(op.padding, 1)};
  const auto precision = bfloat16 && bfloat16_is_fast(weight) ? Precision::kBfloat16
                         : tf32_is_wanted()                   ? Precision::kTf32
                                                              : Precision::kFloat32;
  const int blocks = cuda::convolution_blocks(geometry, precision);
  if (blocks == 0) return false;
  if (streaming != "0" && !on_chip_is_faster(geometry, precision, blocks, in.iterations)) return false;
  const auto [packed_words, right_words, left_words] =
      cuda::convolution_scratch(geometry, precision, in.batch, iterations);
  const auto words = [&](int64_t count) { return at::empty({count}, in.options().dtype(at::kInt)); };
  const Tensor packed = words(packed_words), right = words(right_words), left = words(left_words), exponent = words(1);
  const auto bits = [](const Tensor& t) { return reinterpret_cast<uint32_t*>(t.mutable_data_ptr<int>()); };
  const ConvolutionProblem problem = {geometry,
                                      in.batch,
                                      iterations,
                                      bytes(in.row_mask),
                                      bytes(in.col_mask),
                                      pointer<float>(in.start),
                                      in.own_start(),
                                      bits(packed),
                                      bits(right),
                                      bits(left),
                                      in.sigma.mutable_data_ptr<float>(),
                                      in.right.mutable_data_ptr<float>(),
                                      in.left.mutable_data_ptr<float>(),
                                      exponent.mutable_data_ptr<int>()};
  cuda::masked_norm_convolution(problem, weight.const_data_ptr<float>(), precision, LOCALLIP_CURRENT_STREAM);
  return true;
}
#else
bool resident_masked_norm(NormProblem&, const Operator&, bool) { return false; }
#endif

}  // namespace

std::tuple<Tensor, Tensor, Tensor> masked_norm(const Tensor& weight, const OptionalTensor& row_mask,
                                               const OptionalTensor& col_mask, const OptionalTensor& start,
                                               IntArrayRef input_shape, IntArrayRef stride, IntArrayRef padding,
                                               IntArrayRef dilation, int64_t groups, int64_t iterations,
                                               bool bfloat16) {
  const c10::OptionalDeviceGuard on_device(at::device_of(weight));
  const Tf32OnRequest precision;
  check_geometry(stride, padding, dilation);
  // with few rows (a last layer's classes) this exhausts the Krylov space at next to no cost
  if (weight.dim() == 2 && weight.size(0) <= kWindow) iterations = std::max(iterations, weight.size(0) - 1);
  TORCH_CHECK(weight.dim() == 2 || weight.dim() == 4, "weight: got ", weight.dim(), " dimensions, want 2 or 4");
  const Operator op{laid_out(weight.detach()), stride.vec(), padding.vec(), dilation.vec(), groups};
  NormProblem in(weight, row_mask, col_mask, start, input_shape, op.output_sizes(input_shape), iterations);
  if (in.batch == 0) return {in.sigma, in.right, in.left};
  if (!resident_masked_norm(in, op, bfloat16)) stream_norm(in, OneOperator{op}, bfloat16);
  // a NaN or infinite weight in a masked row or column would otherwise stay unseen
  in.sigma.add_(op.weight.mul(0).sum());
  return {in.sigma, in.right, in.left};
}

// d sigma = left^T diag(row) dW diag(col) right with the singular vectors held constant; they are zero where the masks
// are.
Tensor masked_norm_backward(const Tensor& grad, const Tensor& weight, const Tensor& right, const Tensor& left,
                            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const c10::OptionalDeviceGuard on_device(at::device_of(weight));
  const Tf32OnRequest precision;
  const Operator op{weight, stride.vec(), padding.vec(), dilation.vec(), groups};
  if (right.size(0) == 0) return at::zeros_like(weight);
  std::vector<int64_t> shape(left.dim(), 1);
  shape[0] = -1;
  // the factor goes to the smaller of the two
  const Tensor factor = grad.view(shape);
  return left.numel() < right.numel()
             ? std::get<1>(op.gradients(laid_out(left * factor), laid_out(right), false, true))
             : std::get<1>(op.gradients(laid_out(left), laid_out(right * factor), false, true));
}

}  // namespace locallip
