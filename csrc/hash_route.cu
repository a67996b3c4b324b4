#include "hash_route.cuh"

namespace mbk {

cudaError_t hash_route(const HashRouteParams& params) {
  if (params.layers == 0 || params.tokens == 0) return cudaSuccess;
  if (params.lookup.vocab_size > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t blocks_per_layer = ceil_div(params.tokens, kHashRouteThreads * kHashRouteItems);
  MBK_RETURN_IF_ERROR(launch(hash_route_kernel, params.layers * blocks_per_layer, kHashRouteThreads, 0, params.stream,
                             params.lookup, params.expert_ids, params.tokens, blocks_per_layer));
  return cudaGetLastError();
}

}  // namespace mbk
