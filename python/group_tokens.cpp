#include "group_tokens.h"

#include <pybind11/pybind11.h>

#include "shared_bytes.h"
#include "status.h"

namespace mbk {

void bind_group_tokens(pybind11::module_& module) {
  using pybind11::arg;
  module.attr("max_grouped_experts") = kMaxGroupedExperts;
  most_shared_bytes(module)["group_.*true>"] = group_tokens_most_shared_bytes(true);
  most_shared_bytes(module)["group_.*false>"] = group_tokens_most_shared_bytes(false);
  module.def("group_tokens_workspace_bytes", &group_tokens_workspace_bytes, arg("layers"), arg("tokens"),
             arg("num_experts"), "Bytes of scratch for L layers of N tokens and E experts.");
  module.def(
      "group_tokens",
      [](uintptr_t ids, int64_t ids_stride_layer, int64_t ids_stride, int ids_type, uintptr_t tables,
         int64_t tables_stride_layer, int64_t tables_stride, int tables_type, uintptr_t mask, int64_t mask_stride,
         int mask_bytes, bool mask_is_float, int64_t vocab_size, bool by_hash, uintptr_t offsets, uintptr_t row_to_assignment,
         uintptr_t assignment_to_row, uintptr_t workspace, int64_t layers, int64_t tokens, int num_experts,
         uintptr_t stream) {
        const auto data = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
        GroupTokensParams params = {};
        params.lookup = {{data(ids), ids_stride_layer, ids_stride, static_cast<IntType>(ids_type)},
                         {data(tables), tables_stride_layer, tables_stride, static_cast<IntType>(tables_type)},
                         {data(mask), mask_stride, mask_bytes, mask_is_float},
                         vocab_size};
        params.by_hash = by_hash;
        params.offsets = reinterpret_cast<int32_t*>(offsets);
        params.row_to_assignment = reinterpret_cast<int32_t*>(row_to_assignment);
        params.assignment_to_row = reinterpret_cast<int32_t*>(assignment_to_row);
        params.workspace = reinterpret_cast<void*>(workspace);
        params.layers = layers;
        params.tokens = tokens;
        params.num_experts = num_experts;
        params.stream = reinterpret_cast<cudaStream_t>(stream);
        raise_on_error(group_tokens(params), "group_tokens", {{"L", layers}, {"T", tokens}, {"E", num_experts}});
      },
      pybind11::kw_only(), arg("ids"), arg("ids_stride_layer"), arg("ids_stride"), arg("ids_type"), arg("tables"),
      arg("tables_stride_layer"), arg("tables_stride"), arg("tables_type"), arg("mask"), arg("mask_stride"),
      arg("mask_bytes"), arg("mask_is_float"), arg("vocab_size"), arg("by_hash"), arg("offsets"), arg("row_to_assignment"),
      arg("assignment_to_row"), arg("workspace"), arg("layers"), arg("tokens"), arg("num_experts"), arg("stream"),
      "Offsets and both permutations of expert ids (L, N), or of token ids routed by hash.");
}

}  // namespace mbk
