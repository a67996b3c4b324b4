// The part of CUDA's runtime that the launchers use. Kernels are queued as in a stream and run when something waits for
// them: a launch that is not programmatic, a memset, `cudaDeviceSynchronize`.
#pragma once

#include <map>
#include <utility>

#include "emulation_warp.h"

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
using cudaStream_t = void*;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };

struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulation {

constexpr int kMultiprocessors = 6;
constexpr int kMostSharedBytes = 227 * 1024, kSharedBytesUnasked = 48 * 1024;

inline std::map<const void*, int>& shared_bytes_allowed() {
  static std::map<const void*, int> value;
  return value;
}

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaDeviceSynchronize() {
  emulation::Machine::instance().run();
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  cudaDeviceSynchronize();
  std::memset(data, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : emulation::kMultiprocessors;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {90, 90};
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulation::kMostSharedBytes) return cudaErrorInvalidValue;
  emulation::shared_bytes_allowed()[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

// As many as multiprocessors have room for, one block each.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t* config) {
  *count = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    *count = std::max(1, emulation::kMultiprocessors / static_cast<int>(attribute.val.clusterDim.x));
  }
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulation::Grid grid;
  grid.size = config->gridDim;
  grid.block = config->blockDim;
  grid.shared_bytes = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      grid.cluster = attribute.val.clusterDim.x * attribute.val.clusterDim.y * attribute.val.clusterDim.z;
    } else {
      grid.beside_previous = attribute.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  const unsigned threads = grid.block.x * grid.block.y * grid.block.z;
  const auto allowed = emulation::shared_bytes_allowed().find(reinterpret_cast<const void*>(kernel));
  const bool asked = allowed != emulation::shared_bytes_allowed().end();
  const int most = asked ? allowed->second : emulation::kSharedBytesUnasked;
  if (grid.blocks() == 0 || threads == 0 || threads > 1024 || grid.cluster == 0 || grid.blocks() % grid.cluster != 0 ||
      grid.shared_bytes > static_cast<size_t>(most)) {
    return cudaErrorInvalidConfiguration;
  }
  grid.body = [kernel, copies = std::make_tuple(static_cast<std::decay_t<Arguments>>(arguments)...)] {
    std::apply(kernel, copies);
  };
  emulation::Machine::instance().launch(std::move(grid));
  return cudaSuccess;
}
