// How a failed launch becomes a Python exception.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "common.h"

namespace mbk {

// Raises RuntimeError with the kernel, its sizes and CUDA's own text, where a launcher failed.
inline void raise_on_error(cudaError_t status, const char* kernel,
                           std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the failure would turn up again at a later launch
  std::string message = std::string(kernel) + "(";
  const char* separator = "";
  for (const auto& [name, size] : sizes) {
    message += separator + std::string(name) + "=" + std::to_string(size);
    separator = ", ";
  }
  throw std::runtime_error(message + "): " + cudaGetErrorString(status));
}

}  // namespace mbk
