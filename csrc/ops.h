// The ops, as torch calls them: their schemas stand in ops.cpp, their meaning in locallip_cuda/ops/kernels.py. They
// check and lay out tensors; the kernels below take plain pointers. Four-dimensional tensors are channels-last
// throughout.
#pragma once

#include <string>

#include "tensors.h"

namespace locallip {

Tensor affine(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
              IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool bfloat16);

std::tuple<Tensor, Tensor, Tensor> affine_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& weight,
                                                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                   int64_t groups, bool bfloat16, bool of_input, bool of_weight,
                                                   bool of_bias);

std::tuple<Tensor, Tensor, Tensor> masked_norm(const Tensor& weight, const OptionalTensor& row_mask,
                                               const OptionalTensor& col_mask, const OptionalTensor& start,
                                               IntArrayRef input_shape, IntArrayRef stride, IntArrayRef padding,
                                               IntArrayRef dilation, int64_t groups, int64_t iterations, bool bfloat16);

Tensor masked_norm_backward(const Tensor& grad, const Tensor& weight, const Tensor& right, const Tensor& left,
                            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups);

std::tuple<Tensor, Tensor, Tensor> chain_norm(at::TensorList weights, at::TensorList masks,
                                              const OptionalTensor& row_mask, const OptionalTensor& col_mask,
                                              const OptionalTensor& start, IntArrayRef input_shape, IntArrayRef stride,
                                              IntArrayRef padding, IntArrayRef dilation, IntArrayRef groups,
                                              int64_t iterations, bool bfloat16);

std::vector<Tensor> chain_norm_backward(const Tensor& grad, at::TensorList weights, at::TensorList masks,
                                        const Tensor& right, const Tensor& left, IntArrayRef stride,
                                        IntArrayRef padding, IntArrayRef dilation, IntArrayRef groups);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activation_pattern(
    const Tensor& values, const OptionalTensor& half_width, const Tensor& squared_row_norms, const Tensor& radius,
    const std::string& activation, const OptionalTensor& first, const OptionalTensor& second, bool box_behind);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activation_pattern_backward(
    const Tensor& grad_values, const Tensor& grad_half_width, const Tensor& grad_slack, const Tensor& values,
    const OptionalTensor& half_width, const Tensor& squared_row_norms, const Tensor& radius,
    const std::string& activation, const OptionalTensor& first, const OptionalTensor& second, bool box_behind);

std::tuple<Tensor, Tensor> margin(const Tensor& features, const Tensor& lower, const Tensor& upper,
                                  const Tensor& radius, const Tensor& weight, const Tensor& labels);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> margin_backward(const Tensor& grad_gain, const Tensor& step,
                                                                   const Tensor& features, const Tensor& lower,
                                                                   const Tensor& upper, const Tensor& radius,
                                                                   const Tensor& weight, const Tensor& labels);

std::tuple<Tensor, Tensor> lanczos_bound(const Tensor& alpha, const Tensor& beta, const Tensor& error,
                                         const Tensor& level);

}  // namespace locallip
