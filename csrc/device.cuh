// What device code needs beyond the language, and launches. tests/csrc/emulation_warp.h has the same for the host.
#pragma once

#include <utility>

#include "common.h"

#ifndef MBK_EMULATION

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace mbk {

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char mbk_dynamic_shared[];
  return mbk_dynamic_shared;
}

// The value, of which the compiler knows nothing any more.
__device__ __forceinline__ int64_t opaque(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

// 1 / x and 2^x in one instruction each, right to 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Between two looks at a word that another block is about to write.
__device__ __forceinline__ void pause() { __nanosleep(32); }

// A store that other blocks of this kernel look at.
template <typename T>
__device__ __forceinline__ void store_volatile(T* address, T value) {
  *static_cast<volatile T*>(address) = value;
}

// A load that another block's store may have changed during this kernel.
template <typename T>
__device__ __forceinline__ T load_volatile(const T* address) {
  return *static_cast<const volatile T*>(address);
}

}  // namespace mbk

#endif

namespace mbk {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

// Launches; asks for more than 48 KiB of shared memory where the kernel needs it.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    MBK_RETURN_IF_ERROR(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace mbk
