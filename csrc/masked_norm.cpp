// Norms of masked operators: the streaming path, and which norms a GPU computes on chip.
#include "masked_norm.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

#include "operator.h"
#include "ops.h"

namespace locallip {
namespace {

// Orthonormal vectors of a group of samples: [slot][sample][...], each slot laid out as the operator wants it. A
// smaller group uses the same memory with its slots closer together, as the kernels address them.
struct Basis {
  Tensor slots;
  std::vector<int64_t> sizes;

  Basis(int64_t count, std::vector<int64_t> group, at::TensorOptions options) : sizes(std::move(group)) {
    slots = at::empty({count * c10::multiply_integers(sizes)}, options);
  }

  Tensor at_slot(int64_t slot, int64_t samples) const {
    const int64_t length = c10::multiply_integers(sizes) / sizes[0];
    const Tensor t = slots.narrow(0, slot * samples * length, samples * length);
    return sizes.size() == 4 ? t.view({samples, sizes[2], sizes[3], sizes[1]}).permute({0, 3, 1, 2})
                             : t.view({samples, sizes[1]});
  }
};

// The arguments of the op, laid out and checked, and what it returns.
struct MaskedNorm {
  Operator op;
  OptionalTensor row_mask, col_mask, start;
  std::vector<int64_t> input_shape, output_shape;
  int64_t batch, columns, rows, iterations;
  Tensor sigma, right, left;

  MaskedNorm(const Tensor& weight, const OptionalTensor& row_mask_in, const OptionalTensor& col_mask_in,
             const OptionalTensor& start_in, IntArrayRef input, IntArrayRef stride, IntArrayRef padding,
             IntArrayRef dilation, int64_t groups, int64_t steps)
      : op{laid_out(weight.detach()), stride.vec(), padding.vec(), dilation.vec(), groups},
        row_mask(laid_out(row_mask_in)),
        col_mask(laid_out(col_mask_in)),
        start(laid_out(start_in)),
        input_shape(input.vec()),
        iterations(steps) {
    TORCH_CHECK(weight.dim() == 2 || weight.dim() == 4, "weight: got ", weight.dim(), " dimensions, want 2 or 4");
    TORCH_CHECK(iterations >= 0, "iterations: got ", iterations, ", want at least 0");
    output_shape = op.output_sizes(input);
    const auto check = [&](const char* name, const OptionalTensor& t, IntArrayRef sizes, bool broadcast) {
      if (!t) return;
      TORCH_CHECK(t->device() == weight.device(), name, ": got device ", t->device(), ", want ", weight.device());
      TORCH_CHECK(t->sizes() == sizes || (broadcast && t->sizes() == IntArrayRef(with_batch(1, sizes))), name,
                  ": got shape ", t->sizes(), ", want ", sizes);
    };
    check("row_mask", row_mask, output_shape, false);
    check("col_mask", col_mask, input_shape, false);
    check("start", start, input_shape, true);
    const auto options = weight.options().requires_grad(false);
    batch = input_shape[0];
    right = empty(input_shape, options);
    left = empty(output_shape, options);
    sigma = at::empty({batch}, options);
    columns = batch ? right.numel() / batch : 0;
    rows = batch ? left.numel() / batch : 0;
  }

  bool own_start() const { return start && start->size(0) > 1; }
  at::TensorOptions options() const { return sigma.options(); }
};

// Products of the whole batch by torch's libraries, and the kernels of masked_norm.h between them.
void stream_masked_norm(MaskedNorm& in) {
  // A few samples at a time on the CPU, so that their bases stay in cache from one pass to the next. Buffers are
  // reused.
  const Operator& op = in.op;
  const int64_t rows = in.rows, columns = in.columns, iterations = in.iterations;
  const int64_t at_once = std::min(in.batch, op.samples_at_once(std::max(rows, columns)));
  const int64_t window = std::min<int64_t>(iterations + 1, kWindow);
  const bool restarts = iterations + 1 > kWindow;
  const Basis right_basis(window + restarts, with_batch(at_once, in.input_shape), in.options());
  const Basis left_basis(window, with_batch(at_once, in.output_shape), in.options());
  const auto doubles = in.options().dtype(at::kDouble);
  const Tensor projected = at::empty({at_once, kWindow, kWindow}, doubles);
  const Tensor right_rotation = at::empty({at_once, kKept, kWindow}, doubles),
               left_rotation = at::empty_like(right_rotation);

  for (int64_t first = 0; first < in.batch; first += at_once) {
    const int64_t samples = std::min(at_once, in.batch - first);
    projected.zero_();
    AT_DISPATCH_FLOATING_TYPES(op.weight.scalar_type(), "masked_norm", [&] {
      auto* q = right_basis.slots.mutable_data_ptr<scalar_t>();
      auto* p = left_basis.slots.mutable_data_ptr<scalar_t>();
      auto* small = projected.mutable_data_ptr<double>();
      auto* right_turn = right_rotation.mutable_data_ptr<double>();
      auto* left_turn = left_rotation.mutable_data_ptr<double>();
      auto* value = in.sigma.mutable_data_ptr<scalar_t>() + first;
      const uint8_t* row_bytes = in.row_mask ? bytes(in.row_mask) + first * rows : nullptr;
      const uint8_t* col_bytes = in.col_mask ? bytes(in.col_mask) + first * columns : nullptr;
      const scalar_t* from = in.start ? pointer<scalar_t>(in.start) + (in.own_start() ? first * columns : 0) : nullptr;
      LOCALLIP_RUN(op.weight, start_basis, q, from, in.own_start(), col_bytes, samples, columns);
      Tensor image = at::empty({0}, in.options()), back = at::empty({0}, in.options());
      int count = 0;
      for (int64_t step = 0;; ++step) {
        op.apply_into(image, right_basis.at_slot(count, samples));
        LOCALLIP_RUN(op.weight, extend_basis, p, image.mutable_data_ptr<scalar_t>(), row_bytes, count, samples, rows,
                     Breakdown::kDrop, restarts, 0u, small);
        ++count;
        if (step == iterations) break;
        op.adjoint_into(back, left_basis.at_slot(count - 1, samples), right_basis.at_slot(0, samples));
        LOCALLIP_RUN(op.weight, extend_basis, q, back.mutable_data_ptr<scalar_t>(), col_bytes, count, samples, columns,
                     Breakdown::kReplace, restarts, static_cast<uint32_t>(step + 1), static_cast<double*>(nullptr));
        if (count < kWindow) continue;
        // thick restart: the leading Ritz vectors stay, and the direction just found follows them
        LOCALLIP_RUN(op.weight, decompose, small, count, kKept, samples, right_turn, left_turn, value);
        LOCALLIP_RUN(op.weight, rotate_basis, q, right_turn, count, kKept, samples, columns, q);
        LOCALLIP_RUN(op.weight, rotate_basis, p, left_turn, count, kKept, samples, rows, p);
        right_basis.at_slot(kKept, samples).copy_(right_basis.at_slot(count, samples));
        count = kKept;
      }
      LOCALLIP_RUN(op.weight, decompose, small, count, 1, samples, right_turn, left_turn, value);
      LOCALLIP_RUN(op.weight, rotate_basis, q, right_turn, count, 1, samples, columns,
                   in.right.mutable_data_ptr<scalar_t>() + first * columns);
      LOCALLIP_RUN(op.weight, rotate_basis, p, left_turn, count, 1, samples, rows,
                   in.left.mutable_data_ptr<scalar_t>() + first * rows);
    });
  }
}

#if defined(LOCALLIP_CUDA) || defined(LOCALLIP_EMULATED_CUDA)
// The fewest iterations from which on the kernel of a convolution is the faster one: below, its phases beside the
// iteration cost more than the library's products of whole batches (measured on an H200, B = 256).
constexpr int64_t kLeast = 1, kLeastInTf32 = 4;

// The one place that chooses how a GPU computes norms: on chip in one kernel where the layer fits, needs no restart and
// has iterations enough, else by the streaming path (false). LOCALLIP_STREAMING=1 or 0 decides it, for measuring one
// against the other.
bool resident_masked_norm(MaskedNorm& in) {
  const Tensor& weight = in.op.weight;
#ifndef LOCALLIP_EMULATED_CUDA
  if (!weight.is_cuda()) return false;
#endif
  const char* asked = std::getenv("LOCALLIP_STREAMING");
  const std::string streaming = asked ? asked : "";
  const int64_t least = weight.dim() == 2 ? 0 : tf32_is_wanted() ? kLeastInTf32 : kLeast;
  if (streaming == "1" || (streaming != "0" && in.iterations < least)) return false;
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
  const bool plain = in.op.groups == 1 && in.op.dilation == std::vector<int64_t>{1, 1};
  if (weight.scalar_type() != at::kFloat || !plain) return false;
  const auto size = [](const auto& sizes, int i) { return static_cast<int>(sizes[i]); };
  const ConvolutionGeometry geometry = {size(in.input_shape, 1),  size(in.input_shape, 2),  size(in.input_shape, 3),
                                        size(in.output_shape, 1), size(in.output_shape, 2), size(in.output_shape, 3),
                                        size(weight.sizes(), 2),  size(weight.sizes(), 3),  size(in.op.stride, 0),
                                        size(in.op.stride, 1),    size(in.op.padding, 0),   size(in.op.padding, 1)};
  if (!cuda::convolution_fits(geometry, in.batch)) return false;
  const Tensor packed = at::empty({cuda::packed_weight_floats(geometry)}, in.options()),
               exponent = at::empty({1}, in.options().dtype(at::kInt)), right = slots(iterations, in.columns),
               left = slots(iterations, in.rows);
  const ConvolutionProblem problem = {geometry,
                                      in.batch,
                                      iterations,
                                      bytes(in.row_mask),
                                      bytes(in.col_mask),
                                      pointer<float>(in.start),
                                      in.own_start(),
                                      packed.mutable_data_ptr<float>(),
                                      right.mutable_data_ptr<float>(),
                                      left.mutable_data_ptr<float>(),
                                      in.sigma.mutable_data_ptr<float>(),
                                      in.right.mutable_data_ptr<float>(),
                                      in.left.mutable_data_ptr<float>(),
                                      exponent.mutable_data_ptr<int>()};
  cuda::masked_norm_convolution(problem, weight.const_data_ptr<float>(), !tf32_is_wanted(), LOCALLIP_CURRENT_STREAM);
  return true;
}
#else
bool resident_masked_norm(MaskedNorm&) { return false; }
#endif

}  // namespace

std::tuple<Tensor, Tensor, Tensor> masked_norm(const Tensor& weight, const OptionalTensor& row_mask,
                                               const OptionalTensor& col_mask, const OptionalTensor& start,
                                               IntArrayRef input_shape, IntArrayRef stride, IntArrayRef padding,
                                               IntArrayRef dilation, int64_t groups, int64_t iterations) {
  const c10::OptionalDeviceGuard on_device(at::device_of(weight));
  const Tf32OnRequest precision;
  check_geometry(stride, padding, dilation);
  // with few rows (a last layer's classes) this exhausts the Krylov space at next to no cost
  if (weight.dim() == 2 && weight.size(0) <= kWindow) iterations = std::max(iterations, weight.size(0) - 1);
  MaskedNorm in(weight, row_mask, col_mask, start, input_shape, stride, padding, dilation, groups, iterations);
  if (in.batch == 0) return {in.sigma, in.right, in.left};
  if (!resident_masked_norm(in)) stream_masked_norm(in);
  // a NaN or infinite weight in a masked row or column would otherwise stay unseen
  in.sigma.add_(in.op.weight.mul(0).sum());
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
