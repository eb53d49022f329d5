// The norm of any masked map by the streaming path: products of the whole batch by torch's libraries, and the kernels
// of masked_norm.h between them.
#pragma once

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>

#include "masked_norm.h"
#include "operator.h"

namespace locallip {

// Whether products in bfloat16 are any faster: without instructions for it they are slower.
inline bool bfloat16_is_fast(const Tensor& weight) {
  return weight.scalar_type() == at::kFloat && LOCALLIP_HOST_RUN(weight, has_bfloat16);
}

// Orthonormal vectors of a group of samples: [slot][sample][...], each slot laid out as the operator wants it. A
// smaller group uses the same memory with its slots closer together, as the kernels address them. Products take the
// newest vector, or a copy of it in bfloat16.
struct Basis {
  Tensor slots, copy;
  std::vector<int64_t> sizes;

  Basis(int64_t count, std::vector<int64_t> group, at::TensorOptions options, bool narrow) : sizes(std::move(group)) {
    slots = at::empty({count * c10::multiply_integers(sizes)}, options);
    if (narrow) copy = at::empty({c10::multiply_integers(sizes)}, options.dtype(at::kBFloat16));
  }

  Tensor at_slot(int64_t slot, int64_t samples) const { return viewed(slots, slot, samples); }

  Tensor newest(int64_t slot, int64_t samples) const {
    return copy.defined() ? viewed(copy, 0, samples) : at_slot(slot, samples);
  }

  // The kernel of that name on `vector`, which a product gave.
  template <typename scalar_t>
  void extend(const Tensor& vector, const uint8_t* mask, int count, int64_t samples, Breakdown breakdown,
              Against against, uint32_t seed, double* projected) const {
    const auto run = [&](const auto* given, auto* narrow) {
      LOCALLIP_RUN(slots, extend_basis, slots.mutable_data_ptr<scalar_t>(), given, mask, count, samples,
                   vector.numel() / samples, breakdown, against, seed, projected, narrow);
    };
    if constexpr (std::is_same_v<scalar_t, float>)
      if (vector.scalar_type() == at::kBFloat16)
        return run(static_cast<const uint16_t*>(vector.const_data_ptr()),
                   static_cast<uint16_t*>(copy.mutable_data_ptr()));
    run(vector.const_data_ptr<scalar_t>(), static_cast<scalar_t*>(nullptr));
  }

 private:
  Tensor viewed(const Tensor& memory, int64_t slot, int64_t samples) const {
    const int64_t length = c10::multiply_integers(sizes) / sizes[0];
    const Tensor t = memory.narrow(0, slot * samples * length, samples * length);
    return sizes.size() == 4 ? t.view({samples, sizes[2], sizes[3], sizes[1]}).permute({0, 3, 1, 2})
                             : t.view({samples, sizes[1]});
  }
};

// What is asked of a map's norm, laid out and checked, and what is found; `weight` for its dtype and device.
struct NormProblem {
  OptionalTensor row_mask, col_mask, start;
  std::vector<int64_t> input_shape, output_shape;
  int64_t batch, columns, rows, iterations;
  Tensor sigma, right, left;

  NormProblem(const Tensor& weight, const OptionalTensor& row_mask_in, const OptionalTensor& col_mask_in,
              const OptionalTensor& start_in, IntArrayRef input, IntArrayRef output, int64_t steps)
      : row_mask(laid_out(row_mask_in)),
        col_mask(laid_out(col_mask_in)),
        start(laid_out(start_in)),
        input_shape(input.vec()),
        output_shape(output.vec()),
        iterations(steps) {
    TORCH_CHECK(iterations >= 0, "iterations: got ", iterations, ", want at least 0");
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

// `map` has apply_into(out, x, first) and adjoint_into(out, y, like, first) of samples from number `first` on,
// samples_at_once(length), any of its weights, and itself in_bfloat16(). Where `bfloat16` is wanted, and fast, that one
// finds the right vectors, and one product of theirs in full has their values, of which none is above the norm. A few
// samples are taken at a time on the CPU, so that their bases stay in cache from one pass to the next. Buffers are
// reused.
template <typename Map>
void stream_norm(NormProblem& in, const Map& map, bool bfloat16) {
  const int64_t rows = in.rows, columns = in.columns, iterations = in.iterations;
  const int64_t at_once = std::min(in.batch, map.samples_at_once(std::max(rows, columns)));
  const int64_t window = std::min<int64_t>(iterations + 1, kWindow);
  const bool restarts = iterations + 1 > kWindow;
  const Against against = restarts ? Against::kAllTwice : against_for(std::max(rows, columns));
  std::optional<Map> narrow;
  if (bfloat16 && bfloat16_is_fast(map.weight())) narrow = map.in_bfloat16();
  const Map& iterated = narrow ? *narrow : map;
  const Basis right(window + restarts, with_batch(at_once, in.input_shape), in.options(), narrow.has_value());
  const Basis left(window, with_batch(at_once, in.output_shape), in.options(), narrow.has_value());
  const auto doubles = in.options().dtype(at::kDouble);
  const Tensor projected = at::empty({at_once, kWindow, kWindow}, doubles);
  const Tensor right_rotation = at::empty({at_once, kKept, kWindow}, doubles),
               left_rotation = at::empty_like(right_rotation);

  for (int64_t first = 0; first < in.batch; first += at_once) {
    const int64_t samples = std::min(at_once, in.batch - first);
    projected.zero_();
    AT_DISPATCH_FLOATING_TYPES(map.weight().scalar_type(), "masked_norm", [&] {
      auto* q = right.slots.mutable_data_ptr<scalar_t>();
      auto* p = left.slots.mutable_data_ptr<scalar_t>();
      auto* small = projected.mutable_data_ptr<double>();
      auto* right_turn = right_rotation.mutable_data_ptr<double>();
      auto* left_turn = left_rotation.mutable_data_ptr<double>();
      auto* value = in.sigma.mutable_data_ptr<scalar_t>() + first;
      const uint8_t* row_bytes = in.row_mask ? bytes(in.row_mask) + first * rows : nullptr;
      const uint8_t* col_bytes = in.col_mask ? bytes(in.col_mask) + first * columns : nullptr;
      const scalar_t* from = in.start ? pointer<scalar_t>(in.start) + (in.own_start() ? first * columns : 0) : nullptr;
      LOCALLIP_RUN(map.weight(), start_basis, q, from, in.own_start(), col_bytes, samples, columns);
      if (narrow) right.newest(0, samples).copy_(right.at_slot(0, samples));
      Tensor image = at::empty({0}, iterated.weight().options()), back = at::empty_like(image);
      int count = 0;
      for (int64_t step = 0;; ++step) {
        iterated.apply_into(image, right.newest(count, samples), first);
        left.extend<scalar_t>(image, row_bytes, count, samples, Breakdown::kDrop, against, 0, small);
        ++count;
        if (step == iterations) break;
        iterated.adjoint_into(back, left.newest(count - 1, samples), right.newest(0, samples), first);
        right.extend<scalar_t>(back, col_bytes, count, samples, Breakdown::kReplace, against,
                               static_cast<uint32_t>(step + 1), nullptr);
        if (count < kWindow) continue;
        // thick restart: the leading Ritz vectors stay, and the direction just found follows them
        LOCALLIP_RUN(map.weight(), decompose, small, count, kKept, samples, right_turn, left_turn, value);
        LOCALLIP_RUN(map.weight(), rotate_basis, q, right_turn, count, kKept, samples, columns, q);
        LOCALLIP_RUN(map.weight(), rotate_basis, p, left_turn, count, kKept, samples, rows, p);
        right.at_slot(kKept, samples).copy_(right.at_slot(count, samples));
        count = kKept;
      }
      LOCALLIP_RUN(map.weight(), decompose, small, count, 1, samples, right_turn, left_turn, value);
      LOCALLIP_RUN(map.weight(), rotate_basis, q, right_turn, count, 1, samples, columns,
                   in.right.mutable_data_ptr<scalar_t>() + first * columns);
      if (narrow) {
        map.apply_into(image = at::empty({0}, in.options()), in.right.narrow(0, first, samples), first);
        projected.zero_();
        count = 0;
        left.extend<scalar_t>(image, row_bytes, count++, samples, Breakdown::kDrop, against, 0, small);
        LOCALLIP_RUN(map.weight(), decompose, small, count, 1, samples, right_turn, left_turn, value);
      }
      LOCALLIP_RUN(map.weight(), rotate_basis, p, left_turn, count, 1, samples, rows,
                   in.left.mutable_data_ptr<scalar_t>() + first * rows);
    });
  }
}

}  // namespace locallip
