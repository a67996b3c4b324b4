#include "fused_moe_ffn_add_norm.cuh"

namespace mbk {
namespace {

using ForwardKernel = void (*)(AddNormInputs, const int32_t*, void*, int);
using BackwardKernel = void (*)(FusedMoeFfnAddNormBackwardParams, int);

struct Kernels {
  ForwardKernel forward;
  BackwardKernel backward;
  int warps_per_row;
};

template <typename X, typename F, int STEPS>
Kernels kernels(int columns) {
  int warps_per_row = 1;
  while (warps_per_row * STEPS * kVector * kWarpSize < columns) warps_per_row *= 2;
  return {add_norm_kernel<X, F, STEPS>, add_norm_backward_kernel<X, F, STEPS>, warps_per_row};
}

template <typename X, typename F>
Kernels kernels_in_vectors(int columns) {
  return columns <= 3 * kVector * kWarpSize ? kernels<X, F, 3>(columns) : kernels<X, F, 4>(columns);
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool has_vectors(const Matrix& matrix) {
  return is_aligned(matrix.data) && matrix.stride_column == 1 && matrix.stride_row % kVector == 0;
}

bool has_vectors(const AddNormInputs& in) {
  return in.columns % kVector == 0 && has_vectors(in.x) && has_vectors(in.norm_weight) && has_vectors(in.norm_bias) &&
         is_aligned(in.ffn);
}

// The pairs of types that the ops come with, in vectors; anything else element by element.
Kernels pick(const AddNormInputs& in, bool vectors) {
  const DType x = in.x_type, f = in.ffn_type;
  if (!vectors) return kernels<AnyFloat, AnyFloat, 2>(in.columns);
  if (x == DType::kFloat32 && f == DType::kFloat32) return kernels_in_vectors<float, float>(in.columns);
  if (x == DType::kFloat32 && f == DType::kFloat16) return kernels_in_vectors<float, __half>(in.columns);
  if (x == DType::kFloat32 && f == DType::kBFloat16) return kernels_in_vectors<float, __nv_bfloat16>(in.columns);
  if (x == DType::kFloat16 && f == DType::kFloat16) return kernels_in_vectors<__half, __half>(in.columns);
  if (x == DType::kBFloat16 && f == DType::kBFloat16) {
    return kernels_in_vectors<__nv_bfloat16, __nv_bfloat16>(in.columns);
  }
  return kernels<AnyFloat, AnyFloat, 2>(in.columns);
}

bool is_valid(const AddNormInputs& in) {
  return in.columns <= kMaxNormColumns && in.num_experts >= 1 && in.tokens <= INT32_MAX;
}

}  // namespace

int fused_moe_ffn_add_norm_shared_bytes(int columns, bool backward) {
  return kNormSumsBytes + (backward ? columns * static_cast<int>(sizeof(float)) : 0);
}

cudaError_t fused_moe_ffn_add_norm(const FusedMoeFfnAddNormParams& params) {
  const AddNormInputs& in = params.inputs;
  if (in.tokens == 0 || in.columns == 0) return cudaSuccess;
  if (!is_valid(in)) return cudaErrorInvalidValue;
  const Kernels kernels = pick(in, has_vectors(in) && is_aligned(params.y));
  const int rows_of_block = kNormWarps / kernels.warps_per_row;
  MBK_RETURN_IF_ERROR(launch(kernels.forward, ceil_div(in.tokens, rows_of_block), kNormThreads,
                             static_cast<size_t>(fused_moe_ffn_add_norm_shared_bytes(in.columns, false)),
                             params.stream, in, params.assignment_to_row, params.y, kernels.warps_per_row));
  return cudaGetLastError();
}

cudaError_t fused_moe_ffn_add_norm_backward(const FusedMoeFfnAddNormBackwardParams& params) {
  const AddNormInputs& in = params.inputs;
  if (in.columns == 0) return cudaSuccess;
  if (!is_valid(in)) return cudaErrorInvalidValue;
  const bool vectors = has_vectors(in) && has_vectors(params.dy) && is_aligned(params.dz) && is_aligned(params.dffn);
  const Kernels kernels = pick(in, vectors);
  const auto shared = static_cast<size_t>(fused_moe_ffn_add_norm_shared_bytes(in.columns, true));
  MBK_RETURN_IF_ERROR(launch(kernels.backward, norm_chunks(in.tokens, in.num_experts), kNormThreads, shared,
                             params.stream, params, kernels.warps_per_row));
  if (params.dnorm_weight != nullptr || params.dnorm_bias != nullptr) {
    const int64_t blocks_per_expert = ceil_div(in.columns, kReduceThreads);
    MBK_RETURN_IF_ERROR(launch(reduce_partials_kernel<kReduceThreads>, in.num_experts * blocks_per_expert,
                               kReduceThreads, 0, params.stream, params, static_cast<int>(blocks_per_expert)));
  }
  return cudaGetLastError();
}

}  // namespace mbk
