#include "group_tokens.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "shared_bytes.h"
#include "status.h"
#include "token_lookup.h"

namespace mbk {

void bind_group_tokens(pybind11::module_& module) {
  module.attr("max_grouped_experts") = kMaxGroupedExperts;
  module.attr("max_tile_maps") = kMaxTileMaps;
  most_shared_bytes(module)["group_.*true>"] = group_tokens_most_shared_bytes(true);
  most_shared_bytes(module)["group_.*false>"] = group_tokens_most_shared_bytes(false);
  module.def("group_tokens_workspace_bytes", &group_tokens_workspace_bytes,
             "Bytes of scratch for L layers of N tokens and E experts.");
  module.def(
      "group_tokens",
      [](uintptr_t ids, int64_t ids_stride_layer, int64_t ids_stride, int ids_type, uintptr_t tables,
         int64_t tables_stride_layer, int64_t tables_stride, int tables_type, uintptr_t mask, int64_t mask_stride,
         int mask_bytes, bool mask_is_float, int64_t vocab_size, bool by_hash, uintptr_t offsets,
         uintptr_t row_to_assignment, uintptr_t assignment_to_row, const std::vector<std::pair<uintptr_t, int>>& tile_maps,
         uintptr_t workspace, int64_t layers, int64_t tokens, int num_experts, uintptr_t stream) {
        GroupTokensParams params = {};
        params.lookup = token_lookup(ids, ids_stride_layer, ids_stride, ids_type, tables, tables_stride_layer,
                                     tables_stride, tables_type, mask, mask_stride, mask_bytes, mask_is_float,
                                     vocab_size);
        params.by_hash = by_hash;
        params.offsets = reinterpret_cast<int32_t*>(offsets);
        params.row_to_assignment = reinterpret_cast<int32_t*>(row_to_assignment);
        params.assignment_to_row = reinterpret_cast<int32_t*>(assignment_to_row);
        for (size_t i = 0; i < tile_maps.size() && i < kMaxTileMaps; ++i) {
          params.tile_maps[i] = {reinterpret_cast<int32_t*>(tile_maps[i].first), tile_maps[i].second};
        }
        params.num_tile_maps = static_cast<int>(tile_maps.size());
        params.workspace = reinterpret_cast<void*>(workspace);
        params.layers = layers;
        params.tokens = tokens;
        params.num_experts = num_experts;
        params.stream = reinterpret_cast<cudaStream_t>(stream);
        raise_on_error(group_tokens(params), "group_tokens", {{"L", layers}, {"T", tokens}, {"E", num_experts}});
      },
      "Offsets and both permutations of expert ids (L, N), or of token ids routed by hash.");
}

}  // namespace mbk
