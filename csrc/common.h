// What every launcher shares: types of elements, activations, size arithmetic, and how a failed CUDA call returns.
//
// Host tests compile the same sources with MBK_EMULATION defined and tests/csrc on the include path; there
// emulation.h stands in for CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef MBK_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

#ifdef __CUDACC__
#define MBK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MBK_HOST_DEVICE inline
#endif

// Leaves a function of type cudaError_t with the status of a call that failed.
#define MBK_RETURN_IF_ERROR(call)                     \
  do {                                                \
    const cudaError_t mbk_status = (call);            \
    if (mbk_status != cudaSuccess) return mbk_status; \
  } while (false)

namespace mbk {

// The numbers are those that Python passes; moebert_kernels/cuda_backend has the same ones.
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// In the order of moebert_kernels.activation.ACTIVATIONS; the last four are gated, gate rows first.
enum class Activation : int {
  kGelu = 0,
  kGeluTanh = 1,
  kRelu = 2,
  kRelu2 = 3,
  kSilu = 4,
  kIdentity = 5,
  kSwiGlu = 6,
  kGeGlu = 7,
  kGeGluTanh = 8,
  kReGlu = 9,
};

MBK_HOST_DEVICE constexpr int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

MBK_HOST_DEVICE constexpr bool is_gated(Activation activation) { return activation >= Activation::kSwiGlu; }

MBK_HOST_DEVICE constexpr int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

MBK_HOST_DEVICE constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return ceil_div(count, multiple) * multiple;
}

}  // namespace mbk
