// The expert GEMM with a LayerNorm behind it, for Hopper, one launch:
// y[t] = weight[t] * LayerNorm_e(x[t] + a[r] @ w[e].T + bias[e]), r being the row of token t and e its expert.
#pragma once

#include "expert_gemm.h"

namespace mbk {

struct ExpertGemmNorm {
  const void* x;         // (T, N) by token, or with `x_by_row` by row; columns adjacent
  int64_t x_row_stride;  // in elements
  const void* weight;    // (E, N) contiguous
  const void* bias;      // (E, N) contiguous
  float eps;
  bool x_by_row;
};

// The widest rows that a cluster holds.
inline constexpr int64_t kExpertGemmNormMaxColumns = 1024;

// Dynamic shared memory of the kernels with 128 or 192 columns of a tile.
int expert_gemm_norm_shared_bytes(int block_n);

// `gemm` is as for expert_gemm, with one expert per token, rows in order, nothing saved and no activation; columns are
// multiples of 32. Every element of y is written, by token: x for rows without an expert. Everything has gemm.dtype.
// Tile (128 or 192 columns) and cluster (1, 2, 4, 8; 8 only with 128) are chosen by columns, or given in `gemm`.
// cudaErrorNotSupported where the device is not sm_90 or has no room for a cluster.
cudaError_t expert_gemm_norm(const ExpertGemmParams& gemm, const ExpertGemmNorm& norm);

}  // namespace mbk
