// The expert GEMM of float16.
#include "expert_gemm_launch.cuh"

namespace mbk {

template cudaError_t expert_gemm_of<__half>(const ExpertGemmParams&, const ExpertGemmConfig&, EncodeTiled, int);

}  // namespace mbk
