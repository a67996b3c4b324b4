#include "tiny_ffn.h"

#include <pybind11/pybind11.h>

#include <string>

#include "shared_bytes.h"
#include "status.h"

namespace mbk {

void bind_tiny_ffn(pybind11::module_& module) {
  using pybind11::arg;
  module.attr("tiny_ffn_max_tokens") = kTinyFfnMaxTokens;
  module.attr("tiny_ffn_max_experts") = kTinyFfnMaxExperts;
  for (int block_m : {16, 32, 64}) {
    const std::string kernels = "tiny_ffn_.*, " + std::to_string(block_m) + ">";
    most_shared_bytes(module)[kernels.c_str()] = tiny_ffn_shared_bytes(block_m);
  }
  module.def(
      "tiny_ffn_workspace_bytes",
      [](int tokens, int hidden, int width, int experts, int dtype, int activation, bool has_norm) {
        return tiny_ffn_plan(tokens, hidden, width, experts, static_cast<DType>(dtype),
                             static_cast<Activation>(activation), has_norm)
            .bytes;
      },
      arg("tokens"), arg("hidden"), arg("width"), arg("experts"), arg("dtype"), arg("activation"), arg("has_norm"),
      "Bytes of scratch, of any contents, for T tokens, sizes H and I, E experts.");
  module.def(
      "tiny_ffn",
      [](uintptr_t ids, int64_t ids_stride, int ids_type, uintptr_t offsets, uintptr_t row_to_assignment,
         uintptr_t x, int64_t x_stride_t, int64_t x_stride_h, uintptr_t w1, int64_t w1_stride_e, int64_t w1_stride_n,
         int64_t w1_stride_k, uintptr_t b1, uintptr_t w2, int64_t w2_stride_e, int64_t w2_stride_n,
         int64_t w2_stride_k, uintptr_t b2, uintptr_t norm_weight, uintptr_t norm_bias, uintptr_t routing_weights,
         uintptr_t y, uintptr_t workspace, int tokens, int hidden, int width, int experts, int dtype, int x_dtype,
         int activation, float eps, uintptr_t stream) {
        const auto data = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
        TinyFfnParams params = {};
        params.routing.offsets = reinterpret_cast<const int32_t*>(offsets);
        params.routing.row_to_assignment = reinterpret_cast<const int32_t*>(row_to_assignment);
        params.routing.expert_ids = {data(ids), 0, ids_stride, static_cast<IntType>(ids_type)};
        params.tokens = tokens;
        params.hidden = hidden;
        params.width = width;
        params.experts = experts;
        params.dtype = static_cast<DType>(dtype);
        params.x_dtype = static_cast<DType>(x_dtype);
        params.activation = static_cast<Activation>(activation);
        params.eps = eps;
        params.x = data(x);
        params.x_stride_t = x_stride_t;
        params.x_stride_h = x_stride_h;
        params.w1 = data(w1);
        params.w1_stride_e = w1_stride_e;
        params.w1_stride_n = w1_stride_n;
        params.w1_stride_k = w1_stride_k;
        params.w2 = data(w2);
        params.w2_stride_e = w2_stride_e;
        params.w2_stride_n = w2_stride_n;
        params.w2_stride_k = w2_stride_k;
        params.b1 = data(b1);
        params.b2 = data(b2);
        params.norm_weight = data(norm_weight);
        params.norm_bias = data(norm_bias);
        params.routing_weights = data(routing_weights);
        params.y = reinterpret_cast<void*>(y);
        params.workspace = reinterpret_cast<void*>(workspace);
        params.stream = reinterpret_cast<cudaStream_t>(stream);
        raise_on_error(tiny_ffn(params), "tiny_ffn", {{"T", tokens}, {"H", hidden}, {"I", width}, {"E", experts}});
      },
      pybind11::kw_only(), arg("ids"), arg("ids_stride"), arg("ids_type"), arg("offsets"), arg("row_to_assignment"),
      arg("x"), arg("x_stride_t"), arg("x_stride_h"), arg("w1"), arg("w1_stride_e"), arg("w1_stride_n"),
      arg("w1_stride_k"), arg("b1"), arg("w2"), arg("w2_stride_e"), arg("w2_stride_n"), arg("w2_stride_k"), arg("b2"),
      arg("norm_weight"), arg("norm_bias"), arg("routing_weights"), arg("y"), arg("workspace"), arg("tokens"),
      arg("hidden"), arg("width"), arg("experts"), arg("dtype"), arg("x_dtype"), arg("activation"), arg("eps"),
      arg("stream"),
      "The expert feed-forward of few tokens; with residual and norm where norm_weight is not 0.");
}

}  // namespace mbk
