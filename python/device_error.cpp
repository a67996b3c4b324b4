#include "device_error.h"

#include <pybind11/pybind11.h>

#include <string>

namespace mbk {

void bind_device_error(pybind11::module_& module) {
  module.def(
      "device_error",
      [](int index) -> std::string {
        const cudaError_t status = mbk::device_error(index);
        // The failed call's status must not turn up at a later launch.
        cudaGetLastError();
        return status == cudaSuccess ? "" : cudaGetErrorString(status);
      },
      "Why no kernel of this module can run on CUDA device `index`, in CUDA's words; \"\" if they can.");
}

}  // namespace mbk
