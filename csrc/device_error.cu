// A kernel that does nothing, to ask whether the ones that do would load.
#include "device_error.h"

namespace mbk {
namespace {

__global__ void probe_kernel() {}

}  // namespace

cudaError_t device_error(int index) {
  int previous = 0;
  MBK_RETURN_IF_ERROR(cudaGetDevice(&previous));
  MBK_RETURN_IF_ERROR(cudaSetDevice(index));
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  MBK_RETURN_IF_ERROR(cudaSetDevice(previous));
  return status;
}

}  // namespace mbk
