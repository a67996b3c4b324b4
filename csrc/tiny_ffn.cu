#include "tiny_ffn.cuh"

namespace mbk {
namespace tiny {
namespace {

template <typename T, int kBlockM>
cudaError_t launch_both(const Arguments& a) {
  static Launcher launch_hidden(kSharedBytes<kBlockM>), launch_output(kSharedBytes<kBlockM>);
  const auto shape = [&](int64_t slices, bool after_previous) {
    return LaunchShape{slices * a.plan.tiles, kThreads, kSharedBytes<kBlockM>, 0, after_previous, a.p.stream};
  };
  MBK_RETURN_IF_ERROR(launch_hidden(tiny_ffn_hidden_kernel<T, kBlockM>, shape(a.plan.hidden_slices, false), a));
  return launch_output(tiny_ffn_output_kernel<T, kBlockM>,
                       shape(int64_t{a.plan.output_slices} * a.plan.splits, true), a);
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
