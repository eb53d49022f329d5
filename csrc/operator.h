// Weights as linear operators by torch's libraries, in the arithmetic that was asked for.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/_convolution.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tensors.h"

namespace locallip {

// Arithmetic is what the tensors say, even where autocast narrows the layers around an op.
struct NoAutocast {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Layers and norms take TF32 where torch.backends.cuda.matmul.allow_tf32 or torch.set_float32_matmul_precision asks for
// it. Without that, torch allows it in convolutions alone; here it is off in both, because a bound is only as good as
// its rounding, and TF32 puts norms off by a thousandth, and above the true ones.
inline bool tf32_is_wanted() {
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
    // oneDNN, as torch 2.11 and 2.12 have it, leaves an output of one column unwritten where the stride is wider and
    // the input has one channel and the strides of channels last. Its other strides are as true.
    const bool one_column = x.size(1) == 1 && stride[1] > 1 && output_sizes(x.sizes())[3] == 1;
    const int64_t image = x.size(2) * x.size(3);
    const Tensor from = one_column ? x.as_strided(x.sizes(), {image, image, x.size(3), 1}) : x;
    const auto plain = [&](const OptionalTensor& shift) {
      return laid_out(at::convolution(from, weight, shift, stride, padding, dilation, false, {0, 0}, groups));
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

  // By a power of two, which brings its largest weight near 1: bfloat16's instructions take denormal numbers for 0.
  // Found without a wait for the device.
  Operator in_bfloat16() const {
    Tensor scaled = weight;
    if (weight.numel()) {
      const Tensor bits = weight.abs().amax().view(at::kInt).bitwise_and(0x7F800000);  // the exponent's alone
      scaled = weight / bits.view(at::kFloat).clamp(0x1p-126, 0x1p126);
    }
    return {scaled.to(at::kBFloat16), stride, padding, dilation, groups};
  }

  std::vector<int64_t> output_sizes(IntArrayRef input) const {
    if (weight.dim() == 2) {
      TORCH_CHECK(input.size() == 2 && input[1] == weight.size(1), "input_shape: got ", input, ", want (B, ",
                  weight.size(1), ")");
      return {input[0], weight.size(0)};
    }
    TORCH_CHECK(input.size() == 4 && input[1] == weight.size(1) * groups, "input_shape: got ", input, ", want (B, ",
                weight.size(1) * groups, ", H, W)");
    std::vector<int64_t> out = {input[0], weight.size(0), 0, 0};
    for (int i = 0; i < 2; ++i) {
      TORCH_CHECK(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, "stride, padding, dilation: got ", stride, ", ",
                  padding, ", ", dilation, ", want at least 1, 0, 1");
      const int64_t room = input[i + 2] + 2 * padding[i] - dilation[i] * (weight.size(i + 2) - 1) - 1;
      TORCH_CHECK(room >= 0, "input_shape: got ", input, ", smaller with its padding than a kernel of ",
                  weight.sizes().slice(2));
      out[i + 2] = room / stride[i] + 1;
    }
    return out;
  }
};

inline void check_geometry(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  for (const IntArrayRef pair : {stride, padding, dilation})
    TORCH_CHECK(pair.size() == 2, "stride, padding, dilation: got ", pair, ", want two numbers each");
}

}  // namespace locallip
