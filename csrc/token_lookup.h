// Ids on the device, masks, and tables from token ids to expert ids.
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

}  // namespace mbk
