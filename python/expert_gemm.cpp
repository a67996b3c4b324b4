#include "expert_gemm.h"

#include <pybind11/pybind11.h>

#include <string>

#include "shared_bytes.h"
#include "status.h"

namespace mbk {

void bind_expert_gemm(pybind11::module_& module) {
  using pybind11::arg;
  for (int block_n : {128, 192, 256}) {
    const std::string kernels = "expert_gemm_kernel<.*, " + std::to_string(block_n) + ", .*";
    most_shared_bytes(module)[kernels.c_str()] = expert_gemm_shared_bytes(block_n);
  }
  module.def(
      "expert_gemm",
      [](uintptr_t a, int64_t a_row_stride, uintptr_t w, int64_t w_expert_stride, int64_t w_row_stride, uintptr_t y,
         uintptr_t pre, uintptr_t bias, uintptr_t weights, uintptr_t offsets, uintptr_t row_to_assignment, int64_t rows,
         int64_t num_experts, int64_t columns, int64_t depth, int top_k, int dtype, int activation, bool gather,
         bool scatter, bool after_previous, int block_n, int cluster, uintptr_t stream) {
        ExpertGemmParams params = {};
        params.a = reinterpret_cast<const void*>(a);
        params.a_row_stride = a_row_stride;
        params.w = reinterpret_cast<const void*>(w);
        params.w_expert_stride = w_expert_stride;
        params.w_row_stride = w_row_stride;
        params.y = reinterpret_cast<void*>(y);
        params.pre = reinterpret_cast<void*>(pre);
        params.bias = reinterpret_cast<const void*>(bias);
        params.weights = reinterpret_cast<const void*>(weights);
        params.offsets = reinterpret_cast<const int*>(offsets);
        params.row_to_assignment = reinterpret_cast<const int*>(row_to_assignment);
        params.rows = rows;
        params.num_experts = num_experts;
        params.columns = columns;
        params.depth = depth;
        params.top_k = top_k;
        params.dtype = static_cast<DType>(dtype);
        params.activation = static_cast<Activation>(activation);
        params.gather = gather;
        params.scatter = scatter;
        params.after_previous = after_previous;
        params.block_n = block_n;
        params.cluster = cluster;
        params.stream = reinterpret_cast<cudaStream_t>(stream);
        raise_on_error(expert_gemm(params), "expert_gemm",
                       {{"rows", rows}, {"E", num_experts}, {"N", columns}, {"K", depth}});
      },
      pybind11::kw_only(), arg("a"), arg("a_row_stride"), arg("w"), arg("w_expert_stride"), arg("w_row_stride"),
      arg("y"), arg("pre"), arg("bias"), arg("weights"), arg("offsets"), arg("row_to_assignment"), arg("rows"),
      arg("num_experts"), arg("columns"), arg("depth"), arg("top_k"), arg("dtype"), arg("activation"), arg("gather"),
      arg("scatter"), arg("after_previous"), arg("block_n"), arg("cluster"), arg("stream"),
      "Each expert's rows times that expert's weights, with bias, activation and scatter; for sm_90.");
}

}  // namespace mbk
