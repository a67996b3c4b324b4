// Eight neighbouring elements at a time: in 16-byte accesses where layout and alignment allow, else one by one.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.cuh"
#include "fused_moe_ffn_add_norm.h"

namespace mbk {

constexpr int kVector = 8;

// Stands for all types of elements and all layouts: the type is looked at while the kernel runs.
struct AnyFloat {};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void from_float(float value, float* out) { *out = value; }
__device__ __forceinline__ void from_float(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

__device__ __forceinline__ float load_float(const void* data, int64_t index, DType type) {
  if (type == DType::kFloat16) return to_float(static_cast<const __half*>(data)[index]);
  if (type == DType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

__device__ __forceinline__ void store_float(void* data, int64_t index, DType type, float value) {
  if (type == DType::kFloat16) {
    from_float(value, static_cast<__half*>(data) + index);
  } else if (type == DType::kBFloat16) {
    from_float(value, static_cast<__nv_bfloat16*>(data) + index);
  } else {
    static_cast<float*>(data)[index] = value;
  }
}

// Columns `column` to `column + 7` of a row; 0 from `columns` on.
template <typename T>
__device__ __forceinline__ void load_vector(const Matrix& matrix, DType type, int64_t row, int column, int columns,
                                            float (&values)[kVector]) {
  if constexpr (std::is_same_v<T, AnyFloat>) {
    int64_t index = row * matrix.stride_row + column * matrix.stride_column;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = column + i < columns ? load_float(matrix.data, index, type) : 0.0f;
      // one address at a time: with all of them in registers the kernels spill
      if (i + 1 < kVector) index = opaque(index + matrix.stride_column);
    }
  } else {
    constexpr int kLoads = kVector * sizeof(T) / sizeof(uint4);
    uint4 words[kLoads] = {};
    if (column < columns) {
      const T* first = static_cast<const T*>(matrix.data) + row * matrix.stride_row + column;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) words[i] = reinterpret_cast<const uint4*>(first)[i];
    }
    T elements[kVector];
    memcpy(elements, words, sizeof(words));
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = to_float(elements[i]);
  }
}

// The same of a contiguous matrix.
template <typename T>
__device__ __forceinline__ void store_vector(void* data, DType type, int64_t row, int column, int columns,
                                             const float (&values)[kVector]) {
  if constexpr (std::is_same_v<T, AnyFloat>) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (column + i < columns) store_float(data, row * columns + column + i, type, values[i]);
    }
  } else {
    if (column >= columns) return;
    constexpr int kStores = kVector * sizeof(T) / sizeof(uint4);
    T elements[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) from_float(values[i], elements + i);
    uint4 words[kStores];
    memcpy(words, elements, sizeof(words));
    auto* first = reinterpret_cast<uint4*>(static_cast<T*>(data) + row * columns + column);
#pragma unroll
    for (int i = 0; i < kStores; ++i) first[i] = words[i];
  }
}

}  // namespace mbk
