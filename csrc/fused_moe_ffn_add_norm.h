// The pass after the expert's second GEMM: un-permute, dropout, residual and per-expert LayerNorm (and probability).
//
//     z = x + dropout(ffn)      n = (z - mean) / sqrt(var + eps)      y = p * (n * weight[e] + bias[e])
//
// Everything is computed in float32.
#pragma once

#include "common.h"

namespace mbk {

constexpr int kMaxNormColumns = 4096;
constexpr int kNormChunk = 64;  // rows of an expert whose share of the norm's gradients one block sums up

// Strides in elements.
struct Matrix {
  const void* data;
  int64_t stride_row;
  int64_t stride_column;
};

struct AddNormInputs {
  Matrix x;                // (T, H), of x_type; so are the norm's parameters, the weights and, in backward, dy
  const void* ffn;         // (T, H) in row order, contiguous, of ffn_type
  Matrix norm_weight;      // (E, H)
  Matrix norm_bias;        // (E, H)
  const void* weights;     // (T,) or null: 1
  const int64_t* seed;     // () or null: no dropout
  const int32_t* offsets;  // (E + 1,)
  int64_t tokens;
  int columns;  // at most kMaxNormColumns
  int num_experts;
  float eps;
  unsigned threshold;  // of 65536 random values those below it mean "drop"
  float scale;         // of those that are kept
  DType x_type;
  DType ffn_type;
};

struct FusedMoeFfnAddNormParams {
  AddNormInputs inputs;
  const int32_t* assignment_to_row;  // (T,)
  void* y;                      // (T, H) contiguous, of x_type; x where a token has no expert
  cudaStream_t stream;
};

struct FusedMoeFfnAddNormBackwardParams {
  AddNormInputs inputs;
  Matrix dy;                    // (T, H)
  const int32_t* row_to_assignment;  // (T,)
  void* dz;                     // (T, H) in row order, contiguous, of x_type
  void* dffn;                   // the same after dropout, of ffn_type; null: not wanted
  float* weight_partials;       // (norm_chunks, H)
  float* bias_partials;         // (norm_chunks, H)
  void* dnorm_weight;           // (E, H) contiguous, of x_type; null: not wanted
  void* dnorm_bias;             // likewise
  void* dweights;               // (T,) of x_type; null: not wanted
  cudaStream_t stream;
};

// The most chunks that E experts can have together; an expert without rows has one, for its zeros.
inline int64_t norm_chunks(int64_t tokens, int num_experts) { return tokens / kNormChunk + num_experts; }

// Dynamic shared memory of a launch for rows of `columns`.
int fused_moe_ffn_add_norm_shared_bytes(int columns, bool backward);

// Traffic of a token: a row of x, one of ffn, one of y.
cudaError_t fused_moe_ffn_add_norm(const FusedMoeFfnAddNormParams& params);

// Traffic of a row: x, ffn, dy, dz and dffn. Rows without an expert are not written in dz, dffn and dweights.
cudaError_t fused_moe_ffn_add_norm_backward(const FusedMoeFfnAddNormBackwardParams& params);

}  // namespace mbk
