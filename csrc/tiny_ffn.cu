#include "tiny_ffn.cuh"

#include <algorithm>
#include <atomic>

namespace mbk {
namespace tiny {
namespace {

constexpr int kMaxDevices = 64;
enum Preparation : int { kUnknown = 0, kPlain = 1, kProgrammatic = 2 };

// Once for each kernel and device: room in shared memory, and whether the code that runs there knows griddepcontrol.
// PTX of an earlier architecture does not; such a kernel must not start before the one that it reads from ends.
template <typename Kernel>
cudaError_t prepare(Kernel kernel, int shared_bytes, std::atomic<int>* prepared, int* preparation) {
  int device = 0;
  MBK_RETURN_IF_ERROR(cudaGetDevice(&device));
  const bool remembered = device < kMaxDevices;
  *preparation = remembered ? prepared[device].load(std::memory_order_relaxed) : kUnknown;
  if (*preparation != kUnknown) return cudaSuccess;
  cudaFuncAttributes attributes;
  MBK_RETURN_IF_ERROR(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  MBK_RETURN_IF_ERROR(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  *preparation = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90 ? kProgrammatic : kPlain;
  if (remembered) prepared[device].store(*preparation, std::memory_order_relaxed);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t launch_prepared(Kernel kernel, std::atomic<int>* prepared, int blocks, int shared_bytes,
                            bool after_previous, const Arguments& arguments) {
  int preparation = kUnknown;
  MBK_RETURN_IF_ERROR(prepare(kernel, shared_bytes, prepared, &preparation));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = arguments.p.stream;
  config.attrs = &attribute;
  config.numAttrs = after_previous && preparation == kProgrammatic ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <typename T, int kBlockM>
cudaError_t launch_both(const Arguments& a) {
  if (int64_t{a.plan.tiles} * std::max(a.plan.hidden_slices, a.plan.output_slices * a.plan.splits) > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  const int hidden_blocks = a.plan.hidden_slices * a.plan.tiles;
  const int output_blocks = a.plan.output_slices * a.plan.tiles * a.plan.splits;
  constexpr int kBytes = kSharedBytes<kBlockM>;
  static std::atomic<int> hidden_prepared[kMaxDevices], output_prepared[kMaxDevices];
  MBK_RETURN_IF_ERROR(
      launch_prepared(tiny_ffn_hidden_kernel<T, kBlockM>, hidden_prepared, hidden_blocks, kBytes, false, a));
  MBK_RETURN_IF_ERROR(
      launch_prepared(tiny_ffn_output_kernel<T, kBlockM>, output_prepared, output_blocks, kBytes, true, a));
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_tiles(const Arguments& a) {
  switch (a.plan.block_m) {
    case 16:
      return launch_both<T, 16>(a);
    case 32:
      return launch_both<T, 32>(a);
    default:
      return launch_both<T, 64>(a);
  }
}

bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Rows of `length` elements of which chunks can be copied without looking at the others.
Operand operand(const void* data, DType dtype, DType gemm_dtype, int64_t stride_e, int64_t stride_row,
                int64_t stride_k) {
  const int64_t chunk = 16 / size_of(dtype);
  const bool vector = stride_k == 1 && stride_e % chunk == 0 && stride_row % chunk == 0 && aligned(data, 16);
  return {data, stride_k, vector, dtype != gemm_dtype};
}

bool fits_int32(int64_t size) { return size >= 1 && size <= INT32_MAX / 4; }

}  // namespace
}  // namespace tiny

int tiny_ffn_shared_bytes(int block_m) {
  return block_m == 16 ? tiny::kSharedBytes<16> : block_m == 32 ? tiny::kSharedBytes<32> : tiny::kSharedBytes<64>;
}

cudaError_t tiny_ffn(const TinyFfnParams& params) {
  if (params.tokens == 0) return cudaSuccess;
  const bool known_dtypes = params.x_dtype == params.dtype || params.x_dtype == DType::kFloat32;
  if (params.tokens < 0 || params.tokens > kTinyFfnMaxTokens || params.experts < 1 ||
      params.experts > kTinyFfnMaxExperts || !tiny::fits_int32(params.hidden) || !tiny::fits_int32(params.width) ||
      !known_dtypes) {
    return cudaErrorInvalidValue;
  }
  tiny::Arguments a{};
  a.p = params;
  a.plan = tiny_ffn_plan(params.tokens, params.hidden, params.width, params.experts, params.dtype, params.activation,
                         params.norm_weight != nullptr);
  a.x = tiny::operand(params.x, params.x_dtype, params.dtype, 0, params.x_stride_t, params.x_stride_h);
  a.w1 = tiny::operand(params.w1, params.dtype, params.dtype, params.w1_stride_e, params.w1_stride_n,
                       params.w1_stride_k);
  a.w2 = tiny::operand(params.w2, params.dtype, params.dtype, params.w2_stride_e, params.w2_stride_n,
                       params.w2_stride_k);
  a.h = tiny::operand(params.workspace, params.dtype, params.dtype, 0, a.plan.h_pitch, 1);
  a.x_is_float = params.x_dtype == DType::kFloat32 && params.dtype != DType::kFloat32;
  const int64_t four = 4 * size_of(params.x_dtype);
  a.norm_vector = params.hidden % 4 == 0 && tiny::aligned(params.y, four) &&
                  tiny::aligned(params.norm_weight, four) && tiny::aligned(params.norm_bias, four);
  switch (params.dtype) {
    case DType::kFloat32:
      return tiny::launch_tiles<float>(a);
    case DType::kFloat16:
      return tiny::launch_tiles<__half>(a);
    case DType::kBFloat16:
      return tiny::launch_tiles<__nv_bfloat16>(a);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mbk
