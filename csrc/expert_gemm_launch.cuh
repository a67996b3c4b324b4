// Launches the expert GEMM for one type of elements: one source file for each, so that they compile side by side.
#pragma once

#include <atomic>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "expert_gemm.cuh"
#include "expert_gemm.h"

namespace mbk {

// Of the driver, found at run time: the library is not linked with it.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder of tensor maps, or null. Asked for once.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    const bool usable = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return found;
}

// Multiprocessors of the current device, 0 where it is not sm_90. Asked for once for each device.
inline cudaError_t multiprocessors_of_hopper(int* count) {
  constexpr int kOther = -1;
  static std::atomic<int> known[kMaxDevices];
  int device = 0, major = 0;
  MBK_RETURN_IF_ERROR(cudaGetDevice(&device));
  const bool remembered = device < kMaxDevices;
  const int found = remembered ? known[device].load(std::memory_order_relaxed) : 0;
  *count = found == kOther ? 0 : found;
  if (found != 0) return cudaSuccess;
  MBK_RETURN_IF_ERROR(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major == 9) MBK_RETURN_IF_ERROR(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
  if (remembered) known[device].store(*count == 0 ? kOther : *count, std::memory_order_relaxed);
  return cudaSuccess;
}

// What the copies move at least: 8 elements, 16 bytes.
inline bool multiples_of_8(std::initializer_list<int64_t> counts) {
  for (int64_t count : counts) {
    if (count <= 0 || count % 8 != 0) return false;
  }
  return true;
}

inline bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return true;
}

inline ExpertGemmSizes expert_gemm_sizes(const ExpertGemmParams& params) {
  return {params.rows, params.num_experts, params.columns, params.depth, params.activation != Activation::kIdentity};
}

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

// What a tensor map says: sizes[0] adjacent elements, then strides in elements; boxes of 64 by `box_rows`.
template <int kRank>
struct Tensor {
  const void* data;
  int64_t sizes[kRank], strides[kRank - 1];
  int64_t box_rows;
};

// A map of boxes swizzled over 128 bytes. The maps that a thread encoded last are kept: they are functions of the tensor.
template <class T, int kRank>
cudaError_t encode_map(EncodeTiled encode, CUtensorMap* map, const Tensor<kRank>& tensor) {
  struct Known {
    Tensor<kRank> tensor;
    CUtensorMap map;
  };
  constexpr size_t kKnown = 64;
  static thread_local Known all[kKnown] = {};
  Known& known = all[(reinterpret_cast<uintptr_t>(tensor.data) / 256 + static_cast<size_t>(tensor.sizes[1])) % kKnown];
  if (std::memcmp(&known.tensor, &tensor, sizeof(tensor)) != 0) {
    cuuint64_t sizes[kRank], strides[kRank - 1];
    cuuint32_t box[kRank], steps[kRank];
    for (int i = 0; i < kRank; ++i) {
      sizes[i] = static_cast<cuuint64_t>(tensor.sizes[i]);
      box[i] = 1;
      steps[i] = 1;
    }
    for (int i = 0; i < kRank - 1; ++i) strides[i] = static_cast<cuuint64_t>(tensor.strides[i]) * sizeof(T);
    box[0] = kExpertGemmBlockK;
    box[1] = static_cast<cuuint32_t>(tensor.box_rows);
    // The driver's encoder wants a context, which a thread that only read memory of others does not have yet; the
    // runtime makes one here, in a capture too.
    int current = 0;
    MBK_RETURN_IF_ERROR(cudaGetDevice(&current));
    MBK_RETURN_IF_ERROR(cudaSetDevice(current));
    CUtensorMap encoded;
    const CUresult status = encode(&encoded, kTensorMapType<T>, kRank, const_cast<void*>(tensor.data), sizes, strides,
                                   box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) return cudaErrorInvalidValue;
    known = {tensor, encoded};
  }
  *map = known.map;
  return cudaSuccess;
}

template <class Traits, ActivationForm kForm>
cudaError_t launch(const ExpertGemmParams& params, const ActivationConstants& constants, EncodeTiled encode,
                   int multiprocessors) {
  using T = typename Traits::Element;
  ExpertGemmKernelParams<T> device{};
  const Tensor<3> weights{params.w,
                          {params.depth, params.columns, params.num_experts},
                          {params.w_row_stride, params.w_expert_stride},
                          Traits::kBlockN / Traits::kCluster};
  MBK_RETURN_IF_ERROR((encode_map<T, 3>(encode, &device.weights, weights)));
  if (!params.gather) {
    const Tensor<2> rows{params.a, {params.depth, params.rows}, {params.a_row_stride}, Traits::kBlockM};
    MBK_RETURN_IF_ERROR((encode_map<T, 2>(encode, &device.rows, rows)));
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

  constexpr int kSharedBytes = static_cast<int>(sizeof(typename Traits::Shared));
  const int64_t items = max_expert_gemm_items({Traits::kBlockN, Traits::kCluster}, expert_gemm_sizes(params));
  const int64_t most = multiprocessors / Traits::kCluster > 1 ? multiprocessors / Traits::kCluster : 1;
  const int64_t clusters = items < most ? items : most;
  static Launcher launcher(kSharedBytes);
  return launcher(expert_gemm_kernel<Traits, kForm, ExpertGemmKernelParams<T>>,
                  {clusters * Traits::kCluster, kExpertGemmThreads, kSharedBytes, Traits::kCluster,
                   params.after_previous, params.stream},
                  device);
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

template <class T, int kBlockN>
cudaError_t launch_cluster(const ExpertGemmParams& params, int cluster, EncodeTiled encode, int multiprocessors) {
  return cluster == 1   ? launch_form<T, kBlockN, 1>(params, encode, multiprocessors)
         : cluster == 2 ? launch_form<T, kBlockN, 2>(params, encode, multiprocessors)
                        : cudaErrorInvalidValue;
}

}  // namespace expert_gemm_detail

template <class T>
cudaError_t expert_gemm_of(const ExpertGemmParams& params, const ExpertGemmConfig& config, EncodeTiled encode,
                           int multiprocessors) {
  using namespace expert_gemm_detail;
  switch (config.block_n) {
    case 128:
      return launch_cluster<T, 128>(params, config.cluster, encode, multiprocessors);
    case 192:
      return launch_cluster<T, 192>(params, config.cluster, encode, multiprocessors);
    case 256:
      return launch_cluster<T, 256>(params, config.cluster, encode, multiprocessors);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mbk
