#include "fused_moe_ffn_add_norm.h"

#include <pybind11/pybind11.h>

#include "shared_bytes.h"
#include "status.h"

namespace mbk {
namespace {

Matrix matrix(uintptr_t data, int64_t stride_row, int64_t stride_column) {
  return {reinterpret_cast<const void*>(data), stride_row, stride_column};
}

AddNormInputs inputs(uintptr_t x, int64_t x_stride_row, int64_t x_stride_column, uintptr_t ffn, uintptr_t norm_weight,
                     int64_t norm_weight_stride_row, int64_t norm_weight_stride_column, uintptr_t norm_bias,
                     int64_t norm_bias_stride_row, int64_t norm_bias_stride_column, uintptr_t weights, uintptr_t seed,
                     uintptr_t offsets, int64_t tokens, int columns, int num_experts, float eps, unsigned threshold,
                     float scale, int x_type, int ffn_type) {
  return {matrix(x, x_stride_row, x_stride_column),
          reinterpret_cast<const void*>(ffn),
          matrix(norm_weight, norm_weight_stride_row, norm_weight_stride_column),
          matrix(norm_bias, norm_bias_stride_row, norm_bias_stride_column),
          reinterpret_cast<const void*>(weights),
          reinterpret_cast<const int64_t*>(seed),
          reinterpret_cast<const int32_t*>(offsets),
          tokens,
          columns,
          num_experts,
          eps,
          threshold,
          scale,
          static_cast<DType>(x_type),
          static_cast<DType>(ffn_type)};
}

void raise(cudaError_t status, const char* kernel, const AddNormInputs& in) {
  raise_on_error(status, kernel, {{"T", in.tokens}, {"H", in.columns}, {"E", in.num_experts}});
}

}  // namespace

void bind_fused_moe_ffn_add_norm(pybind11::module_& module) {
  pybind11::class_<AddNormInputs>(module, "AddNormInputs", "What both directions read.")
      .def(pybind11::init(&inputs));
  module.attr("max_norm_columns") = kMaxNormColumns;
  most_shared_bytes(module)["add_norm_kernel.*"] = fused_moe_ffn_add_norm_shared_bytes(kMaxNormColumns, false);
  most_shared_bytes(module)["add_norm_backward_kernel.*"] = fused_moe_ffn_add_norm_shared_bytes(kMaxNormColumns, true);
  module.def("norm_chunks", &norm_chunks, "Rows of the partials of T tokens and E experts.");
  module.def(
      "add_norm",
      [](const AddNormInputs& in, uintptr_t assignment_to_row, uintptr_t y, uintptr_t stream) {
        raise(fused_moe_ffn_add_norm({in, reinterpret_cast<const int32_t*>(assignment_to_row), reinterpret_cast<void*>(y),
                                      reinterpret_cast<cudaStream_t>(stream)}),
              "add_norm", in);
      },
      "y (T, H) from x and the feed-forward's rows.");
  module.def(
      "add_norm_backward",
      [](const AddNormInputs& in, uintptr_t dy, int64_t dy_stride_row, int64_t dy_stride_column,
         uintptr_t row_to_assignment, uintptr_t dz, uintptr_t dffn, uintptr_t weight_partials, uintptr_t bias_partials,
         uintptr_t dnorm_weight, uintptr_t dnorm_bias, uintptr_t dweights, uintptr_t stream) {
        FusedMoeFfnAddNormBackwardParams params = {};
        params.inputs = in;
        params.dy = matrix(dy, dy_stride_row, dy_stride_column);
        params.row_to_assignment = reinterpret_cast<const int32_t*>(row_to_assignment);
        params.dz = reinterpret_cast<void*>(dz);
        params.dffn = reinterpret_cast<void*>(dffn);
        params.weight_partials = reinterpret_cast<float*>(weight_partials);
        params.bias_partials = reinterpret_cast<float*>(bias_partials);
        params.dnorm_weight = reinterpret_cast<void*>(dnorm_weight);
        params.dnorm_bias = reinterpret_cast<void*>(dnorm_bias);
        params.dweights = reinterpret_cast<void*>(dweights);
        params.stream = reinterpret_cast<cudaStream_t>(stream);
        raise(fused_moe_ffn_add_norm_backward(params), "add_norm_backward", in);
      },
      "dz, dffn (T, H) by row, the norm's gradients (E, H) and dweights (T,).");
}

}  // namespace mbk
