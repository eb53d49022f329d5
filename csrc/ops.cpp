// Op schemas, dispatch and the pybind11 module: the only file that knows torch's registration. Tensors are checked and
// laid out here; the kernels below take plain pointers. Four-dimensional tensors are channels-last throughout.
#include <ATen/ATen.h>
#include <ATen/DeviceGuard.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "activation_pattern.h"
#include "lanczos_bound.h"
#include "margin.h"
#include "masked_norm.h"

#if defined(LOCALLIP_EMULATED_CUDA)  // the tests' build: the CUDA kernels, compiled for the host, in place of the CPU's
#define LOCALLIP_CURRENT_STREAM nullptr
#define LOCALLIP_RUN(tensor, function, ...) cuda::function(__VA_ARGS__, LOCALLIP_CURRENT_STREAM)
#define LOCALLIP_HOST_RUN(tensor, function, ...) cuda::function(__VA_ARGS__)
#elif defined(LOCALLIP_CUDA)
#include <c10/cuda/CUDAStream.h>
#define LOCALLIP_CURRENT_STREAM c10::cuda::getCurrentCUDAStream().stream()
#define LOCALLIP_RUN(tensor, function, ...) \
  ((tensor).is_cuda() ? cuda::function(__VA_ARGS__, LOCALLIP_CURRENT_STREAM) : cpu::function(__VA_ARGS__))
#define LOCALLIP_HOST_RUN(tensor, function, ...) \
  ((tensor).is_cuda() ? cuda::function(__VA_ARGS__) : cpu::function(__VA_ARGS__))
#else
#define LOCALLIP_RUN(tensor, function, ...) cpu::function(__VA_ARGS__)
#define LOCALLIP_HOST_RUN(tensor, function, ...) cpu::function(__VA_ARGS__)
#endif

namespace locallip {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Dense, channels last, and at an address that accesses of 16 bytes take: a view may begin anywhere.
Tensor laid_out(const Tensor& t) {
  const auto format = t.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor dense = t.contiguous(format);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone(format);
}

OptionalTensor laid_out(const OptionalTensor& t) { return t ? OptionalTensor(laid_out(*t)) : std::nullopt; }

Tensor empty(IntArrayRef sizes, at::TensorOptions options) {
  return at::empty(
      sizes, options.memory_format(sizes.size() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous));
}

const uint8_t* bytes(const OptionalTensor& mask) {
  return mask ? reinterpret_cast<const uint8_t*>(mask->const_data_ptr<bool>()) : nullptr;
}

uint8_t* bytes(Tensor& mask) { return reinterpret_cast<uint8_t*>(mask.mutable_data_ptr<bool>()); }

template <typename T>
const T* pointer(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

std::vector<int64_t> with_batch(int64_t batch, IntArrayRef sizes) {
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out[0] = batch;
  return out;
}

// ---- affine layers -------------------------------------------------------------------------------------------------------

// Arithmetic is what the tensors say, even where autocast narrows the layers around an op.
struct NoAutocast {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Layers and norms take TF32 where torch.backends.cuda.matmul.allow_tf32 or torch.set_float32_matmul_precision asks for
// it. Without that, torch allows it in convolutions alone; here it is off in both, because a bound is only as good as
// its rounding, and TF32 puts norms off by a thousandth, and above the true ones.
bool tf32_is_wanted() {
  try {
    return at::globalContext().float32MatmulPrecision() != at::Float32MatmulPrecision::HIGHEST;
  } catch (const c10::Error&) {  // torch does not answer where precisions were set by backend: nobody asked in this way
    return false;
  }
}

// The guard is heard by cuBLAS alone; cuDNN is told in every call (Operator).
struct Tf32OnRequest : NoAutocast {
  std::optional<at::NoTF32Guard> no_tf32;

  Tf32OnRequest() {
    if (!tf32_is_wanted()) no_tf32.emplace();
  }
};

// One weight as the linear operator it is: dense, or a zero-padded convolution.
struct Operator {
  Tensor weight;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;

  // Its convolutions with cuDNN told what the call wants, because torch's switches are the whole process's: no TF32 but
  // on request, and in float64 no cuDNN, whose convolutions need not be sums of products, as the proofs have it.
  // `transposed` is W^T, with `beyond` rows and columns past the last that the kernel reaches.
  Tensor convolve(const Tensor& x, const OptionalTensor& bias, bool transposed, IntArrayRef beyond) const {
    const auto& torch_wants = at::globalContext();
    const bool deterministic = torch_wants.deterministicCuDNN() || torch_wants.deterministicAlgorithms();
    const bool cudnn = torch_wants.userEnabledCuDNN() && weight.scalar_type() != at::kDouble;
    return laid_out(at::_convolution(x, weight, bias, stride, padding, dilation, transposed, beyond, groups,
                                     torch_wants.benchmarkCuDNN(), deterministic, cudnn,
                                     /*allow_tf32=*/tf32_is_wanted()));
  }

  Tensor apply(const Tensor& x, const OptionalTensor& bias = std::nullopt) const {
    if (weight.dim() == 2) return bias ? at::addmm(*bias, x, weight.t()) : at::mm(x, weight.t());
    if (weight.is_cuda() || weight.scalar_type() == at::kDouble) return convolve(x, bias, false, {0, 0});
    const auto plain = [&](const OptionalTensor& shift) {
      return laid_out(at::convolution(x, weight, shift, stride, padding, dilation, false, {0, 0}, groups));
    };
    // oneDNN, as torch 2.13 has it, crashes on a dilated channels-last convolution with a bias where no tap of any
    // output column lies inside the image; not without the bias.
    if (bias && weight.is_cpu() && dilation != std::vector<int64_t>{1, 1})
      return plain(std::nullopt).add_(bias->view({1, -1, 1, 1}));
    return plain(bias);
  }

  // Gradients of the input and the weight at x for the gradient y of the output; the first is W^T y, whatever x is.
  std::tuple<Tensor, Tensor> gradients(const Tensor& y, const Tensor& x, bool of_input, bool of_weight) const {
    if (weight.dim() == 2) return {of_input ? at::mm(y, weight) : Tensor(), of_weight ? at::mm(y.t(), x) : Tensor()};
    // torch's backward takes TF32 as torch's own switch for convolutions says: harmless in a weight's gradient alone
    const bool apart = of_input && weight.is_cuda();
    Tensor input, kernel;
    if (apart) input = adjoint(y, x.sizes());
    if (of_weight || !apart) {
      const auto found = at::convolution_backward(y, x, weight, std::nullopt, stride, padding, dilation, false, {0, 0},
                                                  groups, {of_input && !apart, of_weight, false});
      if (!apart && of_input) input = laid_out(std::get<0>(found));
      if (of_weight) kernel = std::get<1>(found).contiguous(weight.suggest_memory_format());
    }
    return {input, kernel};
  }

  // W^T y of a convolution, as the transposed one
  Tensor adjoint(const Tensor& y, IntArrayRef input) const {
    std::vector<int64_t> beyond(2);
    for (int i = 0; i < 2; ++i) {
      const int64_t reached = (y.size(i + 2) - 1) * stride[i] + dilation[i] * (weight.size(i + 2) - 1) + 1;
      beyond[i] = input[i + 2] + 2 * padding[i] - reached;
    }
    return convolve(y, std::nullopt, true, beyond);
  }

  // W x and W^T y into `out`, whose memory a dense product takes again; `like` is any input.
  void apply_into(Tensor& out, const Tensor& x) const {
    if (weight.dim() == 2)
      at::mm_out(out, x, weight.t());
    else
      out = apply(x);
  }

  void adjoint_into(Tensor& out, const Tensor& y, const Tensor& like) const {
    if (weight.dim() == 2)
      at::mm_out(out, y, weight);
    else
      out = std::get<0>(gradients(y, like, true, false));
  }

  // How many samples of `length` units the norm solver best takes together: all on a GPU, and for a dense weight, which
  // is read again for every group; for a convolution on the CPU as many as stay in a core's second-level cache with
  // their basis.
  int64_t samples_at_once(int64_t length) const {
    if (!weight.is_cpu() || weight.dim() == 2) return std::numeric_limits<int64_t>::max();
    return at::get_num_threads() * std::max<int64_t>(1, (int64_t{1} << 18) / length);
  }

  std::vector<int64_t> output_sizes(IntArrayRef input) const {
    if (weight.dim() == 2) return {input[0], weight.size(0)};
    std::vector<int64_t> out = {input[0], weight.size(0), 0, 0};
    for (int i = 0; i < 2; ++i)
      out[i + 2] = (input[i + 2] + 2 * padding[i] - dilation[i] * (weight.size(i + 2) - 1) - 1) / stride[i] + 1;
    return out;
  }
};

void check_geometry(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  for (const IntArrayRef pair : {stride, padding, dilation})
    TORCH_CHECK(pair.size() == 2, "stride, padding, dilation: got ", pair, ", want two numbers each");
}

Tensor narrowed(const Tensor& t, bool bfloat16) { return bfloat16 ? t.to(at::kBFloat16) : t; }

Tensor affine(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
              IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool bfloat16) {
  const c10::OptionalDeviceGuard on_device(at::device_of(weight));
  const Tf32OnRequest precision;
  check_geometry(stride, padding, dilation);
  const Operator op{narrowed(weight, bfloat16), stride.vec(), padding.vec(), dilation.vec(), groups};
  const OptionalTensor shift = bias ? OptionalTensor(narrowed(*bias, bfloat16)) : std::nullopt;
  return op.apply(narrowed(laid_out(x), bfloat16), shift).to(weight.scalar_type());
}

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

// ---- masked norm ---------------------------------------------------------------------------------------------------------

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
// The one place that chooses how a GPU computes norms: on chip in one kernel where the layer fits and needs no restart,
// else by the streaming path (false); convolutions in TF32 stream too, because there the library's products are the
// faster (by 1.2 to 1.4 on an H200). LOCALLIP_STREAMING=1 or 0 decides it, for measuring one against the other.
bool resident_masked_norm(MaskedNorm& in) {
  const Tensor& weight = in.op.weight;
#ifndef LOCALLIP_EMULATED_CUDA
  if (!weight.is_cuda()) return false;
#endif
  const char* asked = std::getenv("LOCALLIP_STREAMING");
  const std::string streaming = asked ? asked : "";
  if (streaming == "1" || (streaming != "0" && weight.dim() == 4 && tf32_is_wanted())) return false;
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

// ---- activation pattern --------------------------------------------------------------------------------------------------

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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activation_pattern(
    const Tensor& values, const OptionalTensor& half_width, const Tensor& squared_row_norms, const Tensor& radius,
    const std::string& activation, const OptionalTensor& first, const OptionalTensor& second) {
  const c10::OptionalDeviceGuard on_device(at::device_of(values));
  const Pattern in(values, half_width, squared_row_norms, radius, activation, first, second);
  const auto options = values.options().requires_grad(false);
  Tensor out = empty(with_batch(2 * in.batch, in.sizes), options), out_half = empty(in.sizes, options);
  Tensor row = empty(in.sizes, options.dtype(at::kBool)), col = empty(in.sizes, options.dtype(at::kBool)), sums;
  const int64_t units = out_half.numel() / std::max<int64_t>(in.batch, 1);
  if (out_half.numel() == 0) {
    const Tensor none = at::zeros({in.batch, 2}, options);
    return {out, out_half, row, col, none, none.to(at::kLong)};
  }
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "activation_pattern", [&] {
    const int64_t chunks = LOCALLIP_HOST_RUN(values, activation_pattern_chunks<scalar_t>, in.outer, in.inner, false);
    sums = at::empty({in.batch, chunks, 4}, options);
    auto* clean = out.mutable_data_ptr<scalar_t>();
    const ActivationOutput<scalar_t> to = {
        clean,      clean + out_half.numel(),         out_half.mutable_data_ptr<scalar_t>(), bytes(row),
        bytes(col), sums.mutable_data_ptr<scalar_t>()};
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
    const std::string& activation, const OptionalTensor& first, const OptionalTensor& second) {
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
    const ActivationOutputGrad<scalar_t> from = {g, g + g_half.numel(), g_half.const_data_ptr<scalar_t>(),
                                                 g_slack.const_data_ptr<scalar_t>()};
    auto* clean = out_values.mutable_data_ptr<scalar_t>();
    const ActivationInputGrad<scalar_t> to = {clean,
                                              in.box ? clean + g_half.numel() : nullptr,
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

// ---- margin --------------------------------------------------------------------------------------------------------------

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

// ---- Lanczos bound -------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> lanczos_bound(const Tensor& alpha, const Tensor& beta, const Tensor& error,
                                         const Tensor& level) {
  TORCH_CHECK(alpha.dim() == 2 && alpha.size(1) > 0 && beta.sizes() == alpha.sizes(), "alpha, beta: got shapes ",
              alpha.sizes(), ", ", beta.sizes(), ", want one (B, steps), steps > 0");
  const IntArrayRef batch = alpha.sizes().slice(0, 1);
  TORCH_CHECK(error.sizes() == batch && level.sizes() == batch, "error, level: got shapes ", error.sizes(), ", ",
              level.sizes(), ", want (B,)");
  for (const Tensor& t : {alpha, beta, error, level})
    TORCH_CHECK(t.scalar_type() == at::kDouble, "lanczos_bound: got dtype ", t.scalar_type(), ", want float64");
  const Tensor in[] = {alpha.contiguous(), beta.contiguous(), error.contiguous(), level.contiguous()};
  Tensor theta = at::empty(batch, alpha.options()), upper = at::empty(batch, alpha.options());
  cpu::lanczos_bound(in[0].const_data_ptr<double>(), in[1].const_data_ptr<double>(), in[2].const_data_ptr<double>(),
                     in[3].const_data_ptr<double>(), alpha.size(0), alpha.size(1), theta.mutable_data_ptr<double>(),
                     upper.mutable_data_ptr<double>());
  return {theta, upper};
}

}  // namespace

TORCH_LIBRARY(locallip_cuda, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::string conv = "int[] stride, int[] padding, int[] dilation, int groups";
  const std::string bounds =
      "Tensor values, Tensor? half_width, Tensor squared_row_norms, Tensor radius, str activation, "
      "Tensor? first, Tensor? second";
  const std::string last = "Tensor features, Tensor lower, Tensor upper, Tensor radius, Tensor weight, Tensor labels";
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  define("affine(Tensor x, Tensor weight, Tensor? bias, " + conv + ", bool bfloat16) -> Tensor");
  define("affine_backward(Tensor grad, Tensor x, Tensor weight, " + conv +
         ", bool bfloat16, bool of_input, bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)");
  define("masked_norm(Tensor weight, Tensor? row_mask, Tensor? col_mask, Tensor? start, SymInt[] input_shape, " + conv +
         ", int iterations) -> (Tensor sigma, Tensor right, Tensor left)");
  define("masked_norm_backward(Tensor grad, Tensor weight, Tensor right, Tensor left, " + conv + ") -> Tensor");
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
// torch's own error would not say that the cause is this build
void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(),
              ": got a tensor on a GPU, but this locallip_cuda was built for the CPU alone: "
              "locallip_cuda.build_info()[\"reason\"] says why");
}

TORCH_LIBRARY_IMPL(locallip_cuda, CUDA, m) {
  for (const char* op : {"affine", "masked_norm", "activation_pattern", "margin"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
}
#endif

}  // namespace locallip

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Registers the ops torch.ops.locallip_cuda.*; call them through locallip_cuda.ops.";
  m.attr("WINDOW") = locallip::kWindow;
}
