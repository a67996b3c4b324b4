#include "hash_route.h"

#include <pybind11/pybind11.h>

#include "status.h"
#include "token_lookup.h"

namespace mbk {

void bind_hash_route(pybind11::module_& module) {
  module.def(
      "hash_route",
      [](uintptr_t ids, int64_t ids_stride_layer, int64_t ids_stride, int ids_type, uintptr_t tables,
         int64_t tables_stride_layer, int64_t tables_stride, int tables_type, uintptr_t mask, int64_t mask_stride,
         int mask_bytes, bool mask_is_float, int64_t vocab_size, uintptr_t expert_ids, int64_t layers, int64_t tokens,
         uintptr_t stream) {
        HashRouteParams params = {};
        params.lookup = token_lookup(ids, ids_stride_layer, ids_stride, ids_type, tables, tables_stride_layer,
                                     tables_stride, tables_type, mask, mask_stride, mask_bytes, mask_is_float,
                                     vocab_size);
        params.expert_ids = reinterpret_cast<int32_t*>(expert_ids);
        params.layers = layers;
        params.tokens = tokens;
        params.stream = reinterpret_cast<cudaStream_t>(stream);
        raise_on_error(hash_route(params), "hash_route", {{"L", layers}, {"T", tokens}, {"V", vocab_size}});
      },
      "Expert ids (L, N) int32 of token ids (N,) through tables (L, V).");
}

}  // namespace mbk
