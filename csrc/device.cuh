// What device code needs beyond the language, and launches. tests/csrc/emulation_warp.h has the same for the host.
#pragma once

#include <atomic>
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

// Programmatic dependent launch: waits for the kernel before this one and sees all that it wrote.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may start once all blocks of this one have said so and there is room.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace mbk

#endif

namespace mbk {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kMaxDevices = 64;  // of which something is remembered

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;
  int cluster;          // blocks; 0: no clusters
  bool after_previous;  // may start while the kernel before it runs, where the device's code waits for that one
  cudaStream_t stream;
};

// Launches one kernel; what a device has to be told and asked once for that kernel is remembered. One static object for
// each kernel.
class Launcher {
 public:
  explicit Launcher(int64_t most_shared_bytes) : most_shared_bytes_(static_cast<int>(most_shared_bytes)) {}

  template <typename... Parameters, typename... Arguments>
  cudaError_t operator()(void (*kernel)(Parameters...), const LaunchShape& shape, Arguments&&... arguments) {
    if (shape.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    int state = kUnknown;
    MBK_RETURN_IF_ERROR(prepare(reinterpret_cast<const void*>(kernel), &state));
    cudaLaunchAttribute attributes[2] = {};
    const cudaLaunchConfig_t config = describe(shape, state, attributes);
    MBK_RETURN_IF_ERROR(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
    return cudaGetLastError();
  }

  // How many clusters of this shape the device holds at once, whatever the number of blocks.
  template <typename... Parameters>
  cudaError_t most_clusters(void (*kernel)(Parameters...), const LaunchShape& shape, int* count) {
    int state = kUnknown;
    MBK_RETURN_IF_ERROR(prepare(reinterpret_cast<const void*>(kernel), &state));
    cudaLaunchAttribute attributes[2] = {};
    const cudaLaunchConfig_t config = describe(shape, state, attributes);
    return cudaOccupancyMaxActiveClusters(count, kernel, &config);
  }

 private:
  enum State : int { kUnknown = 0, kSerial = 1, kProgrammatic = 2 };

  static cudaLaunchConfig_t describe(const LaunchShape& shape, int state, cudaLaunchAttribute (&attributes)[2]) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = shape.stream;
    config.attrs = attributes;
    if (shape.cluster != 0) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (shape.after_previous && state == kProgrammatic) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    return config;
  }

  // Room for dynamic shared memory, and whether the code that runs there knows griddepcontrol: PTX of an architecture
  // before sm_90 does not, so such a kernel must not start before the one that it reads from ends. Nor do graphs before
  // CUDA 12.3 capture such launches.
  cudaError_t prepare(const void* kernel, int* state) {
    int device = 0, driver = 0;
    MBK_RETURN_IF_ERROR(cudaGetDevice(&device));
    const bool remembered = device < kMaxDevices;
    if (remembered) *state = state_[device].load(std::memory_order_relaxed);
    if (*state != kUnknown) return cudaSuccess;
    cudaFuncAttributes attributes;
    MBK_RETURN_IF_ERROR(cudaFuncGetAttributes(&attributes, kernel));
    MBK_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes_));
    MBK_RETURN_IF_ERROR(cudaDriverGetVersion(&driver));
    const bool programmatic = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90 && driver >= 12030;
    *state = programmatic ? kProgrammatic : kSerial;
    if (remembered) state_[device].store(*state, std::memory_order_relaxed);
    return cudaSuccess;
  }

  const int most_shared_bytes_;
  std::atomic<int> state_[kMaxDevices] = {};
};

}  // namespace mbk
