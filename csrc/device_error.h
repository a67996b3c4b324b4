// Whether this library's kernels can run on a device.
#pragma once

#include "common.h"

namespace mbk {

// cudaSuccess, or why not: no device or driver, a driver too old, no code for the device's architecture.
// Launches nothing; the caller's current device stays current.
cudaError_t device_error(int index);

}  // namespace mbk
