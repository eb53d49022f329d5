// Bounds from Lanczos runs: on the CPU alone.
#include "lanczos_bound.h"

#include "ops.h"

namespace locallip {

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

}  // namespace locallip
