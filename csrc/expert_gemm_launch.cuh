// Launches the expert GEMM for one type of elements: one source file for each, so that they compile side by side.
#pragma once

#include <type_traits>

#include "expert_gemm.cuh"
#include "expert_gemm.h"

namespace mbk {

// Of the driver, found at run time: the library is not linked with it.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

template <class T>
cudaError_t expert_gemm_of(const ExpertGemmParams& params, const ExpertGemmConfig& config, EncodeTiled encode,
                           int multiprocessors);

extern template cudaError_t expert_gemm_of<__half>(const ExpertGemmParams&, const ExpertGemmConfig&, EncodeTiled, int);
extern template cudaError_t expert_gemm_of<__nv_bfloat16>(const ExpertGemmParams&, const ExpertGemmConfig&, EncodeTiled,
                                                          int);

namespace expert_gemm_detail {

struct Form {
  ActivationForm form;
  ActivationConstants constants;
};

constexpr float kLog2E = 1.4426950408889634f;

inline Form form_of(Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return {ActivationForm::kGelu, {}};
    case Activation::kGeluTanh:  // (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
      return {ActivationForm::kSigmoid, {-kLog2E * 1.5957691216057308f, -kLog2E * 0.071354816272600250f, false}};
    case Activation::kSilu:
      return {ActivationForm::kSigmoid, {-kLog2E, 0.0f, false}};
    case Activation::kRelu:
      return {ActivationForm::kClamp, {0.0f, 0.0f, true}};
    default:
      return {ActivationForm::kClamp, {0.0f, 0.0f, false}};
  }
}

template <class T>
constexpr CUtensorMapDataType kTensorMapType =
    std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// sizes[0] adjacent elements, then strides in elements; copies boxes of 64 by `box_rows`, swizzled over 128 bytes.
template <class T, int kRank>
cudaError_t encode_map(EncodeTiled encode, CUtensorMap* map, const void* data, const int64_t (&sizes)[kRank],
                       const int64_t (&strides)[kRank - 1], int box_rows) {
  cuuint64_t dims[kRank], bytes[kRank - 1];
  cuuint32_t box[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    dims[i] = static_cast<cuuint64_t>(sizes[i]);
    box[i] = 1;
    steps[i] = 1;
  }
  for (int i = 0; i < kRank - 1; ++i) bytes[i] = static_cast<cuuint64_t>(strides[i]) * sizeof(T);
  box[0] = kExpertGemmBlockK;
  box[1] = static_cast<cuuint32_t>(box_rows);
  const CUresult status = encode(map, kTensorMapType<T>, kRank, const_cast<void*>(data), dims, bytes, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Traits, ActivationForm kForm>
cudaError_t launch(const ExpertGemmParams& params, const ActivationConstants& constants, EncodeTiled encode,
                   int multiprocessors) {
  using T = typename Traits::Element;
  ExpertGemmKernelParams<T> device{};
  MBK_RETURN_IF_ERROR(
      (encode_map<T, 3>(encode, &device.weights, params.w, {params.depth, params.columns, params.num_experts},
                        {params.w_row_stride, params.w_expert_stride}, Traits::kBlockN / Traits::kCluster)));
  if (!params.gather) {
    MBK_RETURN_IF_ERROR((encode_map<T, 2>(encode, &device.rows, params.a, {params.depth, params.rows},
                                          {params.a_row_stride}, Traits::kBlockM)));
  }
  device.a = static_cast<const T*>(params.a);
  device.offsets = params.offsets;
  device.epilogue.y = static_cast<T*>(params.y);
  device.epilogue.pre = static_cast<T*>(params.pre);
  device.epilogue.bias = static_cast<const T*>(params.bias);
  device.epilogue.weights = static_cast<const T*>(params.weights);
  device.epilogue.row_to_assignment = params.row_to_assignment;
  device.epilogue.columns = static_cast<int>(params.columns);
  device.epilogue.scatter = params.scatter;
  device.epilogue.constants = constants;
  device.a_row_stride = static_cast<int>(params.a_row_stride);
  device.num_rows = static_cast<int>(params.rows);
  device.num_experts = static_cast<int>(params.num_experts);
  device.depth = static_cast<int>(params.depth);
  device.tiles_n = static_cast<int>(ceil_div(params.columns, Traits::kBlockN));
  device.top_k = params.top_k;
  device.gather = params.gather;

  const auto kernel = &expert_gemm_kernel<Traits, kForm, ExpertGemmKernelParams<T>>;
  constexpr int kSharedBytes = static_cast<int>(sizeof(typename Traits::Shared));
  MBK_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const int64_t items =
      max_expert_gemm_items({Traits::kBlockN, Traits::kCluster}, params.rows, params.num_experts, params.columns);
  const int64_t most = multiprocessors / Traits::kCluster > 1 ? multiprocessors / Traits::kCluster : 1;
  const int64_t clusters = items < most ? items : most;

  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Traits::kCluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(clusters * Traits::kCluster));
  launch.blockDim = dim3(kExpertGemmThreads);
  launch.dynamicSmemBytes = kSharedBytes;
  launch.stream = params.stream;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  MBK_RETURN_IF_ERROR(cudaLaunchKernelEx(&launch, kernel, device));
  return cudaGetLastError();
}

template <class T, int kBlockN, int kCluster>
cudaError_t launch_form(const ExpertGemmParams& params, EncodeTiled encode, int multiprocessors) {
  using Traits = ExpertGemmTraits<T, kBlockN, kCluster>;
  const auto [form, constants] = form_of(params.activation);
  switch (form) {
    case ActivationForm::kGelu:
      return launch<Traits, ActivationForm::kGelu>(params, constants, encode, multiprocessors);
    case ActivationForm::kSigmoid:
      return launch<Traits, ActivationForm::kSigmoid>(params, constants, encode, multiprocessors);
    default:
      return launch<Traits, ActivationForm::kClamp>(params, constants, encode, multiprocessors);
  }
}

}  // namespace expert_gemm_detail

template <class T>
cudaError_t expert_gemm_of(const ExpertGemmParams& params, const ExpertGemmConfig& config, EncodeTiled encode,
                           int multiprocessors) {
  using namespace expert_gemm_detail;
  if (config.block_n == 128 && config.cluster == 1) return launch_form<T, 128, 1>(params, encode, multiprocessors);
  if (config.block_n == 128 && config.cluster == 2) return launch_form<T, 128, 2>(params, encode, multiprocessors);
  if (config.block_n == 192 && config.cluster == 1) return launch_form<T, 192, 1>(params, encode, multiprocessors);
  if (config.block_n == 192 && config.cluster == 2) return launch_form<T, 192, 2>(params, encode, multiprocessors);
  return cudaErrorInvalidValue;
}

}  // namespace mbk
