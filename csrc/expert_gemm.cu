// Checks what the expert GEMM's copies can take, chooses a tile and passes on by type of elements.
#include <climits>

#include "expert_gemm.h"
#include "expert_gemm_launch.cuh"

namespace mbk {
namespace {

bool is_supported(const ExpertGemmParams& params, const ExpertGemmConfig& config) {
  const int64_t row_tiles = params.rows / kExpertGemmBlockM + params.num_experts + 1;
  return multiples_of_8(
             {params.columns, params.depth, params.a_row_stride, params.w_expert_stride, params.w_row_stride}) &&
         aligned({params.a, params.w, params.y, params.pre, params.bias}) && params.a_row_stride <= INT_MAX &&
         params.columns <= INT_MAX / 2 && params.depth <= INT_MAX / 2 && params.rows <= INT_MAX / 2 &&
         params.num_experts > 0 && params.num_experts <= INT_MAX / 2 && params.top_k > 0 &&
         row_tiles * ceil_div(params.columns, config.block_n) <= INT_MAX / 2 && !is_gated(params.activation) &&
         params.activation != Activation::kRelu2 &&
         (params.dtype == DType::kFloat16 || params.dtype == DType::kBFloat16);
}

}  // namespace

int expert_gemm_shared_bytes(int block_n) {
  return static_cast<int>(block_n == 128   ? sizeof(ExpertGemmTraits<__half, 128, 1>::Shared)
                          : block_n == 192 ? sizeof(ExpertGemmTraits<__half, 192, 1>::Shared)
                                           : sizeof(ExpertGemmTraits<__half, 256, 1>::Shared));
}

cudaError_t expert_gemm(const ExpertGemmParams& params) {
  if (params.rows == 0 || params.columns == 0) return cudaSuccess;
  int multiprocessors = 0;
  MBK_RETURN_IF_ERROR(multiprocessors_of_hopper(&multiprocessors));
  if (multiprocessors == 0) return cudaErrorNotSupported;
  ExpertGemmConfig config = pick_expert_gemm_config(expert_gemm_sizes(params), multiprocessors);
  if (params.block_n != 0) config.block_n = params.block_n;
  if (params.cluster != 0) config.cluster = params.cluster;
  if (!is_supported(params, config)) return cudaErrorInvalidValue;
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  return params.dtype == DType::kFloat16 ? expert_gemm_of<__half>(params, config, encode, multiprocessors)
                                         : expert_gemm_of<__nv_bfloat16>(params, config, encode, multiprocessors);
}

}  // namespace mbk
