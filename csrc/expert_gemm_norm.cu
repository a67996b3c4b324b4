// Checks what the expert GEMM with a LayerNorm can take, chooses its tile and cluster, and launches it.
#include "expert_gemm_norm.h"

#include <climits>

#include "expert_gemm_norm_launch.cuh"

namespace mbk {
namespace {

// The fewest CTAs, then the narrowest tile, that hold a row.
ExpertGemmConfig pick_config(int64_t columns) {
  for (int cluster : {1, 2, 4, 8}) {
    for (int block_n : {128, 192}) {
      if (columns <= int64_t{block_n} * cluster && (block_n == 128 || cluster <= 4)) return {block_n, cluster};
    }
  }
  return {0, 0};
}

bool is_supported(const ExpertGemmParams& gemm, const ExpertGemmNorm& norm, const ExpertGemmConfig& config) {
  const bool plain = gemm.activation == Activation::kIdentity && !gemm.gather && gemm.pre == nullptr && gemm.top_k == 1;
  return plain && gemm.columns % 32 == 0 &&
         multiples_of_8({gemm.columns, gemm.depth, gemm.a_row_stride, gemm.w_expert_stride, gemm.w_row_stride,
                         norm.x_row_stride}) &&
         aligned({gemm.a, gemm.w, gemm.y, gemm.bias, norm.x, norm.weight, norm.bias}) && norm.weight != nullptr &&
         norm.bias != nullptr && gemm.a_row_stride <= INT_MAX && gemm.depth <= INT_MAX / 2 &&
         gemm.columns <= int64_t{config.block_n} * config.cluster && gemm.rows <= INT_MAX / 2 && gemm.num_experts > 0 &&
         gemm.num_experts * gemm.columns <= INT_MAX &&
         (gemm.dtype == DType::kFloat16 || gemm.dtype == DType::kBFloat16);
}

template <class T>
cudaError_t launch_of(const ExpertGemmParams& gemm, const ExpertGemmNorm& norm, const ExpertGemmConfig& config,
                      EncodeTiled encode) {
  return config.block_n == 128   ? launch_expert_gemm_norm<T, 128>(gemm, norm, config.cluster, encode)
         : config.block_n == 192 ? launch_expert_gemm_norm<T, 192>(gemm, norm, config.cluster, encode)
                                 : cudaErrorInvalidValue;
}

}  // namespace

int expert_gemm_norm_shared_bytes(int block_n) {
  return static_cast<int>(block_n == 128 ? sizeof(ExpertGemmNormTraits<__half, 128>::Shared)
                                         : sizeof(ExpertGemmNormTraits<__half, 192>::Shared));
}

cudaError_t expert_gemm_norm(const ExpertGemmParams& gemm, const ExpertGemmNorm& norm) {
  if (gemm.rows == 0 || gemm.columns == 0) return cudaSuccess;
  int multiprocessors = 0;
  MBK_RETURN_IF_ERROR(multiprocessors_of_hopper(&multiprocessors));
  if (multiprocessors == 0) return cudaErrorNotSupported;
  ExpertGemmConfig config = pick_config(gemm.columns);
  if (gemm.block_n != 0) config.block_n = gemm.block_n;
  if (gemm.cluster != 0) config.cluster = gemm.cluster;
  if (!is_supported(gemm, norm, config)) return cudaErrorInvalidValue;
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  return gemm.dtype == DType::kFloat16 ? launch_of<__half>(gemm, norm, config, encode)
                                       : launch_of<__nv_bfloat16>(gemm, norm, config, encode);
}

}  // namespace mbk
