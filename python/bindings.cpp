// moebert_kernels._C: calls every op's binding. CMakeLists.txt says which ops there are.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace mbk {

#define MBK_DECLARE(op) void bind_##op(pybind11::module_& module);
MBK_FOR_EACH_OP(MBK_DECLARE)

}  // namespace mbk

PYBIND11_MODULE(_C, module) {
#define MBK_BIND(op) mbk::bind_##op(module);
  MBK_FOR_EACH_OP(MBK_BIND)
}
