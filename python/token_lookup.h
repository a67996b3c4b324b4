// The arguments that routing and grouping share, as Python passes them.
#pragma once

#include "hash_route.h"

namespace mbk {

inline TokenLookup token_lookup(uintptr_t ids, int64_t ids_stride_layer, int64_t ids_stride, int ids_type,
                                uintptr_t tables, int64_t tables_stride_layer, int64_t tables_stride, int tables_type,
                                uintptr_t mask, int64_t mask_stride, int mask_bytes, bool mask_is_float,
                                int64_t vocab_size) {
  return {{reinterpret_cast<const void*>(ids), ids_stride_layer, ids_stride, static_cast<IntType>(ids_type)},
          {reinterpret_cast<const void*>(tables), tables_stride_layer, tables_stride,
           static_cast<IntType>(tables_type)},
          {reinterpret_cast<const void*>(mask), mask_stride, mask_bytes, mask_is_float},
          vocab_size};
}

}  // namespace mbk
