#include "expert_gemm_norm.h"

#include <pybind11/pybind11.h>

#include <string>

#include "shared_bytes.h"
#include "status.h"

namespace mbk {

void bind_expert_gemm_norm(pybind11::module_& module) {
  using pybind11::arg;
  for (int block_n : {128, 192}) {
    const std::string kernels = "expert_gemm_norm_kernel<.*, " + std::to_string(block_n) + ">.*";
    most_shared_bytes(module)[kernels.c_str()] = expert_gemm_norm_shared_bytes(block_n);
  }
  module.attr("expert_gemm_norm_max_columns") = kExpertGemmNormMaxColumns;
  module.def(
      "expert_gemm_norm",
      [](uintptr_t a, int64_t a_row_stride, uintptr_t w, int64_t w_expert_stride, int64_t w_row_stride, uintptr_t bias,
         uintptr_t x, int64_t x_row_stride, uintptr_t norm_weight, uintptr_t norm_bias, uintptr_t weights, uintptr_t y,
         uintptr_t offsets, uintptr_t row_to_assignment, int64_t rows, int64_t num_experts, int64_t columns,
         int64_t depth, int dtype, float eps, bool x_by_row, bool after_previous, int block_n, int cluster,
         uintptr_t stream) {
        ExpertGemmParams gemm = {};
        gemm.a = reinterpret_cast<const void*>(a);
        gemm.a_row_stride = a_row_stride;
        gemm.w = reinterpret_cast<const void*>(w);
        gemm.w_expert_stride = w_expert_stride;
        gemm.w_row_stride = w_row_stride;
        gemm.y = reinterpret_cast<void*>(y);
        gemm.bias = reinterpret_cast<const void*>(bias);
        gemm.weights = reinterpret_cast<const void*>(weights);
        gemm.offsets = reinterpret_cast<const int*>(offsets);
        gemm.row_to_assignment = reinterpret_cast<const int*>(row_to_assignment);
        gemm.rows = rows;
        gemm.num_experts = num_experts;
        gemm.columns = columns;
        gemm.depth = depth;
        gemm.top_k = 1;
        gemm.dtype = static_cast<DType>(dtype);
        gemm.activation = Activation::kIdentity;
        gemm.after_previous = after_previous;
        gemm.block_n = block_n;
        gemm.cluster = cluster;
        gemm.stream = reinterpret_cast<cudaStream_t>(stream);
        const ExpertGemmNorm norm{reinterpret_cast<const void*>(x), x_row_stride,
                                  reinterpret_cast<const void*>(norm_weight),
                                  reinterpret_cast<const void*>(norm_bias), eps, x_by_row};
        raise_on_error(expert_gemm_norm(gemm, norm), "expert_gemm_norm",
                       {{"rows", rows}, {"E", num_experts}, {"N", columns}, {"K", depth}});
      },
      pybind11::kw_only(), arg("a"), arg("a_row_stride"), arg("w"), arg("w_expert_stride"), arg("w_row_stride"),
      arg("bias"), arg("x"), arg("x_row_stride"), arg("norm_weight"), arg("norm_bias"), arg("weights"), arg("y"),
      arg("offsets"), arg("row_to_assignment"), arg("rows"), arg("num_experts"), arg("columns"), arg("depth"),
      arg("dtype"), arg("eps"), arg("x_by_row"), arg("after_previous"), arg("block_n"), arg("cluster"), arg("stream"),
      "Each expert's rows times that expert's weights, plus a residual, normalised and put by token; for sm_90.");
}

}  // namespace mbk
