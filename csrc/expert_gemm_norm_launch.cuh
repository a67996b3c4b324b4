// Launches the expert GEMM with a LayerNorm for one type of elements and one tile.
#pragma once

#include "expert_gemm_launch.cuh"
#include "expert_gemm_norm.cuh"
#include "expert_gemm_norm.h"

namespace mbk {

// Clusters of 1, 2, 4 or 8: a part of the rows is whole swizzles of 8. Persistent clusters that do not all fit would
// run one after the other. A GPU's parts of 16 or 18 multiprocessors hold fewer than their number says: so CUDA is
// asked, once for each device.
template <class T, int kBlockN>
cudaError_t launch_expert_gemm_norm(const ExpertGemmParams& gemm, const ExpertGemmNorm& norm, int cluster,
                                    EncodeTiled encode) {
  using Traits = ExpertGemmNormTraits<T, kBlockN>;
  using namespace expert_gemm_detail;
  if (cluster < 1 || cluster > Traits::kMaxCluster || (cluster & (cluster - 1)) != 0) return cudaErrorInvalidValue;
  ExpertGemmNormKernelParams<T> device{};
  const Tensor<3> weights{gemm.w,
                          {gemm.depth, gemm.columns, gemm.num_experts},
                          {gemm.w_row_stride, gemm.w_expert_stride},
                          kBlockN};
  const Tensor<2> rows{gemm.a, {gemm.depth, gemm.rows}, {gemm.a_row_stride}, Traits::kBlockM / cluster};
  MBK_RETURN_IF_ERROR((encode_map<T, 3>(encode, &device.weights, weights)));
  MBK_RETURN_IF_ERROR((encode_map<T, 2>(encode, &device.rows, rows)));
  device.offsets = gemm.offsets;
  device.epilogue.y = static_cast<T*>(gemm.y);
  device.epilogue.x = static_cast<const T*>(norm.x);
  device.epilogue.bias = static_cast<const T*>(gemm.bias);
  device.epilogue.norm_weight = static_cast<const T*>(norm.weight);
  device.epilogue.norm_bias = static_cast<const T*>(norm.bias);
  device.epilogue.weights = static_cast<const T*>(gemm.weights);
  device.epilogue.row_to_token = gemm.row_to_assignment;
  device.epilogue.x_row_stride = norm.x_row_stride;
  device.epilogue.columns = static_cast<int>(gemm.columns);
  device.epilogue.eps = norm.eps;
  device.epilogue.x_by_row = norm.x_by_row;
  device.num_rows = static_cast<int>(gemm.rows);
  device.num_experts = static_cast<int>(gemm.num_experts);
  device.depth = static_cast<int>(gemm.depth);
  device.cluster = cluster;

  constexpr int kSharedBytes = static_cast<int>(sizeof(typename Traits::Shared));
  static Launcher launcher(kSharedBytes);
  static std::atomic<int> known[kMaxDevices][Traits::kMaxCluster + 1];
  const auto kernel = &expert_gemm_norm_kernel<Traits, ExpertGemmNormKernelParams<T>>;
  LaunchShape shape{cluster, kExpertGemmThreads, kSharedBytes, cluster, gemm.after_previous, gemm.stream};
  int index = 0, most = 0;
  MBK_RETURN_IF_ERROR(cudaGetDevice(&index));
  if (index < kMaxDevices) most = known[index][cluster].load(std::memory_order_relaxed);
  if (most == 0) {
    MBK_RETURN_IF_ERROR(launcher.most_clusters(kernel, shape, &most));
    if (most == 0) return cudaErrorNotSupported;
    if (index < kMaxDevices) known[index][cluster].store(most, std::memory_order_relaxed);
  }
  const int64_t row_tiles = gemm.rows / Traits::kBlockM + gemm.num_experts + 1;
  device.clusters = static_cast<int>(row_tiles < most ? row_tiles : most);
  shape.blocks = int64_t{device.clusters} * cluster;
  return launcher(kernel, shape, device);
}

}  // namespace mbk
