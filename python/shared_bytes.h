// What the table of resources says of the memory that launches add to a kernel's own.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace mbk {

// The module's dictionary: a regular expression of kernels' names -> the most dynamic shared memory, in bytes.
inline pybind11::dict most_shared_bytes(pybind11::module_& module) {
  if (!pybind11::hasattr(module, "most_shared_bytes")) module.attr("most_shared_bytes") = pybind11::dict();
  return module.attr("most_shared_bytes");
}

}  // namespace mbk
