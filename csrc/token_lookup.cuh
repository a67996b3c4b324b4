// Bounds-safe loads of ids of any integer type, masks, and lookups in tables.
#pragma once

#include "device.cuh"
#include "token_lookup.h"

namespace mbk {

// Calls f with a null pointer to the type; the branch is the same for a whole grid.
template <typename F>
__device__ __forceinline__ void with_type(IntType type, F&& f) {
  switch (type) {
    case IntType::kInt8:
      return f(static_cast<const int8_t*>(nullptr));
    case IntType::kUInt8:
      return f(static_cast<const uint8_t*>(nullptr));
    case IntType::kInt16:
      return f(static_cast<const int16_t*>(nullptr));
    case IntType::kInt32:
      return f(static_cast<const int32_t*>(nullptr));
    case IntType::kInt64:
      return f(static_cast<const int64_t*>(nullptr));
  }
}

// Values `first + i * step` of a layer for i < COUNT, -1 for those outside [0, limit) or at positions from `end` on.
// All loads are issued before the first value is used.
template <int COUNT>
__device__ __forceinline__ void load_below(const Integers& source, int64_t layer, int64_t first, int step, int64_t end,
                                           int64_t limit, int (&values)[COUNT]) {
  with_type(source.type, [&](auto type) {
    const auto* data = static_cast<decltype(type)>(source.data) + layer * source.stride_layer;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int64_t position = first + int64_t{i} * step;
      const int64_t value = position < end ? static_cast<int64_t>(data[position * source.stride]) : -1;
      values[i] = value >= 0 && value < limit ? static_cast<int>(value) : -1;
    }
  });
}

__device__ __forceinline__ bool keeps(const Mask& mask, int64_t position) {
  uint64_t bits = 0;
  const int64_t index = position * mask.stride;
  if (mask.bytes == 1) {
    bits = static_cast<const uint8_t*>(mask.data)[index];
  } else if (mask.bytes == 2) {
    bits = static_cast<const uint16_t*>(mask.data)[index];
  } else if (mask.bytes == 4) {
    bits = static_cast<const uint32_t*>(mask.data)[index];
  } else {
    bits = static_cast<const uint64_t*>(mask.data)[index];
  }
  const int sign_bit = 8 * mask.bytes - 1;
  return (mask.is_float ? bits & ~(uint64_t{1} << sign_bit) : bits) != 0;
}

template <int COUNT>
__device__ __forceinline__ void drop_masked(const Mask& mask, int64_t first, int step, int64_t end,
                                            int (&ids)[COUNT]) {
  if (mask.data == nullptr) return;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int64_t position = first + int64_t{i} * step;
    if (position < end && !keeps(mask, position)) ids[i] = -1;
  }
}

// Token ids become expert ids, as int32; -1 stays, and an entry that is no int32 becomes -1.
template <int COUNT>
__device__ __forceinline__ void look_up(const Integers& tables, int64_t layer, int (&ids)[COUNT]) {
  with_type(tables.type, [&](auto type) {
    const auto* data = static_cast<decltype(type)>(tables.data) + layer * tables.stride_layer;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (ids[i] >= 0) {
        const auto entry = data[ids[i] * tables.stride];
        const int expert = static_cast<int>(entry);
        ids[i] = expert == entry ? expert : -1;
      }
    }
  });
}

}  // namespace mbk
