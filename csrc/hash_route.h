// Hash routing: the expert of a token is a table entry of its vocabulary id; one launch for all layers.
#pragma once

#include "common.h"

namespace mbk {

enum class IntType : int { kInt8 = 0, kUInt8 = 1, kInt16 = 2, kInt32 = 3, kInt64 = 4 };

// Integers on the device, by layer and position; strides in elements.
struct Integers {
  const void* data;
  int64_t stride_layer;
  int64_t stride;
  IntType type;
};

// What keeps a token: any value but zero, which in floating point has a sign. A null `data` keeps all of them.
struct Mask {
  const void* data;
  int64_t stride;
  int bytes;  // 1, 2, 4 or 8 of a value
  bool is_float;
};

// Token ids (N,) through tables (L, V). Ids outside [0, V) are never looked up.
struct TokenLookup {
  Integers token_ids;  // stride_layer 0: all layers see the same tokens
  Integers tables;
  Mask mask;
  int64_t vocab_size;  // below 2^31
};

// expert_ids (L, N) int32, contiguous: -1 where masked or outside the table.
struct HashRouteParams {
  TokenLookup lookup;
  int32_t* expert_ids;
  int64_t layers;
  int64_t tokens;
  cudaStream_t stream;
};

// Traffic of a layer: the ids, the mask, one table entry and one int32 for each token.
cudaError_t hash_route(const HashRouteParams& params);

}  // namespace mbk
