// The lookup alone: every thread looks up kHashRouteItems tokens of one layer.
#pragma once

#include "token_lookup.cuh"

namespace mbk {

constexpr int kHashRouteThreads = 256;
constexpr int kHashRouteItems = 4;  // tokens of a thread

__global__ void __launch_bounds__(kHashRouteThreads)
    hash_route_kernel(TokenLookup lookup, int32_t* expert_ids, int64_t tokens, int64_t blocks_per_layer) {
  const int64_t layer = blockIdx.x / blocks_per_layer;
  const int64_t first = (blockIdx.x % blocks_per_layer) * (kHashRouteThreads * kHashRouteItems) + threadIdx.x;
  int ids[kHashRouteItems];
  load_below(lookup.token_ids, 0, first, kHashRouteThreads, tokens, lookup.vocab_size, ids);
  drop_masked(lookup.mask, first, kHashRouteThreads, tokens, ids);
  look_up(lookup.tables, layer, ids);
#pragma unroll
  for (int i = 0; i < kHashRouteItems; ++i) {
    const int64_t token = first + i * kHashRouteThreads;
    if (token < tokens) expert_ids[layer * tokens + token] = ids[i];
  }
}

}  // namespace mbk
