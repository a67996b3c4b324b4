// The expert GEMM of bfloat16.
#include "expert_gemm_launch.cuh"

namespace mbk {

template cudaError_t expert_gemm_of<__nv_bfloat16>(const ExpertGemmParams&, const ExpertGemmConfig&, EncodeTiled, int);

}  // namespace mbk
