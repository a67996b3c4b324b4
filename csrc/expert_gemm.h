// Expert (grouped) GEMM for Hopper: y[to(r)] = act(a[from(r)] @ w[e].T + bias[e]) * weight[r], one launch.
#pragma once

#include "common.h"

namespace mbk {

struct ExpertGemmParams {
  const void* a;         // (rows, K) in row order, or with `gather` (T, K); columns adjacent
  int64_t a_row_stride;  // in elements, as all strides
  const void* w;         // (E, N, K), K adjacent
  int64_t w_expert_stride, w_row_stride;
  void* y;                  // (rows, N) contiguous; row r is written to r, or with `scatter` to row_to_assignment[r]
  void* pre;                // as y: what the activation is taken of; or null
  const void* bias;         // (E, N) contiguous, or null
  const void* weights;      // (rows,) by assignment, or null
  const int* offsets;       // (E + 1,)
  const int* row_to_assignment;  // (rows,) assignment of each row; its token is that / top_k

  int64_t rows;                         // T * top_k
  int64_t num_experts, columns, depth;  // E, N, K
  int top_k;

  DType dtype;            // of a, w, y, pre, bias and weights: kFloat16 or kBFloat16; sums are float32
  Activation activation;  // neither a gated one nor kRelu2
  bool gather, scatter;
  bool after_previous;    // may be launched while the kernel before it on the stream, an expert GEMM, still runs
  int block_n, cluster;   // the tile's columns (128, 192, 256) and the CTAs that share weights (1, 2); 0: chosen by sizes
  cudaStream_t stream;
};

// Dynamic shared memory of the kernels with 128, 192 or 256 columns of a tile.
int expert_gemm_shared_bytes(int block_n);

// Every element of y and of pre is written: zeros for rows without an expert. N, K and the strides are multiples of 8,
// pointers of 16 bytes. cudaErrorNotSupported where the device is not sm_90.
cudaError_t expert_gemm(const ExpertGemmParams& params);

}  // namespace mbk
